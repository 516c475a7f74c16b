"""How long each sequence is, where each has a stream of cells to itself: position p lies in cell p."""

from __future__ import annotations


class StreamTable:
    """`streams` sequences of at most `most` cells each. It has what a `CellTable` is asked, too."""

    def __init__(self, streams: int, most: int) -> None:
        self.most = most
        self.size = streams * most
        self._lengths: dict[int, int] = {}

    def sequences(self) -> tuple[int, ...]:
        return tuple(self._lengths)

    def length(self, sequence: int) -> int:
        return self._lengths[sequence]

    def length_of(self, sequence: int) -> int | None:
        """None if there is no such sequence."""
        return self._lengths.get(sequence)

    def can_decode(self, sequence: int) -> bool:
        return self._lengths[sequence] < self.most

    def reclaimable(self) -> int:
        """Cells that are free."""
        return self.size - sum(self._lengths.values())

    def is_in_order(self, sequence: int) -> bool:
        return sequence in self._lengths

    def open(self, sequence: int) -> None:
        assert sequence not in self._lengths
        self._lengths[sequence] = 0

    def close(self, sequence: int) -> None:
        del self._lengths[sequence]

    def append(self, sequence: int, count: int) -> None:
        assert self._lengths[sequence] + count <= self.most
        self._lengths[sequence] += count

    def cut(self, sequence: int, length: int) -> None:
        assert 0 <= length <= self._lengths[sequence]
        self._lengths[sequence] = length

    def check_integrity(self) -> None:
        assert all(0 <= length <= self.most for length in self._lengths.values())
