"""Grammars tried byte by byte with llguidance, over a vocabulary of bytes and some control tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import llguidance

_END = b"\xff<end>"


class _Bytes:
    """What llguidance wants of a tokenizer. Control tokens have no text: it knows them by 0xFF."""

    bos_token_id = None
    eos_token_id = 256

    def __init__(self, control: Sequence[str]) -> None:
        self.tokens = [bytes([byte]) for byte in range(256)] + [_END]
        self.tokens += [b"\xff" + text.encode() for text in control]
        self.special_token_ids = list(range(256, len(self.tokens)))

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


@cache
def _tokenizer(control: tuple[str, ...]) -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes(control)))


class Grammar:
    """control: texts that are single control tokens here. In what is tried, they stand as they are."""

    def __init__(self, lark: str, control: tuple[str, ...] = ()) -> None:
        self.tokens = {text: 257 + number for number, text in enumerate(control)}
        self._lark = lark
        self._tokenizer = _tokenizer(control)
        fault = llguidance.LLMatcher.validate_grammar(lark, self._tokenizer)
        assert not fault, f"{fault}\n{lark}"

    def accepted(self, text: str, *, plainly: bool = False) -> int:
        """How many characters are accepted before the first that is not. plainly: control tokens written
        out as text."""
        return self._match(text, plainly)[0]

    def takes(self, text: str, *, plainly: bool = False) -> bool:
        """Whether `text` is a whole answer."""
        count, matcher = self._match(text, plainly)
        return count == len(text) and matcher.is_accepting()

    def must_end_after(self, text: str) -> bool:
        count, matcher = self._match(text, plainly=False)
        mask = matcher.compute_bitmask()
        allowed = [token for token in range(257 + len(self.tokens)) if mask[token // 8] >> token % 8 & 1]
        return count == len(text) and allowed in ([], [256])

    def begins(self, text: str, *, plainly: bool = False) -> bool:
        """Whether `text` is the beginning of an answer."""
        return self.accepted(text, plainly=plainly) == len(text)

    def _match(self, text: str, plainly: bool) -> tuple[int, llguidance.LLMatcher]:
        matcher = llguidance.LLMatcher(self._tokenizer, self._lark)
        at = 0
        while at < len(text):
            mark = next(
                (each for each in self.tokens if text.startswith(each, at) and not plainly), None
            )
            piece = mark or text[at]
            tokens = [self.tokens[mark]] if mark else list(piece.encode())
            if matcher.is_stopped() or matcher.try_consume_tokens(tokens) != len(tokens):
                break
            at += len(piece)
        return at, matcher
