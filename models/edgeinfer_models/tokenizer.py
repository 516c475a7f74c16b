"""The tokenizer protocol every backend supplies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """Text to token ids and back. Thread-safe."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos(self) -> int | None:
        """Beginning-of-sequence token, if the model has one."""
        ...

    @property
    def eos(self) -> int | None: ...

    @property
    def adds_bos(self) -> bool:
        """Whether the model expects bos before a text that does not carry it."""
        ...

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of `text`.
        add_special: put bos (and eos) where the model expects them.
        parse_special: read `<|im_end|>` and the like as their tokens, not as text. True for rendered
        templates only."""
        ...

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for; b"" for control tokens. May end inside a UTF-8 character."""
        ...

    def text(self, token: int) -> str:
        """A token's text for templates and display, control tokens included."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of several tokens; invalid UTF-8 becomes U+FFFD."""
        ...

    def is_end(self, token: int) -> bool:
        """Whether a token ends generation (eos, end of turn, …)."""
        ...

    def is_control(self, token: int) -> bool: ...
