"""A runtime that checks its own bookkeeping after every operation, failed ones included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType

import numpy as np
import numpy.typing as npt

from edgeinfer.backend import Layers, MemoryItem, Runtime, RuntimeFacts, Sampler, Step, StepResult
from edgeinfer.sampling import SamplingParams
from edgeinfer_models.tokenizer import Tokenizer


class CheckedRuntime(Runtime):
    def __init__(self, inner: Runtime) -> None:
        self.inner = inner

    def __enter__(self) -> CheckedRuntime:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """The check of what an operation left behind, whether it raised or not."""
        self.inner.check_integrity()

    @property
    def facts(self) -> RuntimeFacts:
        return self.inner.facts

    @property
    def tokenizer(self) -> Tokenizer:
        return self.inner.tokenizer

    def identity(self) -> Mapping[str, str]:
        return self.inner.identity()

    def memory(self) -> list[MemoryItem]:
        return self.inner.memory()

    def forward(self, step: Step) -> StepResult:
        with self:
            return self.inner.forward(step)

    def abort(self) -> None:
        self.inner.abort()

    def logits(self, row: int) -> npt.NDArray[np.float32]:
        return self.inner.logits(row)

    def create_sampler(self, params: SamplingParams, seed: int) -> Sampler:
        return self.inner.create_sampler(params, seed)

    def sample(
        self, row: int | npt.NDArray[np.float32], sampler: Sampler, mask: bytes | None = None
    ) -> int:
        return self.inner.sample(row, sampler, mask)

    def set_threads(self, threads: int, threads_batch: int) -> None:
        self.inner.set_threads(threads, threads_batch)

    def embed(self, sequence: int, tokens: Sequence[int]) -> list[float]:
        with self:
            return self.inner.embed(sequence, tokens)

    def open(self) -> int:
        with self:
            return self.inner.open()

    def free(self, sequence: int) -> None:
        with self:
            self.inner.free(sequence)

    def length(self, sequence: int) -> int:
        return self.inner.length(sequence)

    def free_cells(self) -> int:
        return self.inner.free_cells()

    def fork(self, sequence: int, length: int) -> int:
        with self:
            return self.inner.fork(sequence, length)

    def rewind(self, sequence: int, length: int) -> None:
        with self:
            self.inner.rewind(sequence, length)

    def evict(self, sequence: int, start: int, stop: int) -> None:
        with self:
            self.inner.evict(sequence, start, stop)

    def evict_lightest(self, sequence: int, start: int, stop: int, keep: int) -> bytes:
        with self:
            return self.inner.evict_lightest(sequence, start, stop, keep)

    def layers(self) -> Layers:
        return self.inner.layers()

    def privatise(self, sequence: int) -> None:
        with self:
            self.inner.privatise(sequence)

    def snapshot(self, sequence: int, start: int, stop: int) -> bytes:
        with self:
            return self.inner.snapshot(sequence, start, stop)

    def restore(self, sequence: int, payload: bytes, num_positions: int) -> None:
        with self:
            self.inner.restore(sequence, payload, num_positions)

    def is_in_order(self, sequence: int) -> bool:
        return self.inner.is_in_order(sequence)

    def check_integrity(self) -> None:
        self.inner.check_integrity()

    def close(self) -> None:
        self.inner.close()
