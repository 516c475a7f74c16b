"""The GGUF's own tokenizer, through llama.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from edgeinfer_backends.llamacpp.library import library

MAX_TEXT_BYTES = 256 * 2**20  # far above any context; keeps lengths inside int32


class LlamaTokenizer:
    """`edgeinfer_models.tokenizer.Tokenizer` over a `llama_vocab`. The model must outlive it.

    llama.cpp documents tokenization as thread-safe; no state is kept here but caches.
    """

    def __init__(self, vocab: Any) -> None:
        self._lib = library()
        self._vocab = vocab
        # LLAMA_API int32_t llama_vocab_n_tokens(const struct llama_vocab * vocab)
        self._size: int = self._lib.llama_vocab_n_tokens(vocab)
        self._pieces: dict[int, bytes] = {}
        self._ends: dict[int, bool] = {}

    @property
    def vocab_size(self) -> int:
        return self._size

    @property
    def bos(self) -> int | None:
        return self._optional(self._lib.llama_vocab_bos(self._vocab))

    @property
    def eos(self) -> int | None:
        return self._optional(self._lib.llama_vocab_eos(self._vocab))

    @property
    def adds_bos(self) -> bool:
        return bool(self._lib.llama_vocab_get_add_bos(self._vocab))

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode("utf-8", "replace")  # a lone surrogate becomes "?"
        if len(data) > MAX_TEXT_BYTES:
            raise ValueError(f"text of {len(data)} bytes; at most {MAX_TEXT_BYTES} are tokenized")
        room = len(data) + 16
        # LLAMA_API int32_t llama_tokenize(const struct llama_vocab * vocab, const char * text,
        #     int32_t text_len, llama_token * tokens, int32_t n_tokens_max, bool add_special,
        #     bool parse_special)
        tokens = (ctypes.c_int32 * room)()
        count = self._lib.llama_tokenize(
            self._vocab, data, len(data), tokens, room, add_special, parse_special
        )
        if count < 0 and count != -(2**31):  # -count is the room it wants
            tokens = (ctypes.c_int32 * -count)()
            count = self._lib.llama_tokenize(
                self._vocab, data, len(data), tokens, -count, add_special, parse_special
            )
        if count < 0:
            raise ValueError(f"llama.cpp could not tokenize a text of {len(data)} bytes")
        return list(tokens[:count])

    def piece(self, token: int) -> bytes:
        known = self._pieces.get(token)
        if known is None:
            # not special: a control token has no piece, llama.cpp renders it as nothing
            known = self._pieces[token] = self._render(token, False)
        return known

    def text(self, token: int) -> str:
        return self._render(token, True).decode("utf-8", "replace")

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(self.piece(token) for token in tokens).decode("utf-8", "replace")

    def is_end(self, token: int) -> bool:
        known = self._ends.get(token)
        if known is None:
            self._check(token)
            known = self._ends[token] = bool(self._lib.llama_vocab_is_eog(self._vocab, token))
        return known

    def is_control(self, token: int) -> bool:
        self._check(token)
        return bool(self._lib.llama_vocab_is_control(self._vocab, token))

    def _render(self, token: int, special: bool) -> bytes:
        self._check(token)
        room = 256
        while True:
            buffer = ctypes.create_string_buffer(room)
            # LLAMA_API int32_t llama_token_to_piece(const struct llama_vocab * vocab,
            #     llama_token token, char * buf, int32_t length, int32_t lstrip, bool special)
            count = self._lib.llama_token_to_piece(self._vocab, token, buffer, room, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            room = -count

    def _check(self, token: int) -> None:
        if not 0 <= token < self._size:
            raise ValueError(f"token {token} is outside the vocabulary of {self._size}")

    def _optional(self, token: int) -> int | None:
        return token if 0 <= token < self._size else None
