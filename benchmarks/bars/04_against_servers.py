"""The endpoint against llama-server and llama_cpp.server: same file, threads, KV type, slots, context.

Both sides are asked the same texts over the same client code (/v1/completions, streamed, greedy, a fixed
number of tokens), and stay up between their turns. Prompts are new each time, and both cache prompts.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.alternate import Comparison, Side, alternate
from benchmarks.endpoint import EndpointProcess
from benchmarks.llama_cpp_server import llama_cpp_server
from benchmarks.llama_server import LlamaServer
from benchmarks.model_files import starter_q4_0
from benchmarks.openai_stream import Pieces, read_all, read_completion
from benchmarks.verdict import Bar, run_bar

CLIENTS = 8
CONTEXT = 4096
MIN_ROUNDS = 10
SINGLE_TOKENS, SHARED_TOKENS = 128, 64
# A lone client's alternations, for each of the others': one first token scatters by 20 ms here.
SINGLE_ROUNDS = 4
# Before a question, so that what a server does after its answer (keeping the conversation, for one)
# falls neither into the other's turn nor into its own next one.
PAUSE_S = 0.3
SHORT_STREAMS, SHORT_TOKENS, LONG_TOKENS = 7, 600, 8
SETTLED = 5  # pieces that each short stream has had before the long prompt comes

LEAST_SINGLE, MOST_TTFT_MORE_S = 1.0, 0.005
LEAST_SHARED, LEAST_SHARED_PYTHON = 1.0, 2.2
MOST_GAP, MOST_LONG_TTFT = 0.6, 1.3

# The end of turn and the end of text of SmolLM2's vocabulary: every answer has the tokens asked for.
NO_END = {"logit_bias": {"2": -100, "0": -100}}

_WORDS = [
    "river",
    "stone",
    "winter",
    "copper",
    "garden",
    "letter",
    "bridge",
    "candle",
    "harbour",
    "valley",
    "mirror",
    "wagon",
    "forest",
    "music",
    "paper",
    "silver",
    "window",
    "morning",
    "island",
    "engine",
    "orchard",
    "shadow",
    "barrel",
    "lantern",
    "meadow",
    "anchor",
    "violin",
    "basket",
]


class Texts:
    """Texts that no cache can know."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def draw(self, words: int) -> str:
        return " ".join(self._random.choices(_WORDS, k=words))


def single(url: str, texts: Texts) -> dict[str, float]:
    time.sleep(PAUSE_S)
    answer = read_completion(url, texts.draw(60), SINGLE_TOKENS, body=NO_END)
    return {"one stream, tok/s": answer.decode_tok_s, "time to first token, s": answer.ttft_s}


def shared(url: str, texts: Texts) -> dict[str, float]:
    """All tokens over the time from the first question to the last answer's end."""
    tasks = [
        partial(read_completion, url, texts.draw(40), SHARED_TOKENS, body=NO_END) for _ in range(CLIENTS)
    ]
    time.sleep(PAUSE_S)
    answers = read_all(tasks)
    span = max(answer.end for answer in answers) - min(answer.asked for answer in answers)
    return {f"{CLIENTS} clients, tok/s": CLIENTS * SHARED_TOKENS / span}


def beside_a_long_prompt(url: str, texts: Texts, long_words: int) -> dict[str, float]:
    """p95 of the waits between two pieces of the short streams while a long prompt is read."""
    settled = threading.Semaphore(0)

    def on_piece(_: float, pieces: int) -> None:
        if pieces == SETTLED:
            settled.release()

    def long() -> Pieces:
        for _ in range(SHORT_STREAMS):
            settled.acquire()
        return read_completion(url, texts.draw(long_words), LONG_TOKENS, body=NO_END)

    short = [
        partial(read_completion, url, texts.draw(20), SHORT_TOKENS, body=NO_END, on_piece=on_piece)
        for _ in range(SHORT_STREAMS)
    ]
    time.sleep(PAUSE_S)
    *streams, late = read_all([*short, long])
    gaps = [gap for one in streams for gap in one.gaps(late.asked, late.times[0])]
    p95 = statistics.quantiles(gaps, n=20, method="inclusive")[-1]
    return {"p95 wait beside it, s": p95, "its first token, s": late.ttft_s}


@contextlib.contextmanager
def ours(model: Path, threads: int, slots: int) -> Iterator[str]:
    arguments = [str(model), "--threads", str(threads), "--parallel", str(slots), "--ctx", str(CONTEXT)]
    arguments += ["--kv-type", "f16"]  # as the others have it
    with EndpointProcess(arguments) as endpoint:
        yield endpoint.url


def compare(
    bar: Bar, title: str, ours_turn: Side, peer_turn: Side, times: int = 1
) -> tuple[Comparison, ...]:
    comparisons = alternate(
        ours_turn,
        peer_turn,
        bar.options.rounds * times,
        lambda number, a, b: print(f"  round {number}: {dict(a)} | {dict(b)}", file=sys.stderr),
    )
    bar.show(title, comparisons)
    return tuple(comparisons)


def against_llama_server(bar: Bar, model: Path, threads: int) -> None:
    enough = bar.options.rounds >= MIN_ROUNDS
    for slots in (1, CLIENTS):
        with (
            ours(model, threads, slots) as url,
            LlamaServer(
                model, threads=threads, slots=slots, context=CONTEXT, cache_prompts=True
            ) as peer,
        ):
            if slots == 1:
                turns = [partial(single, each, Texts(1)) for each in (url, peer.url)]
                speed, ttft = compare(
                    bar,
                    "one client",
                    Side("edgeinfer", turns[0]),
                    Side("llama-server", turns[1]),
                    SINGLE_ROUNDS,
                )
                ratio = speed.ratio.median
                bar.require(
                    f"one stream: {ratio:.3f} of llama-server's tok/s >= {LEAST_SINGLE}",
                    ratio >= LEAST_SINGLE and enough,
                )
                more = statistics.median(a - b for a, b in zip(ttft.a, ttft.b, strict=True))
                bar.require(
                    f"first token {1e3 * more:+.1f} ms from llama-server's"
                    f" <= {1e3 * MOST_TTFT_MORE_S:+.0f} ms",
                    more <= MOST_TTFT_MORE_S and enough,
                )
                continue
            turns = [partial(shared, each, Texts(2)) for each in (url, peer.url)]
            (total,) = compare(
                bar, f"{CLIENTS} clients", Side("edgeinfer", turns[0]), Side("llama-server", turns[1])
            )
            ratio = total.ratio.median
            bar.require(
                f"{CLIENTS} clients: {ratio:.3f} of llama-server's tok/s >= {LEAST_SHARED}",
                ratio >= LEAST_SHARED and enough,
            )
            words = long_words(url)
            turns = [partial(beside_a_long_prompt, each, Texts(3), words) for each in (url, peer.url)]
            wait, late = compare(
                bar,
                f"{SHORT_STREAMS} short streams beside a prompt of 3,000 tokens",
                Side("edgeinfer", turns[0]),
                Side("llama-server", turns[1]),
            )
            ratio = wait.ratio.median
            bar.require(
                f"p95 wait beside the prompt: {ratio:.3f} of llama-server's <= {MOST_GAP}",
                ratio <= MOST_GAP and enough,
            )
            ratio = late.ratio.median
            bar.require(
                f"the prompt's first token: {ratio:.3f} of llama-server's <= {MOST_LONG_TTFT}",
                ratio <= MOST_LONG_TTFT and enough,
            )


def long_words(url: str) -> int:
    """Words whose text has about 3,000 tokens."""
    import json
    import urllib.request

    text = Texts(4).draw(500)
    asked = urllib.request.Request(
        f"{url}/v1/tokenize", json.dumps({"text": text}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked) as reply:
        count = json.load(reply)["count"]
    return round(3000 * 500 / count)


def against_llama_cpp_server(bar: Bar, model: Path, threads: int) -> None:
    with (
        ours(model, threads, CLIENTS) as url,
        llama_cpp_server(model, threads=threads, context=CONTEXT) as peer,
    ):
        turns = [partial(shared, each, Texts(5)) for each in (url, peer.url)]
        (total,) = compare(
            bar,
            f"{CLIENTS} clients, llama_cpp.server",
            Side("edgeinfer", turns[0]),
            Side("llama_cpp.server", turns[1]),
        )
    ratio = total.ratio.median
    bar.require(
        f"{CLIENTS} clients: {ratio:.3f} of llama_cpp.server's tok/s >= {LEAST_SHARED_PYTHON}",
        ratio >= LEAST_SHARED_PYTHON and bar.options.rounds >= MIN_ROUNDS,
    )


def measure(bar: Bar) -> None:
    options = bar.options
    if options.rounds < MIN_ROUNDS:
        bar.say(f"  {options.rounds} rounds are for a look only; the bar asks for {MIN_ROUNDS}")
    model = options.model or starter_q4_0()
    if "llama-server" in options.peers:
        against_llama_server(bar, model, options.threads)
    if "llama_cpp.server" in options.peers:
        against_llama_cpp_server(bar, model, options.threads)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=Path, help="a GGUF file instead of the starter's Q4_0")
    parser.add_argument("--peers", nargs="+", default=["llama-server", "llama_cpp.server"])


if __name__ == "__main__":
    sys.exit(run_bar(__file__, "the endpoint against other servers", measure, add_options))
