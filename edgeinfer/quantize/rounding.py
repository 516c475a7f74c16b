"""Rows rounded to a type's blocks, each number by itself ("rtn") or the columns that matter more exactly
("imatrix"): what llama-quantize writes, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edgeinfer.errors import ModelFileInvalid
from edgeinfer.registry import get_backend
from edgeinfer_models.conversion.tensor_data import Encode

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]


@contextmanager
def rounding(importance: Mapping[str, Floats], num_rows: Mapping[str, int]) -> Iterator[Encode]:
    """importance: by GGUF name, of each column of each of a tensor's matrices: (matrices, width).
    num_rows: of one such matrix. Raises BackendUnavailable."""
    # One thread each: what writes a file has several, which ask for different parts.
    rounder = get_backend("llamacpp").row_quantizer(threads=1)

    def encode(
        name: str, type_name: str, rows: npt.NDArray[np.float32], first_row: int
    ) -> npt.NDArray[np.uint8]:
        import numpy as np

        weights = importance.get(name)
        found, start = [], 0
        try:
            if weights is None:
                return rounder.quantize(type_name, rows)
            while start < len(rows):
                matrix, row = divmod(first_row + start, num_rows[name])
                stop = min(start + num_rows[name] - row, len(rows))
                found.append(rounder.quantize(type_name, rows[start:stop], weights[matrix]))
                start = stop
        except ValueError as error:  # of the numbers; the rest was found out before
            raise ModelFileInvalid(
                f"tensor '{name}' cannot become {type_name} ({error}); download the model again"
            ) from None
        return found[0] if len(found) == 1 else np.concatenate(found)

    try:
        yield encode
    finally:
        rounder.close()
