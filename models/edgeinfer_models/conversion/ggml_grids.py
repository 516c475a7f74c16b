"""The blocks of ggml's types whose numbers lie on evenly described grids: what they hold, and back.

    parts = unpack("Q4_K", blocks)        # numbers = parts.scale * levels[codes] + parts.offset
    blocks = pack("Q4_K", parts)

In all of them a number is a level (one of at most 256, by its code) times a scale, and in some of them
an offset is added. Scale and offset belong to a group of 16 or 32 neighbours; in types of blocks of
256 they are a number of the block (in F16) times a small whole number. Types that look vectors up (IQ1
to IQ3) are not among them. Layouts from ggml-common.h of llama.cpp as packaged in llama-cpp-python
0.3.36.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgeinfer_models.conversion.grids import Grid, Parts
from edgeinfer_models.ggml_types import GGML_TYPES_BY_NAME

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]
    Blocks = npt.NDArray[np.uint8]
    Array = npt.NDArray[Any]

# Of IQ4_NL and IQ4_XS (kvalues_iq4nl).
_UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _range(first: int, last: int) -> tuple[float, ...]:
    return tuple(float(level) for level in range(first, last + 1))


GRIDS = {
    grid.name: grid
    for grid in (
        Grid("Q4_0", 32, 32, _range(-8, 7)),
        Grid("Q4_1", 32, 32, _range(0, 15), has_offset=True),
        Grid("Q5_0", 32, 32, _range(-16, 15)),
        Grid("Q5_1", 32, 32, _range(0, 31), has_offset=True),
        Grid("Q8_0", 32, 32, _range(-128, 127)),
        Grid("IQ4_NL", 32, 32, tuple(map(float, _UNEVEN))),
        Grid("IQ4_XS", 256, 32, tuple(map(float, _UNEVEN)), steps=(-32, 31)),
        Grid("Q2_K", 256, 16, _range(0, 3), has_offset=True, steps=(0, 15), offset_steps=(0, 15)),
        Grid("Q3_K", 256, 16, _range(-4, 3), steps=(-32, 31)),
        Grid("Q4_K", 256, 32, _range(0, 15), has_offset=True, steps=(0, 63), offset_steps=(0, 63)),
        Grid("Q5_K", 256, 32, _range(0, 31), has_offset=True, steps=(0, 63), offset_steps=(0, 63)),
        Grid("Q6_K", 256, 16, _range(-32, 31), steps=(-128, 127)),
    )
}


def unpack(name: str, blocks: Blocks) -> Parts:
    """blocks: shape (n, bytes of a row)."""
    grid, size = GRIDS[name], GGML_TYPES_BY_NAME[name].block_bytes
    if blocks.ndim != 2 or not blocks.shape[1] or blocks.shape[1] % size:
        raise ValueError(f"rows of {list(blocks.shape)} bytes are no whole blocks of {name}")
    rows = blocks.shape[0]
    each = np.ascontiguousarray(blocks).reshape(-1, size)
    read = _READERS[name](each)
    groups = grid.block // grid.group
    ones, zeros = np.ones((len(each), groups), np.float32), np.zeros((len(each), 1), np.float32)
    return Parts(
        read["unit"].reshape(rows, -1),
        read.get("step", ones).reshape(rows, -1),
        read.get("offset_unit", zeros).reshape(rows, -1),
        read.get("offset_step", ones).reshape(rows, -1),
        read["codes"].reshape(rows, -1),
    )


def pack(name: str, parts: Parts) -> Blocks:
    """Shape (n, bytes of a row). Raises ValueError where a number is none that the type can hold."""
    grid = GRIDS[name]
    rows, width = parts.codes.shape
    if width % grid.block:
        raise ValueError(f"rows of {width} numbers are no whole blocks of {name}")
    _check(grid, parts)
    count = rows * width // grid.block
    each = Parts(
        parts.unit.reshape(count, -1),
        parts.step.reshape(count, -1),
        parts.offset_unit.reshape(count, -1),
        parts.offset_step.reshape(count, -1),
        parts.codes.reshape(count, -1),
    )
    found: Blocks = np.concatenate(_WRITERS[name](each), axis=1)
    assert found.shape == (count, GGML_TYPES_BY_NAME[name].block_bytes), name
    return found.reshape(rows, -1)


def to_f16(values: Floats) -> Floats:
    """As a block's own numbers can be."""
    with np.errstate(over="ignore"):
        found: Floats = values.astype(np.float16).astype(np.float32)
    return found


def _check(grid: Grid, parts: Parts) -> None:
    ranges = [("step", parts.step, grid.steps or (1, 1))]
    if grid.has_offset:
        ranges.append(("offset_step", parts.offset_step, grid.offset_steps or (1, 1)))
    for name, values, (least, greatest) in ranges:
        if (values != np.rint(values)).any() or values.min() < least or values.max() > greatest:
            raise ValueError(f"{name} of {grid.name} lies outside [{least}, {greatest}]")
    if int(parts.codes.max(initial=0)) >= len(grid.levels):
        raise ValueError(f"{grid.name} has {len(grid.levels)} levels")
    for values in (parts.unit, parts.offset_unit):
        if not np.isfinite(to_f16(values)).all():
            raise ValueError(f"{grid.name}: a scale is too large for F16")


# -- each type: Array of (blocks, bytes) to its parts, and parts to columns of bytes ---------------


def _f16(each: Array, at: int) -> Array:
    found: Array = np.ascontiguousarray(each[:, at : at + 2]).view("<f2").astype(np.float32)
    return found


def _f16_bytes(values: Array) -> Array:
    return values.astype("<f2").view(np.uint8)


def _nibbles(packed: Array) -> Array:
    """16 bytes are 32 codes: low halves first."""
    shaped = packed.reshape(len(packed), -1, 16)
    found: Array = np.concatenate([shaped & 15, shaped >> 4], axis=2).reshape(len(packed), -1)
    return found


def _nibble_bytes(codes: Array) -> Array:
    shaped = codes.reshape(len(codes), -1, 2, 16) & 15
    return (shaped[:, :, 0] | shaped[:, :, 1] << 4).reshape(len(codes), -1)


def _bits(packed: Array) -> Array:
    """4 bytes are the fifth bits of 32 codes."""
    return np.unpackbits(packed, axis=1, bitorder="little")


def _bit_bytes(codes: Array) -> Array:
    return np.packbits(codes >> 4, axis=1, bitorder="little")


def _read_q4(each: Array) -> dict[str, Array]:
    return {"unit": _f16(each, 0), "codes": _nibbles(each[:, 2:])}


def _write_q4(parts: Parts) -> list[Array]:
    return [_f16_bytes(parts.unit), _nibble_bytes(parts.codes)]


def _read_q4_1(each: Array) -> dict[str, Array]:
    return {"unit": _f16(each, 0), "offset_unit": -_f16(each, 2), "codes": _nibbles(each[:, 4:])}


def _write_q4_1(parts: Parts) -> list[Array]:
    return [_f16_bytes(parts.unit), _f16_bytes(-parts.offset_unit), _nibble_bytes(parts.codes)]


def _read_q5_0(each: Array) -> dict[str, Array]:
    return {"unit": _f16(each, 0), "codes": _nibbles(each[:, 6:]) | _bits(each[:, 2:6]) << 4}


def _write_q5_0(parts: Parts) -> list[Array]:
    return [_f16_bytes(parts.unit), _bit_bytes(parts.codes), _nibble_bytes(parts.codes)]


def _read_q5_1(each: Array) -> dict[str, Array]:
    codes = _nibbles(each[:, 8:]) | _bits(each[:, 4:8]) << 4
    return {"unit": _f16(each, 0), "offset_unit": -_f16(each, 2), "codes": codes}


def _write_q5_1(parts: Parts) -> list[Array]:
    offsets = _f16_bytes(-parts.offset_unit)
    return [_f16_bytes(parts.unit), offsets, _bit_bytes(parts.codes), _nibble_bytes(parts.codes)]


def _read_q8_0(each: Array) -> dict[str, Array]:
    return {"unit": _f16(each, 0), "codes": each[:, 2:] ^ 128}


def _write_q8_0(parts: Parts) -> list[Array]:
    return [_f16_bytes(parts.unit), parts.codes ^ 128]


def _read_iq4_xs(each: Array) -> dict[str, Array]:
    high = np.ascontiguousarray(each[:, 2:4]).view("<u2").astype(np.int32)
    low = np.stack([each[:, 4:8] & 15, each[:, 4:8] >> 4], axis=2).reshape(len(each), 8)
    step = low.astype(np.int32) | (high >> 2 * np.arange(8) & 3) << 4
    return {
        "unit": _f16(each, 0),
        "step": step.astype(np.float32) - 32,
        "codes": _nibbles(each[:, 8:]),
    }


def _write_iq4_xs(parts: Parts) -> list[Array]:
    step = (parts.step + 32).astype(np.int32)
    high = ((step >> 4) << 2 * np.arange(8)).sum(axis=1, keepdims=True).astype("<u2")
    low = (step[:, ::2] & 15 | (step[:, 1::2] & 15) << 4).astype(np.uint8)
    return [_f16_bytes(parts.unit), high.view(np.uint8), low, _nibble_bytes(parts.codes)]


def _quarters(packed: Array) -> Array:
    """32 bytes are 128 codes of two bits: the lowest pairs of all bytes first."""
    shaped = packed.reshape(len(packed), -1, 1, 32)
    return (shaped >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3).reshape(len(packed), -1)


def _quarter_bytes(codes: Array) -> Array:
    shaped = (codes & 3).reshape(len(codes), -1, 4, 32) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    found: Array = np.bitwise_or.reduce(shaped, axis=2).reshape(len(codes), -1)
    return found


def _read_q2_k(each: Array) -> dict[str, Array]:
    return {
        "unit": _f16(each, 80),
        "step": (each[:, :16] & 15).astype(np.float32),
        "offset_unit": _f16(each, 82),
        "offset_step": (each[:, :16] >> 4).astype(np.float32),
        "codes": _quarters(each[:, 16:80]),
    }


def _write_q2_k(parts: Parts) -> list[Array]:
    steps = parts.step.astype(np.uint8) | parts.offset_step.astype(np.uint8) << 4
    units = [_f16_bytes(parts.unit), _f16_bytes(parts.offset_unit)]
    return [steps, _quarter_bytes(parts.codes), *units]


def _read_q3_k(each: Array) -> dict[str, Array]:
    packed = each[:, 96:108]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    shifts = np.repeat(np.array([0, 2, 4, 6], np.uint8), 4)
    high = np.tile(packed[:, 8:], (1, 4)) >> shifts & 3
    # Of each byte of the mask, one bit for each of the eight groups of 32.
    third = (each[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & 1).reshape(len(each), 256)
    return {
        "unit": _f16(each, 108),
        "step": (low | high << 4).astype(np.float32) - 32,
        "codes": _quarters(each[:, 32:96]) | third << 2,
    }


def _write_q3_k(parts: Parts) -> list[Array]:
    third = (parts.codes >> 2).reshape(-1, 8, 32) << np.arange(8, dtype=np.uint8)[:, None]
    mask = np.bitwise_or.reduce(third, axis=1)
    step = (parts.step + 32).astype(np.uint8)
    low = step[:, :8] & 15 | (step[:, 8:] & 15) << 4
    pairs = (step >> 4).reshape(-1, 4, 4) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = np.bitwise_or.reduce(pairs, axis=1)
    return [mask, _quarter_bytes(parts.codes), low, high, _f16_bytes(parts.unit)]


def _k_steps(packed: Array) -> tuple[Array, Array]:
    """Eight scales and eight offsets of six bits in twelve bytes."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    step = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    offset = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    return step.astype(np.float32), offset.astype(np.float32)


def _k_step_bytes(parts: Parts) -> Array:
    step, offset = parts.step.astype(np.uint8), parts.offset_step.astype(np.uint8)
    first = step[:, :4] | step[:, 4:] >> 4 << 6
    second = offset[:, :4] | offset[:, 4:] >> 4 << 6
    third = step[:, 4:] & 15 | (offset[:, 4:] & 15) << 4
    return np.concatenate([first, second, third], axis=1)


def _halves(packed: Array) -> Array:
    """32 bytes are 64 codes of four bits: all low halves first."""
    shaped = packed.reshape(len(packed), -1, 32)
    found: Array = np.concatenate([shaped & 15, shaped >> 4], axis=2).reshape(len(packed), -1)
    return found


def _half_bytes(codes: Array) -> Array:
    shaped = codes.reshape(len(codes), -1, 2, 32) & 15
    return (shaped[:, :, 0] | shaped[:, :, 1] << 4).reshape(len(codes), -1)


def _read_q4_k(each: Array) -> dict[str, Array]:
    step, offset_step = _k_steps(each[:, 4:16])
    units = {"unit": _f16(each, 0), "offset_unit": _f16(each, 2)}
    return {**units, "step": step, "offset_step": offset_step, "codes": _halves(each[:, 16:])}


def _write_q4_k(parts: Parts) -> list[Array]:
    units = [_f16_bytes(parts.unit), _f16_bytes(parts.offset_unit)]
    return [*units, _k_step_bytes(parts), _half_bytes(parts.codes)]


def _read_q5_k(each: Array) -> dict[str, Array]:
    step, offset_step = _k_steps(each[:, 4:16])
    fifth = (each[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1).reshape(len(each), 256)
    units = {"unit": _f16(each, 0), "offset_unit": _f16(each, 2)}
    codes = _halves(each[:, 48:]) | fifth << 4
    return {**units, "step": step, "offset_step": offset_step, "codes": codes}


def _write_q5_k(parts: Parts) -> list[Array]:
    fifth = (parts.codes >> 4).reshape(-1, 8, 32) << np.arange(8, dtype=np.uint8)[:, None]
    units = [_f16_bytes(parts.unit), _f16_bytes(parts.offset_unit)]
    return [
        *units,
        _k_step_bytes(parts),
        np.bitwise_or.reduce(fifth, axis=1),
        _half_bytes(parts.codes),
    ]


def _read_q6_k(each: Array) -> dict[str, Array]:
    # Of each half of 128: 64 bytes, whose low halves are the first 64 codes.
    low = each[:, :128].reshape(len(each), 2, 64)
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(len(each), 256)
    step = each[:, 192:208].view(np.int8).astype(np.float32)
    codes = low | _quarters(each[:, 128:192]) << 4
    return {"unit": _f16(each, 208), "step": step, "codes": codes}


def _write_q6_k(parts: Parts) -> list[Array]:
    shaped = (parts.codes & 15).reshape(-1, 2, 2, 64)
    low = (shaped[:, :, 0] | shaped[:, :, 1] << 4).reshape(-1, 128)
    high = _quarter_bytes(parts.codes >> 4)
    return [low, high, parts.step.astype(np.int8).view(np.uint8), _f16_bytes(parts.unit)]


_READERS = {
    "Q4_0": _read_q4, "IQ4_NL": _read_q4, "Q4_1": _read_q4_1, "Q5_0": _read_q5_0, "Q5_1": _read_q5_1,
    "Q8_0": _read_q8_0, "IQ4_XS": _read_iq4_xs, "Q2_K": _read_q2_k, "Q3_K": _read_q3_k,
    "Q4_K": _read_q4_k, "Q5_K": _read_q5_k, "Q6_K": _read_q6_k,
}  # fmt: skip
_WRITERS = {
    "Q4_0": _write_q4, "IQ4_NL": _write_q4, "Q4_1": _write_q4_1, "Q5_0": _write_q5_0,
    "Q5_1": _write_q5_1, "Q8_0": _write_q8_0, "IQ4_XS": _write_iq4_xs, "Q2_K": _write_q2_k,
    "Q3_K": _write_q3_k, "Q4_K": _write_q4_k, "Q5_K": _write_q5_k, "Q6_K": _write_q6_k,
}  # fmt: skip

__all__ = ["GRIDS", "Grid", "Parts", "pack", "to_f16", "unpack"]
