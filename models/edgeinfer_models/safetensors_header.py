"""A safetensors file's header and a Hugging Face folder of them, checked before anything is loaded.

The `safetensors` library reads tensors (later, where they are converted); looking at a model needs only
the JSON in front, without numpy. The rules are those of the library's own `SafeTensors::deserialize`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeinfer.errors import ModelFileInvalid, ModelNotFound, UnsupportedModel
from edgeinfer_models.file_kind import SNIFF_BYTES, describe, only_pickles, require_regular_file, shown

MAX_HEADER_BYTES = 100_000_000
MAX_JSON_BYTES = 64 << 20  # of config.json and shard indexes
INDEX_NAME = "model.safetensors.index.json"

_DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class SafetensorsTensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # in the file
    num_bytes: int

    @property
    def elements(self) -> int:
        product = 1
        for dim in self.shape:
            product *= dim
        return product


@dataclass(frozen=True)
class SafetensorsHeader:
    path: Path
    metadata: Mapping[str, str]
    tensors: tuple[SafetensorsTensor, ...]  # by their place in the file
    data_offset: int
    file_bytes: int


@dataclass(frozen=True)
class SafetensorsFolder:
    folder: Path
    config: Mapping[str, Any]
    shards: tuple[SafetensorsHeader, ...]

    @property
    def tensors(self) -> tuple[SafetensorsTensor, ...]:
        return tuple(tensor for shard in self.shards for tensor in shard.tensors)


def read_safetensors_header(path: Path) -> SafetensorsHeader:
    """Raises ModelNotFound, ModelFileInvalid, UnsupportedModel (a dtype nobody knows)."""
    file_bytes = require_regular_file(path)
    try:
        with path.open("rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, file_bytes - 8):
                raise _not_safetensors(path, head + file.read(SNIFF_BYTES), length, file_bytes)
            raw = file.read(length)
    except OSError as error:
        raise ModelFileInvalid(
            f"{shown(path)}: cannot be read ({error.strerror}); check the file"
        ) from None
    if not raw.startswith(b"{"):
        raise _invalid(path.name, "its header is not a JSON object")
    entries = _parse_json(path.name, raw)
    metadata = entries.pop("__metadata__", None)
    if metadata is None:  # MLX writes null
        metadata = {}
    if not isinstance(metadata, dict):
        raise _invalid(path.name, "'__metadata__' is not an object")
    data_offset = 8 + length
    tensors = [_tensor(path.name, name, entry, data_offset) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.num_bytes))
    _check_placement(path.name, tensors, data_offset, file_bytes)
    texts = {str(key): str(value) for key, value in metadata.items()}
    return SafetensorsHeader(path, texts, tuple(tensors), data_offset, file_bytes)


def read_safetensors_folder(folder: Path) -> SafetensorsFolder:
    """A Hugging Face folder: config.json and one safetensors file, or the shards its index names."""
    config = read_json(folder / "config.json")
    index = folder / INDEX_NAME
    single = folder / "model.safetensors"
    if index.is_file():
        shards = _indexed_shards(index)
    elif single.is_file():
        shards = [read_safetensors_header(single)]
    else:
        files = sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            found = (
                "no .safetensors file" if not files else f"{len(files)} .safetensors files but no index"
            )
            why = "" if files else only_pickles(path.name for path in folder.iterdir())
            raise ModelFileInvalid(
                f"{shown(folder)}: {why or f'has {found}; download the whole model folder'}"
            )
        shards = [read_safetensors_header(files[0])]
    return SafetensorsFolder(folder, config, tuple(shards))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelNotFound, ModelFileInvalid."""
    if require_regular_file(path) > MAX_JSON_BYTES:
        raise _invalid(path.name, f"has more than {MAX_JSON_BYTES:,} bytes")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ModelFileInvalid(
            f"{shown(path)}: cannot be read ({error.strerror}); check the file"
        ) from None
    return _parse_json(path.name, raw)


def _indexed_shards(index: Path) -> list[SafetensorsHeader]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _invalid(index.name, "has no 'weight_map'")
    names = sorted({str(name) for name in weight_map.values()})
    shards: list[SafetensorsHeader] = []
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise _invalid(index.name, f"names the shard '{name}', which is not a file beside it")
        try:
            shards.append(read_safetensors_header(index.parent / name))
        except ModelNotFound:
            raise ModelNotFound(f"{name}: shard is missing; put it beside {index.name}") from None
    held = {tensor.name: shard.path.name for shard in shards for tensor in shard.tensors}
    for tensor, name in weight_map.items():
        if held.get(tensor) != name:
            raise _invalid(index.name, f"tensor '{tensor}' is not in {name}")
    return shards


def _parse_json(name: str, raw: bytes) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key is there twice")
        return found

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise _invalid(name, f"its JSON cannot be read ({reason})") from None
    if not isinstance(value, dict):
        raise _invalid(name, "its JSON is not an object")
    return value


def _tensor(file: str, name: str, entry: Any, data_offset: int) -> SafetensorsTensor:
    what = f"tensor '{name}'"
    if not isinstance(entry, dict):
        raise _invalid(file, f"{what} is not described by an object")
    dtype: Any
    shape: Any
    offsets: Any
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    proper = isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2
    if not proper:
        raise _invalid(file, f"{what} lacks a proper dtype, shape or data_offsets")
    bits = _DTYPE_BITS.get(dtype)
    if bits is None:
        raise UnsupportedModel(
            f"{file}: {what} has the unknown dtype '{dtype}'; update edgeinfer, or use another file"
        )
    elements = 1
    for dim in shape:
        elements *= dim
    start, stop = offsets
    if stop - start != -(-elements * bits // 8) or elements * bits >= 2**63:
        raise _invalid(file, f"{what} has {stop - start:,} bytes, which its shape {shape} does not fill")
    return SafetensorsTensor(name, dtype, tuple(shape), data_offset + start, stop - start)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_placement(
    name: str, tensors: list[SafetensorsTensor], data_offset: int, file_bytes: int
) -> None:
    position = data_offset
    for tensor in tensors:
        if tensor.start != position:
            raise _invalid(name, f"tensor '{tensor.name}' does not follow the one before it")
        position += tensor.num_bytes
    if position > file_bytes:
        raise ModelFileInvalid(
            f"{name}: {position - file_bytes:,} of {position:,} bytes are missing at its end;"
            " the download was cut off, download it again"
        )
    if position < file_bytes:
        raise _invalid(name, f"has {file_bytes - position:,} bytes after its last tensor")


def _not_safetensors(path: Path, head: bytes, length: int, file_bytes: int) -> ModelFileInvalid:
    what, then = describe(head)
    if what in ("unknown data", "a safetensors file"):
        return ModelFileInvalid(
            f"{path.name}: its header claims {length:,} bytes in a file of {file_bytes:,};"
            " the file is damaged, download it again"
        )
    if what == "empty":
        return ModelFileInvalid(f"{path.name}: is empty; {then}")
    then = then.replace("a .gguf file", "a .safetensors file")
    return ModelFileInvalid(f"{path.name}: is not safetensors but seems to be {what}; {then}")


def _invalid(name: str, what: str) -> ModelFileInvalid:
    return ModelFileInvalid(f"{name}: {what}; the file is damaged, download it again")
