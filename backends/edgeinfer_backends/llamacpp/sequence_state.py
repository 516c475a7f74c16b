"""llama.cpp's state of one sequence, taken apart into rows and put together again.

The form is that of llama-cpp-python 0.3.36 (`state_seq_get_data`, llama-context.cpp; `state_write`,
llama-kv-cache.cpp), for a cache with a stream for each sequence, V not transposed and cells without an
extension: u32 magic, i32 sequence, u32 streams; for each stream u32 cells, and where there are any, for
each cell i32 position, u32 owners = 1, i32 owner, then u32 transposed = 0, u32 layers, for each layer
i32 type of K, u64 bytes of a row, the rows, and the same for V. Nothing of it is assumed of another
version: `StateForm.read_from` checks a state of two cells byte for byte, and refuses.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeinfer_backends.llamacpp.raw_bytes import unfilled_bytes, writable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]

_HEAD = struct.Struct("<IiI")  # magic, sequence, streams
_COUNT = struct.Struct("<I")
_CELL = struct.Struct("<iIi")  # position, owners, owner
_DATA = struct.Struct("<II")  # transposed, layers
_ROWS = struct.Struct("<iQ")  # type, bytes of a row


class UnknownState(Exception):
    """llama.cpp writes another form than this module knows."""


@dataclass(frozen=True)
class StateForm:
    """magic, streams: as in the head. sections: (type, bytes of a row) of K of each layer, then of V."""

    magic: int
    streams: int
    sections: tuple[tuple[int, int], ...]

    @property
    def row_bytes(self) -> int:
        """Of one position, in all layers."""
        return sum(size for _, size in self.sections)

    @classmethod
    def read_from(cls, state: bytes, streams: int) -> StateForm:
        """state: of a sequence with positions 0 and 1. Raises UnknownState."""
        try:
            return _read(state, streams)
        except struct.error as error:
            raise UnknownState(f"the state of a sequence is too short: {error}") from None

    def size(self, cells: int) -> int:
        """Bytes of the state of so many cells, of at least one."""
        heads = _HEAD.size + self.streams * _COUNT.size + cells * _CELL.size + _DATA.size
        return heads + len(self.sections) * _ROWS.size + cells * self.row_bytes

    def rows(
        self, state: bytes, native: int, start: int, stop: int, found: Bytes | None = None
    ) -> Bytes:
        """Positions [start, stop) of the state of llama.cpp's sequence `native`: section after section,
        each with its rows in order. The state's cells must lie in position order.
        found: where to put them, (stop - start) * row_bytes."""
        import numpy as np

        (cells,) = _COUNT.unpack_from(state, _HEAD.size + native * _COUNT.size)
        whole = np.frombuffer(state, dtype=np.uint8)
        offset = _HEAD.size + (native + 1) * _COUNT.size + cells * _CELL.size + _DATA.size
        if found is None:
            found = np.empty((stop - start) * self.row_bytes, dtype=np.uint8)
        done = 0
        for _, size in self.sections:
            offset += _ROWS.size
            count = (stop - start) * size
            found[done : done + count] = whole[offset + start * size : offset + stop * size]
            done += count
            offset += cells * size
        return found

    def state(self, blocks: Sequence[tuple[Bytes, int]], start: int = 0) -> bytes:
        """A state with the positions of several (rows, positions), from `start` on."""
        cells = sum(count for _, count in blocks)
        data = unfilled_bytes(self.size(cells), is_passing=True)
        state = writable(data, 0)
        head = bytearray(_HEAD.pack(self.magic, 0, self.streams) + _COUNT.pack(cells))
        for position in range(start, start + cells):
            head += _CELL.pack(position, 1, 0)
        head += _DATA.pack(0, len(self.sections) // 2)
        offset = _put(state, 0, head)
        taken = [0] * len(blocks)
        for kind, size in self.sections:
            offset = _put(state, offset, _ROWS.pack(kind, size))
            for index, (rows, count) in enumerate(blocks):
                part = rows[taken[index] : taken[index] + count * size]
                state[offset : offset + part.size] = part
                taken[index] += part.size
                offset += part.size
        # the other streams have no cells
        offset = _put(state, offset, bytes((self.streams - 1) * _COUNT.size))
        assert offset == state.size
        return data


def _put(state: Bytes, offset: int, data: bytes | bytearray) -> int:
    import numpy as np

    end = offset + len(data)
    state[offset:end] = np.frombuffer(data, dtype=np.uint8)
    return end


def positions_of(state: bytes, native: int) -> list[int]:
    """The positions of a state's cells, in cell order; for checks."""
    at = _HEAD.size + native * _COUNT.size
    (cells,) = _COUNT.unpack_from(state, at)
    first = at + _COUNT.size
    return [_CELL.unpack_from(state, first + i * _CELL.size)[0] for i in range(cells)]


def _read(state: bytes, streams: int) -> StateForm:
    magic, native, told = _HEAD.unpack_from(state)
    if told != streams or not 0 <= native < streams:
        raise UnknownState(f"the state has {told} streams; {streams} were asked for")
    offset = _HEAD.size
    for stream in range(native + 1):
        (cells,) = _COUNT.unpack_from(state, offset)
        offset += _COUNT.size
        if cells != (2 if stream == native else 0):
            raise UnknownState(f"stream {stream} has {cells} cells")
    for position in range(2):
        if _CELL.unpack_from(state, offset) != (position, 1, native):
            raise UnknownState("the cells are told in another form")
        offset += _CELL.size
    transposed, layers = _DATA.unpack_from(state, offset)
    offset += _DATA.size
    if transposed or not 0 < layers <= 4096:
        raise UnknownState("values are transposed, or layers told in another form")
    sections = []
    for _ in range(2 * layers):
        kind, size = _ROWS.unpack_from(state, offset)
        offset += _ROWS.size + 2 * size
        if not 0 < size <= 1 << 24 or offset > len(state):
            raise UnknownState("rows are told in another form")
        sections.append((kind, size))
    form = StateForm(magic, streams, tuple(sections))
    if offset + (streams - 1 - native) * _COUNT.size != len(state) or form.size(2) != len(state):
        raise UnknownState("the state has another length")
    return form
