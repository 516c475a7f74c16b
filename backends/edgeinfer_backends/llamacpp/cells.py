"""Where llama.cpp's unified KV cache puts each position, mirrored in integers.

llama.cpp fills the first empty cells from a *head*, and a freed cell pulls the head back to itself:
the next token of another sequence then lands in the hole, out of position order, and results change
(measured: 21 of 24 greedy answers). So cells are handed out like a log: always at `top`, above every
cell in use. A freed cell below the top stays occupied by a *grave* sequence until the cache is
compacted; a freed run that ends at the top is really given back. The head then always equals the top,
and every sequence's cells lie in position order by construction.

Order is not all: the flash attention that prefill uses walks over the cache in tiles of 64 cells, so a
sequence's results also depend on how its positions fall into tiles (measured: logits up to 0.7 apart
after a shift by 32 cells, none after 64). A sequence is *tiled* where position p lies in a cell c with
c = p (mod 64) and each of its tiles is in one piece, as in a cache it has to itself.

Nothing here calls native code; `CellTable` says what to do and keeps count of it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

# When half of the cells below the top is dead, and at least so many, masked cells cost more than moving
# the live ones.
COMPACT_AT_LEAST = 512


@dataclass(frozen=True)
class Drop:
    """What dropping positions of a sequence means for its cells.

    buried: runs of positions [start, stop) to give to the grave first; the rest is shared with other
    sequences or lies at the top and is freed.
    """

    buried: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Piece:
    """Positions [start, stop) that exactly the sequences `owners` hold, in the same cells."""

    owners: tuple[int, ...]
    start: int
    stop: int


class CellTable:
    """size: cells of the cache. A sequence is a list of cell indices by position."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.most = size  # cells that one sequence may have
        self.top = 0
        self.dead = 0  # cells below the top that only the grave holds
        self._cells: dict[int, list[int]] = {}
        self._owners = [0] * size  # live sequences that hold each cell

    # -- questions -------------------------------------------------------------------------------

    def sequences(self) -> tuple[int, ...]:
        return tuple(self._cells)

    def length(self, sequence: int) -> int:
        return len(self._cells[sequence])

    def length_of(self, sequence: int) -> int | None:
        """None if there is no such sequence."""
        cells = self._cells.get(sequence)
        return None if cells is None else len(cells)

    def can_decode(self, sequence: int) -> bool:
        """Whether a token more needs nothing but the next cell."""
        return self.top < self.size and self.dead < COMPACT_AT_LEAST

    def room(self) -> int:
        """Cells that can be filled without compaction."""
        return self.size - self.top

    def reclaimable(self) -> int:
        """Cells that can be filled after compaction."""
        return self.room() + self.dead

    def is_shared(self, sequence: int, start: int = 0) -> bool:
        owners = self._owners
        return any(owners[cell] > 1 for cell in self._cells[sequence][start:])

    def is_in_order(self, sequence: int) -> bool:
        cells = self._cells[sequence]
        return all(a < b for a, b in pairwise(cells))

    def first_position_from(self, sequence: int, from_cell: int) -> int:
        """The first position whose cell is at or above `from_cell`; the length if there is none."""
        return bisect_left(self._cells[sequence], from_cell)

    def first_untiled(self, sequence: int, tile: int) -> int:
        """The first position of the first tile that is not placed as in a cache of the sequence's own;
        the length if all are, and the next position can follow in the next cell."""
        cells = self._cells[sequence]
        for start in range(0, len(cells), tile):
            first, last = cells[start], cells[min(start + tile, len(cells)) - 1]
            if first % tile or last - first != min(tile, len(cells) - start) - 1:
                return start
        rest = len(cells) % tile
        if rest and cells[-1] != self.top - 1:
            return len(cells) - rest
        return len(cells)

    def lowest_dead(self) -> int:
        """The first dead cell, or `top`."""
        return next((c for c in range(self.top) if self._owners[c] == 0), self.top)

    # -- changes ---------------------------------------------------------------------------------

    def open(self, sequence: int) -> None:
        assert sequence not in self._cells
        self._cells[sequence] = []

    def close(self, sequence: int) -> None:
        assert not self._cells[sequence]
        del self._cells[sequence]

    def append(self, sequence: int, count: int) -> None:
        """`count` more positions at the top; the caller made sure of the room."""
        assert count <= self.room()
        top = self.top
        if count == 1:  # the decode path
            self._cells[sequence].append(top)
            self._owners[top] = 1
        else:
            self._cells[sequence].extend(range(top, top + count))
            self._owners[top : top + count] = [1] * count
        self.top = top + count

    def bury(self, count: int) -> None:
        """`count` cells at the top were given to the grave, to align what comes next."""
        assert count <= self.room()
        self.top += count
        self.dead += count

    def share(self, source: int, target: int, length: int) -> None:
        cells = self._cells[source][:length]
        for cell in cells:
            self._owners[cell] += 1
        self._cells[target] = cells

    def drop(self, sequence: int, start: int, stop: int) -> Drop:
        """Forget positions [start, stop). Positions after them move down; their cells stay, so none of
        them may be shared: it would have two positions."""
        cells = self._cells[sequence]
        assert stop == len(cells) or not self.is_shared(sequence, start)
        going = cells[start:stop]
        del cells[start:stop]
        freed = []
        for cell in going:
            self._owners[cell] -= 1
            if self._owners[cell] == 0:
                freed.append(cell)
        kept = self._give_back(freed)
        self.dead += len(kept)
        buried = [start + i for i, cell in enumerate(going) if cell in kept]
        return Drop(tuple(_runs(buried)))

    def _give_back(self, freed: list[int]) -> set[int]:
        """Lower the top over the freed cells that end there; return the others."""
        remaining = set(freed)
        while self.top - 1 in remaining:
            self.top -= 1
            remaining.discard(self.top)
        return remaining

    def has_live_cells(self) -> bool:
        return self.top > self.dead

    def clear(self) -> None:
        """No live cell is left and the cache was emptied."""
        assert not self.has_live_cells()
        self.top = self.dead = 0

    # -- compaction ------------------------------------------------------------------------------

    def pieces(self, from_cell: int = 0) -> list[Piece]:
        """The cells at or above `from_cell`, cut where the set of owners changes.

        Restoring them in this order, each after the other, leaves every sequence in position order.
        """
        holders: dict[int, list[int]] = {}
        for sequence, cells in self._cells.items():
            for cell in cells:
                if cell >= from_cell:
                    holders.setdefault(cell, []).append(sequence)
        found: list[tuple[int, Piece]] = []
        done: set[int] = set()
        for cells in self._cells.values():
            position = 0
            while position < len(cells):
                cell = cells[position]
                if cell < from_cell or cell in done:
                    position += 1
                    continue
                owners = holders[cell]
                begin = position
                while (
                    position < len(cells)
                    and cells[position] >= from_cell
                    and cells[position] not in done
                    and holders[cells[position]] == owners
                ):
                    done.add(cells[position])
                    position += 1
                found.append((cell, Piece(tuple(owners), begin, position)))
        # By start position first: a sequence's earlier piece must come before its later one, and a
        # shared prefix starts before what follows it in every owner.
        found.sort(key=lambda item: (item[1].start, item[0]))
        return [piece for _, piece in found]

    def lift(self, from_cell: int) -> None:
        """Everything at or above `from_cell` was taken out of the cache (its positions come back
        through `put`)."""
        for cell in range(from_cell, self.top):
            self._owners[cell] = 0
        self.top = from_cell
        self.dead = sum(1 for cell in range(from_cell) if self._owners[cell] == 0)

    def put(self, piece: Piece, start: int, stop: int) -> None:
        """Positions [start, stop) of a lifted piece are in the cache again, at the top."""
        count = stop - start
        assert count <= self.room()
        for sequence in piece.owners:
            self._cells[sequence][start:stop] = range(self.top, self.top + count)
        for cell in range(self.top, self.top + count):
            self._owners[cell] = len(piece.owners)
        self.top += count

    # -- invariants ------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        counted = [0] * self.size
        for sequence, cells in self._cells.items():
            assert len(set(cells)) == len(cells), f"sequence {sequence} holds a cell twice"
            assert self.is_in_order(sequence), f"sequence {sequence} is out of position order"
            for cell in cells:
                counted[cell] += 1
        assert counted == self._owners, "owner counts disagree with the sequences"
        assert 0 <= self.top <= self.size
        assert all(owners == 0 for owners in self._owners[self.top :]), "a live cell above the top"
        assert self.dead == self._owners[: self.top].count(0), "dead cells miscounted"


def _runs(positions: Iterable[int]) -> list[tuple[int, int]]:
    """[3, 4, 5, 9] -> [(3, 6), (9, 10)]"""
    runs: list[tuple[int, int]] = []
    for position in positions:
        if runs and runs[-1][1] == position:
            runs[-1] = (runs[-1][0], position + 1)
        else:
            runs.append((position, position + 1))
    return runs
