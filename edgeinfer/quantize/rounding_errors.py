"""What rounding costs each tensor, seen while a file is written: some rows of each part are read back.

errors = RoundingErrors()
quantize(plan, watch=errors.watching)
errors.found(plan.types)
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgeinfer.quality.tensor_error import TensorError
from edgeinfer_models.conversion.tensor_data import Encode

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

ROWS = 8  # of a part (some hundred rows): enough for two digits of a tensor's error


class RoundingErrors:
    """|W - Q|² / |W|² of each tensor that is rounded, over evenly spaced rows. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[str, tuple[float, float]] = {}

    def watching(self, encode: Encode) -> Encode:
        """The same, looked at."""

        def watched(
            name: str, type_name: str, rows: npt.NDArray[np.float32], first_row: int
        ) -> npt.NDArray[np.uint8]:
            blocks = encode(name, type_name, rows, first_row)
            step = max(1, len(rows) // ROWS)
            self._add(name, type_name, rows[::step], blocks[::step])
            return blocks

        return watched

    def found(self, types: Mapping[str, str]) -> tuple[TensorError, ...]:
        """types: of all tensors, by name."""
        return tuple(
            TensorError(name, types[name], lost / whole)
            for name, (lost, whole) in sorted(self._sums.items())
            if whole > 0.0
        )

    def _add(
        self,
        name: str,
        type_name: str,
        rows: npt.NDArray[np.float32],
        blocks: npt.NDArray[np.uint8],
    ) -> None:
        import numpy as np

        from edgeinfer.quantize.forms import numbers_of

        try:
            meant = numbers_of(type_name, np.ascontiguousarray(blocks))
        except NotImplementedError:  # a type that the gguf package cannot read
            return
        lost = float(np.square(meant - rows, dtype=np.float64).sum())
        whole = float(np.square(rows, dtype=np.float64).sum())
        with self._lock:
            before = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (before[0] + lost, before[1] + whole)
