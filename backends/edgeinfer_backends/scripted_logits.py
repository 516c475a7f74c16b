"""The scripted backend's logits: babble from a hash, or a pinned token far above it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeinfer_backends.scripted_cells import scramble_all
from edgeinfer_backends.scripted_script import Prompter, Script
from edgeinfer_backends.scripted_tokenizer import ByteTokenizer

_PINNED = 40.0  # how much likelier a pinned token is than any other
_UNLIKELY = -30.0  # how much less likely what is no part of babble is


@dataclass(frozen=True)
class Row:
    """A row of logits not computed yet."""

    state: int  # 64 bits that say all about the cells the row has seen
    history: Sequence[int]  # the tokens in them
    is_in_order: bool


class RowLogits:
    """Computes rows."""

    def __init__(self, script: Script, tokenizer: ByteTokenizer) -> None:
        self._order_noise = script.order_noise
        self._prompter = Prompter(script, tokenizer)
        self._bias = _babble_bias(tokenizer)

    def compute(self, row: Row) -> npt.NDArray[np.float32]:
        """Shape (vocab_size,). Raises ValueError if the script names a token there is not."""
        scores = self._bias - 2.0 * np.log(-np.log(uniform(row.state, len(self._bias))))  # Gumbel
        pinned = self._prompter.next_token(row.history)
        if pinned is not None:
            if not 0 <= pinned < len(scores):
                raise ValueError(f"the script's next_token gave {pinned}, which is no token")
            scores[pinned] = scores.max() + _PINNED
        if not row.is_in_order:
            scores += self._order_noise * (2.0 * uniform(row.state ^ 1, len(scores)) - 1.0)
        return np.asarray(scores, dtype=np.float32)


def uniform(state: int, size: int) -> npt.NDArray[np.float64]:
    """`size` numbers in (0, 1) that follow from 64 bits of state. Source: splitmix64."""
    counter = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    words = scramble_all(counter + np.uint64(state & (2**64 - 1)))
    return (np.right_shift(words, np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _babble_bias(tokenizer: ByteTokenizer) -> npt.NDArray[np.float64]:
    """0 for what free text is made of (printable ASCII and the end of turn), else unlikely."""
    bias = np.full(tokenizer.vocab_size, _UNLIKELY)
    for token in range(tokenizer.vocab_size):
        piece = tokenizer.piece(token)
        if tokenizer.is_end(token) or (piece.isascii() and piece.decode().isprintable() and piece):
            bias[token] = 0.0
    return bias
