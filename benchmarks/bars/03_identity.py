"""Greedy answers of requests that come, go and share steps, against the same requests' answers alone.

Each scene is a plan drawn from the seed: prompts of random tokens (from a few to more than 512), after
how many told tokens of all streams a request joins, and after how many of its own it is cancelled. (Who
meets whom in a step also depends on the machine's pace.) Compared are every token and every log
probability, of finished answers whole and of cancelled ones as far as they came.

The scenes: the worker process at one thread; the engine in this process at one thread, steps of several
tokens padded at random; the worker at two threads and with automatic ones (whose tuner pads), in a cache
that stays below the 512 cells from which llama.cpp splits it between threads. About four minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.alternate import table
from benchmarks.model_files import own_cache_folder, starter, starter_q4_0
from benchmarks.verdict import Bar, run_bar
from edgeinfer.backend import RuntimeSettings
from edgeinfer.client import Client, Ended, Event, LocalClient, OpenOptions, Request, Started, Text
from edgeinfer.engine.engine import Engine
from edgeinfer.engine.request import TokenLogprob
from edgeinfer.engine.tuner import Choice, Tuner
from edgeinfer.errors import MeasureFailed, error_from_wire
from edgeinfer.machine.step_cost import StepCosts
from edgeinfer.measure.streams import GREEDY, Prompts
from edgeinfer.registry import get_backend
from edgeinfer_models.model_files import ModelFiles

LEAST_COMPARED = 200
AT_ONCE = 4
LONG_CONTEXT = 1024
# llama.cpp looks at the cache in pieces of 256 cells: 257 in use are the 512 from which threads split it
# in a step of one row (llama_kv_cache::get_n_kv, use_split_kv_path in ggml-cpu/ops.cpp, 0.3.36).
MOST_CELLS = 256
TILE = 64  # a prompt of so many tokens begins at a multiple of it: up to 63 cells before it are dead
MOST_PADDING = 6
SIZES = ((5, 63), (64, 127), (128, 300), (513, 700))  # tokens of prompts
SIZE_WEIGHTS = (5, 4, 2, 1)
ANSWER = (4, 40)  # tokens
LEAVING = 0.25  # of all requests


@dataclass(frozen=True)
class Part:
    """One request's part in a scene."""

    request: Request
    joins_after: int  # tokens told of all streams since the request before it came
    leaves_after: int | None  # tokens of its own


@dataclass
class Played:
    """What came of it."""

    tokens: list[TokenLogprob] = field(default_factory=list)
    outcome: str = ""
    joined_late: bool = False  # while another one was answering
    left_others: bool = False  # it was cancelled while another one was answering

    @property
    def is_answering(self) -> bool:
        return bool(self.tokens) and not self.outcome


class Plays:
    """Draws what requests there are, and when they come and go."""

    def __init__(self, draw: random.Random, vocab_size: int) -> None:
        self._draw = draw
        self._prompts = Prompts(vocab_size, draw.randrange(2**31))

    def parts(self, count: int) -> list[Part]:
        """Of all sizes; the first one is long."""
        drawn = self._draw.choices(SIZES, SIZE_WEIGHTS, k=count - 1)
        return [self._part(size) for size in (SIZES[-1], *drawn)]

    def waves(self, count: int, cells: int) -> list[list[Part]]:
        """Of short prompts, so many that all of a wave never have more than `cells` cells together, dead
        ones included: a cell that becomes free is not used again while anybody runs."""
        waves: list[list[Part]] = [[]]
        left = cells
        for size in self._draw.choices(SIZES[:2], SIZE_WEIGHTS[:2], k=count):
            part = self._part(size, most_wait=3)
            prompt, answer = part.request.tokens or (), part.request.max_tokens or 0
            needed = len(prompt) + answer + (TILE - 1 if len(prompt) >= TILE else 0)
            if needed > left:
                waves.append([])
                left = cells
            waves[-1].append(part)
            left -= needed
        return waves

    def _part(self, size: tuple[int, int], most_wait: int = 15) -> Part:
        answer = self._draw.randint(*ANSWER)
        request = Request(
            tokens=self._prompts.draw(self._draw.randint(*size)),
            max_tokens=answer,
            sampling=GREEDY,
            ignore_eos=True,
            logprobs=0,
        )
        leaves = self._draw.randint(1, answer - 1) if self._draw.random() < LEAVING else None
        return Part(request, self._draw.randint(0, most_wait), leaves)


class Scene:
    """Takes what is told, and knows who comes and who goes next."""

    def __init__(self, parts: Sequence[Part], at_once: int) -> None:
        self.parts = parts
        self.played = [Played() for _ in parts]
        self._at_once = at_once
        self._next = 0
        self._told = 0  # since the last one joined

    def hear(self, number: int, event: Event) -> None:
        mine = self.played[number]
        others = [other for other in self.played if other is not mine]
        if isinstance(event, Started):
            mine.joined_late = any(other.is_answering for other in others)
        elif isinstance(event, Text):
            self._told += len(event.logprobs)
            mine.tokens += event.logprobs
        elif isinstance(event, Ended):
            if event.outcome == "failed":
                raise error_from_wire(event.error_type, event.error)
            mine.outcome = event.outcome
            if event.outcome == "cancelled":
                mine.left_others = any(other.is_answering for other in others)

    def who_joins(self) -> int | None:
        """The next one's number, if it is its turn."""
        if self._next == len(self.parts):
            return None
        running = sum(not played.outcome for played in self.played[: self._next])
        if running >= self._at_once:
            return None
        if running and self._told < self.parts[self._next].joins_after:
            return None
        self._next, self._told = self._next + 1, 0
        return self._next - 1

    def leaves(self, number: int) -> bool:
        after, mine = self.parts[number].leaves_after, self.played[number]
        return after is not None and len(mine.tokens) >= after and not mine.outcome

    @property
    def is_over(self) -> bool:
        return all(played.outcome for played in self.played)


def play_in_worker(client: Client, scene: Scene) -> None:
    """Raises the error of a request that failed."""
    changed = threading.Condition()
    errors: list[Exception] = []
    generations = {}

    def told(number: int) -> Callable[[Event], None]:
        def on_event(event: Event) -> None:
            with changed:
                try:
                    scene.hear(number, event)
                except Exception as error:  # of the request: for the one who waits, not for this thread
                    errors.append(error)
                changed.notify()

        return on_event

    with changed:
        while not scene.is_over and not errors:
            number = scene.who_joins()
            if number is not None:
                generations[number] = client.start(scene.parts[number].request, told(number))
                continue
            for leaving in [n for n in generations if scene.leaves(n)]:
                generations.pop(leaving).cancel()
            changed.wait(1.0)
    if errors:
        raise errors[0]


def play_in_engine(engine: Engine, scene: Scene) -> None:
    while not scene.is_over:
        number = scene.who_joins()
        if number is not None:
            request = scene.parts[number].request
            assert request.tokens is not None
            _hear_all(scene, engine.submit(number, request, request.tokens))
            continue
        for playing in range(len(scene.parts)):
            if scene.leaves(playing):
                _hear_all(scene, engine.cancel(playing))
        _hear_all(scene, engine.step())
    engine.check_integrity()


def _hear_all(scene: Scene, events: Sequence[tuple[int, Event]]) -> None:
    for key, event in events:
        scene.hear(key, event)


def play_alone(client: Client, parts: Sequence[Part]) -> list[Played]:
    """Each request to its end, with nobody beside it."""
    found = []
    for part in parts:
        scene = Scene([Part(part.request, 0, None)], at_once=1)
        play_in_worker(client, scene)
        found += scene.played
    return found


class RandomPadding(Tuner):
    """Pads every step of several tokens at random; one thread."""

    def __init__(self, seed: int) -> None:
        super().__init__(StepCosts(), (1,), (1, 1), lambda: None)
        self._draw = random.Random(seed)
        self.num_padded = 0

    def choose(self, tokens: int, rows: int, context: int, most: int) -> Choice:
        padding = self._draw.randint(0, min(MOST_PADDING, most - tokens)) if 1 < tokens < most else 0
        self.num_padded += padding > 0
        return Choice(1, padding)


@dataclass
class Tally:
    """Of one scene or of all."""

    compared: int = 0
    tokens: int = 0
    different: int = 0  # answers with another token
    inexact: int = 0  # answers with another log probability
    late_joins: int = 0
    leaves: int = 0
    padded: int = 0

    def add(self, other: Tally) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def compare(together: Sequence[Played], alone: Sequence[Played], parts: Sequence[Part]) -> Tally:
    tally = Tally()
    for mine, reference, part in zip(together, alone, parts, strict=True):
        if len(reference.tokens) != part.request.max_tokens or reference.outcome != "finished":
            raise MeasureFailed("an answer alone did not come to its end")
        if mine.outcome == "finished" and len(mine.tokens) != len(reference.tokens):
            raise MeasureFailed(f"an answer of {len(mine.tokens)} tokens, {len(reference.tokens)} alone")
        expected = reference.tokens[: len(mine.tokens)]
        if not mine.tokens:
            continue  # cancelled before anything was told
        tally.compared += 1
        tally.tokens += len(mine.tokens)
        words = [(one.token, one.bytes) for one in mine.tokens]
        tally.different += words != [(one.token, one.bytes) for one in expected]
        tally.inexact += [t.logprob for t in mine.tokens] != [t.logprob for t in expected]
        tally.late_joins += mine.joined_late
        tally.leaves += mine.left_others
    return tally


def padded_steps(folder: Path) -> int:
    """Steps that a tuner padded, by what it stored of their costs. With prompts of five tokens and more
    nothing else makes a step of up to three tokens more than rows."""
    (path,) = folder.glob("step-costs/*.json")
    rows = json.loads(path.read_text())["costs"]
    return sum(int(count) for _, tokens, wanted, _, _, count in rows if 0 < tokens - wanted < 4)


def _client(model: Path, sequences: int, context: int, threads: int | None) -> LocalClient:
    return LocalClient(
        OpenOptions(
            model=str(model),
            kv_type_k="f16",
            kv_type_v="f16",
            context=context,
            threads=threads,
            threads_batch=threads,
            sequences=sequences,
            cache_bytes=0,
            speculate="off",
        )
    )


class Play:
    """All scenes of one model."""

    def __init__(self, bar: Bar, model: Path, count: int) -> None:
        self._bar, self._model = bar, model
        self._draw = random.Random(f"{bar.options.seed} {model.name}")
        self._count = count
        self.rows: list[tuple[str, ...]] = []
        self.total = Tally()

    def all(self) -> None:
        self._at_one_thread(self._count)
        short = max(1, self._count // 2)
        self._in_short_cache(short, 2)
        self._in_short_cache(short, None)

    def _at_one_thread(self, count: int) -> None:
        """Both scenes have the same requests, so one run alone is enough; it has a core of its own."""
        with (
            _client(self._model, AT_ONCE, LONG_CONTEXT, 1) as many,
            _client(self._model, 1, LONG_CONTEXT, 1) as one,
            ThreadPoolExecutor(1) as beside,
        ):
            vocab_size = many.load().vocab_size
            one.load()
            parts = Plays(self._draw, vocab_size).parts(count)
            pending = beside.submit(play_alone, one, parts)
            scene = Scene(parts, AT_ONCE)
            play_in_worker(many, scene)
            padded, num_padded = self._padded_scene(parts)
            alone = pending.result()
        self._tell("worker, 1 thread", compare(scene.played, alone, parts))
        tally = compare(padded, alone, parts)
        tally.padded = num_padded
        self._tell("engine, 1 thread, random padding", tally)

    def _padded_scene(self, parts: Sequence[Part]) -> tuple[list[Played], int]:
        settings = RuntimeSettings(context=LONG_CONTEXT, sequences=AT_ONCE, threads=1, threads_batch=1)
        files = ModelFiles(self._model.name, (self._model,), "gguf")
        runtime = get_backend("llamacpp").load(files, settings, lambda _: True)
        tuner = RandomPadding(self._draw.randrange(2**31))
        scene = Scene(parts, AT_ONCE)
        with contextlib.closing(
            Engine(runtime, model=files.name, max_running=AT_ONCE, tuner=tuner)
        ) as engine:
            play_in_engine(engine, scene)
        return scene.played, tuner.num_padded

    def _in_short_cache(self, count: int, threads: int | None) -> None:
        cells: int = self._bar.options.cells
        played: list[Played] = []
        with own_cache_folder() as folder:
            with _client(self._model, AT_ONCE, cells, threads) as many:
                waves = Plays(self._draw, many.load().vocab_size).waves(count, cells)
                for wave in waves:  # the cache is empty again between two of them
                    scene = Scene(wave, AT_ONCE)
                    play_in_worker(many, scene)
                    played += scene.played
            num_padded = padded_steps(folder) if threads is None else 0
        parts = [part for wave in waves for part in wave]
        # Not beside it: two threads that share their cores with others take ten times as long.
        with own_cache_folder(), _client(self._model, 1, cells, threads) as one:
            one.load()
            alone = play_alone(one, parts)
        tally = compare(played, alone, parts)
        tally.padded = num_padded
        name = "automatic threads" if threads is None else f"{threads} threads"
        self._tell(f"worker, {name}, {cells} cells", tally)

    def _tell(self, scene: str, tally: Tally) -> None:
        self.total.add(tally)
        figures = (str(value) for value in vars(tally).values())
        self.rows.append((f"{self._model.name[:24]}: {scene}", *figures))
        print(f"  {scene}: {vars(tally)}", file=sys.stderr)


def measure(bar: Bar) -> None:
    o = bar.options
    total = Tally()
    rows: list[tuple[str, ...]] = [("scene", *(name.replace("_", " ") for name in vars(total)))]
    begin = time.perf_counter()
    for model, count in ((starter_q4_0(), o.requests), (o.starter or starter(), o.requests // 2)):
        play = Play(bar, model, count)
        play.all()
        total.add(play.total)
        rows += play.rows
    rows.append(("all", *(str(value) for value in vars(total).values())))
    bar.say(
        f"\nseed {o.seed}, {time.perf_counter() - begin:.0f} s; answers and tokens that were compared"
    )
    bar.say(table(rows))
    bar.details["scenes"] = rows
    same = total.compared - total.different
    bar.require(
        f"{same} of {total.compared} answers have the tokens they have alone (>= {LEAST_COMPARED})",
        same == total.compared >= LEAST_COMPARED,
    )
    for what, count in (
        ("requests joined while others answered", total.late_joins),
        ("left while others answered", total.leaves),
        ("steps were padded", total.padded),
    ):
        bar.require(f"{count} {what} (>= {o.requests // 2})", count >= o.requests // 2 > 0)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--requests", type=int, default=60, help="of the first model's first scene")
    parser.add_argument("--cells", type=int, default=MOST_CELLS, help="of the caches beside 2 threads")
    parser.add_argument("--starter", type=Path, help="a GGUF file instead of the starter")


if __name__ == "__main__":
    sys.exit(run_bar(__file__, "answers together against those alone", measure, add_options))
