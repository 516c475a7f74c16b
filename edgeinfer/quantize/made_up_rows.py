"""Rows of made-up weights in ggml's types, for files whose speed alone counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeinfer_models.conversion.floats import HELD_AS, from_float32

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgeinfer.backend import RowQuantizer

_ELEMENTS = 2**19  # drawn and rounded once for each type and width
_SEED = 1


class MadeUpRows:
    """Implements `MadeUp` of conversion/stand_in.py. Their size keeps activations near 1."""

    def __init__(self, quantizer: RowQuantizer) -> None:
        self._quantizer = quantizer
        self._drawn: dict[tuple[str, int], npt.NDArray[np.uint8]] = {}

    def __call__(self, type_name: str, width: int) -> npt.NDArray[np.uint8]:
        import numpy as np

        found = self._drawn.get((type_name, width))
        if found is None:
            rows = max(1, _ELEMENTS // width)
            random = np.random.Generator(np.random.SFC64(_SEED))
            values = random.standard_normal((rows, width), np.float32) / np.float32(width**0.5)
            if type_name in HELD_AS:
                found = from_float32(values, type_name).view(np.uint8)
            else:
                found = self._quantizer.quantize(type_name, values)
            self._drawn[type_name, width] = found
        return found
