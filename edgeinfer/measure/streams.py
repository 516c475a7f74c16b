"""Several answers at once, and how fast their tokens came.

The definitions hold for any server: a stream is what its reader saw, with the time at which it saw it.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

from edgeinfer.client import Client, Ended, Event, Generation, Request, RunStats, Text
from edgeinfer.errors import MeasureFailed, error_from_wire
from edgeinfer.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True)
class Stream:
    """One answer as it arrived.

    asked: when it was asked for, in seconds of a clock that all streams share. points: (seconds, tokens
    so far), both rising, beginning with the first token.
    """

    asked: float
    points: tuple[tuple[float, int], ...]

    @property
    def first(self) -> float:
        return self.points[0][0]

    @property
    def last(self) -> float:
        return self.points[-1][0]

    @property
    def ttft_s(self) -> float:
        return self.first - self.asked

    def tokens_until(self, moment: float) -> float:
        """Tokens seen by then, evenly spread between two points: text is told in bursts, which must not
        count for or against the moment at which one looks."""
        before = self.points[0]
        for point in self.points:
            if point[0] > moment:
                share = (moment - before[0]) / (point[0] - before[0]) if moment > before[0] else 0.0
                return before[1] + share * (point[1] - before[1])
            before = point
        return before[1]


def total_tok_s(streams: Sequence[Stream]) -> float:
    """Tokens a second of all streams together while all of them decode: from the moment the last one has
    its first token until the first one ends. Of one stream: tokens after the first over their time.

    Raises MeasureFailed if there is no such span.
    """
    start = max(stream.first for stream in streams)
    end = min(stream.last for stream in streams)
    if end <= start:
        raise MeasureFailed(
            f"the {len(streams)} streams were never all answering at once; ask for more new tokens"
        )
    return sum(s.tokens_until(end) - s.tokens_until(start) for s in streams) / (end - start)


class Prompts:
    """Random tokens of the whole vocabulary, as llama-bench has them; no two prompts begin with the same
    token (as long as the vocabulary lasts), so that no prefix cache can know them."""

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        self._random = random.Random(seed)  # noqa: S311 (nothing secret)
        self._vocab_size = vocab_size
        self._number = count(self._random.randrange(vocab_size))

    def draw(self, num_tokens: int) -> tuple[int, ...]:
        rest = (self._random.randrange(self._vocab_size) for _ in range(num_tokens - 1))
        return (next(self._number) % self._vocab_size, *rest)


@dataclass(frozen=True)
class Answer:
    stream: Stream
    stats: RunStats


class _Reader:
    """Notes the time of what a client tells, from the client's own thread."""

    def __init__(self) -> None:
        self.asked = time.perf_counter()
        self.points: list[tuple[float, int]] = []
        self.ended: Ended | None = None
        self.over = threading.Event()

    def on_event(self, event: Event) -> None:
        now = time.perf_counter()
        if isinstance(event, Text):
            self._note(now, event.num_tokens)
        elif isinstance(event, Ended):
            self._note(now, event.stats.usage.completion_tokens)
            self.ended = event
            self.over.set()

    def _note(self, now: float, num_tokens: int) -> None:
        if num_tokens > (self.points[-1][1] if self.points else 0):
            self.points.append((now, num_tokens))


def answer_all(
    client: Client,
    prompts: Sequence[tuple[int, ...]],
    new_tokens: int,
    on_started: Callable[[Sequence[Generation]], None] = lambda _: None,
) -> list[Answer] | None:
    """Answer all prompts at once, each with exactly `new_tokens` tokens; None if any was cancelled.

    on_started: is given what runs, to cancel it. Raises the error of a request that failed, and
    MeasureFailed if an answer is not what was asked for or a prompt was partly known.
    """
    readers, generations = [], []
    for prompt in prompts:
        request = Request(tokens=prompt, max_tokens=new_tokens, ignore_eos=True, sampling=GREEDY)
        readers.append(_Reader())
        generations.append(client.start(request, readers[-1].on_event))
    on_started(generations)
    for reader in readers:
        reader.over.wait()
    ends = [reader.ended for reader in readers if reader.ended is not None]
    for ended in ends:
        if ended.outcome == "failed":
            raise error_from_wire(ended.error_type, ended.error)
    if any(ended.outcome == "cancelled" for ended in ends):
        return None
    for ended in ends:
        _check(ended.stats, new_tokens)
    return [
        Answer(Stream(reader.asked, tuple(reader.points)), ended.stats)
        for reader, ended in zip(readers, ends, strict=True)
    ]


def _check(stats: RunStats, new_tokens: int) -> None:
    usage = stats.usage
    if usage.completion_tokens != new_tokens:
        raise MeasureFailed(
            f"an answer has {usage.completion_tokens} tokens where {new_tokens} were asked for"
        )
    if usage.cached_tokens:
        raise MeasureFailed(
            f"{usage.cached_tokens} of {usage.prompt_tokens} prompt tokens came from the prompt cache,"
            " so the figures would flatter; measure again"
        )
