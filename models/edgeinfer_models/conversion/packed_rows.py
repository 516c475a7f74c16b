"""Weights packed row by row, as MLX and compressed-tensors store them: codes, and scales for groups of
a row's entries. Which tensors belong together and their shapes are checked before anything is read.

    matrices = mlx_packing(config["quantization"], where).matrices(tensors, where)
    unpacked(matrices[name], data, scales, biases)

weight = code * scale + bias, MLX's codes from 0 up, compressed-tensors' around zero and without a bias.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from edgeinfer.errors import ModelFileInvalid, UnsupportedModel
from edgeinfer_models.conversion.bit_packing import WORD_BITS, unpack_codes
from edgeinfer_models.safetensors_header import SafetensorsTensor

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]
    Bytes = npt.NDArray[np.uint8]
    Codes = npt.NDArray[np.int8] | npt.NDArray[np.uint8]

Tensors = Mapping[str, SafetensorsTensor]

MLX_BITS = (2, 3, 4, 5, 6, 8)
MLX_GROUPS = (32, 64, 128)
_FLOAT_TYPES = ("F16", "BF16", "F32")
# mlx-lm's name of a layer's experts, all in one tensor, and the ones they have elsewhere.
STACKED = "switch_mlp"
_STACKED_NAME = re.compile(r"(.*)\.switch_mlp\.(gate_proj|up_proj|down_proj)")
MIXTRAL_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_MOST_EXPERTS = 4096


@dataclass(frozen=True)
class PackedMatrix:
    """codes, scales, biases: names of tensors, their rows seen as one matrix; this one's begin at
    first_row. bits: of a code. group: entries of a row that share a scale. zero: the code that stands
    for zero, where there are no biases. extras: other tensors that only say what is known."""

    shape: tuple[int, int]
    bits: int
    group: int
    codes: str
    scales: str
    biases: str | None = None
    zero: int = 0
    first_row: int = 0
    extras: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        found = (self.codes, self.scales, *self.extras)
        return found if self.biases is None else (*found, self.biases)


class RowPacking(Protocol):
    def matrices(self, tensors: Tensors, where: str) -> dict[str, PackedMatrix]:
        """By the names that the unpacked matrices have. Raises ModelFileInvalid, UnsupportedModel."""
        ...


@dataclass(frozen=True)
class MlxPacking:
    """bits, group: where `own` has nothing for a layer of that name."""

    bits: int
    group: int
    own: Mapping[str, tuple[int, int]]

    def matrices(self, tensors: Tensors, where: str) -> dict[str, PackedMatrix]:
        found: dict[str, PackedMatrix] = {}
        for name, codes in tensors.items():
            stem = name.removesuffix(".weight")
            if stem == name or f"{stem}.scales" not in tensors:
                continue
            bits, group = self.own.get(stem, (self.bits, self.group))
            scales = _typed(tensors, f"{stem}.scales", _FLOAT_TYPES, where)
            biases = _typed(tensors, f"{stem}.biases", _FLOAT_TYPES, where)
            _typed(tensors, name, ("U32",), where)
            *stack, rows, words = codes.shape if len(codes.shape) in (2, 3) else (0, 0)
            width = words * WORD_BITS // bits
            expected = (*stack, rows, width // group)
            if words * WORD_BITS % bits or width % group or not rows * expected[-1]:
                raise _misfit(where, name, codes.shape, f"of {bits} bits in groups of {group}")
            for tensor in (scales, biases):
                if tensor.shape != expected:
                    raise _misfit(where, tensor.name, tensor.shape, f"but {list(expected)}")
            whole = PackedMatrix((rows, width), bits, group, name, scales.name, biases.name)
            found |= _experts(stem, stack[0], whole) if stack else {name: whole}
        return found


@dataclass(frozen=True)
class WordPacking:
    """compressed-tensors' "pack-quantized". group: -1 for whole rows."""

    bits: int
    group: int

    def matrices(self, tensors: Tensors, where: str) -> dict[str, PackedMatrix]:
        found: dict[str, PackedMatrix] = {}
        for name, codes in tensors.items():
            stem = name.removesuffix(".weight_packed")
            if stem == name:
                continue
            if f"{stem}.weight_g_idx" in tensors:
                raise UnsupportedModel(
                    f"{where}: weights whose groups are out of order cannot be unpacked"
                    f" ('{stem}.weight_g_idx'); use the model's original weights"
                )
            scales = _typed(tensors, f"{stem}.weight_scale", _FLOAT_TYPES, where)
            shape = _typed(tensors, f"{stem}.weight_shape", ("I64", "I32"), where)
            _typed(tensors, name, ("I32", "U32"), where)
            rows, words = _pair(codes, where)
            width = words * WORD_BITS // self.bits
            group = width if self.group == -1 else self.group
            if words * WORD_BITS % self.bits or not rows * width or width % group:
                raise _misfit(where, name, codes.shape, f"of {self.bits} bits in groups of {group}")
            if shape.shape != (2,):
                raise _misfit(where, shape.name, shape.shape, "but [2]")
            if scales.shape != (rows, width // group):
                raise _misfit(where, scales.name, scales.shape, f"but {[rows, width // group]}")
            zero = 1 << self.bits - 1
            found[f"{stem}.weight"] = PackedMatrix(
                (rows, width), self.bits, group, name, scales.name, zero=zero, extras=(shape.name,)
            )
        return found


@dataclass(frozen=True)
class BytePacking:
    """compressed-tensors' "int-quantized": a byte for each weight, a scale for each row or for all."""

    def matrices(self, tensors: Tensors, where: str) -> dict[str, PackedMatrix]:
        found: dict[str, PackedMatrix] = {}
        for name, codes in tensors.items():
            if codes.dtype != "I8":
                continue
            scales = _typed(tensors, f"{name}_scale", _FLOAT_TYPES, where)
            rows, width = _pair(codes, where)
            if scales.shape not in ((), (1,), (1, 1), (rows,), (rows, 1)) or not rows * width:
                raise _misfit(where, scales.name, scales.shape, f"but {[rows, 1]}")
            found[name] = PackedMatrix((rows, width), 8, width, name, scales.name)
        return found


def mlx_packing(quantization: Mapping[str, Any], where: str) -> MlxPacking:
    """Of config.json's `quantization`. Raises UnsupportedModel, ModelFileInvalid."""
    bits, group = _checked_mlx(quantization, where)
    own = {
        name: _checked_mlx(each, where) for name, each in quantization.items() if isinstance(each, dict)
    }
    return MlxPacking(bits, group, own)


def _checked_mlx(given: Mapping[str, Any], where: str) -> tuple[int, int]:
    mode, bits, group = given.get("mode", "affine"), given.get("bits"), given.get("group_size")
    if mode != "affine":
        raise UnsupportedModel(
            f"{where}: weights that MLX quantized in the mode '{str(mode)[:20]}' cannot be unpacked; use"
            " the model's original weights"
        )
    if (type(bits), type(group)) != (int, int) or bits not in MLX_BITS or group not in MLX_GROUPS:
        raise ModelFileInvalid(
            f"{where}: weights of {str(bits)[:20]} bits in groups of {str(group)[:20]} are none that MLX"
            " makes; check the file"
        )
    return bits, group


def compressed_packing(quantization: Mapping[str, Any], where: str) -> RowPacking | None:
    """Of a `quantization_config` of the method compressed-tensors; None for 8-bit floats, whose type
    says what they are. Raises UnsupportedModel for what cannot be unpacked, with the reason."""
    groups = quantization.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    forms = {str(quantization.get("format"))}
    found: set[tuple[Any, ...]] = set()
    for each in groups:
        weights = each.get("weights") if isinstance(each, dict) else None
        if not isinstance(weights, dict):
            continue
        forms |= {str(each["format"])} if each.get("format") else set()
        keys = ("type", "num_bits", "symmetric", "strategy", "group_size", "actorder")
        found.add(tuple(_plain(weights.get(key)) for key in keys))
    reason = ""
    if len(found) != 1 or len(forms) != 1:
        reason = "weights packed in several ways at once"
    elif isinstance(quantization.get("sparsity_config"), dict) and quantization["sparsity_config"].get(
        "format", "dense"
    ) not in ("dense", None):
        reason = "sparse weights"
    elif quantization.get("transform_config"):
        reason = "rotated weights"
    if reason:
        raise _cannot(where, reason)
    return _one_packing(forms.pop(), found.pop(), where)


def _one_packing(form: str, scheme: tuple[Any, ...], where: str) -> RowPacking | None:
    kind, bits, symmetric, strategy, group, order = scheme
    if symmetric not in (True, None):
        raise _cannot(where, "weights with zero points")
    if order not in (None, "static", "weight"):  # those leave the groups where they are
        raise _cannot(where, "weights whose groups are out of order")
    if form == "float-quantized" and (kind, bits) == ("float", 8):
        return None
    if form == "int-quantized" and (kind, bits) == ("int", 8) and strategy in ("channel", "tensor"):
        return BytePacking()
    if form == "pack-quantized" and kind == "int" and type(bits) is int and 2 <= bits <= 8:
        if strategy == "channel":
            return WordPacking(bits, -1)
        if strategy == "group" and type(group) is int and (group == -1 or 8 <= group < 2**20):
            return WordPacking(bits, group)
    what = f"compressed-tensors weights of the form '{form[:40]}' ({str(bits)[:10]} bits,"
    raise _cannot(where, f"{what} {str(strategy)[:20]})")


def unpacked(matrix: PackedMatrix, data: Bytes, scales: Floats, biases: Floats | None) -> Floats:
    """data, scales, biases: of some rows, as they are stored."""
    import numpy as np

    codes = codes_of(matrix, data)
    rows, width = codes.shape
    groups = codes.reshape(rows, -1, matrix.group).astype(np.float32)
    groups *= scales.reshape(rows, -1)[:, :, None]
    if biases is not None:
        groups += biases.reshape(rows, -1)[:, :, None]
    return groups.reshape(rows, width)


def codes_of(matrix: PackedMatrix, data: Bytes) -> Codes:
    """As small whole numbers: around zero, where there are no biases."""
    import numpy as np

    if matrix.biases is not None:
        return unpack_codes(data, matrix.bits)
    if not matrix.zero:
        return data.view(np.int8)
    return (unpack_codes(data, matrix.bits).astype(np.int16) - matrix.zero).astype(np.int8)


def _experts(stem: str, count: int, whole: PackedMatrix) -> dict[str, PackedMatrix]:
    """Of a stack, the matrix of each expert by the name that it has elsewhere."""
    from dataclasses import replace

    match = _STACKED_NAME.fullmatch(stem)
    if match is None or count > _MOST_EXPERTS:
        return {f"{stem}.weight": whole}  # nobody asks for it: the model's check says so
    room, which = match[1], match[2]
    which = MIXTRAL_NAMES[which] if room.endswith("block_sparse_moe") else which
    return {
        f"{room}.experts.{index}.{which}.weight": replace(whole, first_row=index * whole.shape[0])
        for index in range(count)
    }


def _typed(tensors: Tensors, name: str, types: tuple[str, ...], where: str) -> SafetensorsTensor:
    found = tensors.get(name)
    if found is None:
        raise ModelFileInvalid(
            f"{where}: tensor '{name}' is missing; download the whole model folder again"
        )
    if found.dtype not in types:
        raise ModelFileInvalid(
            f"{where}: tensor '{name}' is of the type {found.dtype}, not {' or '.join(types)}"
        )
    return found


def _pair(tensor: SafetensorsTensor, where: str) -> tuple[int, int]:
    if len(tensor.shape) != 2:
        raise ModelFileInvalid(f"{where}: tensor '{tensor.name}' is no matrix; download the model again")
    return tensor.shape[0], tensor.shape[1]


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _misfit(where: str, name: str, shape: tuple[int, ...], what: str) -> ModelFileInvalid:
    return ModelFileInvalid(
        f"{where}: tensor '{name}' has the shape {list(shape)}, which is not {what}; the files do not"
        " belong together"
    )


def _cannot(where: str, what: str) -> UnsupportedModel:
    return UnsupportedModel(f"{where}: {what} cannot be unpacked; use the model's original weights")
