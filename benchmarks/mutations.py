"""Damaged copies of a GGUF file, the same ones for the same seed."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass

# Sizes that break arithmetic: signs, wrap-arounds of 32 and 64 bits, and one step past what is there.
_POWERS = (32, 40, 62, 63)
AWKWARD = (
    *(0, 1, 2, 31, 0x7F, 0xFF, 0x7FFF_FFFF, 0x8000_0000),
    *(1 << power for power in _POWERS),
    *((1 << power) - 1 for power in (*_POWERS, 64)),
    (1 << 64) - 32,
)

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Field:
    """A number in the header that says how much follows, or of what kind it is."""

    what: str
    offset: int
    size: int


@dataclass(frozen=True)
class Layout:
    fields: tuple[Field, ...]
    header_bytes: int  # where tensor data may begin


def layout(data: bytes) -> Layout:
    """Where a sound GGUF file keeps its lengths, types, dimensions and offsets."""
    fields = [Field("version", 4, 4), Field("tensor count", 8, 8), Field("key count", 16, 8)]
    tensors, keys = struct.unpack_from("<QQ", data, 8)
    at = 24

    def number(what: str, size: int) -> int:
        nonlocal at
        fields.append(Field(what, at, size))
        value = int.from_bytes(data[at : at + size], "little")
        at += size
        return value

    def skip(num_bytes: int) -> None:
        nonlocal at
        at += num_bytes

    def skip_value(kind: int) -> None:
        if kind == _STRING:
            skip(number("string length", 8))
        elif kind == _ARRAY:
            element = number("array type", 4)
            count = number("array length", 8)
            if element in _SIZES:
                skip(count * _SIZES[element])
            else:
                for _ in range(count):
                    skip(number("array string length", 8))
        else:
            number("value", _SIZES[kind])

    for _ in range(keys):
        skip(number("key length", 8))
        skip_value(number("value type", 4))
    for _ in range(tensors):
        skip(number("tensor name length", 8))
        for _ in range(number("tensor dimensions", 4)):
            number("tensor dimension", 8)
        number("tensor type", 4)
        number("tensor offset", 8)
    return Layout(tuple(fields), at)


class Mutator:
    """`mutate(n)` is the n-th damaged copy: its name and its bytes. Any n, in any order."""

    def __init__(self, data: bytes, seed: int = 0) -> None:
        self.data = data
        self.seed = seed
        self.layout = layout(data)
        self.kinds: tuple[Callable[[random.Random], bytes], ...] = (
            self.edited_field,
            self.flipped_bits,
            self.overwritten_bytes,
            self.truncated,
            self.swapped,
            self.duplicated,
            self.removed,
            self.several_fields,
        )

    def mutate(self, number: int) -> tuple[str, bytes]:
        draw = random.Random(f"{self.seed}/{number}")
        # Lengths and types are where parsers break, so they get a third of the cases.
        weights = (5, 3, 3, 2, 2, 2, 1, 2)
        kind = draw.choices(self.kinds, weights)[0]
        return kind.__name__, kind(draw)

    def edited_field(self, draw: random.Random) -> bytes:
        result = bytearray(self.data)
        self._edit(result, draw)
        return bytes(result)

    def several_fields(self, draw: random.Random) -> bytes:
        result = bytearray(self.data)
        for _ in range(draw.randint(2, 6)):
            self._edit(result, draw)
        return bytes(result)

    def flipped_bits(self, draw: random.Random) -> bytes:
        result = bytearray(self.data)
        for _ in range(draw.choice((1, 1, 2, 8, 64))):
            result[self._place(draw)] ^= 1 << draw.randrange(8)
        return bytes(result)

    def overwritten_bytes(self, draw: random.Random) -> bytes:
        result = bytearray(self.data)
        start = self._place(draw)
        length = min(draw.choice((1, 4, 8, 64, 1024)), len(result) - start)
        fill = draw.choice((b"\x00" * length, b"\xff" * length, draw.randbytes(length)))
        result[start : start + length] = fill
        return bytes(result)

    def truncated(self, draw: random.Random) -> bytes:
        return self.data[: self._place(draw)]

    def swapped(self, draw: random.Random) -> bytes:
        length = draw.choice((1, 4, 8, 32, 256))
        first, second = sorted((self._place(draw), self._place(draw)))
        length = min(length, second - first, len(self.data) - second)
        a, b = self.data[first : first + length], self.data[second : second + length]
        middle = self.data[first + length : second]
        return self.data[:first] + b + middle + a + self.data[second + length :]

    def duplicated(self, draw: random.Random) -> bytes:
        start = self._place(draw)
        chunk = self.data[start : start + draw.choice((1, 8, 32, 256, 4096))]
        return self.data[:start] + chunk + self.data[start:]

    def removed(self, draw: random.Random) -> bytes:
        start = self._place(draw)
        return self.data[:start] + self.data[start + draw.choice((1, 4, 8, 32, 1024)) :]

    def _edit(self, result: bytearray, draw: random.Random) -> None:
        field = draw.choice(self.layout.fields)
        old = int.from_bytes(result[field.offset : field.offset + field.size], "little")
        new = draw.choice(
            (*AWKWARD, old + 1, old - 1, old * 2, old ^ (1 << draw.randrange(field.size * 8)))
        )
        wrapped = new % (1 << (8 * field.size))
        result[field.offset : field.offset + field.size] = wrapped.to_bytes(field.size, "little")

    def _place(self, draw: random.Random) -> int:
        """Mostly in the header: almost any bytes are valid weights."""
        end = self.layout.header_bytes if draw.random() < 0.75 else len(self.data)
        return draw.randrange(end)
