"""A model as a Hugging Face folder that transformers and mlx-lm load: config.json and its shards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from edgeinfer.errors import UsageError
from edgeinfer_models.conversion.floats import recast, to_float32
from edgeinfer_models.conversion.new_file import NewFile
from edgeinfer_models.conversion.sources import TensorSource
from edgeinfer_models.conversion.to_gguf import check_tensors, require_f16, row_chunks
from edgeinfer_models.families.tensors import TensorRule
from edgeinfer_models.safetensors_header import INDEX_NAME

SHARD_BYTES = 4 * 2**30
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
Progress = Callable[[float], None]


@dataclass(frozen=True)
class _Entry:
    name: str
    rule: TensorRule
    dtype: str

    @property
    def num_bytes(self) -> int:
        elements = 1
        for size in self.rule.shape:
            elements *= size
        return elements * _ITEM_BYTES[self.dtype]


def write_safetensors(
    folder: Path,
    source: TensorSource,
    rules: Sequence[TensorRule],
    texts: Mapping[str, str],
    *,
    dtype: str | None = None,
    progress: Progress = lambda _: None,
) -> None:
    """texts: the other files, by name. dtype: F32, F16 or BF16 of every tensor; None: as the source has
    each. The folder is made when all is written. Raises ModelFileInvalid, UsageError (it is there and
    not empty), OSError."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: is there already and not empty; -o gives another name")
    check_tensors(source, rules)
    entries = [
        _Entry(name, rule, dtype or source.info(name).dtype) for rule in rules for name in rule.hf
    ]
    shards = _shards(entries)
    total, done = sum(entry.num_bytes for entry in entries), 0
    within = folder if folder.exists() else folder.parent
    with ExitStack() as files:  # what is entered first gets its name last: config.json after the weights

        def begin(name: str) -> IO[bytes]:
            return files.enter_context(NewFile(folder / name, within=within)).file

        for name, text in texts.items():
            begin(name).write(text.encode())
        if len(shards) > 1:
            begin(INDEX_NAME).write(_index(shards, total))
        for name, shard in shards.items():
            file = begin(name)
            file.write(_header(shard))
            for entry in shard:
                for part in _parts(source, entry):
                    file.write(part)
                    done += part.nbytes
                    progress(done / total)


def _shards(entries: Sequence[_Entry]) -> dict[str, list[_Entry]]:
    shards: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.num_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {
        f"model-{index:05d}-of-{count:05d}.safetensors": shard
        for index, shard in enumerate(shards, start=1)
    }


def _header(entries: Sequence[_Entry]) -> bytes:
    """Source: the format's description in the safetensors repository; "format": "pt" is what
    transformers asks for."""
    found: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        stop = offset + entry.num_bytes
        found[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.rule.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(found, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _index(shards: Mapping[str, Sequence[_Entry]], total: int) -> bytes:
    names = {entry.name: name for name, shard in shards.items() for entry in shard}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": names}, indent=1).encode()


def _parts(source: TensorSource, entry: _Entry) -> Iterator[memoryview]:
    import numpy as np

    dtype = source.info(entry.name).dtype
    for start, stop in row_chunks(entry.rule):
        rows = source.rows(entry.name, start, stop)
        if entry.dtype == "F16" and dtype != "F16":
            require_f16(to_float32(rows, dtype), entry.name)
        yield np.ascontiguousarray(recast(rows, dtype, entry.dtype)).data
