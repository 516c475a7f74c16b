"""What a runtime predicts after each token of a text, over the contract and so for every backend.

All logarithms are natural; a perplexity is exp of the mean negative log-likelihood of the tokens that
were there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from edgeinfer.backend import Runtime, SequenceStep, Step

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]
    Logits = npt.NDArray[np.float32]

Progress = Callable[[float], None]
CHUNK = 64  # tokens of a step: from so many on, a step's kernel does not depend on their number


def nothing(_: float) -> None:
    """No progress is told."""


def chunk_of(runtime: Runtime) -> int:
    """Tokens read at once."""
    return min(CHUNK, runtime.facts.max_logit_rows, runtime.facts.max_step_tokens)


def rows(runtime: Runtime, sequence: int, tokens: Sequence[int]) -> Logits:
    """Append tokens; the logits after each: shape (tokens, vocabulary)."""
    import numpy as np

    result = runtime.forward(Step([SequenceStep(sequence, tokens, "all")]))
    start = result.starts[0]
    return np.stack([runtime.logits(start + index) for index in range(len(tokens))])


def log_softmax(logits: Logits) -> Floats:
    """Over the last axis, in float64."""
    import numpy as np

    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def nll_of(logits: Logits, following: Sequence[int]) -> Floats:
    """Of the tokens that follow the first rows: shape (len(following),)."""
    import numpy as np

    log_probs = log_softmax(logits[: len(following)])
    found: Floats = -log_probs[np.arange(len(following)), np.asarray(following, dtype=np.int64)]
    return found


def perplexity(nll: Floats) -> float:
    return math.exp(float(nll.mean()))
