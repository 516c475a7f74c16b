"""The layout `private`: llama.cpp keeps a stream of cells for each sequence.

In a unified cache every row of a step looks at every sequence's cells, masked or not: with 8 sequences
of 100 tokens a step of SmolLM2 took 33.9 ms, with a stream for each 30.3. Here position p of a sequence
lies in cell p of its stream, whatever the others do, so nothing has to be aligned or compacted. What it
costs: a fork copies, and a stream is taken whole, so there are no more sequences than run at once.

A step of several sequences is one pass through the weights only where their streams lie side by side
(`split_equal`, llama-batch.cpp): where they do not for a while, sequences change places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgeinfer.backend import BLOCK_TOKENS, SequenceStep, Step, StepResult
from edgeinfer.errors import LoadFailed, OutOfCells, SnapshotRejected, StepFailed
from edgeinfer_backends.llamacpp.library import native_log
from edgeinfer_backends.llamacpp.raw_bytes import address_of, overwrite, unfilled_bytes, writable
from edgeinfer_backends.llamacpp.runtime import (
    SNAPSHOT,
    SNAPSHOT_MAGIC,
    LlamaCppRuntime,
    head_checksum,
)
from edgeinfer_backends.llamacpp.sequence_state import StateForm, positions_of
from edgeinfer_backends.llamacpp.stream_table import StreamTable

if TYPE_CHECKING:
    from edgeinfer_backends.llamacpp.sequence_state import Bytes

_VERSION = 2  # of a snapshot; the first is that of the other layout
_SCATTERED = 3  # steps in a row, after which sequences change places


class PrivateStreams(LlamaCppRuntime):
    """Sequences' numbers are ours; `_ids` has the stream of each, which may change."""

    _layout = "private"
    _form: StateForm

    def _make_table(self, cells: int) -> StreamTable:
        streams = self._max_sequences
        # What was restored and is not in the cache yet: (rows, positions), to be put in at once.
        self._pending: dict[int, list[tuple[Bytes, int]]] = {}
        # The state that was read last, and whose: a conversation is read once for all its blocks.
        self._read: tuple[int, bytes] | None = None
        self._num_scattered = 0
        return StreamTable(streams, cells // streams)

    @property
    def _streams(self) -> StreamTable:
        assert isinstance(self._table, StreamTable)
        return self._table

    # -- running ---------------------------------------------------------------------------------

    def _forward_one(self, part: SequenceStep) -> StepResult | None:
        self._settle(part.sequence)
        return super()._forward_one(part)

    def _forward_any(self, step: Step) -> StepResult:
        for part in step.parts:
            self._settle(part.sequence)
        if len(step.parts) == 1:
            return super()._forward_any(step)
        self._check_step(step)
        self._gather(step)
        order = sorted(range(len(step.parts)), key=lambda i: self._ids[step.parts[i].sequence])
        result = super()._forward_any(Step([step.parts[i] for i in order], step.padding))
        place = {index: at for at, index in enumerate(order)}
        starts = [result.starts[place[i]] for i in range(len(order))]
        return StepResult(starts, [result.counts[place[i]] for i in range(len(order))])

    def _prepare(self, step: Step) -> None:
        for part in step.parts:
            self._check_room(part.sequence, len(part.tokens))

    def _prepare_embedding(self, sequence: int, count: int) -> None:
        self._settle(sequence)
        self._check_room(sequence, count)

    def _check_room(self, sequence: int, count: int) -> None:
        length, most = self._streams.length(sequence), self._streams.most
        if length + count > most:
            raise OutOfCells(f"{count} cells are needed and {most - length} of {most} are free")

    def _fill_padding(self, step: Step, total: int) -> list[int]:
        """Dummy rows are the first positions of streams that nobody has, next to the step's own."""
        if any(len(part.tokens) != 1 for part in step.parts):
            return []  # llama.cpp would take the others' rest in a pass of its own
        used = {self._ids[sequence] for sequence in self._streams.sequences()}
        native = max(self._ids[part.sequence] for part in step.parts) + 1
        dummies: list[int] = []
        while (
            len(dummies) < step.padding
            and native < self._max_sequences
            and native not in used
            and total + len(dummies) < self._step_tokens
        ):
            self._put_dummy(total + len(dummies), native, 0)
            dummies.append(native)
            native += 1
        return dummies

    def _undo(self, step: Step) -> None:
        """llama.cpp takes back the pass that failed, not those of the step before it."""
        for part in step.parts:
            self._remove(part.sequence, self._streams.length(part.sequence))

    # -- places ----------------------------------------------------------------------------------

    def _gather(self, step: Step) -> None:
        """Where the step's streams have lain apart for a while, bring them together."""
        own = {self._ids[part.sequence] for part in step.parts}
        if max(own) - min(own) + 1 == len(own):
            self._num_scattered = 0
            return
        self._num_scattered += 1
        if self._num_scattered < _SCATTERED:
            return
        self._num_scattered = 0
        lengths = [0] * self._max_sequences
        for sequence in self._streams.sequences():
            lengths[self._ids[sequence]] = self._streams.length(sequence)
        count = len(own)

        def moved(first: int) -> int:
            """Positions that are copied if the step has the streams from `first` on."""
            block = range(first, first + count)
            inside = sum(lengths[native] for native in block if native not in own)
            return inside + sum(lengths[native] for native in own if native not in block)

        first = min(range(self._max_sequences - count + 1), key=moved)
        block = set(range(first, first + count))
        for left, right in zip(sorted(own - block), sorted(block - own), strict=True):
            self._exchange(left, right)

    def _exchange(self, left: int, right: int) -> None:
        """Two streams change their contents, bit for bit."""
        owners = {native: sequence for sequence, native in enumerate(self._ids)}
        a, b = owners[left], owners[right]
        known = self._streams.sequences()
        states = [self._state(s) if s in known and self._num_native(s) else None for s in (a, b)]
        for sequence, state in zip((a, b), states, strict=True):
            if state is not None:
                self._remove(sequence, 0)
        self._ids[a], self._ids[b] = right, left
        for sequence, state in zip((a, b), states, strict=True):
            if state is not None:
                self._write(sequence, state)

    # -- sequences -------------------------------------------------------------------------------

    def open(self) -> int:
        # The lowest stream, so that those in use lie side by side.
        self._free_handles.sort(key=lambda sequence: -self._ids[sequence])
        return super().open()

    def free(self, sequence: int) -> None:
        self._check_sequence(sequence)
        self._pending.pop(sequence, None)
        super().free(sequence)

    def fork(self, sequence: int, length: int) -> int:
        self._check_range(sequence, 0, length)
        target = self.open()
        if length:
            self._settle(sequence)
            self._write(target, self._state(sequence))
            self._remove(target, length)
            self._streams.append(target, length)
            self._forget(sequence)
        return target

    def evict(self, sequence: int, start: int, stop: int) -> None:
        self._check_range(sequence, start, stop)
        if not self._facts.can.evict:
            raise ValueError("this model's positions cannot be shifted")
        length = self._streams.length(sequence)
        if start == stop or stop == length:
            self._drop(sequence, start, stop)
            return
        self._settle(sequence)
        native = self._ids[sequence]
        self._lib.llama_memory_seq_rm(self._memory, native, start, stop)
        # LLAMA_API void llama_memory_seq_add(llama_memory_t mem, llama_seq_id seq_id, llama_pos p0,
        #     llama_pos p1, llama_pos delta): only notes the shift
        self._lib.llama_memory_seq_add(self._memory, native, stop, -1, start - stop)
        self._streams.cut(sequence, length - (stop - start))
        self._compute_shift_of(sequence)
        # What follows the gap moves into it: the next token would be put there, out of order.
        self._close_gap(sequence, start)

    def _close_gap(self, sequence: int, start: int) -> None:
        """Put the positions from `start` on into the cells before theirs that nobody has."""
        self._write(sequence, self._state(sequence))
        self._forget(sequence)

    def _compute_shift_of(self, sequence: int) -> None:
        """llama.cpp applies a shift at the next decode: one dummy position, in one of the free cells.
        Not interruptible (measured: KL 1.3, without an error)."""
        self._row_to_batch = []
        length = self._streams.length(sequence)
        self._put_dummy(0, self._ids[sequence], length)
        self._clear_abort()
        code = self._decode(1)
        self._remove(sequence, length)
        if code != 0:
            raise StepFailed(f"llama.cpp failed to re-rotate the KV cache (code {code})")

    def privatise(self, sequence: int) -> None:
        self._check_sequence(sequence)  # no cell is shared

    def snapshot(self, sequence: int, start: int, stop: int) -> bytes:
        self._check_range(sequence, start, stop)
        if not 0 < stop - start <= BLOCK_TOKENS:
            raise ValueError(f"a snapshot holds 1 to {BLOCK_TOKENS} positions, not {stop - start}")
        data = unfilled_bytes(SNAPSHOT.size + (stop - start) * self._form.row_bytes)
        self._rows(sequence, start, stop, writable(data, SNAPSHOT.size))
        if stop == self._streams.length(sequence):
            self._read = None  # its last block: megabytes that nobody needs
        check = head_checksum(memoryview(data)[SNAPSHOT.size :])
        overwrite(data, 0, SNAPSHOT.pack(SNAPSHOT_MAGIC, _VERSION, 1, start, stop, check))
        return data

    def restore(self, sequence: int, payload: bytes, num_positions: int) -> None:
        import numpy as np

        self._check_sequence(sequence)
        begin = self._streams.length(sequence)
        if len(payload) < SNAPSHOT.size:
            raise SnapshotRejected(f"a KV snapshot of {len(payload)} bytes is too short to be one")
        magic, version, parts, start, stop, check = SNAPSHOT.unpack_from(payload)
        if (magic, version, parts) != (SNAPSHOT_MAGIC, _VERSION, 1):
            raise SnapshotRejected("these bytes are not a KV snapshot of this version")
        if (start, stop) != (begin, begin + num_positions):
            raise SnapshotRejected(
                f"the KV snapshot holds positions [{start}, {stop}),"
                f" not [{begin}, {begin + num_positions})"
            )
        body = memoryview(payload)[SNAPSHOT.size :]
        if len(body) != num_positions * self._form.row_bytes or check != head_checksum(body):
            raise SnapshotRejected("the KV snapshot is truncated or damaged")
        self._check_room(sequence, num_positions)
        self._forget(sequence)
        rows = np.frombuffer(payload, dtype=np.uint8, offset=SNAPSHOT.size)
        self._pending.setdefault(sequence, []).append((rows, num_positions))
        self._streams.append(sequence, num_positions)

    def check_integrity(self) -> None:
        lib, memory = self._lib, self._memory
        self._streams.check_integrity()
        assert sorted(self._ids) == list(range(self._max_sequences))
        for sequence in range(self._max_sequences):
            known = sequence in self._streams.sequences()
            assert known != (sequence in self._free_handles)
            if known:
                self._settle(sequence)
            expected = self._streams.length(sequence) if known else 0
            last = lib.llama_memory_seq_pos_max(memory, self._ids[sequence])
            assert last == expected - 1, f"sequence {sequence} ends at {last}, not {expected - 1}"
            if expected:
                positions = positions_of(self._state(sequence), self._ids[sequence])
                assert positions == list(range(expected)), f"sequence {sequence} is out of order"
            self._forget(sequence)

    # -- cells -----------------------------------------------------------------------------------

    def _drop(self, sequence: int, start: int, stop: int) -> None:
        """Positions from `start` to the end."""
        if start == stop:
            return
        self._settle(sequence)
        assert stop == self._streams.length(sequence)
        self._row_to_batch = []
        self._streams.cut(sequence, start)
        self._remove(sequence, start)

    def _remove(self, sequence: int, start: int) -> None:
        self._forget(sequence)
        self._lib.llama_memory_seq_rm(self._memory, self._ids[sequence], start, -1)

    def _forget(self, sequence: int) -> None:
        """What was read of it is true no more."""
        if self._read is not None and self._read[0] == sequence:
            self._read = None

    def _num_native(self, sequence: int) -> int:
        """Positions that are in the cache already."""
        waiting = sum(count for _, count in self._pending.get(sequence, ()))
        return self._streams.length(sequence) - waiting

    def _settle(self, sequence: int) -> None:
        """Put what was restored into the cache; a step follows, or whatever else changes it."""
        self._forget(sequence)
        if sequence not in self._pending:
            return
        have = self._num_native(sequence)
        blocks: Sequence[tuple[Bytes, int]] = self._pending.pop(sequence)
        if have:
            rows = self._form.rows(self._state(sequence), self._ids[sequence], 0, have)
            blocks = [(rows, have), *blocks]
        self._write(sequence, self._form.state(blocks))

    def _rows(self, sequence: int, start: int, stop: int, found: Bytes | None = None) -> Bytes:
        if sequence in self._pending:
            self._settle(sequence)
        return self._form.rows(self._state(sequence), self._ids[sequence], start, stop, found)

    def _state(self, sequence: int) -> bytes:
        """Of llama.cpp, for what is in the cache."""
        if self._read is not None and self._read[0] == sequence:
            return self._read[1]
        data = self._native_state(self._ids[sequence])
        self._read = (sequence, data)
        return data

    def _native_state(self, native: int) -> bytes:
        lib = self._lib
        # LLAMA_API size_t llama_state_seq_get_size(struct llama_context * ctx, llama_seq_id seq_id)
        num_bytes = lib.llama_state_seq_get_size(self._ctx, native)
        data = unfilled_bytes(num_bytes)
        # LLAMA_API size_t llama_state_seq_get_data(struct llama_context * ctx, uint8_t * dst,
        #     size_t size, llama_seq_id seq_id)
        written = lib.llama_state_seq_get_data(self._ctx, address_of(data, 0), num_bytes, native)
        if written != num_bytes:
            raise StepFailed(f"llama.cpp wrote {written} of {num_bytes} bytes of a sequence's state")
        return data

    def _write(self, sequence: int, state: bytes) -> None:
        """In place of what the sequence has in the cache. Only states that are known to be right."""
        self._row_to_batch = []
        self._forget(sequence)
        if self._set_state(state, self._ids[sequence], 0, len(state)) != len(state):
            reason = native_log.reason() or "no reason given"
            raise StepFailed(f"llama.cpp took back no state of a sequence: {reason}")

    def _warm_up(self) -> int:
        """Run two positions once (the first step pays for page faults and the graph), and learn from
        their state what form it has. Raises UnknownState, LoadFailed."""
        for index in range(2):
            self._put_dummy(0, 0, index)
            self._batch_logits[0] = 1
            if self._decode(1) != 0:
                raise LoadFailed(
                    f"{self._files.name}: the first step failed: {native_log.reason() or 'no reason'}"
                )
        state = self._state(0)
        self._form = StateForm.read_from(state, self._max_sequences)
        self._read = None
        self._lib.llama_memory_clear(self._memory, False)
        return self._form.row_bytes
