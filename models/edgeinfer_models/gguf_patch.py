"""A value of a GGUF file's metadata that is known only when the file is there: its writer reserves a
string of spaces, and the value takes their place."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from edgeinfer.errors import ModelFileInvalid
from edgeinfer_models.gguf_format import Cursor
from edgeinfer_models.gguf_header import MAX_KEY_BYTES, read_gguf_header

_STRING = 8  # of GGUF's value types


def reserved(num_bytes: int) -> str:
    """What the writer gives as the value."""
    return " " * num_bytes


def patch_metadata(path: Path, key: str, value: str) -> None:
    """Write a value in the place of the spaces reserved under `key`; what is left of them stays. Nothing
    else of the file changes, so whoever reads the value strips it.

    ValueError: no such key, another type, not blank, or not enough room (a mistake of the writer's).
    Raises ModelFileInvalid for a file that is none, OSError.
    """
    header = read_gguf_header(path)
    if header.types.get(key) != "str":
        raise ValueError(f"{path.name} has no string {key!r}")
    offset, size = _place(path, key)
    data = value.encode()
    if header.get_str(key).strip(" "):
        raise ValueError(f"{path.name}: {key!r} holds something already")
    if len(data) > size:
        raise ValueError(f"{path.name}: {key!r} has {size} bytes reserved, and {len(data)} are needed")
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data.ljust(size))
        file.flush()
        os.fsync(file.fileno())
    if read_gguf_header(path).get_str(key).rstrip(" ") != value.rstrip(" "):
        raise ModelFileInvalid(f"{path.name}: changed while it was written; write it again")


def _place(path: Path, key: str) -> tuple[int, int]:
    """Where a string's bytes begin, and their number, in a file whose header was checked."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = Cursor(path, data, position=4)
        cursor.integer("u32", "the version")
        cursor.integer("u64", "the number of tensors")
        for index in range(cursor.integer("u64", "the number of metadata entries")):
            found = cursor.name_string(f"metadata key {index}", MAX_KEY_BYTES)
            if found == key:
                if cursor.integer("u32", key) != _STRING:
                    break
                size = len(cursor.string_bytes(key))
                return cursor.position - size, size
            cursor.value(found)
    raise ModelFileInvalid(f"{path.name}: changed while it was read; write it again")
