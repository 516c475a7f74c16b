"""MLX's affine quantization in numpy: groups of a row that share a scale and a bias,
weight = code * scale + bias.

Source: `mx.quantize` in mode "affine" (mlx 0.32), whose results these are bit for bit (tests compare).
The end of a group that is larger in size is hit exactly; zero is on the grid wherever it lies between
the ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]
    Codes = npt.NDArray[np.uint8]
    Rounded = tuple[Codes, Floats, Floats]
    # A matrix's name, some of its rows, the number of the first: codes as wide as the rows, and scales
    # and biases of their groups.
    AffineEncode = Callable[[str, Floats, int], Rounded]

GROUPS = (32, 64, 128)
_LEAST_SCALE = 1e-7


def round_to_nearest(rows: Floats, bits: int, group: int) -> Rounded:
    """rows: (n, width), width in whole groups."""
    import numpy as np

    bins, least = np.float32(2**bits - 1), np.float32(_LEAST_SCALE)
    groups = rows.reshape(rows.shape[0], -1, group)
    low, high = groups.min(axis=2), groups.max(axis=2)
    is_low = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / bins, least)
    scale = np.where(is_low, scale, -scale)
    edge = np.where(is_low, low, high)
    at_edge = np.rint(edge / scale)
    reaches = at_edge != 0
    scale = np.divide(edge, at_edge, out=scale, where=reaches)
    bias = np.where(reaches, edge, np.float32(0))
    codes = np.subtract(groups, bias[:, :, None])
    codes /= scale[:, :, None]
    np.rint(codes, out=codes)
    np.clip(codes, np.float32(0), bins, out=codes)
    return codes.astype(np.uint8).reshape(rows.shape), scale, bias


def nearest(bits: int, group: int) -> AffineEncode:
    def encode(name: str, rows: Floats, first_row: int) -> Rounded:
        return round_to_nearest(rows, bits, group)

    return encode
