"""A chat of 30 turns writes to disk what it grows by: bytes after each turn, and in all.

Counted are all bytes of all files as they were written, those included that a longer one has replaced
since. After a restart the 31st turn reads its new tokens only.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from benchmarks.alternate import table
from benchmarks.model_files import starter
from benchmarks.verdict import Bar, run_bar
from edgeinfer.client import LocalClient, Message, OpenOptions, Request, RunStats
from edgeinfer.measure.streams import GREEDY

TURNS = 30
SETTLED_S = 0.4  # without a new file
SLACK_TOKENS = 2  # see 02_second_turn.py
BLOCK = 256
QUESTION = "This is question {n} about the sea. " + "The tide goes out, and comes in again. " * 3


def measure(bar: Bar) -> None:
    with tempfile.TemporaryDirectory() as folder:
        options = OpenOptions(
            model=str(starter()),
            kv_type_k="f16",
            kv_type_v="f16",
            context=8192,
            cache_disk_bytes=2**33,
            cache_dir=folder,
        )
        messages: list[Message] = []
        seen: dict[str, int] = {}
        after: list[int] = []
        tokens: list[int] = []
        with LocalClient(options) as client:
            info = client.load()
            for turn in range(TURNS):
                stats = ask(client, messages, turn)
                settle(Path(folder), seen)
                after.append(sum(seen.values()))
                tokens.append(stats.usage.prompt_tokens + stats.usage.completion_tokens)
        settle(Path(folder), seen)
        written = sum(seen.values())
        with LocalClient(options) as client:
            client.load()
            last = ask(client, messages, TURNS)
    per_token = info.kv_bytes_per_token
    rows = [("turn", "tokens", "MB written", "MB for tokens")]
    for turn in range(0, TURNS, 5):
        numbers = (f"{after[turn] / 1e6:.1f}", f"{tokens[turn] * per_token / 1e6:.1f}")
        rows.append((str(turn + 1), f"{tokens[turn]:,}", *numbers))
    bar.say(table(rows))
    bar.details["written"] = after
    block = per_token * BLOCK
    worst = max(a / (t * per_token) for a, t in zip(after, tokens, strict=True))
    bar.require(f"never more than {worst:.3f} of what its tokens take <= 1.01", worst <= 1.01)
    most = max(b - a for a, b in zip([0, *after], after, strict=False))
    grown = max(b - a for a, b in zip([0, *tokens], tokens, strict=False))
    limit = (grown // BLOCK + 1) * block * 1.01
    bar.require(f"a turn writes at most {most / 1e6:.1f} MB <= {limit / 1e6:.1f} MB", most <= limit)
    total = tokens[-1] * per_token + block
    bar.require(f"in all {written / 1e6:.1f} MB <= {total * 1.01 / 1e6:.1f} MB", written <= total * 1.01)
    known = tokens[-1]
    read = last.usage.prompt_tokens - last.usage.cached_tokens
    new = last.usage.prompt_tokens - known
    bar.require(
        f"after a restart {read} tokens are read, {new} are new ({last.cache.tier})",
        read <= new + SLACK_TOKENS and last.cache.tier == "disk",
    )


def ask(client: LocalClient, messages: list[Message], turn: int) -> RunStats:
    messages.append(Message("user", QUESTION.format(n=turn)))
    request = Request(messages=tuple(messages), max_tokens=40, sampling=GREEDY)
    stats = client.start(request).result().stats
    messages.append(Message("assistant", stats.text))
    return stats


def settle(folder: Path, seen: dict[str, int]) -> None:
    """Wait until nothing is written any more, and count what was."""
    quiet = time.monotonic()
    while time.monotonic() - quiet < SETTLED_S:
        for path in folder.rglob("*.kv"):
            if path.name not in seen:
                seen[path.name] = path.stat().st_size
                quiet = time.monotonic()
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(run_bar(__file__, str(__doc__), measure))
