"""The layout `private` for one sequence: its cells are copied a block at a time.

llama.cpp gives and takes the state of a whole sequence. With a stream for each that is the only way to
a part of one, so a copy of all its cells is there for a moment: for the one long conversation of a chat
as much again as the KV cache. Here a second sequence of llama.cpp's shares the cells (a unified cache,
which for one sequence has the same graph): the positions wanted are given to it, and its state is a
block's. What is restored lands in the first free cells, which follow those in use, so position p lies in
cell p here too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeinfer.backend import BLOCK_TOKENS
from edgeinfer.errors import StepFailed
from edgeinfer_backends.llamacpp.library import native_log
from edgeinfer_backends.llamacpp.streams import PrivateStreams

if TYPE_CHECKING:
    from edgeinfer_backends.llamacpp.sequence_state import Bytes

_OWN, _PART = 0, 1  # llama.cpp's sequences: ours, and what is copied of it


class LoneStream(PrivateStreams):
    def restore(self, sequence: int, payload: bytes, num_positions: int) -> None:
        super().restore(sequence, payload, num_positions)
        self._settle(sequence)

    def _settle(self, sequence: int) -> None:
        have = self._num_native(sequence)
        for rows, count in self._pending.pop(sequence, ()):
            try:
                self._put(rows, have, have + count)
            except StepFailed:
                self._streams.cut(sequence, have)
                raise
            have += count

    def _rows(self, sequence: int, start: int, stop: int, found: Bytes | None = None) -> Bytes:
        self._check_sequence(sequence)
        self._copy(_OWN, _PART, start, stop)
        try:
            return self._form.rows(self._native_state(_PART), 0, 0, stop - start, found)
        finally:
            self._lib.llama_memory_seq_rm(self._memory, _PART, -1, -1)

    def _close_gap(self, sequence: int, start: int) -> None:
        length = self._streams.length(sequence)
        for begin in range(start, length, BLOCK_TOKENS):
            end = min(begin + BLOCK_TOKENS, length)
            rows = self._rows(sequence, begin, end)
            self._lib.llama_memory_seq_rm(self._memory, _OWN, begin, end)
            self._put(rows, begin, end)

    def _put(self, rows: Bytes, start: int, stop: int) -> None:
        """Positions [start, stop), into the first free cells. Only rows that are known to be right."""
        self._row_to_batch = []
        state = self._form.state([(rows, stop - start)], start)
        try:
            if self._set_state(state, _PART, 0, len(state)) != len(state):
                reason = native_log.reason() or "no reason given"
                raise StepFailed(f"llama.cpp took back no part of a sequence: {reason}")
            self._copy(_PART, _OWN, start, stop)
        finally:
            self._lib.llama_memory_seq_rm(self._memory, _PART, -1, -1)
