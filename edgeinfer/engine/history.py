"""What a sequence's cells hold of a conversation's history, once some of it was evicted.

Cells that were shifted hold keys and values that have seen the tokens before them which are gone: the
same tokens read afresh have others. So they are found by the whole history and by what left it when,
never by their own tokens.
"""

from __future__ import annotations

import array
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

ROOT = b""  # of what was read from its beginning


class Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def copy(self) -> Hash: ...
    def digest(self) -> bytes: ...


def token_bytes(tokens: Sequence[int]) -> bytes:
    return array.array("q", tokens).tobytes()


def new_hash(data: bytes = b"") -> Hash:
    return hashlib.blake2b(data, digest_size=16)


def history_key(tokens: Sequence[int]) -> bytes:
    return new_hash(token_bytes(tokens)).digest()


@dataclass(frozen=True)
class Gap:
    """Tokens [head, head + count) of a history are in no cell.

    root: what the cells' contents depend on beside their tokens; ROOT if they are those of the tokens
    read afresh. history: key of its first `length` tokens, at which the last of them left.
    """

    root: bytes
    history: bytes
    length: int
    head: int
    count: int

    @property
    def key(self) -> bytes:
        """Of all that makes two gaps differ."""
        numbers = token_bytes((self.length, self.head, self.count))
        return new_hash(b"gap" + numbers + self.history + self.root).digest()

    def cells(self, history: Sequence[int]) -> list[int]:
        """Those of the tokens that are in cells."""
        return [*history[: self.head], *history[self.head + self.count :]]


def gap_of_shift(
    earlier: Gap | None, history: Sequence[int], head: int, count: int, choice: bytes = b""
) -> Gap:
    """`count` more tokens left a sequence that held `history` (but for an `earlier` gap), and the rest
    moved down. choice: which ones they were, where that does not follow from the numbers. Raises
    ValueError if the gaps do not meet."""
    if earlier is not None and earlier.head != head:
        raise ValueError(f"a gap at {head} beside one at {earlier.head}")
    count += earlier.count if earlier is not None else 0
    key = history_key(history)
    numbers = token_bytes((len(history), head, count))
    before = earlier.key if earlier is not None else ROOT
    root = new_hash(b"shift" + numbers + key + before + choice).digest()
    return Gap(root, key, len(history), head, count)


def gap_of_cut(history: Sequence[int], head: int, cut: int) -> Gap:
    """The tokens [head, cut) were never read: the rest was read as if they had not been there."""
    return Gap(ROOT, history_key(history[:cut]), cut, head, cut - head)


def gaps_within(history: Sequence[int], gaps: Iterable[Gap]) -> list[Gap]:
    """Those of the gaps that came about in the past of `history`."""
    found = []
    digest, done = new_hash(), 0
    for gap in sorted(gaps, key=lambda gap: gap.length):
        if gap.length > len(history):
            break
        if gap.length > done:
            digest.update(token_bytes(history[done : gap.length]))
            done = gap.length
        if digest.digest() == gap.history:
            found.append(gap)
    return found
