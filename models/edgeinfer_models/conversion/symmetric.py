"""Numbers of 8 and 4 bits around zero, weight = code * scale: compressed-tensors' int8, int4 and fp8.

int8 and fp8 have a scale for each row, int4 one for each group of a row. Scales are rounded to the type
they are stored in first, so that codes are the nearest to what will be read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from edgeinfer_models.conversion.floats import from_float32, to_float32

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]
    Codes = npt.NDArray[np.int8] | npt.NDArray[np.uint8]
    # A matrix's name, some of its rows, the number of the first: codes as wide as the rows (int8, or an
    # F8_E4M3's bits as uint8), and scales of shape (n, groups).
    SymmetricEncode = Callable[[str, Floats, int], tuple[Codes, Floats]]

Kind = Literal["int8", "int4", "fp8"]
MOST_E4M3 = 448.0
# What the largest weight of a group is divided by. int4 reaches from -8 to 7: 7.5 shares the loss.
_REACH = {"int8": 127.0, "int4": 7.5, "fp8": MOST_E4M3}
_LEAST_SCALE = {"F32": 1e-30, "BF16": 1e-30, "F16": 2.0**-24}


def round_to_nearest(rows: Floats, kind: Kind, group: int, scale_dtype: str) -> tuple[Codes, Floats]:
    """rows: (n, width), width in whole groups. scale_dtype: F32, F16 or BF16."""
    import numpy as np

    groups = rows.reshape(rows.shape[0], -1, group)
    scales = np.abs(groups).max(axis=2) / np.float32(_REACH[kind])
    scales = to_float32(from_float32(scales, scale_dtype), scale_dtype)
    scales = np.maximum(scales, np.float32(_LEAST_SCALE[scale_dtype]))
    scaled = groups / scales[:, :, None]
    if kind == "fp8":
        codes: Codes = to_e4m3(scaled)
    else:
        low, high = (-8, 7) if kind == "int4" else (-127, 127)
        codes = np.clip(np.rint(scaled), low, high).astype(np.int8)
    return codes.reshape(rows.shape), scales


def nearest(kind: Kind, group: int, scale_dtype: str) -> SymmetricEncode:
    def encode(name: str, rows: Floats, first_row: int) -> tuple[Codes, Floats]:
        return round_to_nearest(rows, kind, group, scale_dtype)

    return encode


def to_e4m3(values: Floats) -> npt.NDArray[np.uint8]:
    """To the nearest, ties to even; what is beyond the largest becomes the largest."""
    import numpy as np

    size = np.minimum(np.abs(values), np.float32(MOST_E4M3))
    bits = np.ascontiguousarray(size).view(np.uint32)
    # Three bits of the mantissa stay; float32's exponents begin 120 lower.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20).astype(np.int32) - (120 << 3)
    small = np.rint(size * np.float32(512.0)).astype(np.int32)  # below 2**-6 codes are equally far apart
    codes = np.where(size < np.float32(2.0**-6), small, normal)
    found: npt.NDArray[np.uint8] = (codes | np.where(np.signbit(values), 128, 0)).astype(np.uint8)
    return found
