"""Time to the first token of a 3,000-token prompt that is known, against the same prompt read cold.

Known in the KV cache (asked again), in host memory (another conversation came between), and on disk
(another process, loading not counted). Random tokens, a new prompt each round, one answer of 8 tokens;
all in the client's own stats, which begin when the request is made. The same is required with
temperature 0, where the last 64 tokens of what is restored are read again so that the answer is the same
each time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile

from benchmarks.alternate import Spread, table
from benchmarks.model_files import starter
from benchmarks.verdict import Bar, run_bar
from edgeinfer.client import LocalClient, OpenOptions, Request
from edgeinfer.measure.streams import GREEDY, Prompts
from edgeinfer.sampling import SamplingParams

TOKENS, OTHER = 3000, 200
MOST = {"live": 0.03, "memory": 0.06, "disk": 0.08}


def measure(bar: Bar) -> None:
    ratios: dict[str, list[float]] = {tier: [] for tier in MOST}
    greedy: dict[str, list[float]] = {tier: [] for tier in MOST}
    rows = [("round", "cold s", *(f"{tier} s" for tier in MOST), *(f"{t}, greedy s" for t in MOST))]
    with tempfile.TemporaryDirectory() as folder:
        options = OpenOptions(
            model=bar.options.model or str(starter()),
            kv_type_k="f16",
            kv_type_v="f16",
            context=4096,
            cache_bytes=2**30,
            cache_disk_bytes=2**32,
            cache_dir=folder,
        )
        prompts: Prompts | None = None
        for number in range(1, bar.options.rounds + 1):
            with LocalClient(options) as client:
                info = client.load()
                prompts = prompts or Prompts(info.vocab_size)
                prompt, other = prompts.draw(TOKENS), [prompts.draw(OTHER) for _ in range(2)]
                cold = ask(client, prompt, "none")
                seconds = {"live": ask(client, prompt, "live")}
                again = {"live": ask(client, prompt, "live", GREEDY)}
                ask(client, other[0], "none")
                seconds["memory"] = ask(client, prompt, "memory")
                ask(client, other[1], "none")
                again["memory"] = ask(client, prompt, "memory", GREEDY)
            for found, sampling in ((seconds, None), (again, GREEDY)):
                with LocalClient(options) as client:
                    client.load()
                    found["disk"] = ask(client, prompt, "disk", sampling)
            for tier in MOST:
                ratios[tier].append(seconds[tier] / cold)
                greedy[tier].append(again[tier] / cold)
            times = [cold, *(seconds[tier] for tier in MOST), *(again[tier] for tier in MOST)]
            rows.append((str(number), *(f"{value:.3f}" for value in times)))
    bar.say(table(rows))
    bar.details["ratios"] = {"sampled": ratios, "greedy": greedy}
    for name, measured in (("", ratios), (", greedy", greedy)):
        for tier, most in MOST.items():
            spread = Spread.of(measured[tier])
            bar.require(f"{tier}{name}: {spread.show(4)} of cold <= {most}", spread.median <= most)


def ask(
    client: LocalClient, prompt: tuple[int, ...], tier: str, sampling: SamplingParams | None = None
) -> float:
    """TTFT in seconds. Raises AssertionError if the prompt was not known from where it should be."""
    request = Request(
        tokens=prompt, max_tokens=8, ignore_eos=True, sampling=sampling or SamplingParams()
    )
    stats = client.start(request).result().stats
    assert stats.cache.tier == tier, f"known from {stats.cache.tier}, not {tier}: {stats.warnings}"
    return stats.timings.ttft_s


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", help="default: the starter")


if __name__ == "__main__":
    sys.exit(run_bar(__file__, str(__doc__), measure, add_options))
