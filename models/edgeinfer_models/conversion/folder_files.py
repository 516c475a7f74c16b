"""The files of a Hugging Face folder, written together: all of them appear, or none.

    write_folder(folder, pieces, {"config.json": b"{…}"})

A piece is what comes out of one reading of the source, a tensor or several: a packed matrix and its
scales. Each part is written to its own place, so that memory is that of a few rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from edgeinfer.errors import UsageError
from edgeinfer_models.conversion.new_file import NewFile
from edgeinfer_models.safetensors_header import INDEX_NAME

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

SHARD_BYTES = 4 * 2**30
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "I64": 8, "I8": 1, "F8_E4M3": 1}
Progress = Callable[[float], None]


@dataclass(frozen=True)
class StoredTensor:
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        elements = 1
        for size in self.shape:
            elements *= size
        return elements * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Piece:
    """parts(): for each of `tensors` its next bytes, in order."""

    tensors: tuple[StoredTensor, ...]
    parts: Callable[[], Iterator[tuple[Array, ...]]]
    num_weights: int  # of the model, that they stand for

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)


def write_folder(
    folder: Path,
    pieces: Sequence[Piece],
    files: Mapping[str, bytes],
    *,
    made_for: str = "pt",
    has_index: bool = False,
    progress: Progress = lambda _: None,
) -> None:
    """files: the others, by name. made_for: the "format" that readers ask for. has_index: also of a
    single shard. The folder is made when all is written. Raises UsageError (it is there and not empty),
    OSError, and what reading a piece raises."""
    require_free(folder)
    shards = _shards(pieces)
    total, done = sum(piece.num_bytes for piece in pieces), 0
    within = folder if folder.exists() else folder.parent
    with (
        ExitStack() as opened
    ):  # what is entered first gets its name last: config.json after the weights

        def begin(name: str) -> IO[bytes]:
            return opened.enter_context(NewFile(folder / name, within=within)).file

        for name, content in files.items():
            begin(name).write(content)
        if len(shards) > 1 or has_index:
            begin(INDEX_NAME).write(_index(shards))
        for name, shard in shards.items():
            file = begin(name)
            head = _header(shard, made_for)
            file.write(head)
            start = len(head)
            for piece in shard:
                for size in _written(file, start, piece):
                    done += size
                    progress(done / total)
                start += piece.num_bytes


def require_free(folder: Path) -> None:
    """Raises UsageError."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"{folder}: is there already and not empty; no folder is replaced, -o gives another name"
        )


def _written(file: IO[bytes], start: int, piece: Piece) -> Iterator[int]:
    import numpy as np

    places, ends = [], []
    for tensor in piece.tensors:
        places.append(start)
        start += tensor.num_bytes
        ends.append(start)
    for arrays in piece.parts():
        for index, array in enumerate(arrays):
            if len(arrays) > 1:  # one tensor's bytes follow each other
                file.seek(places[index])
            file.write(np.ascontiguousarray(array).data)
            places[index] += array.nbytes
            yield array.nbytes
    assert places == ends, [tensor.name for tensor in piece.tensors]
    file.seek(start)


def _shards(pieces: Sequence[Piece]) -> dict[str, list[Piece]]:
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if shards[-1] and size + piece.num_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.num_bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {
        f"model-{index:05d}-of-{count:05d}.safetensors": shard
        for index, shard in enumerate(shards, start=1)
    }


def _header(pieces: Sequence[Piece], made_for: str) -> bytes:
    """Source: the format's description in the safetensors repository; transformers asks for the format
    "pt", MLX writes "mlx"."""
    found: dict[str, Any] = {"__metadata__": {"format": made_for}}
    offset = 0
    for tensor in (tensor for piece in pieces for tensor in piece.tensors):
        stop = offset + tensor.num_bytes
        found[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(found, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _index(shards: Mapping[str, Sequence[Piece]]) -> bytes:
    pieces = [piece for shard in shards.values() for piece in shard]
    sizes = {
        "total_size": sum(piece.num_bytes for piece in pieces),
        "total_parameters": sum(piece.num_weights for piece in pieces),
    }
    names = {
        tensor.name: name
        for name, shard in shards.items()
        for piece in shard
        for tensor in piece.tensors
    }
    return json.dumps({"metadata": sizes, "weight_map": names}, indent=1).encode()
