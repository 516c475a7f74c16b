"""The conversation behind the screen: its turns, its requests, its running answer. Knows no widget."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

from edgeinfer.client import Client, Ended, Event, Generation, Message, Request, RunStats
from edgeinfer.errors import EdgeInferError
from edgeinfer.sampling import SamplingParams

Overflow = Literal["stream", "stop", "error"]
TurnState = Literal["waiting", "answering", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class ChatSettings:
    """What every request of this chat carries."""

    system: str | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    overflow: Overflow = "stream"


@dataclass
class Turn:
    """A question and what came of it. `answer` is the model's own text, unchanged, so that the next
    request repeats it to the letter and finds its prefix in the cache."""

    question: str
    answer: str = ""
    state: TurnState = "waiting"

    @property
    def is_remembered(self) -> bool:
        """Whether later requests carry it. Templates want strict alternation: no answer, no turn."""
        return bool(self.answer) and self.state in ("finished", "stopped", "failed")

    def messages(self) -> tuple[Message, Message]:
        return Message("user", self.question), Message("assistant", self.answer)


class Answer:
    """One running answer. Events arrive on the client's thread and wait until the screen drains them."""

    def __init__(self, turn: Turn, clock: Callable[[], float] = time.monotonic) -> None:
        self.turn = turn
        self.started_at = clock()
        self.is_stopping = False
        self._clock = clock
        self._arrived: deque[tuple[float, Event]] = deque()
        self._generation: Generation | None = None

    def start(self, client: Client, request: Request) -> None:
        """Refusals come as an `Ended` event, also those a client raises."""
        try:
            self._generation = client.start(request, on_event=self._receive)
        except EdgeInferError as error:
            self.refuse(error)

    def refuse(self, error: EdgeInferError) -> None:
        self._receive(Ended("failed", RunStats(), type(error).__name__, str(error)))

    def cancel(self) -> None:
        self.is_stopping = True
        if self._generation is not None:
            self._generation.cancel()

    def drain(self) -> list[tuple[float, Event]]:
        """What came since the last call, in order, with the times it came."""
        batch = []
        while self._arrived:
            batch.append(self._arrived.popleft())
        return batch

    def _receive(self, event: Event) -> None:
        self._arrived.append((self._clock(), event))


class Chat:
    """Turns in order, at most one of them being answered."""

    def __init__(self, client: Client, settings: ChatSettings) -> None:
        self._client = client
        self._settings = settings
        self.turns: list[Turn] = []
        self.running: Answer | None = None

    @property
    def last_answer(self) -> str:
        return next((turn.answer for turn in reversed(self.turns) if turn.answer), "")

    @property
    def can_repeat(self) -> bool:
        """Whether the last question can be asked again (one that came to nothing is in the input)."""
        if self.running is not None or not self.turns:
            return False
        return self.turns[-1].is_remembered or self.turns[-1].state == "finished"

    @property
    def repeats_itself(self) -> bool:
        """Whether the same request gives the same text."""
        return self._settings.sampling.is_greedy or self._settings.sampling.seed is not None

    def why_cut(self, stats: RunStats) -> str:
        """Why an answer that ended by its length did."""
        tokens, limit = stats.usage.completion_tokens, self._settings.max_tokens
        if limit is not None and tokens >= limit:
            return f"ended at {tokens:,} tokens, as --max-tokens says"
        return f"ended after {tokens:,} tokens: the context is full; Ctrl+N starts a new chat"

    def ask(self, turn: Turn) -> Answer:
        """Request the answer to `turn`, after all remembered turns before it."""
        assert self.running is None  # noqa: S101 — the screen refuses a second question
        remembered = [past.messages() for past in self.turns if past.is_remembered]
        self.turns.append(turn)
        turn.state = "answering"
        self.running = answer = Answer(turn)
        system = [Message("system", self._settings.system)] if self._settings.system else []
        try:
            request = Request(
                messages=(*system, *chain.from_iterable(remembered), Message("user", turn.question)),
                sampling=self._settings.sampling,
                max_tokens=self._settings.max_tokens,
                stop=self._settings.stop,
                overflow=self._settings.overflow,
            )
        except EdgeInferError as error:
            answer.refuse(error)
        else:
            answer.start(self._client, request)
        return answer

    def take_last(self) -> Turn:
        """Remove the last turn to ask it again; a fresh turn with its question."""
        return Turn(self.turns.pop().question)

    def settle(self, ended: Ended) -> Turn:
        """The running answer is over."""
        assert self.running is not None  # noqa: S101 — only its own `Ended` leads here
        turn = self.running.turn
        turn.state = "stopped" if ended.outcome == "cancelled" else ended.outcome
        self.running = None
        return turn

    def clear(self) -> None:
        """Forget everything; a running answer is cancelled and its further events are nobody's."""
        if self.running is not None:
            self.running.cancel()
        self.running = None
        self.turns.clear()
