"""What a KV cache of this backend can be made of, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_PLAIN = {"f32": 4, "f16": 2, "bf16": 2}
_LARGEST = {"int8": 127.0, "fp8": 448.0}  # fp8: e4m3
KV_TYPES = (*_PLAIN, *_LARGEST)
# What is nearest to a type of llama.cpp's.
_NEAREST = {"q8_0": "int8"}
_SCALE_BYTES = 4


def nearest(wanted: str) -> tuple[str, str]:
    """The type to take, and a warning if it is another than the one that was asked for."""
    if wanted in KV_TYPES:
        return wanted, ""
    taken = _NEAREST.get(wanted, "f16")
    return taken, f"the torch backend has no KV cache of type {wanted}; {taken} is used"


def is_plain(kind: str) -> bool:
    return kind in _PLAIN


def largest(kind: str) -> float:
    """The largest number that 8 bits of this kind hold."""
    return _LARGEST[kind]


def item_type(kind: str) -> torch.dtype:
    import torch

    return {
        "f32": torch.float32,
        "f16": torch.float16,
        "bf16": torch.bfloat16,
        "int8": torch.int8,
        "fp8": torch.float8_e4m3fn,
    }[kind]


def head_bytes(kind: str, head_dim: int) -> int:
    """Of one head of one position."""
    return head_dim * _PLAIN[kind] if kind in _PLAIN else head_dim + _SCALE_BYTES
