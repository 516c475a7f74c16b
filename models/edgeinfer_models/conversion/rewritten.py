"""A GGUF file with some of its tensors in other types: everything else stays, byte for byte.

Of any architecture: nothing of the model has to be understood for that.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Container, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeinfer_models.conversion.floats import HELD_AS, from_float32, to_float32
from edgeinfer_models.conversion.gguf_head import TensorEntry, entry, head
from edgeinfer_models.conversion.new_file import NewFile
from edgeinfer_models.conversion.sources import gguf_rows, places_of, require_finite, stored_bytes
from edgeinfer_models.conversion.tensor_data import (
    PART_BYTES,
    Encode,
    Part,
    TensorData,
    stored_data,
    write_tensors,
)
from edgeinfer_models.ggml_types import row_bytes
from edgeinfer_models.gguf_format import Cursor
from edgeinfer_models.gguf_header import MAX_KEY_BYTES, GgufHeader, GgufTensor

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

OF_SPLITS = ("split.no", "split.count", "split.tensors.count")
# Of the rounding before this one.
_OF_IMATRIX = tuple(
    f"quantize.imatrix.{what}" for what in ("file", "dataset", "entries_count", "chunks_count")
)
Progress = Callable[[float], None]


def rewrite_gguf(
    path: Path,
    header: GgufHeader,
    types: Mapping[str, str | None],
    metadata: Mapping[str, int | str],
    encode: Encode,
    *,
    stored: Mapping[str, Array] | None = None,
    threads: int = 0,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> None:
    """types: of each tensor; None: as it is. metadata: what is to be said anew. stored: the data of
    tensors that are known already, in their types. threads: 0: one for each core. Raises
    ModelFileInvalid (numbers that are not finite, a file that shrank), UnsupportedModel (a type nobody
    can read back), UsageError (the file is there), OSError; then nothing is left."""
    places = places_of(header)
    known = stored or {}
    entries = {key: entry(key, value) for key, value in metadata.items()}
    tensors = [
        stored_data(known[tensor.name])
        if tensor.name in known
        else TensorData(
            written_bytes(tensor, types[tensor.name]),
            _parts(tensor, places[tensor.name], types[tensor.name], encode),
        )
        for tensor in header.tensors
    ]
    assert all(
        each.num_bytes == written_bytes(tensor, types[tensor.name])
        for each, tensor in zip(tensors, header.tensors, strict=True)
    )
    with NewFile(path, force=force) as new:
        new.file.write(rewritten_head(header, types, entries))
        write_tensors(new.file, tensors, header.alignment, threads=threads, progress=progress)


def written_bytes(tensor: GgufTensor, type_name: str | None) -> int:
    if type_name is None:
        return tensor.num_bytes
    return tensor.elements // tensor.shape[0] * row_bytes(type_name, tensor.shape[0])


def _parts(
    tensor: GgufTensor, place: tuple[Path, int], type_name: str | None, encode: Encode
) -> Iterator[Part]:
    path, offset = place
    if type_name is None or type_name == tensor.type_name:
        yield from stored_parts(tensor, place)
        return
    width = tensor.shape[0]
    rows = tensor.elements // width

    def part(start: int, stop: int) -> Array:
        stored = gguf_rows(path, offset, tensor, start, stop, width)
        values = to_float32(stored, tensor.type_name if tensor.type_name in HELD_AS else "F32")
        require_finite(values, path.name, tensor.name, start, (rows, width))
        if type_name in HELD_AS:
            return from_float32(values, type_name)
        return encode(tensor.name, type_name, values, start)

    step = max(PART_BYTES // (4 * width), 1)
    for start in range(0, rows, step):
        yield partial(part, start, min(start + step, rows))


def stored_parts(tensor: GgufTensor, place: tuple[Path, int]) -> Iterator[Part]:
    """A tensor's data as they are. place: of its file and of where they begin there."""
    path, offset = place
    for start in range(0, tensor.num_bytes, PART_BYTES):
        size = min(PART_BYTES, tensor.num_bytes - start)
        yield partial(stored_bytes, path, offset + start, size)


def rewritten_head(
    header: GgufHeader, types: Mapping[str, str | None], entries: Mapping[str, bytes]
) -> bytes:
    """Everything in front of the tensors' data. entries: of the metadata that are said anew, by key."""
    kept = raw_entries(header.path, {*OF_SPLITS, *_OF_IMATRIX, *entries})
    tensors = [
        TensorEntry(
            tensor.name,
            tensor.shape,
            types[tensor.name] or tensor.type_name,
            written_bytes(tensor, types[tensor.name]),
        )
        for tensor in header.tensors
    ]
    return head([*kept, *entries.values()], tensors, header.alignment)


def raw_entries(path: Path, dropped: Container[str]) -> list[bytes]:
    """The metadata as they lie in a file whose header was checked, but for some."""
    found: list[bytes] = []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = Cursor(path, data, position=4)
        cursor.integer("u32", "the version")
        cursor.integer("u64", "the number of tensors")
        for index in range(cursor.integer("u64", "the number of metadata entries")):
            start = cursor.position
            key = cursor.name_string(f"metadata key {index}", MAX_KEY_BYTES)
            cursor.value(key)
            if key not in dropped:
                found.append(data[start : cursor.position])
    return found
