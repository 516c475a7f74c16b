"""A `Client` that plays scripts from a thread of its own, as the real ones do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from edgeinfer.client import (
    Client,
    Ended,
    Event,
    Generation,
    LoadProgress,
    ModelInfo,
    Prefilled,
    Request,
    RunStats,
    Started,
    Text,
    Token,
)
from edgeinfer.engine.request import KvStats, Timings, Usage
from edgeinfer.errors import EdgeInferError, LoadFailed

INFO = ModelInfo(
    name="SmolLM2-135M",
    backend="llamacpp",
    device="cpu",
    context=2048,
    vocab_size=49152,
    kv_type_k="f16",
    kv_type_v="f16",
    kv_bytes_per_token=23040,
    load_s=0.1,
    threads=2,
    threads_batch=2,
)


@dataclass
class Script:
    """One answer: its text in pieces, and how it ends. `hold`: wait for this before the last event."""

    pieces: Sequence[str] = ("Hello ", "there.")
    prompt_tokens: int = 40
    cached_tokens: int = 8
    evicted_tokens: int = 0
    delay_s: float = 0.0
    error: EdgeInferError | None = None
    warnings: list[str] = field(default_factory=list)
    finish_reason: str = "stop"
    hold: threading.Event | None = None


class FakeClient(Client):
    """Plays `scripts` in turn, the last one for ever. `load_errors`: what the first loads raise (None:
    they succeed). `load_hold`: a load waits for it."""

    def __init__(
        self,
        *scripts: Script,
        load_errors: Sequence[EdgeInferError | None] = (),
        load_hold: threading.Event | None = None,
        load_steps: int = 3,
        load_step_s: float = 0.0,
        info: ModelInfo = INFO,
    ) -> None:
        self._scripts = list(scripts) or [Script()]
        self._load_errors = list(load_errors)
        self._load_hold = load_hold
        self._load_steps = load_steps
        self._load_step_s = load_step_s
        self._model = info
        self._info: ModelInfo | None = None
        self._load_cancelled = threading.Event()
        self._cancels: list[threading.Event] = []
        self._threads: list[threading.Thread] = []
        self.requests: list[Request] = []
        self.cancelled = 0
        self.load_cancelled = False
        self.closed = False

    def load(self, progress: LoadProgress | None = None) -> ModelInfo:
        self._load_cancelled.clear()
        for step in range(self._load_steps):
            if progress is not None:
                progress(f"reading tensors, part {step + 1}", step / self._load_steps)
            time.sleep(self._load_step_s)
            if self._load_cancelled.is_set():
                raise LoadFailed("loading was cancelled")
        while self._load_hold is not None and not self._load_hold.wait(0.005):
            if self._load_cancelled.is_set():
                raise LoadFailed("loading was cancelled")
        error = self._load_errors.pop(0) if self._load_errors else None
        if error is not None:
            raise error
        self._info = self._model
        return self._model

    @property
    def info(self) -> ModelInfo | None:
        return self._info

    def start(self, request: Request, on_event: Callable[[Event], None] | None = None) -> Generation:
        assert self._info is not None, "asked before it was loaded"
        assert not self.closed
        script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
        self.requests.append(request)
        cancel = threading.Event()

        def note_cancel() -> None:
            self.cancelled += 1
            cancel.set()

        generation = Generation(note_cancel)
        thread = threading.Thread(
            target=self._play, args=(script, on_event or generation.put, cancel), daemon=True
        )
        self._cancels.append(cancel)
        self._threads.append(thread)
        thread.start()
        return generation

    def tokenize(
        self, text: str, *, add_special: bool = False, parse_special: bool = False
    ) -> tuple[Token, ...]:
        raise NotImplementedError

    def detokenize(self, tokens: Sequence[int]) -> str:
        raise NotImplementedError

    def count_tokens(self, request: Request) -> int:
        return 40

    def cancel_load(self) -> None:
        self.load_cancelled = True
        self._load_cancelled.set()

    def close(self) -> None:
        self.closed = True
        self._load_cancelled.set()
        for cancel in self._cancels:
            cancel.set()
        for thread in self._threads:
            thread.join(5)

    def _play(self, script: Script, emit: Callable[[Event], None], cancel: threading.Event) -> None:
        said: list[str] = []

        def ended(outcome: str) -> Ended:
            stats = RunStats(
                text="".join(said),
                finish_reason="cancelled" if outcome == "cancelled" else script.finish_reason,
                usage=Usage(script.prompt_tokens, len(said), script.cached_tokens),
                timings=Timings(0.1, 0.25, 400.0, 41.5),
                kv=KvStats("f16", "f16", 1000, 10, script.evicted_tokens),
                backend="llamacpp",
                model=self._model.name,
                context=self._model.context,
                warnings=script.warnings,
            )
            if outcome == "failed":
                return Ended("failed", stats, type(script.error).__name__, str(script.error))
            return Ended(outcome, stats)

        if script.error is None or script.pieces:
            emit(Started(script.prompt_tokens, script.cached_tokens))
            emit(Prefilled(script.prompt_tokens, script.prompt_tokens))
        for number, piece in enumerate(script.pieces, 1):
            time.sleep(script.delay_s)
            if cancel.is_set():
                break
            said.append(piece)
            emit(Text(piece, number))
        while script.hold is not None and not cancel.is_set() and not script.hold.wait(0.005):
            pass
        if cancel.is_set():
            emit(ended("cancelled"))
        else:
            emit(ended("failed" if script.error is not None else "finished"))
