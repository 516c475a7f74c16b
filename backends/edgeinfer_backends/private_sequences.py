"""Runtimes in Python whose sequences each have a KV cache of their own: what they have in common.

The bookkeeping, every check of an argument, sampling and aborting are here; a framework's room has what
the framework computes.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

from edgeinfer.backend import BLOCK_TOKENS, Runtime, RuntimeFacts, Sampler, SequenceStep, Step
from edgeinfer.errors import OutOfCells, StepAborted, StepFailed
from edgeinfer.sampling import SamplingParams
from edgeinfer_backends.sampling_reference import ReferenceSampler

if TYPE_CHECKING:
    from edgeinfer.backend import Logits

IDLE_SEQUENCES = 32  # handles beyond those that run at once


class OwnCache(Protocol):
    """One sequence's keys and values."""

    length: int

    def fork(self, length: int) -> Self: ...

    def rewind(self, length: int) -> None: ...

    def check_integrity(self) -> None: ...


CacheT = TypeVar("CacheT", bound=OwnCache)


class PrivateRuntime(Runtime, Generic[CacheT]):
    """A subclass gives its facts to `_begin` before anything else of the runtime is used."""

    _facts: RuntimeFacts

    def _begin(self, facts: RuntimeFacts) -> None:
        self._facts = facts
        self._sequences: dict[int, CacheT] = {}
        self._next_sequence = 0
        self._rows: Logits | None = None  # of the last step: (rows, vocabulary)
        self._abort_lock = threading.Lock()
        self._is_running = False
        self._is_aborted = False
        self._closed = False

    # -- what the framework does -----------------------------------------------------------------

    @abstractmethod
    def _mapped(self, what: str) -> AbstractContextManager[None]:
        """The framework's errors as ours, and where it computes."""

    @abstractmethod
    def _new_cache(self) -> CacheT: ...

    @abstractmethod
    def _evict(self, cache: CacheT, start: int, stop: int) -> None:
        """There is something between `start` and `stop`. Raises NotImplementedError."""

    @abstractmethod
    def _pack(self, cache: CacheT, start: int, stop: int) -> bytes: ...

    @abstractmethod
    def _unpack(self, payload: bytes, start: int, count: int) -> Any:
        """What `_extend` takes. Raises SnapshotRejected."""

    @abstractmethod
    def _extend(self, cache: CacheT, unpacked: Any) -> None: ...

    @abstractmethod
    def _release(self) -> None:
        """Give up the model."""

    # -- facts and rows --------------------------------------------------------------------------

    @property
    def facts(self) -> RuntimeFacts:
        return self._facts

    def logits(self, row: int) -> Logits:
        num_rows = 0 if self._rows is None else len(self._rows)
        if self._rows is None or not 0 <= row < num_rows:
            raise ValueError(f"row {row}: the last step has {num_rows} rows of logits")
        found: Logits = self._rows[row]
        return found

    def create_sampler(self, params: SamplingParams, seed: int) -> Sampler:
        return ReferenceSampler(params, seed, self._facts.vocab_size)

    def sample(self, row: int | Logits, sampler: Sampler, mask: bytes | None = None) -> int:
        import numpy as np

        if not isinstance(sampler, ReferenceSampler):
            raise ValueError(f"a {type(sampler).__name__} is not a sampler of this runtime")
        logits = self.logits(row) if isinstance(row, int) else sampler.checked(row)
        if not np.isfinite(logits[logits.argmax()]):  # argmax finds a NaN first
            raise StepFailed("the model produced numbers that are not finite; is the file damaged?")
        return sampler.draw(logits, mask)

    def set_threads(self, threads: int, threads_batch: int) -> None:
        """Checked and left: a framework that has such a setting overrides it."""
        if threads < 0 or threads_batch < 0:
            raise ValueError("thread counts must be at least 1, or 0 for those of the load")

    # -- aborting --------------------------------------------------------------------------------

    def abort(self) -> None:
        with self._abort_lock:
            self._is_aborted = self._is_running

    @contextmanager
    def _abortable(self) -> Iterator[None]:
        with self._abort_lock:
            self._is_running, self._is_aborted = True, False
        try:
            yield
        finally:
            with self._abort_lock:
                self._is_running = False

    def _interrupt(self) -> None:
        if self._is_aborted:
            raise StepAborted("the step was interrupted")

    # -- sequences -------------------------------------------------------------------------------

    def open(self) -> int:
        self._check_open()
        return self._add(self._new_cache())

    def _add(self, cache: CacheT) -> int:
        self._need_handle()
        sequence = self._next_sequence
        self._next_sequence += 1
        self._sequences[sequence] = cache
        return sequence

    def free(self, sequence: int) -> None:
        self._check_sequence(sequence)
        self._rows = None
        del self._sequences[sequence]

    def length(self, sequence: int) -> int:
        self._check_sequence(sequence)
        return self._sequences[sequence].length

    def free_cells(self) -> int:
        return self._facts.cells - sum(cache.length for cache in self._sequences.values())

    def fork(self, sequence: int, length: int) -> int:
        self._check_range(sequence, 0, length)
        self._need_handle()
        self._need_cells(length)
        self._rows = None
        with self._mapped("a fork"):
            return self._add(self._sequences[sequence].fork(length))

    def rewind(self, sequence: int, length: int) -> None:
        self._check_range(sequence, 0, length)
        self._rows = None
        with self._mapped("a rewind"):
            self._sequences[sequence].rewind(length)

    def evict(self, sequence: int, start: int, stop: int) -> None:
        self._check_range(sequence, start, stop)
        if not self._facts.can.evict:
            raise NotImplementedError("this model's positions cannot be shifted")
        self._rows = None
        cache = self._sequences[sequence]
        if start == stop:
            return
        with self._mapped("an eviction"):
            if stop == cache.length:
                cache.rewind(start)
            else:
                self._evict(cache, start, stop)

    def privatise(self, sequence: int) -> None:
        self._check_sequence(sequence)  # all sequences are

    def snapshot(self, sequence: int, start: int, stop: int) -> bytes:
        self._check_range(sequence, start, stop)
        if not 1 <= stop - start <= BLOCK_TOKENS:
            raise ValueError(f"a snapshot holds 1 to {BLOCK_TOKENS} positions, not {stop - start}")
        self._rows = None
        with self._mapped("a snapshot"):
            return self._pack(self._sequences[sequence], start, stop)

    def restore(self, sequence: int, payload: bytes, num_positions: int) -> None:
        self._check_sequence(sequence)
        self._rows = None
        cache = self._sequences[sequence]
        with self._mapped("a restore"):
            unpacked = self._unpack(payload, cache.length, num_positions)
            if cache.length + num_positions > self._facts.context:
                raise OutOfCells(f"{num_positions} positions more do not fit into the context")
            self._need_cells(num_positions)
            self._extend(cache, unpacked)

    def is_in_order(self, sequence: int) -> bool:
        self._check_sequence(sequence)
        return True

    def check_integrity(self) -> None:
        assert 0 <= self.free_cells() <= self._facts.cells
        assert len(self._sequences) <= self._facts.max_sequences
        for cache in self._sequences.values():
            assert 0 <= cache.length <= self._facts.context
            cache.check_integrity()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._rows = None
        self._sequences.clear()
        self._release()

    # -- arguments -------------------------------------------------------------------------------

    def _check_step(self, step: Step) -> tuple[list[int], list[int]]:
        """Row starts and counts. Raises ValueError, and OutOfCells where there is no room for it."""
        facts = self._facts
        if not step.parts or step.padding < 0:
            raise ValueError("a step needs at least one part and no negative padding")
        seen: set[int] = set()
        starts: list[int] = []
        counts: list[int] = []
        num_rows = 0
        for part in step.parts:
            self._check_sequence(part.sequence)
            if part.sequence in seen:
                raise ValueError(f"sequence {part.sequence} stands in the step twice")
            seen.add(part.sequence)
            self._check_tokens(part.tokens)
            if part.logits not in ("none", "last", "all"):
                raise ValueError(f"logits are none, last or all, not {part.logits!r}")
            starts.append(num_rows)
            counts.append({"none": 0, "last": 1, "all": len(part.tokens)}[part.logits])
            num_rows += counts[-1]
        if step.num_tokens > facts.max_step_tokens:
            raise ValueError(f"a step of {step.num_tokens} tokens; at most {facts.max_step_tokens}")
        if num_rows > facts.max_logit_rows:
            raise ValueError(f"{num_rows} rows of logits; at most {facts.max_logit_rows}")
        self._check_room(step.parts)
        return starts, counts

    def _check_room(self, parts: Sequence[SequenceStep]) -> None:
        for part in parts:
            length = self._sequences[part.sequence].length
            if length + len(part.tokens) > self._facts.context:
                raise OutOfCells(
                    f"sequence {part.sequence} has {length} positions and {len(part.tokens)} more do not"
                    f" fit into its context of {self._facts.context}; evict, or load with more context"
                )
        self._need_cells(sum(len(part.tokens) for part in parts))

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the runtime is closed")

    def _check_sequence(self, sequence: int) -> None:
        self._check_open()
        if sequence not in self._sequences:
            raise ValueError(f"there is no sequence {sequence}")

    def _check_range(self, sequence: int, start: int, stop: int) -> None:
        self._check_sequence(sequence)
        length = self._sequences[sequence].length
        if not 0 <= start <= stop <= length:
            raise ValueError(f"positions [{start}, {stop}) of a sequence of {length}")

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        """A framework may read an embedding's row without looking whether there is one."""
        if not len(tokens):
            raise ValueError("a part without tokens")
        if min(tokens) < 0 or max(tokens) >= self._facts.vocab_size:
            raise ValueError(f"a token is outside the vocabulary of {self._facts.vocab_size}")

    def _need_handle(self) -> None:
        if len(self._sequences) >= self._facts.max_sequences:
            raise OutOfCells(f"all {self._facts.max_sequences} sequences are in use; free one")

    def _need_cells(self, count: int) -> None:
        if count > self.free_cells():
            raise OutOfCells(
                f"{count} cells are needed and {self.free_cells()} of {self._facts.cells} are free;"
                " free or shorten a sequence"
            )
