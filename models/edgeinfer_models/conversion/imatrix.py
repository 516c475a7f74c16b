"""llama.cpp's importance matrices: how large each column of a matrix's inputs was on some text.

    imatrix = read_imatrix(path)
    imatrix.importance("blk.0.ffn_down.weight")   # mean squares: (matrices, width)
    write_imatrix(path, imatrix)

Two forms: GGUF, and the older one (`.dat`), which has means instead of sums, and of a stack of matrices
(experts) one row of all their columns. Facts from tools/imatrix, common/imatrix-loader.cpp and
tools/quantize of llama.cpp as packaged in llama-cpp-python 0.3.36. What a file says is believed in
nothing: llama.cpp asserts, and reads beyond, where this says what is wrong.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from edgeinfer.errors import ModelFileInvalid, ModelNotFound
from edgeinfer_models.conversion.gguf_head import TensorEntry, entry, head
from edgeinfer_models.conversion.new_file import NewFile
from edgeinfer_models.conversion.sources import stored_bytes
from edgeinfer_models.file_kind import SNIFF_BYTES, describe, require_regular_file, shown
from edgeinfer_models.gguf_header import (
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_TENSOR_NAME,
    MAX_TENSORS,
    GgufHeader,
    GgufTensor,
    read_gguf_header,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]
    Counts = npt.NDArray[np.int64]

Form = Literal["gguf", "dat"]
_SUMS, _COUNTS = ".in_sum2", ".counts"
_DATASETS, _CHUNK_COUNT, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_MOST_BYTES = 2**32
_MOST_TEXT_BYTES = 2**16
_MOST_COUNT = 2.0**53
_MOST_I32 = 2**31 - 1
_AGAIN = "make it anew with llama-imatrix, or download it again"


@dataclass(frozen=True)
class Columns:
    """Of one tensor. in_sum2: each column's squares, summed up over what was seen: (matrices, width).
    counts: of the rows that each matrix saw, int64: (matrices,)."""

    in_sum2: Floats
    counts: Counts

    def means(self) -> Floats:
        """As llama-quantize takes them: 1 for each column of a matrix that saw nothing."""
        import numpy as np

        counts = self.counts.astype(np.float32)[:, None]
        found: Floats = np.where(counts > 0, self.in_sum2 / np.maximum(counts, 1), np.float32(1))
        return found


@dataclass(frozen=True)
class Imatrix:
    """tensors: by their GGUF names. datasets: the files of its text. chunk_size: in tokens; 0 where the
    file did not say (the older form, whose counts are chunks)."""

    tensors: Mapping[str, Columns]
    datasets: tuple[str, ...] = ()
    chunk_size: int = 0
    chunk_count: int = 0

    def importance(self, name: str) -> Floats | None:
        """The mean squares of its columns: (matrices, width); None for a tensor it does not know. A
        stack of matrices may come as one row of all their columns."""
        columns = self.tensors.get(name)
        return None if columns is None else columns.means()


def read_imatrix(path: Path) -> Imatrix:
    """Either form. Raises ModelNotFound, ModelFileInvalid, UnsupportedModel (a newer GGUF)."""
    if not path.exists():
        raise ModelNotFound(f"{shown(path)}: no such file; give an importance matrix of llama-imatrix")
    num_bytes = require_regular_file(path)
    if num_bytes > _MOST_BYTES:
        raise ModelFileInvalid(
            f"{shown(path)}: has {num_bytes / 1e9:.0f} GB, which no importance matrix has; give the file"
            " that llama-imatrix wrote"
        )
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                file.seek(0)
                return _DatReader(path, file, num_bytes).read()
    except OSError as error:
        raise ModelFileInvalid(
            f"{shown(path)}: cannot be read ({error.strerror}); check the file"
        ) from None
    return _from_gguf(read_gguf_header(path))


def write_imatrix(path: Path, imatrix: Imatrix, form: Form = "gguf", *, force: bool = False) -> None:
    """What llama-imatrix would write of it, byte for byte. "dat" leaves out what saw nothing, and all
    datasets but the last. Raises UsageError (the file is there), ModelFileInvalid (a name is
    too long for the form), OSError; then nothing is left."""
    with NewFile(path, force=force) as new:
        if form == "gguf":
            _write_gguf(new.file, imatrix)
        else:
            _write_dat(new.file, imatrix)


def _from_gguf(header: GgufHeader) -> Imatrix:
    where = header.path.name
    names = [t.name.removesuffix(_SUMS) for t in header.tensors if t.name.endswith(_SUMS)]
    if not names:
        what = "a model" if header.architecture else "a GGUF file of something else"
        raise ModelFileInvalid(
            f"{where}: is {what} and no importance matrix; give the file that llama-imatrix wrote"
        )
    by_name = {tensor.name: tensor for tensor in header.tensors}
    tensors: dict[str, Columns] = {}
    for name in names:
        counts = by_name.get(name + _COUNTS)
        if counts is None:
            raise _invalid(where, f"has no counts for '{name}'")
        tensors[name] = _columns(header, name, by_name[name + _SUMS], counts)
    numbers: dict[str, int] = {}
    for key in (_CHUNK_COUNT, _CHUNK_SIZE):
        if header.types.get(key) != "u32":
            raise _invalid(where, f"lacks '{key}'")
        numbers[key] = header.get_int(key)
    if header.types.get(_DATASETS) != "[str]":
        raise _invalid(where, f"lacks '{_DATASETS}'")
    datasets = tuple(str(text) for text in header.get_list(_DATASETS) or ())
    return Imatrix(tensors, datasets, numbers[_CHUNK_SIZE], numbers[_CHUNK_COUNT])


def _columns(header: GgufHeader, name: str, sums: GgufTensor, counts: GgufTensor) -> Columns:
    import numpy as np

    where = header.path.name
    if not name:
        raise _invalid(where, "has an entry without a name")
    for tensor in (sums, counts):
        if tensor.type_name != "F32":
            raise _invalid(where, f"holds '{tensor.name}' in {tensor.type_name}, not in F32")
    if sums.elements % counts.elements:
        raise _invalid(
            where, f"has {sums.elements:,} columns for '{name}' and {counts.elements:,} counts"
        )

    def values(tensor: GgufTensor) -> Floats:
        stored = stored_bytes(header.path, header.data_offset + tensor.offset, tensor.num_bytes)
        found: Floats = stored.view("<f4")
        _require_squares(found, where, tensor.name)
        return found

    seen = values(counts).astype(np.float64)
    if (seen > _MOST_COUNT).any():
        raise _invalid(where, f"counts {seen.max():g} rows for '{name}'")
    # As lround has it: halves away from 0.
    rounded = np.floor(seen + 0.5).astype(np.int64)
    return Columns(values(sums).reshape(counts.elements, -1), rounded)


class _DatReader:
    """The older form: native integers of 4 bytes, everything in a row."""

    def __init__(self, path: Path, file: IO[bytes], num_bytes: int) -> None:
        self._path = path
        self._file = file
        self._left = num_bytes

    def read(self) -> Imatrix:
        import numpy as np

        path = self._path
        sniffed = self._file.read(SNIFF_BYTES)
        self._file.seek(0)
        count = struct.unpack_from("<i", sniffed)[0] if len(sniffed) >= 4 else 0
        # An entry has at least three numbers, a name of one letter, and one column.
        if not 1 <= count <= min(MAX_TENSORS, self._left // 17):
            what, _ = describe(sniffed)
            raise ModelFileInvalid(
                f"{shown(path)}: is no importance matrix but seems to be {what}; give the file that"
                " llama-imatrix wrote"
            )
        self._integer("the number of entries")
        tensors: dict[str, Columns] = {}
        for index in range(count):
            name = self._name(index)
            if name in tensors:
                raise _invalid(path.name, f"has the entry '{name}' twice")
            calls = self._integer(f"the chunks of '{name}'")
            width = self._integer(f"the columns of '{name}'")
            if calls < 0 or width < 1:
                raise _invalid(path.name, f"has {width:,} columns of {calls:,} chunks for '{name}'")
            values: Floats = np.frombuffer(self._bytes(4 * width, f"the columns of '{name}'"), "<f4")
            _require_squares(values, path.name, name)
            # llama-quantize takes what no chunk saw as it is.
            tensors[name] = Columns(values[None], np.array([max(calls, 1)], np.int64))
        if not self._left:  # older still
            return Imatrix(tensors)
        chunks = self._integer("the number of chunks")
        datasets = self._dataset() if self._left else ()
        if chunks < 0 or self._left:
            raise _invalid(path.name, f"has {chunks:,} chunks and {self._left:,} bytes after its end")
        return Imatrix(tensors, datasets, chunk_count=chunks)

    def _bytes(self, count: int, what: str) -> bytes:
        if count > self._left:
            raise _invalid(
                self._path.name, f"{what} take {count:,} bytes where the file has {self._left:,} left"
            )
        found = self._file.read(count)
        if len(found) != count:
            raise ModelFileInvalid(f"{self._path.name}: shrank while it was read; try again")
        self._left -= count
        return found

    def _integer(self, what: str) -> int:
        return int.from_bytes(self._bytes(4, what), "little", signed=True)

    def _name(self, index: int) -> str:
        length = self._integer(f"the name of entry {index}")
        if not 1 <= length <= MAX_TENSOR_NAME:
            raise _invalid(self._path.name, f"entry {index} has a name of {length:,} bytes")
        raw = self._bytes(length, f"the name of entry {index}")
        try:
            name = raw.decode()
        except UnicodeDecodeError:
            name = ""
        if not name.isprintable() or not name:
            raise _invalid(self._path.name, f"the name of entry {index} is no text")
        return name

    def _dataset(self) -> tuple[str, ...]:
        length = self._integer("the dataset's name")
        if not 0 <= length <= _MOST_TEXT_BYTES:
            raise _invalid(self._path.name, f"the dataset's name has {length:,} bytes")
        text = self._bytes(length, "the dataset's name").decode(errors="replace")
        return (text,) if text else ()


def _write_gguf(file: IO[bytes], imatrix: Imatrix) -> None:
    import numpy as np

    values: list[Any] = []
    infos: list[TensorEntry] = []
    for name, columns in _sorted(imatrix):
        matrices, width = columns.in_sum2.shape
        for suffix, array, row in (
            (_SUMS, columns.in_sum2, width),
            (_COUNTS, columns.counts.astype(np.float32), 1),
        ):
            _require_short(name + suffix)
            shape = (row, matrices) if matrices > 1 else (row,)
            infos.append(TensorEntry(name + suffix, shape, "F32", 4 * array.size))
            values.append(np.ascontiguousarray(array, "<f4"))
    entries = [
        entry("general.type", "imatrix"),
        entry(_DATASETS, imatrix.datasets),
        entry(_CHUNK_COUNT, imatrix.chunk_count),
        entry(_CHUNK_SIZE, imatrix.chunk_size),
    ]
    file.write(head(entries, infos))
    for array in values:
        file.write(array.data)
        file.write(bytes(-array.nbytes % DEFAULT_ALIGNMENT))


def _write_dat(file: IO[bytes], imatrix: Imatrix) -> None:
    import numpy as np

    kept = [(name, columns) for name, columns in _sorted(imatrix) if columns.counts.any()]
    file.write(struct.pack("<i", len(kept)))
    for name, columns in kept:
        _require_short(name)
        raw = name.encode()
        # Rounded up, so that what was seen a little is not taken for unseen.
        calls = min(-(-int(columns.counts.max()) // (imatrix.chunk_size or 1)), _MOST_I32)
        values = columns.in_sum2
        if imatrix.chunk_size or len(columns.counts) > 1:  # else it came from this form
            values = columns.means() * np.float32(calls)
        file.write(struct.pack(f"<i{len(raw)}sii", len(raw), raw, calls, values.size))
        file.write(np.ascontiguousarray(values, "<f4").data)
    dataset = imatrix.datasets[-1].encode() if imatrix.datasets else b""
    file.write(struct.pack("<ii", min(imatrix.chunk_count, _MOST_I32), len(dataset)) + dataset)


def _sorted(imatrix: Imatrix) -> list[tuple[str, Columns]]:
    return sorted(imatrix.tensors.items(), key=lambda item: item[0].encode())


def _require_short(name: str) -> None:
    if len(name.encode()) > MAX_TENSOR_NAME:
        raise ModelFileInvalid(
            f"tensor '{name}' has a name of more than {MAX_TENSOR_NAME} bytes, which no such file holds"
        )


def _require_squares(values: Floats, where: str, name: str) -> None:
    import numpy as np

    if not np.isfinite(values).all() or (values < 0).any():
        raise _invalid(where, f"'{name}' holds a number that no sum of squares is")


def _invalid(where: str, what: str) -> ModelFileInvalid:
    return ModelFileInvalid(f"{where}: {what}; the file is damaged, {_AGAIN}")
