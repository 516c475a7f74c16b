"""Which tokens an exit's head keeps: a head of all of them would cost more than the exit's layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from edgeinfer.distill.texts import Texts
from edgeinfer.exits import FORCED

if TYPE_CHECKING:
    from edgeinfer.exits import Tokens

_MULTIPLE = 256  # matrices of such heights suit every kernel


def kept_tokens(
    texts: Texts, vocab_size: int, always: Iterable[int], *, coverage: float, most: int
) -> Tokens:
    """The most frequent tokens that the model wrote, until `coverage` of all written ones is among them,
    or there are `most`; and `always`. Ascending: an exit's token i is the model's token kept[i]."""
    written = texts.tokens[texts.kinds != FORCED]
    counts = np.bincount(written, minlength=vocab_size)
    by_count = np.argsort(-counts, kind="stable")
    covered = np.cumsum(counts[by_count])
    count = int(np.searchsorted(covered, coverage * covered[-1])) + 1
    count = min(-(-count // _MULTIPLE) * _MULTIPLE, most, vocab_size)
    forced = sorted(set(always))
    chosen = [int(token) for token in by_count[:count] if int(token) not in forced]
    return np.array(sorted([*forced, *chosen[: count - len(forced)]]), dtype=np.int32)


def coverage_of(kept: Tokens, texts: Texts) -> float:
    """The share of the tokens which the model wrote that is kept."""
    written = texts.tokens[texts.kinds != FORCED]
    return float(np.isin(written, kept).mean()) if written.size else 0.0
