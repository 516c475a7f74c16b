"""Weights that others packed into 32-bit words: GPTQ's and AWQ's checkpoints, as Hugging Face has them.

Both store a matrix transposed (inputs first) with a scale and a zero point for each group of inputs and
each output; w = scale * (q - zero). GPTQ (Frantar et al. 2023, arXiv:2210.17323) packs along the inputs,
AWQ (Lin et al. 2024, arXiv:2306.00978) along the outputs, each eight of them in an order of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from edgeinfer.errors import ModelFileInvalid, UnsupportedModel
from edgeinfer_models.conversion.packed_rows import RowPacking, compressed_packing

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[Any]
    Floats = npt.NDArray[np.float32]

PARTS = ("qweight", "qzeros", "scales", "g_idx")
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the outputs in a word, lowest bits first


@dataclass(frozen=True)
class Packing:
    """group: inputs that share a scale. adds_one: a zero point is stored less one (GPTQ's first format).
    bits: of a weight."""

    method: Literal["gptq", "awq"]
    bits: int
    group: int
    adds_one: bool = False

    @property
    def per_word(self) -> int:
        return 32 // self.bits


def packing_of(quantization: Mapping[str, Any], where: str) -> Packing | RowPacking | None:
    """Of config.json's `quantization_config`; None for plain or 8-bit float weights. Raises
    UnsupportedModel for what cannot be unpacked, with the reason."""
    method = quantization.get("quant_method")
    if method == "fp8":
        return None
    if method == "compressed-tensors":
        return compressed_packing(quantization, where)
    bits, group = quantization.get("bits", 4), quantization.get("group_size", 128)
    reason = ""
    if method not in ("gptq", "awq"):
        reason = f"weights quantized by '{str(method)[:40]}' cannot be unpacked"
    elif type(bits) is not int or bits not in ((2, 4, 8) if method == "gptq" else (4,)):
        reason = f"{method} weights of {str(bits)[:20]} bits cannot be unpacked"
    elif type(group) is not int or not (group == -1 or 1 <= group < 2**20):
        reason = f"a group size of {str(group)[:20]} cannot be"
    elif method == "awq" and str(quantization.get("version", "gemm")).lower() != "gemm":
        reason = "only AWQ's layout 'gemm' can be unpacked"
    if reason:
        raise UnsupportedModel(f"{where}: {reason}; use the model's original weights")
    if method == "awq":
        return Packing("awq", 4, int(group))
    is_first = quantization.get("checkpoint_format", "gptq") != "gptq_v2"
    return Packing("gptq", int(bits), int(group), adds_one=is_first)


def shape_of_packed(
    packing: Packing, shapes: Mapping[str, tuple[int, ...]], name: str
) -> tuple[int, int]:
    """(outputs, inputs) of the matrix, its parts' shapes checked. Raises ModelFileInvalid."""
    rows, columns = _pair(shapes.get("qweight"), name)
    per = packing.per_word
    inputs, outputs = (rows * per, columns) if packing.method == "gptq" else (rows, columns * per)
    group = packing.group if packing.group > 0 else inputs
    groups = -(-inputs // group)
    wanted = {"qzeros": (groups, outputs // per), "scales": (groups, outputs), "g_idx": (inputs,)}
    for part, shape in wanted.items():
        found = shapes.get(part)
        if found != shape and not (part == "g_idx" and found is None):
            raise ModelFileInvalid(
                f"tensor '{name}.{part}' has the shape {list(found or ())}, not {list(shape)}; the files"
                " do not belong together"
            )
    return outputs, inputs


def unpacked_rows(
    packing: Packing, part: Callable[[str], Array | None], start: int, stop: int, name: str
) -> Floats:
    """Rows [start, stop) of the matrix, an output each. part(): a stored tensor by the name of PARTS,
    its integers unsigned. Raises ModelFileInvalid."""
    import numpy as np

    qweight, qzeros, scales = part("qweight"), part("qzeros"), part("scales")
    assert qweight is not None and qzeros is not None and scales is not None
    per = packing.per_word
    first, last = start // per, -(-stop // per)
    within = slice(start - first * per, stop - first * per)
    zeros = _unpacked(qzeros[:, first:last], packing)[:, within]
    if packing.method == "gptq":
        words = qweight[:, start:stop]
        shifts = np.arange(per, dtype=np.uint32)[None, :, None] * np.uint32(packing.bits)
        codes = (words[:, None, :] >> shifts) & np.uint32(2**packing.bits - 1)
        codes = codes.reshape(-1, stop - start)
    else:
        codes = _unpacked(qweight[:, first:last], packing)[:, within]
    inputs, group = codes.shape[0], packing.group if packing.group > 0 else codes.shape[0]
    groups = part("g_idx")
    of = np.arange(inputs) // group if groups is None else groups.astype(np.int64)
    if of.size and not 0 <= int(of.min()) <= int(of.max()) < scales.shape[0]:
        raise ModelFileInvalid(f"tensor '{name}.g_idx' names groups that are not there")
    zero = zeros.astype(np.float32) + np.float32(packing.adds_one)
    scale = scales[:, start:stop].astype(np.float32)
    found: Floats = (codes.astype(np.float32) - zero[of]) * scale[of]
    return np.ascontiguousarray(found.T)


def _unpacked(words: Array, packing: Packing) -> Array:
    """(n, words) -> (n, words * per_word): codes that were packed along the last dimension."""
    import numpy as np

    per = packing.per_word
    shifts = np.arange(per, dtype=np.uint32) * np.uint32(packing.bits)
    codes: Array = (words[:, :, None] >> shifts) & np.uint32(2**packing.bits - 1)
    if packing.method == "awq":
        ordered = np.empty_like(codes)
        ordered[:, :, list(_AWQ_ORDER)] = codes
        codes = ordered
    found: Array = codes.reshape(words.shape[0], -1)
    return found


def _pair(shape: tuple[int, ...] | None, name: str) -> tuple[int, int]:
    if shape is None or len(shape) != 2:
        raise ModelFileInvalid(f"tensor '{name}.qweight' is no matrix; download the model again")
    return shape[0], shape[1]
