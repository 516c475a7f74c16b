"""From running requests to a reply: as a stream of chunks, or as one piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from edgeinfer.client import Ended, Event, Prefilled, RunStats, Started, Text
from edgeinfer.server import sse
from edgeinfer.server.answers import Answers, failure
from edgeinfer.server.errors import ApiError, as_api_error


class Reader(Protocol):
    """Turns one HTTP request's events into the chunks of its reply."""

    def begin(self) -> str:
        """The chunks before any event."""
        ...

    def read(self, index: int, event: Event) -> str:
        """The chunks that tell an event, `Ended` included."""
        ...

    def end(self, stats: Sequence[RunStats]) -> str:
        """The chunks after the last event. stats: of the requests, in their order."""
        ...


class Deadline:
    """Cancels answers when their time is over. said_s: the limit as a message tells it."""

    def __init__(self, answers: Answers, seconds: float, said_s: float | None = None) -> None:
        self._answers = answers
        self._said_s = seconds if said_s is None else said_s
        self.is_over = False
        self._timer = asyncio.get_running_loop().call_later(seconds, self._end) if seconds else None

    def _end(self) -> None:
        self.is_over = True
        self._answers.cancel()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def error_of(self, ended: Ended) -> ApiError | None:
        """Why an answer is none; None for one that is."""
        if ended.outcome == "failed":
            return as_api_error(failure(ended))
        if ended.outcome == "finished":
            return None
        if self.is_over:
            return ApiError(
                504,
                f"the answer took longer than {self._said_s:g} s and was ended; raise --timeout or ask"
                " for fewer tokens",
                "server_error",
                code="timeout",
            )
        return ApiError(
            503, "the answer was ended: the endpoint is closing", "server_error", code="closing"
        )


async def stream(
    answers: Answers, reader: Reader, timeout_s: float, *, progress: bool = False
) -> AsyncIterator[bytes]:
    """SSE chunks. A failure is a chunk with `error`, after which nothing comes, not even [DONE].
    progress: with comments that tell how far the answers are."""
    deadline = Deadline(answers, timeout_s)
    stats: dict[int, RunStats] = {}
    try:
        if first := reader.begin():
            yield first.encode()
        async for batch in answers.events():
            chunks = ""
            for index, event in batch:
                if isinstance(event, Ended):
                    stats[index] = event.stats
                    problem = deadline.error_of(event)
                    if problem is not None:
                        answers.cancel()
                        yield chunks.encode() + sse.data(problem.body)
                        async for _ in answers.events():  # to the end of the others
                            pass
                        return
                if progress:
                    chunks += _progress(event)
                chunks += reader.read(index, event)
            if chunks:
                yield chunks.encode()
        yield reader.end([stats[index] for index in sorted(stats)]).encode() + sse.DONE
    finally:
        deadline.stop()
        answers.leave()


def _progress(event: Event) -> str:
    if isinstance(event, Started):
        return f': progress {{"cached":{event.cached_tokens},"of":{event.prompt_tokens}}}\n\n'
    if isinstance(event, Prefilled):
        return f': progress {{"done":{event.done},"of":{event.total}}}\n\n'
    if isinstance(event, Text):
        return f': progress {{"tokens":{event.num_tokens}}}\n'
    return ""


async def read_all(
    answers: Answers,
    read: Callable[[int, Event], object],
    timeout_s: float,
    said_s: float | None = None,
) -> None:
    """Every event to `read`. Raises ApiError if any answer failed or was ended.
    said_s: the time limit as a message tells it, where this is a part of the work only."""
    deadline = Deadline(answers, timeout_s, said_s)
    problem: ApiError | None = None
    try:
        async for batch in answers.events():
            for index, event in batch:
                if isinstance(event, Ended):
                    problem = problem or deadline.error_of(event)
                    if problem is not None and not answers.is_cancelled:
                        answers.cancel()
                read(index, event)
    finally:
        deadline.stop()
        answers.leave()
    if problem is not None:
        raise problem
