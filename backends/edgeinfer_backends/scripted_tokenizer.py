"""The scripted backend's tokenizer: bytes, three control tokens, and a few longer pieces.

Ids 0..255 are bytes. Then come <|bos|>, <|im_start|> and <|im_end|> (which ends a turn), then pieces of
several bytes, taken wherever the longest fits. One of those is what the smileys U+1F600..U+1F63F begin
with: such a character is two tokens, neither of which is a character.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

BOS = 256
TURN_START = 257
TURN_END = 258

_CONTROL = {BOS: "<|bos|>", TURN_START: "<|im_start|>", TURN_END: "<|im_end|>"}
_LONGER = (b"\xf0\x9f\x98", b" the", b" a", b" is", b"ing", b"hello", b" world", b"er", b"answer")
_SPLIT = re.compile("(" + "|".join(map(re.escape, _CONTROL.values())) + ")")


class ByteTokenizer:
    """Implements `edgeinfer_models.tokenizer.Tokenizer`. Any text survives encode and decode."""

    bos: int | None = BOS
    eos: int | None = TURN_END
    adds_bos = True

    def __init__(self) -> None:
        self._pieces = [bytes([value]) for value in range(256)]
        self._pieces += [b"" for _ in _CONTROL]
        self._pieces += _LONGER
        self._control_ids = {text: token for token, text in _CONTROL.items()}
        first_longer = len(self._pieces) - len(_LONGER)
        longest_first = sorted(_LONGER, key=len, reverse=True)
        self._longer = {piece: first_longer + _LONGER.index(piece) for piece in longest_first}
        self._longer_starts = frozenset(piece[0] for piece in _LONGER)

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        tokens = [BOS] if add_special else []
        for part in _SPLIT.split(text) if parse_special else [text]:
            if parse_special and part in self._control_ids:
                tokens.append(self._control_ids[part])
            else:
                self._encode_bytes(part.encode("utf-8", "replace"), tokens)
        return tokens

    def _encode_bytes(self, data: bytes, tokens: list[int]) -> None:
        at = 0
        while at < len(data):
            token, length = data[at], 1
            if token in self._longer_starts:
                for piece, longer in self._longer.items():
                    if data.startswith(piece, at):
                        token, length = longer, len(piece)
                        break
            tokens.append(token)
            at += length

    def piece(self, token: int) -> bytes:
        return self._pieces[self._checked(token)]

    def text(self, token: int) -> str:
        return _CONTROL.get(token) or self.piece(token).decode("utf-8", "replace")

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(map(self.piece, tokens)).decode("utf-8", "replace")

    def decode_with_control(self, tokens: Sequence[int]) -> str:
        """As `decode`, with control tokens as their text."""
        pieces = (_CONTROL[t].encode() if t in _CONTROL else self.piece(t) for t in tokens)
        return b"".join(pieces).decode("utf-8", "replace")

    def is_end(self, token: int) -> bool:
        return token == TURN_END

    def is_control(self, token: int) -> bool:
        return token in _CONTROL

    def _checked(self, token: int) -> int:
        if not 0 <= token < len(self._pieces):
            raise ValueError(f"token {token} is outside the vocabulary of {len(self._pieces)}")
        return token
