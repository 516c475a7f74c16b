"""Rows of made-up weights in ggml's types, for files whose speed alone counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from edgeinfer_models.conversion.floats import HELD_AS, from_float32

if TYPE_CHECKING:
    from edgeinfer.backend import RowQuantizer

_ELEMENTS = 2**19  # drawn and rounded once for each type and width; then the same again and again
_SEED = 1


class MadeUpRows:
    """Implements `Blocks` of conversion/stand_in.py: as many rows as are asked for, in no more time than
    they take to be written. They have the size that keeps activations near 1."""

    def __init__(self, quantizer: RowQuantizer) -> None:
        self._quantizer = quantizer
        self._drawn: dict[tuple[str, int], tuple[bytes, int]] = {}

    def __call__(self, type_name: str, rows: int, width: int) -> Iterator[bytes]:
        chunk, held = self._chunk(type_name, width)
        for _ in range(rows // held):
            yield chunk
        if rows % held:
            yield chunk[: len(chunk) // held * (rows % held)]

    def _chunk(self, type_name: str, width: int) -> tuple[bytes, int]:
        """Some rows, and how many."""
        import numpy as np

        found = self._drawn.get((type_name, width))
        if found is None:
            rows = max(1, _ELEMENTS // width)
            random = np.random.Generator(np.random.SFC64(_SEED))
            values = random.standard_normal((rows, width), np.float32) / np.float32(width**0.5)
            if type_name in HELD_AS:
                chunk = from_float32(values, type_name).tobytes()
            else:
                chunk = self._quantizer.quantize(type_name, values).tobytes()
            found = self._drawn[type_name, width] = (chunk, rows)
        return found
