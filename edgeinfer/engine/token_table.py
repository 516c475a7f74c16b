"""A model's vocabulary as grammars need it: llguidance's own table, and what tokens begin or close."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgeinfer.engine.json_text import TOO_LONG

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from edgeinfer_models.tokenizer import Tokenizer

Ranks = npt.NDArray[np.int16]

_SPECIAL = b"\xff"  # llguidance's mark of a token that no text stands for
_DIGITS = b"0123456789"
_CLOSERS = b"}]"

# What a value is begun with, the shortest first; then what it takes when none of them fits.
_VALUES = (
    b'""',
    b"[]",
    b"{}",
    b"null",
    b"0",
    b"1",
    b"false",
    b"true",
    b"n",
    b"f",
    b"t",
    b".",
    b'"',
    b"-",
)
_OPENERS = (b"[", b"{")
# A format's or pattern's signs, before letters and digits: for walks that letters alone do not end.
_SIGNS = b"@:/.-_ TZ"


class TokenTable:
    """Takes about half a second with 49,152 tokens."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """vocab_size: of the logits, which may have rows beyond the tokenizer's last token."""
        known = min(vocab_size, tokenizer.vocab_size)
        self.pieces = [tokenizer.piece(token) for token in range(known)]
        self.pieces += [b""] * (vocab_size - known)
        self.ends = [token for token in range(known) if tokenizer.is_end(token)]
        # Also an end token that has a text: chosen inside a string it would end the answer there.
        special = [t for t in range(known) if not self.pieces[t] or tokenizer.is_control(t)]
        texts = {t: tokenizer.text(t).encode("utf-8", "replace") for t in {*special, *self.ends}}
        words = [
            _SPECIAL + (texts[t] or b"<%d>" % t) if t in texts else piece
            for t, piece in enumerate(self.pieces)
        ]
        self.native = _native(words, self.ends, tokenizer)
        for token in self.ends:
            self.pieces[token] = b""
        self.num_bytes = (vocab_size + 7) // 8
        digits = np.array([len(p) - len(p.lstrip(_DIGITS)) for p in self.pieces], dtype=np.int32)
        self.most_digits = int(digits.max(initial=0))
        self._leading_digits = digits
        self._starts_at_zero = np.array([p[:1] == b"0" for p in self.pieces])
        self._is_too_long = np.array([TOO_LONG.search(p) is not None for p in self.pieces])
        self.has_long_numbers = bool(self._is_too_long.any())
        self.quotes = _as_number(np.array([p[:1] == b'"' for p in self.pieces]))
        self._masks: dict[int, int] = {}
        self.closing_ways = _closing_ways(self.pieces)

    def with_digits(self, most: int) -> int:
        """A mask, as a number, of the tokens that begin with at most so many digits, and have no number
        in them that is too long by itself."""
        mask = self._masks.get(most)
        if mask is None:
            chosen = (self._leading_digits <= most) & ~self._is_too_long
            mask = self._masks[most] = _as_number(chosen)
        return mask

    @property
    def not_zero(self) -> int:
        """A mask, as a number, of the tokens that do not begin with the digit 0."""
        mask = self._masks.get(-1)
        if mask is None:
            mask = self._masks[-1] = _as_number(~self._starts_at_zero)
        return mask

    def only(self, token: int) -> bytes:
        mask = bytearray(self.num_bytes)
        mask[token // 8] = 1 << token % 8
        return bytes(mask)

    def best(self, mask: bytes, ranks: Ranks) -> int | None:
        """The allowed token with the highest rank."""
        size = len(ranks)
        allowed = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")[:size].astype(np.bool_)
        ranked = np.where(allowed, ranks, np.int16(-1))
        token = int(ranked.argmax())
        return token if ranked[token] >= 0 else None


def _native(words: Sequence[bytes], ends: Sequence[int], tokenizer: Tokenizer) -> LLTokenizer:
    from llguidance import LLTokenizer

    tokens = list(words)
    if not ends:  # it wants one; this one is beyond the vocabulary and cannot be drawn
        tokens.append(_SPECIAL + b"<end>")

    class Vocabulary:
        """What llguidance reads of a tokenizer."""

        is_tokenizer_wrapper = True
        bos_token_id = None
        special_token_ids: Sequence[int] = ()

        def __init__(self) -> None:
            self.tokens = tokens
            self.eos_token_id = ends[0] if ends else len(tokens) - 1

        def __call__(self, text: str | bytes) -> list[int]:
            if isinstance(text, bytes):
                text = text.decode("utf-8", "replace")
            return tokenizer.encode(text, add_special=False, parse_special=False)

    vocabulary = Vocabulary()
    # (it takes anything with these attributes; its own wrapper class only copies them)
    return LLTokenizer(vocabulary, eos_token=list(ends) or [vocabulary.eos_token_id])  # type: ignore[arg-type]


def _closing_ways(pieces: Sequence[bytes]) -> list[tuple[Ranks, Ranks]]:
    """Ways to an end, see `closing.py`: each has the ranks of tokens outside of strings and inside."""
    outside = [
        np.array([_outside(piece, zero_first) for piece in pieces], np.int16)
        for zero_first in (False, True)
    ]
    inside = [np.array([_inside(piece, way) for piece in pieces], np.int16) for way in range(3)]
    return [(outside[0], inside[0]), (outside[1], inside[1]), (outside[0], inside[2])]


def _as_number(chosen: npt.NDArray[np.bool_]) -> int:
    return int.from_bytes(np.packbits(chosen, bitorder="little").tobytes(), "little")


def _outside(piece: bytes, zero_first: bool) -> int:
    """Of a token outside of strings. A comma comes before the values: after a number it ends that."""
    if not piece:
        return -1
    if not piece.strip(_CLOSERS):
        return 1000 + len(piece)
    if piece == b",":
        return 900
    if piece == b"0" and not zero_first:
        return 735
    if piece in _VALUES:
        return 800 - 10 * _VALUES.index(piece)
    if len(piece) == 1 and piece in _DIGITS:
        return 745
    if piece in _OPENERS:
        return 300
    if not piece.strip():
        return 0
    return 100 - min(len(piece), 90)


def _inside(piece: bytes, way: int) -> int:
    """Of a token inside a string: what ends it first; else long tokens (for a least length), short ones,
    or those that patterns ask for."""
    if not piece:
        return -1
    if piece[:1] == b'"':
        rest = piece[1:]
        return 1000 + len(piece) if not rest.strip(_CLOSERS) else 900 if rest == b"," else 600
    length = min(len(piece), 60)
    if way == 0:
        return 100 + length + (60 if piece.isalpha() else 0)
    if way == 1:
        return 300 - 2 * length + (20 if piece.isdigit() else 10 if piece.isalpha() else 0)
    if len(piece) == 1 and piece in _SIGNS:
        return 500 - _SIGNS.index(piece)
    return 300 - 2 * length + (10 if piece.isalpha() else 0)
