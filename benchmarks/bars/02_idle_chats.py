"""Seven idle 1,000-token chats do not slow the one that speaks."""

from __future__ import annotations

import argparse
import sys

from benchmarks.alternate import Side, alternate
from benchmarks.conversation import GREEDY, long_chat
from benchmarks.verdict import Bar, run_bar
from edgeinfer.client import Client, LocalClient, OpenOptions, Request

IDLE_CHATS, IDLE_TOKENS = 7, 1000
ACTIVE_TOKENS, DECODE = 256, 128
LEAST_RATIO = 0.95


def measure(bar: Bar) -> None:
    from benchmarks.model_files import starter_q4_0

    model = bar.options.model or str(starter_q4_0())
    options = OpenOptions(
        model=model,
        kv_type_k="f16",
        kv_type_v="f16",
        context=2048,
        sequences=bar.options.sequences,
        threads=bar.options.threads,
    )

    def side(name: str, client: Client) -> Side:
        chat = long_chat(client, ACTIVE_TOKENS, 99, "Go on with this story.")
        ask = Request(messages=chat, ignore_eos=True, max_tokens=DECODE + 1, sampling=GREEDY)
        client.start(ask).result()

        def turn() -> dict[str, float]:
            return {"decode, tok/s": client.start(ask).result().stats.timings.decode_tok_s}

        return Side(name, turn)

    with LocalClient(options) as busy, LocalClient(options) as alone:
        busy.load()
        alone.load()
        idle = []
        for number in range(IDLE_CHATS):
            chat = long_chat(busy, IDLE_TOKENS, number, "What is this about?")
            idle.append(Request(messages=chat, max_tokens=1, sampling=GREEDY))
            busy.start(idle[-1]).result()
        comparisons = alternate(
            side("7 idle chats", busy), side("no idle chat", alone), bar.options.rounds
        )
        kept = [busy.start(request).result().stats.usage.cached_tokens for request in idle]
    title = f"{bar.options.sequences} sequences, median of {bar.options.rounds} alternations"
    bar.show(title, comparisons, LEAST_RATIO)
    bar.say(f"  tokens of the idle chats still cached afterwards: {kept}")
    bar.details["still_cached"] = kept
    ratio = comparisons[0].ratio.median
    bar.require(
        f"decode beside idle chats: {ratio:.3f} of decode alone >= {LEAST_RATIO}", ratio >= LEAST_RATIO
    )
    # Forgetting the idle chats would be quick, and no way to meet the bar.
    bar.require("every idle chat is still cached", min(kept) >= IDLE_TOKENS * 9 // 10)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=40, help="turns of about a second")
    parser.add_argument("--sequences", type=int, default=1, help="requests that could run at once")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", help="a GGUF file instead of the starter's Q4_0")


if __name__ == "__main__":
    sys.exit(run_bar(__file__, "cost of seven idle 1,000-token chats", measure, add_options))
