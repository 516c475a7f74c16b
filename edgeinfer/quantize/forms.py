"""What a matrix's rows become: a form, with its grid, how its scales are found and how it is stored.

    form = GgmlForm("Q4_0", rows)
    blocks = form.rounded(weight, importance)
    form.numbers(blocks)

ggml's types are here; those of folders in folder_forms.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

import numpy as np

from edgeinfer_models.conversion.ggml_grids import GRIDS, pack, to_f16, unpack

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgeinfer.backend import RowQuantizer
    from edgeinfer_models.conversion.grids import Grid, Parts

    Floats = npt.NDArray[np.float32]
    Blocks = npt.NDArray[np.uint8]


class Form(Protocol):
    """grid: None where numbers lie on no even one; then rows can be rounded, and nothing else."""

    @property
    def grid(self) -> Grid | None: ...

    def rounded(self, rows: Floats, importance: Floats) -> Blocks:
        """rows: (n, width). importance: of each column: shape (width,). Returns (n, bytes of a row)."""
        ...

    def numbers(self, blocks: Blocks) -> Floats:
        """What blocks mean: shape (n, width)."""
        ...

    def search(self, rows: Floats, importance: Floats) -> Parts:
        """Scales that suit these numbers, and the nearest codes. importance: above 0."""
        ...

    def as_stored(self, values: Floats) -> Floats:
        """As scales and offsets can be; what is too large is not finite."""
        ...

    def pack(self, parts: Parts) -> Blocks:
        """(n, bytes of a row)."""
        ...


class GgmlForm:
    """A type of ggml's. Its search weighs numbers by importance."""

    def __init__(self, type_name: str, rows: RowQuantizer) -> None:
        self.name = type_name
        self.grid = GRIDS.get(type_name)
        self._rows = rows

    def rounded(self, rows: Floats, importance: Floats) -> Blocks:
        return self._rows.quantize(self.name, rows, importance)

    def numbers(self, blocks: Blocks) -> Floats:
        return numbers_of(self.name, blocks)

    def search(self, rows: Floats, importance: Floats) -> Parts:
        return unpack(self.name, self.rounded(np.ascontiguousarray(rows), importance))

    def as_stored(self, values: Floats) -> Floats:
        return to_f16(values)

    def pack(self, parts: Parts) -> Blocks:
        return pack(self.name, parts)


def ggml_forms(types: Iterable[str | None], rows: RowQuantizer) -> dict[str, Form]:
    """By their names. rows: used as long as they are."""
    return {name: GgmlForm(name, rows) for name in types if name is not None}


def numbers_of(type_name: str, blocks: Blocks) -> Floats:
    """What the blocks of a type of ggml's mean: shape (rows, width)."""
    if type_name in GRIDS:
        return unpack(type_name, blocks).numbers(GRIDS[type_name])
    import gguf
    from gguf.quants import dequantize

    found: Floats = dequantize(np.ascontiguousarray(blocks), gguf.GGMLQuantizationType[type_name])
    return found
