"""The second turn of a 1,500-token chat prefills only what is new."""

from __future__ import annotations

import argparse
import sys

from benchmarks.alternate import Spread, table
from benchmarks.conversation import GREEDY, long_chat
from benchmarks.verdict import Bar, run_bar
from edgeinfer.client import LocalClient, Message, OpenOptions, Request

CHAT_TOKENS = 1500
ANSWER_TOKENS = 48
MOST_TTFT_RATIO = 0.1
# The answer's last token was never run, and its text may be cut into tokens differently at its end.
SLACK_TOKENS = 2


def measure(bar: Bar) -> None:
    from benchmarks.model_files import starter

    model = bar.options.model or str(starter())
    head = "round", "prompt", "second prompt", "cached", "to prefill", "new", "TTFT 1", "TTFT 2", "ratio"
    rows: list[tuple[str, ...]] = [head]
    ratios, excess = [], []
    with LocalClient(OpenOptions(model=model, kv_type_k="f16", kv_type_v="f16", context=4096)) as client:
        client.load()
        for number in range(1, bar.options.rounds + 1):
            chat = long_chat(client, CHAT_TOKENS, number, "Tell me about the river.")
            ask = Request(messages=chat, max_tokens=ANSWER_TOKENS, sampling=GREEDY)
            first = client.start(ask).result().stats
            after = (*chat, Message("assistant", first.text), Message("user", "And what about the sea?"))
            again = Request(messages=after, max_tokens=ANSWER_TOKENS, sampling=GREEDY)
            second = client.start(again).result().stats
            known = first.usage.prompt_tokens + first.usage.completion_tokens
            new = second.usage.prompt_tokens - known
            to_prefill = second.usage.prompt_tokens - second.usage.cached_tokens
            ratio = second.timings.ttft_s / first.timings.ttft_s
            ratios.append(ratio)
            excess.append(to_prefill - new)
            row = (
                number,
                first.usage.prompt_tokens,
                second.usage.prompt_tokens,
                second.usage.cached_tokens,
            )
            times = (f"{first.timings.ttft_s:.3f}", f"{second.timings.ttft_s:.3f}", f"{ratio:.3f}")
            rows.append((*map(str, (*row, to_prefill, new)), *times))
    bar.say(table(rows))
    bar.details["rows"] = rows
    bar.require(
        f"prefilled beyond the new tokens: at most {max(excess)} <= {SLACK_TOKENS}",
        max(excess) <= SLACK_TOKENS,
    )
    median = Spread.of(ratios).median
    bar.require(
        f"TTFT of the second turn: {median:.3f} of the first's <= {MOST_TTFT_RATIO}",
        median <= MOST_TTFT_RATIO,
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", help="default: the starter")


if __name__ == "__main__":
    sys.exit(run_bar(__file__, "second turn of a 1,500-token chat", measure, add_options))
