"""GGUF's bytes to Python values, trusting nothing: every length is checked before it is used.

Why not `gguf.GGUFReader`: it makes a numpy view per vocabulary string (2.5 s and 160 MB for a 98 MB
model) and believes the counts in the header. Layout: ggml/docs/gguf.md; the limits are those of
ggml/src/gguf.cpp, so that a file accepted here is not refused or, worse, aborted on there.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgeinfer.errors import ModelFileInvalid, UnsupportedModel

DECODE_LIMIT = 64  # arrays up to this length are decoded; longer ones stay on disk
MAX_STRING_BYTES = 64 << 20  # of one decoded value; the largest seen are tokenizer files of 20 MB
MAX_KEYS = 65_536

_STRING, _ARRAY = 8, 9
_NAMES = {
    0: "u8", 1: "i8", 2: "u16", 3: "i16", 4: "u32", 5: "i32", 6: "f32", 7: "bool", 8: "str",
    9: "array", 10: "u64", 11: "i64", 12: "f64",
}  # fmt: skip
NUMBER_FORMATS = {  # of struct
    "u8": "B", "i8": "b", "u16": "H", "i16": "h", "u32": "I", "i32": "i", "f32": "f", "bool": "B",
    "u64": "Q", "i64": "q", "f64": "d",
}  # fmt: skip
_SCALARS = {name: struct.Struct("<" + code) for name, code in NUMBER_FORMATS.items()}
VALUE_TYPES = {name: number for number, name in _NAMES.items()}
_U32, _U64, _I64 = _SCALARS["u32"], _SCALARS["u64"], _SCALARS["i64"]

Scalar = int | float | bool | str


@dataclass(frozen=True)
class GgufArray:
    """A long array left in its file. `offset` and `nbytes` are its elements' place there."""

    path: Path
    element_type: str  # "str", "i32", "f32", …
    length: int
    offset: int
    nbytes: int

    def read(self) -> list[Scalar]:
        """The elements; invalid UTF-8 becomes U+FFFD. Raises ModelFileInvalid if the file changed."""
        data = self.read_bytes()
        if self.element_type == "str":
            return [s.decode("utf-8", "replace") for s in iter_strings(data, self.length)]
        return _decode_numbers(self.element_type, self.length, data, 0)

    def read_bytes(self) -> bytes:
        """The elements as they lie in the file."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.nbytes)
        except OSError as error:
            raise ModelFileInvalid(
                f"{self.path.name}: cannot be read ({error.strerror}); try again"
            ) from None
        if len(data) != self.nbytes:
            raise ModelFileInvalid(f"{self.path.name}: shrank while it was read; download it again")
        return data


GgufValue = Scalar | GgufArray | list[Scalar]


def iter_strings(data: bytes, count: int) -> Iterator[bytes]:
    """The strings of a string array's bytes, whose lengths were checked when the header was read."""
    position = 0
    unpack = _U64.unpack_from
    for _ in range(count):
        start = position + 8
        position = start + unpack(data, position)[0]
        yield data[start:position]


class Cursor:
    """A position in a mapped GGUF file. Every read is bounded by the file's end."""

    def __init__(self, path: Path, data: mmap.mmap, position: int = 0) -> None:
        self.path = path
        self.name = path.name
        self.data = data
        self.end = len(data)
        self.position = position

    @property
    def remaining(self) -> int:
        return self.end - self.position

    def invalid(self, what: str) -> ModelFileInvalid:
        return ModelFileInvalid(f"{self.name}: {what}; the file is damaged, download it again")

    def need(self, num_bytes: int, what: str) -> None:
        if num_bytes > self.remaining:
            raise self.invalid(
                f"{what} claims {num_bytes:,} bytes where the file has {self.remaining:,} left"
            )

    def number(self, kind: str, what: str) -> int | float:
        codec = _SCALARS[kind]
        self.need(codec.size, what)
        (value,) = codec.unpack_from(self.data, self.position)
        self.position += codec.size
        return value  # type: ignore[no-any-return]

    def integer(self, kind: str, what: str) -> int:
        return int(self.number(kind, what))

    def string_bytes(self, what: str, limit: int = MAX_STRING_BYTES) -> bytes:
        length = self.integer("u64", what)
        self.need(length, what)
        if length > limit:
            raise self.invalid(f"{what} has {length:,} bytes, more than the {limit:,} that are allowed")
        start = self.position
        self.position += length
        return self.data[start : self.position]

    def name_string(self, what: str, limit: int) -> str:
        raw = self.string_bytes(what, limit)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.invalid(f"{what} is not UTF-8") from None
        if not text or "\0" in text:
            raise self.invalid(f"{what} is empty or holds a zero byte")
        return text

    def value(self, key: str) -> tuple[GgufValue, str]:
        """The next metadata value and its type ("u32", "[str]", …)."""
        what = f"metadata '{key}'"
        kind = self._kind(what)
        if kind == "array":
            return self._array(what)
        if kind == "str":
            return self.string_bytes(what).decode("utf-8", "replace"), kind
        number = self.number(kind, what)
        return (bool(number) if kind == "bool" else number), kind

    def _kind(self, what: str) -> str:
        code = self.integer("u32", what)
        kind = _NAMES.get(code)
        if kind is None:
            raise self.invalid(f"{what} has the unknown type {code}")
        return kind

    def _array(self, what: str) -> tuple[GgufValue, str]:
        kind = self._kind(what)
        length = self.integer("u64", what)
        if kind == "array":
            raise UnsupportedModel(
                f"{self.name}: {what} is an array of arrays, which llama.cpp cannot read"
            )
        element_bytes = 8 if kind == "str" else _SCALARS[kind].size
        self.need(length * element_bytes, f"{what} with {length:,} elements")
        if length > 2**30:
            raise self.invalid(f"{what} claims {length:,} elements")
        start = self.position
        if kind == "str":
            self._skip_strings(length, what)
        else:
            self.position += length * element_bytes
        if length > DECODE_LIMIT or self.position - start > MAX_STRING_BYTES:
            array = GgufArray(self.path, kind, length, start, self.position - start)
            return array, f"[{kind}]"
        if kind == "str":
            strings = iter_strings(self.data[start : self.position], length)
            return [s.decode("utf-8", "replace") for s in strings], "[str]"
        return _decode_numbers(kind, length, self.data, start), f"[{kind}]"

    def _skip_strings(self, count: int, what: str) -> None:
        # The hot loop: 100,000 strings of a vocabulary and its merges.
        unpack, data, end, position = _U64.unpack_from, self.data, self.end, self.position
        last = end - 8
        for index in range(count):
            if position > last:
                raise self.invalid(f"{what} ends early, at element {index:,} of {count:,}")
            position += 8 + unpack(data, position)[0]
        if position > end:
            raise self.invalid(f"{what} runs past the end of the file")
        self.position = position


def _decode_numbers(kind: str, length: int, data: bytes | mmap.mmap, offset: int) -> list[Scalar]:
    numbers = struct.unpack_from(f"<{length}{NUMBER_FORMATS[kind]}", data, offset)
    return [bool(n) for n in numbers] if kind == "bool" else list(numbers)
