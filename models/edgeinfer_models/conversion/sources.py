"""Weights by their Hugging Face names, from either kind of file, a few rows at a time.

    source = SafetensorsSource(read_safetensors_folder(folder))
    source.info("model.embed_tokens.weight")      # shape, dtype
    source.rows("model.embed_tokens.weight", 0, 256)

What a tensor is stored as stays as it is where that is a float of 16 or 32 bits; 8-bit floats with their
scales and ggml's quantized types come out as F32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgeinfer.errors import ModelFileInvalid, UnsupportedModel
from edgeinfer_models.conversion.floats import HELD_AS, first_bad, to_float32
from edgeinfer_models.conversion.packed import PARTS, Packing, shape_of_packed, unpacked_rows
from edgeinfer_models.conversion.packed_rows import PackedMatrix, RowPacking, codes_of, unpacked
from edgeinfer_models.families.changes import from_gguf
from edgeinfer_models.families.tensors import TensorRule
from edgeinfer_models.gguf_header import GgufHeader, GgufTensor
from edgeinfer_models.safetensors_header import SafetensorsFolder, SafetensorsTensor

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgeinfer_models.conversion.packed_rows import Bytes, Codes

    Array = npt.NDArray[Any]
    Floats = npt.NDArray[np.float32]

SCALE_SUFFIXES = ("_scale_inv", "_scale")  # of an F8 tensor's name
_PLAIN_GGUF = {"F32": "F32", "F16": "F16", "BF16": "BF16"}


@dataclass(frozen=True)
class TensorInfo:
    """shape: rows first. dtype: of what `rows` gives: F32, F16 or BF16. is_packed: any rows take the
    reading of the whole matrix, so that few at a time are dear."""

    shape: tuple[int, ...]
    dtype: str
    is_packed: bool = False


class TensorSource(Protocol):
    @property
    def names(self) -> Sequence[str]: ...

    def info(self, name: str) -> TensorInfo:
        """Raises ModelFileInvalid for one that is missing."""
        ...

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Held as floats.py says. Called by several threads. Raises ModelFileInvalid, naming the
        tensor and the place, for numbers that are not finite."""
        ...


class SafetensorsSource:
    """A Hugging Face folder. packing: of the matrices that are not stored as plain numbers."""

    def __init__(self, folder: SafetensorsFolder, packing: Packing | RowPacking | None = None) -> None:
        self._name = folder.folder.name
        self._tensors: dict[str, tuple[Path, SafetensorsTensor]] = {}
        for shard in folder.shards:
            for tensor in shard.tensors:
                if tensor.name in self._tensors:
                    raise ModelFileInvalid(
                        f"{shard.path.name}: tensor '{tensor.name}' is in another shard too; download"
                        " the whole model folder again"
                    )
                self._tensors[tensor.name] = (shard.path, tensor)
        self._scale_of = {
            name: name + suffix
            for name in self._tensors
            for suffix in SCALE_SUFFIXES
            if name + suffix in self._tensors
        }

        self._packing = packing if isinstance(packing, Packing) else None
        self._by_rows: Mapping[str, PackedMatrix] = {}
        if packing is not None and not isinstance(packing, Packing):
            tensors = {name: tensor for name, (_, tensor) in self._tensors.items()}
            self._by_rows = packing.matrices(tensors, self._name)
        self._packed: dict[str, tuple[int, int]] = {}  # shapes, by the name of the unpacked matrix
        for name in self._tensors if self._packing is not None else ():
            if name.endswith(".qweight"):
                stem = name.removesuffix(".qweight")
                self._packed[f"{stem}.weight"] = self._packed_shape(stem)

    def _packed_shape(self, stem: str) -> tuple[int, int]:
        assert self._packing is not None
        shapes: dict[str, tuple[int, ...]] = {}
        for part in PARTS:
            found = self._tensors.get(f"{stem}.{part}")
            if found is None:
                continue
            shapes[part] = found[1].shape
            wanted = ("F16", "BF16", "F32") if part == "scales" else ("I32", "U32")
            if found[1].dtype not in wanted:
                raise ModelFileInvalid(
                    f"{self._name}: tensor '{stem}.{part}' is of the type {found[1].dtype}, not"
                    f" {' or '.join(wanted)}"
                )
        return shape_of_packed(self._packing, shapes, stem)

    @property
    def names(self) -> Sequence[str]:
        parts = {f"{name.removesuffix('.weight')}.{part}" for name in self._packed for part in PARTS}
        by_rows = {part for matrix in self._by_rows.values() for part in matrix.parts}
        hidden = {*self._scale_of.values(), *parts, *by_rows}
        shown = [name for name in self._tensors if name not in hidden]
        return [*shown, *self._packed, *self._by_rows]

    def packed(self, name: str) -> PackedMatrix | None:
        """Of a matrix that lies packed row by row."""
        return self._by_rows.get(name)

    def info(self, name: str) -> TensorInfo:
        if name in self._by_rows:
            return TensorInfo(self._by_rows[name].shape, "F32")
        if name in self._packed:
            return TensorInfo(self._packed[name], "F32", is_packed=True)
        _, tensor = self._find(name)
        if tensor.dtype not in HELD_AS:
            raise UnsupportedModel(
                f"{self._name}: tensor '{name}' is of the type {tensor.dtype}, which is no weight's"
            )
        is_kept = tensor.dtype in _PLAIN_GGUF
        return TensorInfo(tensor.shape, tensor.dtype if is_kept else "F32")

    def rows(self, name: str, start: int, stop: int) -> Array:
        if name in self._by_rows:
            matrix = self._by_rows[name]
            data, scales, biases = self._packed_parts(matrix, start, stop)
            found = unpacked(matrix, data, scales, biases)
            require_finite(found, self._name, name, start, matrix.shape)
            return found
        if name in self._packed:
            return self._unpacked(name.removesuffix(".weight"), start, stop)
        path, tensor = self._find(name)
        found = _read(path, HELD_AS[tensor.dtype], tensor.start, tensor.shape, start, stop)
        values = to_float32(found, tensor.dtype)
        require_finite(values, path.name, tensor.name, start, tensor.shape)
        if tensor.dtype in _PLAIN_GGUF:
            return found
        if not tensor.dtype.startswith("F8"):
            return values
        scaled: Floats = values * self._scales(name, start, stop)
        return scaled

    def codes(self, name: str, start: int, stop: int) -> tuple[Codes, Floats, Floats | None]:
        """Rows of a matrix that `packed` tells of: codes (as packed_rows.py says), scales and biases of
        their groups. Raises ModelFileInvalid."""
        matrix = self._by_rows[name]
        data, scales, biases = self._packed_parts(matrix, start, stop)
        groups = scales.reshape(stop - start, -1)
        return codes_of(matrix, data), groups, None if biases is None else biases.reshape(groups.shape)

    def _packed_parts(
        self, matrix: PackedMatrix, start: int, stop: int
    ) -> tuple[Bytes, Floats, Floats | None]:
        import numpy as np

        def read(part: str, *, is_codes: bool = False) -> Array:
            path, tensor = self._find(part)
            if tensor.elements == 1 and not is_codes:  # a scale for the whole matrix
                shape, first, last = (1, 1), 0, 1
            else:
                rows = tensor.elements // (tensor.shape[-1] if len(tensor.shape) > 1 else 1)
                shape = (rows, tensor.num_bytes // rows if is_codes else tensor.elements // rows)
                first, last = matrix.first_row + start, matrix.first_row + stop
            held_as = "u1" if is_codes else HELD_AS[tensor.dtype]
            found = _read(path, held_as, tensor.start, shape, first, last)
            if is_codes:
                return found
            values = to_float32(found, tensor.dtype)
            require_finite(values, path.name, part, first, shape)
            return np.broadcast_to(values, (stop - start, values.shape[1]))

        biases = None if matrix.biases is None else read(matrix.biases)
        return read(matrix.codes, is_codes=True), read(matrix.scales), biases

    def _unpacked(self, stem: str, start: int, stop: int) -> Floats:
        def part(which: str) -> Array | None:
            if which == "g_idx" and f"{stem}.g_idx" not in self._tensors:
                return None
            path, tensor = self._find(f"{stem}.{which}")
            held_as = HELD_AS.get(tensor.dtype, "<u4")
            stored = _read(path, held_as, tensor.start, tensor.shape, 0, tensor.shape[0])
            return stored if which != "scales" else to_float32(stored, tensor.dtype)

        assert self._packing is not None
        found = unpacked_rows(self._packing, part, start, stop, stem)
        require_finite(found, self._name, f"{stem}.scales", start, self._packed[f"{stem}.weight"])
        return found

    def _find(self, name: str) -> tuple[Path, SafetensorsTensor]:
        found = self._tensors.get(name)
        if found is None:
            raise ModelFileInvalid(
                f"{self._name}: tensor '{name}' is missing; download the whole model folder"
            )
        return found

    def _scales(self, name: str, start: int, stop: int) -> Floats:
        """Of an F8 tensor's rows: one for all, one for each row, or one for each square block."""
        import numpy as np

        if name not in self._scale_of:
            raise ModelFileInvalid(
                f"{self._name}: tensor '{name}' is of the type F8_E4M3 and has no scales beside it"
            )
        path, scale = self._find(self._scale_of[name])
        _, tensor = self._find(name)
        if scale.dtype not in _PLAIN_GGUF:
            raise ModelFileInvalid(
                f"{self._name}: the scales '{scale.name}' are of the type {scale.dtype}, which no scales"
                " are of; download the model again"
            )
        shape = scale.shape or (1,)
        stored = _read(path, HELD_AS[scale.dtype], scale.start, shape, 0, shape[0])
        values = to_float32(stored, scale.dtype)
        require_finite(values, path.name, scale.name, 0, scale.shape)
        if values.size == 1:
            return values.reshape(())
        num_rows, width = tensor.shape
        if values.size == num_rows:
            return values.reshape(num_rows, 1)[start:stop]
        if values.ndim == 2:
            high, wide = (
                -(-size // blocks) for size, blocks in zip(tensor.shape, values.shape, strict=True)
            )
            if (-(-num_rows // high), -(-width // wide)) == values.shape:
                found: Floats = values[np.arange(start, stop) // high][:, np.arange(width) // wide]
                return found
        raise ModelFileInvalid(
            f"{self._name}: the scales '{scale.name}' of shape {list(scale.shape)} do not fit"
            f" {list(tensor.shape)}"
        )


class GgufSource:
    """A GGUF model, its tensors as the family's rules name and lay them out."""

    def __init__(self, header: GgufHeader, rules: Sequence[TensorRule]) -> None:
        self._header = header
        self._rules: dict[str, tuple[TensorRule, int]] = {}
        for rule in rules:
            for index, name in enumerate(rule.hf):
                self._rules[name] = (rule, index)
        self._places = places_of(header)

    @property
    def names(self) -> Sequence[str]:
        return list(self._rules)

    def info(self, name: str) -> TensorInfo:
        rule, _, tensor = self._find(name)
        is_kept = rule.change != "add_one" and tensor.type_name in _PLAIN_GGUF
        return TensorInfo(rule.shape, tensor.type_name if is_kept else "F32")

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Whole heads of a tensor whose rows are paired: `start` and `stop` are at heads' ends."""
        rule, index, tensor = self._find(name)
        path, offset = self._places[tensor.name]
        if rule.change == "flatten":  # one row there, a vector here
            start, stop = 0, tensor.elements
        first = index * rule.shape[0] if rule.is_stack else 0
        width = tensor.shape[0] if len(tensor.shape) > 1 else 1
        found = gguf_rows(path, offset, tensor, first + start, first + stop, width)
        values = to_float32(found, tensor.type_name if tensor.type_name in _PLAIN_GGUF else "F32")
        require_finite(values, path.name, tensor.name, first + start, tuple(reversed(tensor.shape)))
        if len(rule.shape) == 1:
            found = found.reshape(-1)
        elif rule.change == "flatten":
            return found.reshape(rule.shape)
        heads = rule.heads * (stop - start) // rule.shape[0] if rule.heads else 0
        return from_gguf(found, rule.change, heads)

    def _find(self, name: str) -> tuple[TensorRule, int, GgufTensor]:
        rule, index = self._rules[name]
        tensor = self._header.tensor(rule.gguf)
        where = self._header.path.name
        if tensor is None:
            raise ModelFileInvalid(f"{where}: tensor '{rule.gguf}' is missing; download it again")
        if tuple(reversed(tensor.shape)) != rule.gguf_shape:
            raise ModelFileInvalid(
                f"{where}: tensor '{rule.gguf}' has the shape {list(reversed(tensor.shape))}, not"
                f" {list(rule.gguf_shape)}"
            )
        return rule, index, tensor


def places_of(header: GgufHeader) -> Mapping[str, tuple[Path, int]]:
    """Of each tensor its file and where its data begin there."""
    from edgeinfer_models.gguf_header import read_gguf_header

    found: dict[str, tuple[Path, int]] = {}
    for path in header.shards:
        shard = header if len(header.shards) == 1 else read_gguf_header(path)
        for tensor in shard.tensors:
            found[tensor.name] = (path, shard.data_offset + tensor.offset)
    return found


def gguf_rows(path: Path, offset: int, tensor: GgufTensor, start: int, stop: int, width: int) -> Array:
    """Rows of a tensor seen as a matrix; a vector is one of rows of one."""
    if tensor.type_name in _PLAIN_GGUF:
        rows = tensor.elements // width
        return _read(path, HELD_AS[tensor.type_name], offset, (rows, width), start, stop)
    import gguf

    rows = tensor.elements // width
    data = _read(path, "u1", offset, (rows, tensor.num_bytes // rows), start, stop)
    kind = gguf.GGMLQuantizationType(tensor.ggml_type)
    try:
        found: Array = gguf.quants.dequantize(data, kind)
    except NotImplementedError:
        raise UnsupportedModel(
            f"{path.name}: tensor '{tensor.name}' of the type {tensor.type_name} cannot be read back"
        ) from None
    return found


def stored_bytes(path: Path, offset: int, num_bytes: int) -> Array:
    return _read(path, "u1", offset, (num_bytes,), 0, num_bytes)


def _read(path: Path, held_as: str, offset: int, shape: tuple[int, ...], start: int, stop: int) -> Array:
    """Rows of what lies at `offset`. Read, not mapped: pages that were looked at once would stay."""
    import numpy as np

    inner = shape[1:]
    row = 1
    for size in inner:
        row *= size
    item = np.dtype(held_as).itemsize
    try:
        found = np.fromfile(path, held_as, (stop - start) * row, offset=offset + start * row * item)
    except OSError as error:
        raise ModelFileInvalid(f"{path.name}: cannot be read ({error.strerror}); try again") from None
    if found.size != (stop - start) * row:  # it shrank since its header was read
        raise ModelFileInvalid(f"{path.name}: is truncated; download it again")
    return found.reshape(stop - start, *inner)


def require_finite(values: Floats, file: str, name: str, first_row: int, shape: tuple[int, ...]) -> None:
    bad = first_bad(values)
    if bad is None:
        return
    width = shape[-1] if len(shape) > 1 else 1
    number = "NaN" if values.ravel()[bad] != values.ravel()[bad] else "an infinite number"
    row, column = divmod(bad, width)
    place = f"row {first_row + row}, column {column}" if len(shape) > 1 else f"entry {first_row + bad}"
    raise ModelFileInvalid(
        f"{file}: tensor '{name}' holds {number} ({place}); the file is damaged, download it again"
    )
