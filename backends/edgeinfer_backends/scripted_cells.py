"""The scripted backend's KV cache: a finite table of cells with a position, a content and owners.

A cell's *value* stands for its keys and values: a hash of its token, its position and everything its
sequence could see when it was computed, as in a real model, where deeper layers have mixed that in. What
a sequence predicts is a hash of the (position, value) pairs of its cells, read from the table every
time. So a wrong fork, a stale cell, a missed shift or a shared cell that moved changes the output, and
eviction is, as in a real model, not the same as never having had the tokens.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeinfer.errors import OutOfCells, SharedCells, SnapshotRejected

BYTES_PER_CELL = 12  # a token (4) and its value (8), as in a snapshot

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15

_MAGIC = b"EISCRPT1"
_HEADER = struct.Struct("<8s16sII")  # magic, identity, first position, positions
_CELL = np.dtype([("token", "<u4"), ("value", "<u8")])
_CHECKSUM_BYTES = 16


def scramble(word: int) -> int:
    """64 bits to 64 well-mixed bits. Source: splitmix64's finalizer (Steele et al. 2014)."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def scramble_all(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


@dataclass
class _Cells:
    positions: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    values: npt.NDArray[np.uint64]
    owners: list[set[int]]


class CellTable:
    """`num_cells` cells and the sequences that own them. Every failed call changes nothing.

    Sequences are handles of the caller's choosing, at most `max_length` positions each.
    """

    def __init__(self, num_cells: int, max_length: int, seed: int) -> None:
        self.num_cells = num_cells
        self.max_length = max_length
        self._seed = scramble(seed & _WORD)
        self._cells = _Cells(
            positions=np.full(num_cells, -1, dtype=np.int64),
            tokens=np.zeros(num_cells, dtype=np.int64),
            values=np.zeros(num_cells, dtype=np.uint64),
            owners=[set() for _ in range(num_cells)],
        )
        self._free = np.ones(num_cells, dtype=np.bool_)
        self._sequences: dict[int, list[int]] = {}  # sequence -> its cells by position

    # -- questions ---------------------------------------------------------------------------------

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._sequences

    def __len__(self) -> int:
        return len(self._sequences)

    def length(self, sequence: int) -> int:
        return len(self._sequences[sequence])

    def num_free(self) -> int:
        return int(np.count_nonzero(self._free))

    def tokens(self, sequence: int) -> list[int]:
        """What the cells hold, in position order."""
        tokens: list[int] = self._cells.tokens[self._sequences[sequence]].tolist()
        return tokens

    def is_in_order(self, sequence: int) -> bool:
        return bool(np.all(np.diff(self._sequences[sequence]) > 0))

    def is_shared(self, sequence: int, start: int = 0) -> bool:
        return any(len(self._cells.owners[cell]) > 1 for cell in self._sequences[sequence][start:])

    # -- growing -----------------------------------------------------------------------------------

    def plan(self, counts: Sequence[tuple[int, int]]) -> list[list[int]]:
        """Free cells for each (sequence, number of new positions); nothing is taken yet.

        First fit from behind the sequence's own last cell, so that its cells stay in position order
        until the end of the table is reached. Raises OutOfCells.
        """
        for sequence, count in counts:
            if self.length(sequence) + count > self.max_length:
                raise OutOfCells(
                    f"sequence {sequence} has {self.length(sequence)} positions and {count} more do not"
                    f" fit into its context of {self.max_length}; evict, or load with more context"
                )
        wanted = sum(count for _, count in counts)
        if wanted > self.num_free():
            raise OutOfCells(
                f"the step needs {wanted} cells and {self.num_free()} of {self.num_cells} are free;"
                " free or shorten a sequence"
            )
        free = self._free.copy()
        planned = []
        for sequence, count in counts:
            cells = self._sequences[sequence]
            head = max(cells) + 1 if cells else 0
            behind = np.flatnonzero(free[head:])[:count] + head
            chosen = np.concatenate([behind, np.flatnonzero(free[:head])[: count - len(behind)]])
            free[chosen] = False
            planned.append([int(cell) for cell in chosen])
        return planned

    def append(self, sequence: int, cells: Sequence[int], tokens: Sequence[int]) -> list[int]:
        """Compute the tokens into cells that `plan` gave. Returns the state after each token: all that
        the next prediction depends on."""
        position = self.length(sequence)
        seen = self._seen(sequence)
        states = []
        for cell, token in zip(cells, tokens, strict=True):
            value = scramble(seen ^ scramble(self._seed + token * _GOLDEN + (position << 32) & _WORD))
            self._take(cell, sequence, position, token, value)
            seen = (seen + scramble(value + (position + 1) * _GOLDEN & _WORD)) & _WORD
            states.append(scramble(seen ^ self._seed))
            position += 1
        return states

    def _seen(self, sequence: int) -> int:
        """A digest of the (position, value) pairs a sequence owns; the cells' order does not enter."""
        cells = self._sequences[sequence]
        places = (self._cells.positions[cells] + 1).astype(np.uint64) * np.uint64(_GOLDEN)
        terms = scramble_all(self._cells.values[cells] + places)
        return int(terms.sum(dtype=np.uint64))

    def _take(self, cell: int, sequence: int, position: int, token: int, value: int) -> None:
        self._cells.positions[cell] = position
        self._cells.tokens[cell] = token
        self._cells.values[cell] = value
        self._cells.owners[cell] = {sequence}
        self._free[cell] = False
        self._sequences[sequence].append(cell)

    # -- sequences ---------------------------------------------------------------------------------

    def open(self, sequence: int) -> None:
        assert sequence not in self._sequences
        self._sequences[sequence] = []

    def free(self, sequence: int) -> None:
        self._release(sequence, self._sequences[sequence])
        del self._sequences[sequence]

    def rewind(self, sequence: int, length: int) -> None:
        self._release(sequence, self._sequences[sequence][length:])
        del self._sequences[sequence][length:]

    def share(self, sequence: int, length: int, new: int) -> None:
        """`new` owns the first `length` cells of `sequence` too."""
        cells = self._sequences[sequence][:length]
        for cell in cells:
            self._cells.owners[cell].add(new)
        self._sequences[new] = cells

    def copy(self, sequence: int, length: int, new: int) -> None:
        """`new` gets cells of its own, equal to the first `length` of `sequence`. Raises OutOfCells."""
        contents = self._contents(self._sequences[sequence][:length])
        self._sequences[new] = []
        try:
            (cells,) = self.plan([(new, length)])
        except OutOfCells:
            del self._sequences[new]
            raise
        self._fill(cells, new, contents)

    def privatise(self, sequence: int) -> None:
        """Give a sequence cells of its own from the first shared one on. Raises OutOfCells."""
        cells = self._sequences[sequence]
        shared = [len(self._cells.owners[cell]) > 1 for cell in cells]
        if not any(shared):
            return
        if sum(shared) > self.num_free():
            raise OutOfCells(
                f"a private copy of sequence {sequence} needs {sum(shared)} more cells and"
                f" {self.num_free()} of {self.num_cells} are free; free or shorten a sequence"
            )
        first = shared.index(True)
        contents = self._contents(cells[first:])
        self.rewind(sequence, first)
        (planned,) = self.plan([(sequence, len(contents))])
        self._fill(planned, sequence, contents)

    def _contents(self, cells: Sequence[int]) -> list[tuple[int, int, int]]:
        table = self._cells
        return [(int(table.positions[c]), int(table.tokens[c]), int(table.values[c])) for c in cells]

    def _fill(
        self, cells: Sequence[int], sequence: int, contents: Sequence[tuple[int, int, int]]
    ) -> None:
        for cell, (position, token, value) in zip(cells, contents, strict=True):
            self._take(cell, sequence, position, token, value)

    def evict(self, sequence: int, start: int, stop: int) -> None:
        """Drop positions [start, stop) and shift those behind. Values stay what they were: they have
        seen the dropped tokens. Raises SharedCells."""
        if self.is_shared(sequence, start):
            raise SharedCells(
                f"sequence {sequence} shares cells from position {start} on, and moving them would move"
                " them for the other owners; privatise it first"
            )
        cells = self._sequences[sequence]
        self._release(sequence, cells[start:stop])
        del cells[start:stop]
        self._cells.positions[cells[start:]] -= stop - start

    def _release(self, sequence: int, cells: Sequence[int]) -> None:
        for cell in cells:
            self._cells.owners[cell].discard(sequence)
            if not self._cells.owners[cell]:
                self._free[cell] = True
                self._cells.positions[cell] = -1

    # -- snapshots ---------------------------------------------------------------------------------

    def snapshot(self, sequence: int, start: int, stop: int, identity: bytes) -> bytes:
        cells = self._sequences[sequence][start:stop]
        records = np.empty(len(cells), dtype=_CELL)
        records["token"] = self._cells.tokens[cells]
        records["value"] = self._cells.values[cells]
        body = _HEADER.pack(_MAGIC, identity, start, stop - start) + records.tobytes()
        return body + _checksum(body)

    def restore(self, sequence: int, payload: bytes, num_positions: int, identity: bytes) -> None:
        """Raises SnapshotRejected, OutOfCells."""
        start = self.length(sequence)
        records = _read_snapshot(payload, start, num_positions, identity)
        (cells,) = self.plan([(sequence, num_positions)])
        for offset, (cell, record) in enumerate(zip(cells, records, strict=True)):
            self._take(cell, sequence, start + offset, int(record["token"]), int(record["value"]))

    # -- invariants --------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        owners: dict[int, set[int]] = {}
        for sequence, cells in self._sequences.items():
            assert len(set(cells)) == len(cells), f"sequence {sequence} lists a cell twice"
            positions = self._cells.positions[cells].tolist()
            assert positions == list(range(len(cells))), f"sequence {sequence} has positions {positions}"
            for cell in cells:
                owners.setdefault(cell, set()).add(sequence)
        for cell in range(self.num_cells):
            expected = owners.get(cell, set())
            found = self._cells.owners[cell]
            assert found == expected, f"cell {cell} is owned by {found}, listed by {expected}"
            assert bool(self._free[cell]) == (not expected), f"cell {cell}'s free flag is wrong"


def _checksum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_CHECKSUM_BYTES).digest()


def _read_snapshot(
    payload: bytes, start: int, num_positions: int, identity: bytes
) -> npt.NDArray[np.void]:
    if len(payload) < _HEADER.size + _CHECKSUM_BYTES:
        raise SnapshotRejected(f"the snapshot has only {len(payload)} bytes; is it truncated?")
    body, checksum = payload[:-_CHECKSUM_BYTES], payload[-_CHECKSUM_BYTES:]
    magic, made_for, first, count = _HEADER.unpack_from(body)
    if magic != _MAGIC:
        raise SnapshotRejected("the snapshot was not made by the scripted backend")
    if checksum != _checksum(body):
        raise SnapshotRejected("the snapshot's checksum disagrees with its contents; it is damaged")
    if made_for != identity:
        raise SnapshotRejected("the snapshot belongs to another script, KV type or adapter")
    if count != num_positions or len(body) != _HEADER.size + count * _CELL.itemsize:
        raise SnapshotRejected(f"the snapshot holds {count} positions, not {num_positions}")
    if first != start:
        raise SnapshotRejected(f"the snapshot begins at position {first}, the sequence ends at {start}")
    return np.frombuffer(body, dtype=_CELL, offset=_HEADER.size)
