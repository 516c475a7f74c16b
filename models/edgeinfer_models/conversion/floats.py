"""Numbers as model files store them, in numpy, which knows neither bfloat16 nor 8-bit floats.

BF16 is held as its bits (uint16), F8_E4M3 as its (uint8). Rounding is to nearest, ties to even.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[Any]
    Floats = npt.NDArray[np.float32]

# What an array of a dtype is held as.
HELD_AS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1"}
FLOATS = tuple(HELD_AS)
MOST_F16 = 65504.0
_F16_INFINITY = 0x7C00
_BIASES = 2.0**112  # the exponents' biases are 127 and 15
_WITHOUT_COPIED_SIGNS = ~0x7000_0000  # widened from 16 bits, a sign fills those in front of the exponent


def to_float32(array: Array, dtype: str) -> Floats:
    """array: as HELD_AS says. Exact but for F64."""
    import numpy as np

    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F8_E4M3":
        return _e4m3_values()[array]
    return _widened(array) if dtype == "F16" else array.astype(np.float32, copy=False)


def from_float32(array: Floats, dtype: str) -> Array:
    """dtype: F32, F16 or BF16. What is too large for F16 becomes infinite: look before (`fits`)."""
    import numpy as np

    if dtype == "BF16":
        bits = array.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # The sum must not carry a NaN's bits into an infinity.
        return np.where(np.isnan(array), (bits >> 16) | 0x40, rounded).astype(np.uint16)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return array.astype(np.float16)
    return array.astype(np.float32, copy=False)


def _widened(halves: Array) -> Floats:
    """F16 as F32, by moving its bits to their places: numpy's own cast takes three times as long."""
    import numpy as np

    largest_bits = int((halves.view(np.uint16) & 0x7FFF).max(initial=0))
    # A thread whose processor takes the smallest numbers for 0 (some libraries ask for that) would lose
    # those of F16.
    keeps_smallest = np.float32(2.0**-149) * np.float32(_BIASES) != 0.0
    if largest_bits >= _F16_INFINITY or not keeps_smallest:
        return halves.astype(np.float32)
    bits = halves.view(np.int16).astype(np.int32)
    bits <<= 13
    bits &= _WITHOUT_COPIED_SIGNS
    values = bits.view(np.float32)
    values *= _BIASES
    return values


def recast(array: Array, dtype: str, wanted: str) -> Array:
    return array if dtype == wanted else from_float32(to_float32(array, dtype), wanted)


def first_bad(values: Floats) -> int | None:
    """Where the first number is that is not finite, in the flattened array."""
    import numpy as np

    finite = np.isfinite(values)
    return None if finite.all() else int(np.flatnonzero(~finite.ravel())[0])


def _e4m3_values() -> Floats:
    """Of each of the 256 codes: 1 sign, 4 exponent (bias 7) and 3 mantissa bits, no infinities (the
    "fn" variant). Source: Micikevicius et al. 2022, arXiv:2209.05433."""
    import numpy as np

    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    size[(codes & 127) == 127] = np.nan
    return np.where(codes & 128, -size, size).astype(np.float32)
