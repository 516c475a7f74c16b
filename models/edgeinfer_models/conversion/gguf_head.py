"""What stands before the tensors' data in a GGUF file, as bytes. Layout: ggml/docs/gguf.md."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from edgeinfer_models.ggml_types import GGML_TYPES_BY_NAME
from edgeinfer_models.gguf_format import NUMBER_FORMATS, VALUE_TYPES, Scalar
from edgeinfer_models.gguf_header import DEFAULT_ALIGNMENT, MAGIC

_VERSION = 3
_U32, _STRING, _ARRAY = (VALUE_TYPES[name] for name in ("u32", "str", "array"))


@dataclass(frozen=True)
class TensorEntry:
    """shape: ggml's order, the row length first. num_bytes: without what the next one's alignment
    takes."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    num_bytes: int


def head(
    entries: Sequence[bytes], tensors: Sequence[TensorEntry], alignment: int = DEFAULT_ALIGNMENT
) -> bytes:
    """entries: of the metadata. The tensors' data follow in the same order, each aligned."""
    infos, offset = [], 0
    for tensor in tensors:
        kind = GGML_TYPES_BY_NAME[tensor.type_name]
        dims = len(tensor.shape)
        infos.append(
            _string(tensor.name) + struct.pack(f"<I{dims}QIQ", dims, *tensor.shape, kind.id, offset)
        )
        offset += -(-tensor.num_bytes // alignment) * alignment
    found = MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(entries))
    found += b"".join([*entries, *infos])
    return found + bytes(-len(found) % alignment)


def entry(key: str, value: int | str | Sequence[str]) -> bytes:
    """A metadata entry; an int becomes u32."""
    if isinstance(value, int):
        return _string(key) + struct.pack("<II", _U32, value)
    if isinstance(value, str):
        return _string(key) + struct.pack("<I", _STRING) + _string(value)
    texts = b"".join(_string(text) for text in value)
    return _string(key) + struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + texts


def number_entry(key: str, kind: str, value: Scalar) -> bytes:
    """kind: of GGUF's types of numbers, "u32", "f32" …"""
    return _string(key) + struct.pack(f"<I{NUMBER_FORMATS[kind]}", VALUE_TYPES[kind], value)


def numbers_entry(key: str, kind: str, values: Sequence[Scalar]) -> bytes:
    """An array of them."""
    numbers = struct.pack(f"<{len(values)}{NUMBER_FORMATS[kind]}", *values)
    return _string(key) + struct.pack("<IIQ", _ARRAY, VALUE_TYPES[kind], len(values)) + numbers


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
