"""A GGUF file with some of its tensors in other types: everything else stays, byte for byte.

Of any architecture: nothing of the model has to be understood for that.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeinfer_models.conversion.floats import HELD_AS, from_float32, to_float32
from edgeinfer_models.conversion.new_file import NewFile
from edgeinfer_models.conversion.sources import gguf_rows, places_of, require_finite
from edgeinfer_models.ggml_types import GGML_TYPES_BY_NAME, row_bytes
from edgeinfer_models.gguf_format import Cursor
from edgeinfer_models.gguf_header import MAGIC, MAX_KEY_BYTES, GgufHeader, GgufTensor

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[Any]
    # Rows of float32 as a type's blocks: (n, bytes of a row).
    Encode = Callable[[str, npt.NDArray[np.float32]], npt.NDArray[np.uint8]]

_CHUNK_BYTES = 2**24  # of F32 numbers at a time
_VERSION = 3
_U32, _STRING = 4, 8  # of GGUF's value types
_DROPPED = ("split.no", "split.count", "split.tensors.count", "general.file_type",
            "general.quantization_version")  # fmt: skip
_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
Progress = Callable[[float], None]


def rewrite_gguf(
    path: Path,
    header: GgufHeader,
    types: Mapping[str, str | None],
    file_type: int,
    encode: Encode,
    *,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> None:
    """types: of each tensor; None: as it is. file_type: llama_ftype. Raises ModelFileInvalid (numbers
    that are not finite, a file that shrank), UnsupportedModel (a type nobody can read back), UsageError
    (the file is there), OSError; then nothing is left."""
    places = places_of(header)
    total = sum(written_bytes(tensor, types[tensor.name]) for tensor in header.tensors)
    done = 0
    with NewFile(path, force=force) as new:
        new.file.write(gguf_head(header, types, file_type))
        for tensor in header.tensors:
            size = 0
            for part in _parts(tensor, places[tensor.name], types[tensor.name], encode):
                new.file.write(part.tobytes())
                size += part.nbytes
                done += part.nbytes
                progress(done / total)
            assert size == written_bytes(tensor, types[tensor.name]), tensor.name
            new.file.write(bytes(-size % header.alignment))


def written_bytes(tensor: GgufTensor, type_name: str | None) -> int:
    if type_name is None:
        return tensor.num_bytes
    return tensor.elements // tensor.shape[0] * row_bytes(type_name, tensor.shape[0])


def _parts(
    tensor: GgufTensor, place: tuple[Path, int], type_name: str | None, encode: Encode
) -> Iterator[Array]:
    path, offset = place
    width = tensor.shape[0]
    rows = tensor.elements // width
    if type_name is None or type_name == tensor.type_name:
        yield from copied(path, offset, tensor.num_bytes)
        return
    step = max(_CHUNK_BYTES // (4 * width), 1)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        stored = gguf_rows(path, offset, tensor, start, stop, width)
        values = to_float32(stored, tensor.type_name if tensor.type_name in HELD_AS else "F32")
        require_finite(values, path.name, tensor.name, start, (rows, width))
        if type_name in HELD_AS:
            yield from_float32(values, type_name)
        else:
            yield encode(type_name, values)


def copied(path: Path, offset: int, num_bytes: int) -> Iterator[Array]:
    import numpy as np

    for start in range(0, num_bytes, _CHUNK_BYTES):
        yield np.fromfile(path, np.uint8, min(_CHUNK_BYTES, num_bytes - start), offset=offset + start)


def gguf_head(
    header: GgufHeader,
    types: Mapping[str, str | None],
    file_type: int,
    changed: Mapping[str, bytes] = {},
) -> bytes:
    """Everything in front of the tensors' data. changed: metadata with other values than the header's
    (their type's number, then the value)."""
    values = _raw_values(header.path, dropped=(*_DROPPED, *changed))
    values += [_string(key) + value for key, value in changed.items()]
    for key, value in (
        ("general.file_type", file_type),
        ("general.quantization_version", _QUANTIZATION_VERSION),
    ):
        values.append(_string(key) + struct.pack("<II", _U32, value))
    infos, offset = [], 0
    for tensor in header.tensors:
        kind = GGML_TYPES_BY_NAME[types[tensor.name] or tensor.type_name]
        infos.append(
            _string(tensor.name)
            + struct.pack(f"<I{len(tensor.shape)}QIQ", len(tensor.shape), *tensor.shape, kind.id, offset)
        )
        size = written_bytes(tensor, types[tensor.name])
        offset += -(-size // header.alignment) * header.alignment
    head = MAGIC + struct.pack("<IQQ", _VERSION, len(infos), len(values)) + b"".join([*values, *infos])
    return head + bytes(-len(head) % header.alignment)


def _raw_values(path: Path, dropped: Sequence[str]) -> list[bytes]:
    """The metadata's keys and values as they lie in a file whose header was checked, but for those that
    are written anew."""
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


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
