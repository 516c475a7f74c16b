"""The client protocol: load, start, cancel. Synchronous core; an async handle wraps it by passing
`on_event` and hopping to its loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from types import TracebackType
from typing import Any

from edgeinfer.engine.request import Ended, Event, Request, Text
from edgeinfer.errors import RequestFailed, error_from_wire
from edgeinfer.machine.ledger import MemoryUse

# A request's header that asks an endpoint for comments on how far an answer is.
PROGRESS_HEADER = "x-edgeinfer-progress"

LoadProgress = Callable[[str, float], None]  # (what is going on, 0..1)


@dataclass(frozen=True)
class ModelInfo:
    """A loaded model as its user wants to know it."""

    name: str
    backend: str
    device: str
    context: int
    vocab_size: int
    kv_type_k: str
    kv_type_v: str
    kv_bytes_per_token: int
    load_s: float
    threads: int
    threads_batch: int
    memory: tuple[MemoryUse, ...] = ()
    predicted_bytes: int = 0  # of the model's process, once its context is full; GPUs not counted
    resident_bytes: int = 0  # of the same, right after the load
    cache_bytes: int = 0  # that the prompt cache may take beside it
    has_template: bool = True
    warnings: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Token:
    id: int
    text: str


class Generation:
    """One running request. `events()` may be read from any one thread; `cancel()` from any."""

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel
        self._queue: SimpleQueue[Event] = SimpleQueue()
        self._ended: Ended | None = None

    def put(self, event: Event) -> None:
        """For the client that feeds this generation."""
        self._queue.put(event)

    def cancel(self) -> None:
        """Ask for the end. `events()` goes on to an `Ended("cancelled")`; harmless when over."""
        self._cancel()

    def events(self) -> Iterator[Event]:
        """Every event in order; the last is an `Ended`."""
        while self._ended is None:
            event = self._queue.get()
            if isinstance(event, Ended):
                self._ended = event
            yield event

    def result(self) -> Ended:
        """Read to the end. Raises the request's error if it failed."""
        for _ in self.events():
            pass
        assert self._ended is not None
        if self._ended.outcome == "failed":
            raise error_from_wire(self._ended.error_type or RequestFailed.__name__, self._ended.error)
        return self._ended

    def text(self) -> str:
        """The whole answer. Raises the request's error if it failed."""
        parts = [event.text for event in self.events() if isinstance(event, Text)]
        self.result()
        return "".join(parts)


class Client(ABC):
    """A model that answers. All methods raise EdgeInferError subclasses."""

    @abstractmethod
    def load(self, progress: LoadProgress | None = None) -> ModelInfo:
        """Make the model ready; a second call returns at once. `progress` is called from a thread of
        the client's own. Raises ModelError, BackendError, WorkerDied, TemplateError."""

    @property
    @abstractmethod
    def info(self) -> ModelInfo | None:
        """None before `load`."""

    @abstractmethod
    def start(self, request: Request, on_event: Callable[[Event], None] | None = None) -> Generation:
        """Submit. Returns at once; all that happens, refusals included, comes as events.
        on_event: called for every event, from a thread of the client's own, in place of the queue
        behind `Generation.events()`."""

    @abstractmethod
    def count_tokens(self, request: Request) -> int:
        """Prompt tokens the request would have."""

    @abstractmethod
    def tokenize(
        self, text: str, *, add_special: bool = False, parse_special: bool = False
    ) -> tuple[Token, ...]:
        """add_special, parse_special: as `Tokenizer.encode` has them."""

    @abstractmethod
    def detokenize(self, tokens: Sequence[int]) -> str:
        """Raises RequestFailed for a token that the vocabulary does not have."""

    @abstractmethod
    def cancel_load(self) -> None:
        """Stop a `load` in progress; it raises LoadFailed."""

    @abstractmethod
    def close(self) -> None:
        """End everything; running requests end cancelled. Idempotent."""

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
