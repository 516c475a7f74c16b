"""What a tensor goes through between the Hugging Face layout and GGUF's, and back. Numpy alone.

Each change is exact both ways, but for `add_one`: a norm's weight of 1 + w has lost bits of a small w.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

Change = Literal["keep", "pair_rows", "add_one", "flatten"]


def to_gguf(array: Array, change: Change, heads: int) -> Array:
    """array: as Hugging Face has it. heads: of a `pair_rows` tensor."""
    if change == "pair_rows":
        return pair_rows(array, heads)
    if change == "add_one":
        return (array.astype("float32") + 1.0).astype("float32")
    if change == "flatten":  # one row: GGUF has it as a vector
        return array.reshape(array.shape[1:])
    return array


def from_gguf(array: Array, change: Change, heads: int) -> Array:
    if change == "pair_rows":
        return part_rows(array, heads)
    if change == "add_one":
        return (array.astype("float32") - 1.0).astype("float32")
    if change == "flatten":
        return array.reshape(1, *array.shape)
    return array


def pair_rows(array: Array, heads: int) -> Array:
    """Rows of a query or key projection, for RoPE that turns neighbouring entries.

    Hugging Face's Llama turns entry i of a head with entry i + d/2, llama.cpp's with the one beside it:
    of each head (d rows) the two halves are put together like the teeth of two combs.
    """
    half = array.shape[0] // heads // 2
    combed = array.reshape(heads, 2, half, *array.shape[1:]).swapaxes(1, 2)
    return combed.reshape(array.shape)


def part_rows(array: Array, heads: int) -> Array:
    """The inverse of `pair_rows`."""
    half = array.shape[0] // heads // 2
    parted = array.reshape(heads, half, 2, *array.shape[1:]).swapaxes(1, 2)
    return parted.reshape(array.shape)
