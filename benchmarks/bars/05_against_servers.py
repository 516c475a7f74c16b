"""Prompt caches side by side: ours, llama-server's and that of llama-cpp-python's `examples/server`.

A prompt of some 3,000 tokens over HTTP with a new text each round: cold, asked again, asked again after
another conversation, after a restart of the server, and continued by a user's next words; with the bytes
that each leaves on disk. What each server has for it:

- edgeinfer serve: nothing is asked of its user (`--cache-disk` is on by itself);
- llama-server: its host cache, and for the restart a slot saved and restored by hand, whose restoring
  counts as waiting (it has no other way);
- examples/server: live sequences (memory for two conversations) and its cache of sequences on disk.

What is held to: cold, live and the next turn as fast as the best of them, and no more bytes. From host
memory and after a restart llama-server is faster, for it puts back one piece that it wrote whole, and
unchecked; ours are blocks, so that a turn writes only what is new, each checked byte by byte and all put
together: shown, and held to the share of the cold wait that 05_ttft asks for.

Then a conversation that outgrows its context: how long the next turn waits, and what the
answer says of it (llama-server with --context-shift).
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from benchmarks.alternate import Spread, table
from benchmarks.endpoint import EndpointProcess
from benchmarks.llama_cpp_server import example_server
from benchmarks.llama_server import LlamaServer
from benchmarks.model_files import starter
from benchmarks.openai_stream import read_completion
from benchmarks.peers import PeerError
from benchmarks.verdict import Bar, run_bar
from edgeinfer.measure.texts import measured_text

THREADS, CONTEXT = 2, 4096
CHARACTERS, OTHER, NEXT = 11_000, 800, 500  # 3,000 tokens, 220 and 140
AGAIN = 5  # times: an answer that is live is one step, which this machine's noise doubles now and then
# A conversation of turns of so many characters, 150 tokens; of 12 the last 5 are past the context.
SHORT_CONTEXT, TURN, TURNS, PAST = 1024, 600, 12, 5
SITUATIONS = ("cold", "live", "memory", "restart", "next turn")
# Of ours over the best other's: as good, as far as this machine can tell.
MOST_RATIO = 1.1
MOST_OF_COLD = {"memory": 0.06, "restart": 0.08}


ByHand = Callable[[str, Literal["save", "restore"]], None]


def nothing_by_hand(_url: str, _action: Literal["save", "restore"]) -> None:
    pass


class Served:
    """A server of one kind that can be ended and started again. `prepare`: what its user does by hand
    before it ends and after it started, if anything."""

    def __init__(
        self,
        name: str,
        folder: Path,
        start: Callable[[], AbstractContextManager[str]],
        by_hand: ByHand,
    ) -> None:
        self.name = name
        self._folder = folder
        self.start = start
        self._by_hand = by_hand
        self.seconds: dict[str, list[float]] = {what: [] for what in SITUATIONS}
        self.first_bytes: list[float] = []
        self.next_bytes: list[float] = []

    def turn(self, text: str, other: str, more: str) -> None:
        before = self._num_bytes()
        with self.start() as url:
            self.seconds["cold"].append(ttft(url, text))
            again = [ttft(url, text) for _ in range(AGAIN)]
            self.seconds["live"].append(Spread.of(again).median)
            ttft(url, other)
            self.seconds["memory"].append(ttft(url, text))
            self._by_hand(url, "save")
        between = self._num_bytes()
        self.first_bytes.append(between - before)
        with self.start() as url:
            begin = time.perf_counter()
            self._by_hand(url, "restore")
            by_hand = time.perf_counter() - begin
            self.seconds["restart"].append(by_hand + ttft(url, text))
            self.seconds["next turn"].append(ttft(url, text + more))
            self._by_hand(url, "save")
        self.next_bytes.append(self._num_bytes() - between)

    def _num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self._folder.rglob("*") if file.is_file())


def ttft(url: str, prompt: str) -> float:
    return read_completion(url, prompt, 8, body={"temperature": 0.7, "ignore_eos": True}).ttft_s


def servers(model: Path, folder: Path, context: int = CONTEXT) -> list[Served]:
    """Each with a folder of its own; context: of a conversation."""
    kinds: list[tuple[str, Callable[..., AbstractContextManager[str]], ByHand]] = [
        ("edgeinfer", edgeinfer, nothing_by_hand),
        ("llama-server", llama_server, SlotByHand()),
        ("examples/server", examples, nothing_by_hand),
    ]
    found = []
    for name, kind, by_hand in kinds:
        own = folder / name.replace("/", "-")
        own.mkdir()
        found.append(Served(name, own, partial(kind, model, own, context), by_hand))
    return found


@contextmanager
def edgeinfer(model: Path, folder: Path, context: int) -> Iterator[str]:
    options = ["--threads", str(THREADS), "--ctx", str(context), "--kv-type", "f16"]
    options += ["--cache-dir", str(folder), "--overflow", "stream"]
    with EndpointProcess([str(model), *options]) as endpoint:
        yield endpoint.url


@contextmanager
def llama_server(model: Path, folder: Path, context: int) -> Iterator[str]:
    more = ("--slot-save-path", str(folder), "--context-shift")
    with LlamaServer(
        model, threads=THREADS, slots=1, context=context, cache_prompts=True, more=more
    ) as server:
        yield server.url


@contextmanager
def examples(model: Path, folder: Path, context: int) -> Iterator[str]:
    with example_server(
        model, folder, threads=THREADS, context=2 * context, longest=context, sequences=4
    ) as server:
        yield server.url


class SlotByHand:
    """What llama-server's user does: saves the slot under a new name before the server ends, and has the
    last one read after it started."""

    def __init__(self) -> None:
        self._numbers = count()
        self._last = ""

    def __call__(self, url: str, action: Literal["save", "restore"]) -> None:
        if action == "save":
            self._last = f"slot-{next(self._numbers)}.bin"
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)
        try:
            body, kind = json.dumps({"filename": self._last}), {"Content-Type": "application/json"}
            connection.request("POST", f"/slots/0?action={action}", body, kind)
            response = connection.getresponse()
            if response.status != 200:
                raise PeerError(f"llama-server cannot {action} a slot: {response.read(300)!r}")
            response.read()
        finally:
            connection.close()


def overflown(served: Served, text: str) -> list[float] | str:
    """Seconds that each turn waits once a conversation is longer than the context; or what is said
    instead of an answer."""
    with served.start() as url:
        try:
            waits = [ttft(url, text[:end]) for end in range(TURN, (TURNS + 1) * TURN, TURN)]
            return waits[-PAST:]
        except PeerError as error:
            return str(error).partition(" answered ")[2][:90] or str(error)[:90]


def measure(bar: Bar) -> None:
    model = starter()
    source = measured_text(None)
    random.seed(5)
    with tempfile.TemporaryDirectory() as folder:
        sides = servers(model, Path(folder))
        for number in range(bar.options.rounds):
            start = random.randrange(len(source) - 3 * CHARACTERS)
            text = source[start : start + CHARACTERS]
            other = source[start + CHARACTERS :][:OTHER]
            more = source[start + 2 * CHARACTERS :][:NEXT]
            for side in sides if number % 2 == 0 else reversed(sides):
                side.turn(text, other, more)
    rows: list[Sequence[str]] = [("median seconds to the first token", *(side.name for side in sides))]
    for what in SITUATIONS:
        rows.append((what, *(Spread.of(side.seconds[what]).show() for side in sides)))
    for what, sizes in (
        ("MiB on disk after it", [side.first_bytes for side in sides]),
        ("MiB more after the next turn", [side.next_bytes for side in sides]),
    ):
        rows.append((what, *(f"{Spread.of(found).median / 2**20:.1f}" for found in sizes)))
    bar.say(f"\n{bar.options.rounds} rounds, {THREADS} threads, SmolLM2, f16\n{table(rows)}\n")
    bar.say(f"the last {PAST} turns of a conversation of {TURNS} that outgrows {SHORT_CONTEXT} tokens:")
    with tempfile.TemporaryDirectory() as folder:
        for side in servers(model, Path(folder), SHORT_CONTEXT):
            found = overflown(side, source)
            bar.details[f"overflow, {side.name}"] = found
            said = found if isinstance(found, str) else f"{Spread.of(found).show()} s to the first token"
            bar.say(f"  {side.name}: {said}")
    bar.say("")
    ours, others = sides[0], sides[1:]
    for side in sides:
        bar.details[side.name] = {
            "seconds": side.seconds,
            "first_bytes": side.first_bytes,
            "next_bytes": side.next_bytes,
        }
    for what in SITUATIONS:
        best = min(others, key=lambda side: Spread.of(side.seconds[what]).median)
        spread = Spread.of([a / b for a, b in zip(ours.seconds[what], best.seconds[what], strict=True)])
        said = f"{what}: {spread.show()} of {best.name}'s wait"
        if what in MOST_OF_COLD:  # blocks that are checked and put together; see the module's words
            bar.say(f"       {said}")
            known = zip(ours.seconds[what], ours.seconds["cold"], strict=True)
            share, most = Spread.of([a / b for a, b in known]).median, MOST_OF_COLD[what]
            bar.require(f"{what}: {share:.4f} of our cold wait <= {most}", share <= most)
        else:
            bar.require(f"{said} <= {MOST_RATIO}", spread.median <= MOST_RATIO)
    # Of the others only examples/server keeps both conversations by itself, as we do.
    for what, peers, sizes in (
        ("first", sides[2:], "first_bytes"),
        ("next", others, "next_bytes"),
    ):
        found = {side.name: Spread.of(getattr(side, sizes)).median for side in (ours, *peers)}
        name = min((side.name for side in peers), key=lambda name: found[name])
        share = found[ours.name] / max(1.0, found[name])
        bar.require(
            f"bytes of the {what} turn: {share:.3f} of {name}'s <= {MOST_RATIO}", share <= MOST_RATIO
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5)


if __name__ == "__main__":
    sys.exit(run_bar(__file__, str(__doc__).partition("\n")[0], measure, add_options))
