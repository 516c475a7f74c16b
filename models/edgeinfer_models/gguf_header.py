"""A GGUF file's header: metadata and tensors, checked against the file before native code sees it.

`read_gguf_header` is strict in what can be proved from one file's structure. What callers want is
`gguf_model.read_gguf_model`: it joins the shards of a split model and checks that the model makes sense.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgeinfer.errors import ModelFileInvalid, UnsupportedModel
from edgeinfer_models.file_kind import SNIFF_BYTES, describe, require_regular_file, shown
from edgeinfer_models.ggml_types import GGML_TYPES, REMOVED_TYPES
from edgeinfer_models.gguf_format import MAX_KEYS, Cursor, GgufArray, GgufValue, Scalar

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_TENSOR_NAME = 63  # GGML_MAX_NAME - 1
MAX_KEY_BYTES = 65_535
MAX_TENSORS = 1 << 18
_MIN_KEY_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8
_INT64_MAX = 2**63 - 1


@dataclass(frozen=True)
class GgufTensor:
    name: str
    shape: tuple[int, ...]  # ggml order: the row length first
    type_name: str
    ggml_type: int
    offset: int  # from the start of the file's data section
    num_bytes: int

    @property
    def elements(self) -> int:
        product = 1
        for dim in self.shape:
            product *= dim
        return product


@dataclass(frozen=True)
class GgufHeader:
    """One file's header. For a split model: the first shard's metadata, the tensors of all."""

    path: Path
    version: int
    metadata: Mapping[str, GgufValue]
    types: Mapping[str, str]  # of the metadata: "u32", "str", "[i32]" …
    tensors: tuple[GgufTensor, ...]
    data_offset: int
    alignment: int
    file_bytes: int  # all shards together
    weights_bytes: int  # of the tensors, without padding
    shards: tuple[Path, ...] = field(default=())  # in order; (path,) for a model in one file

    @property
    def architecture(self) -> str:
        return self.get_str("general.architecture")

    def get(self, key: str, default: GgufValue | None = None) -> GgufValue | None:
        """A value by its key. `{arch}` in the key stands for the architecture."""
        return self.metadata.get(self._key(key), default)

    def get_int(self, key: str, default: int = 0) -> int:
        value = self.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else default

    def get_float(self, key: str, default: float = 0.0) -> float:
        value = self.get(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if is_number else default  # type: ignore[arg-type]

    def get_str(self, key: str, default: str = "") -> str:
        value = self.get(key)
        return value if isinstance(value, str) else default

    def get_list(self, key: str) -> list[Scalar] | None:
        """An array's elements, read from the file if it is long; None if there is no such array."""
        value = self.get(key)
        if isinstance(value, GgufArray):
            return value.read()
        return value if isinstance(value, list) else None

    def get_length(self, key: str) -> int | None:
        """An array's length; None if there is no such array."""
        value = self.get(key)
        if isinstance(value, GgufArray):
            return value.length
        return len(value) if isinstance(value, list) else None

    def tensor(self, name: str) -> GgufTensor | None:
        return next((t for t in self.tensors if t.name == name), None)

    def _key(self, key: str) -> str:
        if "{arch}" not in key:
            return key
        architecture = self.metadata.get("general.architecture")
        return key.replace("{arch}", architecture if isinstance(architecture, str) else "")


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check one GGUF file's header.

    Raises ModelNotFound, ModelFileInvalid, UnsupportedModel. Reads the header only, whatever the size.
    """
    file_bytes = require_regular_file(path)
    try:
        with path.open("rb") as file:
            head = file.read(SNIFF_BYTES)
            if head[:4] != MAGIC or len(head) < 24:
                raise _not_gguf(path, head, file_bytes)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read(Cursor(path, data, position=4))
    except OSError as error:
        raise ModelFileInvalid(
            f"{shown(path)}: cannot be read ({error.strerror}); check the file"
        ) from None


def _not_gguf(path: Path, head: bytes, file_bytes: int) -> ModelFileInvalid:
    if head[:4] == MAGIC:
        return ModelFileInvalid(f"{path.name}: has only {file_bytes} bytes; download it again")
    what, then = describe(head)
    if what == "empty":
        return ModelFileInvalid(f"{path.name}: is empty; {then}")
    return ModelFileInvalid(f"{path.name}: is not a GGUF model but seems to be {what}; {then}")


def _read(cursor: Cursor) -> GgufHeader:
    version = _read_version(cursor)
    num_tensors = cursor.integer("u64", "the number of tensors")
    num_keys = cursor.integer("u64", "the number of metadata entries")
    _check_count(cursor, num_keys, MAX_KEYS, _MIN_KEY_BYTES, "metadata entries")
    _check_count(cursor, num_tensors, MAX_TENSORS, _MIN_TENSOR_BYTES, "tensors")

    metadata: dict[str, GgufValue] = {}
    types: dict[str, str] = {}
    for index in range(num_keys):
        key = cursor.name_string(f"metadata key {index}", MAX_KEY_BYTES)
        if key in metadata:
            raise cursor.invalid(f"metadata '{key}' is there twice")
        metadata[key], types[key] = cursor.value(key)

    alignment = _alignment(cursor, metadata, types)
    infos = [_read_tensor(cursor, index) for index in range(num_tensors)]
    data_offset = -(-cursor.position // alignment) * alignment
    _check_placement(cursor, infos, data_offset, alignment)
    return GgufHeader(
        path=cursor.path,
        version=version,
        metadata=metadata,
        types=types,
        tensors=tuple(infos),
        data_offset=data_offset,
        alignment=alignment,
        file_bytes=cursor.end,
        weights_bytes=sum(t.num_bytes for t in infos),
        shards=(cursor.path,),
    )


def _read_version(cursor: Cursor) -> int:
    version = cursor.integer("u32", "the version")
    if version in (2, 3):
        return version
    if version & 0xFFFF == 0 and version:
        raise UnsupportedModel(
            f"{cursor.name}: is a big-endian GGUF file; download the little-endian one of this model"
        )
    if version == 1:
        raise UnsupportedModel(
            f"{cursor.name}: is GGUF version 1, which llama.cpp no longer reads; download a newer"
            " conversion"
        )
    if 3 < version < 100:
        raise UnsupportedModel(
            f"{cursor.name}: is GGUF version {version}; this build reads 2 and 3, update edgeinfer"
        )
    raise cursor.invalid(f"claims GGUF version {version}")


def _check_count(cursor: Cursor, count: int, limit: int, min_bytes: int, what: str) -> None:
    if count > limit or count * min_bytes > cursor.remaining:
        raise cursor.invalid(f"the header claims {count:,} {what} in a file of {cursor.end:,} bytes")


def _alignment(cursor: Cursor, metadata: Mapping[str, GgufValue], types: Mapping[str, str]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    kind = types.get("general.alignment", "u32")
    if kind != "u32" or not isinstance(value, int) or value < 1 or value & (value - 1):
        raise cursor.invalid("'general.alignment' is not a power of two")
    if value > MAX_ALIGNMENT:
        raise cursor.invalid(f"'general.alignment' is {value:,}")
    return value


def _read_tensor(cursor: Cursor, index: int) -> GgufTensor:
    name = cursor.name_string(f"tensor name {index}", MAX_KEY_BYTES)
    what = f"tensor '{name}'"
    if len(name.encode()) > MAX_TENSOR_NAME:
        raise cursor.invalid(f"{what} has a name of more than {MAX_TENSOR_NAME} bytes")
    num_dims = cursor.integer("u32", what)
    if not 1 <= num_dims <= 4:
        raise cursor.invalid(f"{what} has {num_dims} dimensions, not 1 to 4")
    shape = tuple(cursor.integer("i64", what) for _ in range(num_dims))
    elements = 1
    for dim in shape:
        elements *= dim
        if dim < 1 or elements > _INT64_MAX:
            raise cursor.invalid(f"{what} has the impossible shape {list(shape)}")
    type_id = cursor.integer("u32", what)
    offset = cursor.integer("u64", what)
    ggml_type = GGML_TYPES.get(type_id)
    if ggml_type is None:
        if type_id in REMOVED_TYPES:
            raise UnsupportedModel(
                f"{cursor.name}: {what} has the type {REMOVED_TYPES[type_id]}, which llama.cpp has"
                " dropped;"
                " download a newer quantization of this model"
            )
        raise cursor.invalid(f"{what} has the unknown type {type_id}")
    if shape[0] % ggml_type.block:
        raise cursor.invalid(
            f"{what} has rows of {shape[0]}, which {ggml_type.name} cannot hold (blocks of"
            f" {ggml_type.block})"
        )
    num_bytes = elements // ggml_type.block * ggml_type.block_bytes
    return GgufTensor(name, shape, ggml_type.name, type_id, offset, num_bytes)


def _check_placement(
    cursor: Cursor, tensors: Sequence[GgufTensor], data_offset: int, alignment: int
) -> None:
    """Tensors follow one another without gap or overlap, as gguf.cpp demands, and end in the file."""
    seen: set[str] = set()
    expected = 0
    for tensor in tensors:
        if tensor.name in seen:
            raise cursor.invalid(f"tensor '{tensor.name}' is there twice")
        seen.add(tensor.name)
        if tensor.offset != expected:
            raise cursor.invalid(
                f"tensor '{tensor.name}' lies at offset {tensor.offset:,} where {expected:,} was"
                " expected"
            )
        expected += -(-tensor.num_bytes // alignment) * alignment
    if not tensors:
        return
    end = data_offset + tensors[-1].offset + tensors[-1].num_bytes
    if end > cursor.end:
        missing = end - cursor.end
        raise ModelFileInvalid(
            f"{cursor.name}: {missing:,} of {end:,} bytes are missing at its end;"
            " the download was cut off, download it again"
        )
