"""What an approximation costs: a model's predictions with it, beside those without.

Over the contract, so for every backend. All logarithms are natural; a perplexity is exp of the mean
negative log-likelihood of the tokens that were there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeinfer.backend import Runtime, SequenceStep, Step
from edgeinfer.engine.eviction import let_go
from edgeinfer.engine.window import Window
from edgeinfer.errors import MeasureFailed

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

Progress = Callable[[float], None]
CHUNK = 64  # tokens of a step: from so many on, a step's kernel does not depend on their number


def _nothing(_: float) -> None:
    pass


@dataclass(frozen=True)
class Streamed:
    """A text read once from end to end.

    nll: of each token but the first; shape (tokens - 1,). used_cells: in the cache after each step.
    evicted: tokens that left on the way.
    """

    nll: Floats
    used_cells: tuple[int, ...]
    evicted: int


@dataclass(frozen=True)
class Agreement:
    """How far a model's predictions lie from a reference's.

    kl: divergence from the reference at each position, in nats; shape (positions,). top1: share of
    positions whose likeliest token is the same. nll, reference_nll: of the tokens that were there.
    """

    kl: Floats
    top1: float
    nll: Floats
    reference_nll: Floats

    @property
    def mean_kl(self) -> float:
        return float(self.kl.mean())

    @property
    def median_kl(self) -> float:
        return percentile(self.kl, 50)

    @property
    def p99_kl(self) -> float:
        return percentile(self.kl, 99)


def percentile(values: Floats, percent: float) -> float:
    import numpy as np

    return float(np.percentile(values, percent))


def perplexity(nll: Floats) -> float:
    return math.exp(float(nll.mean()))


def log_softmax(logits: npt.NDArray[np.float32]) -> Floats:
    """Over the last axis, in float64."""
    import numpy as np

    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def rows(runtime: Runtime, sequence: int, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    """Append tokens; the logits after each: shape (tokens, vocabulary)."""
    import numpy as np

    result = runtime.forward(Step([SequenceStep(sequence, tokens, "all")]))
    start = result.starts[0]
    return np.stack([runtime.logits(start + index) for index in range(len(tokens))])


def _nll_of(logits: npt.NDArray[np.float32], following: Sequence[int]) -> Floats:
    """Of the tokens that follow the first rows: shape (len(following),)."""
    import numpy as np

    log_probs = log_softmax(logits[: len(following)])
    found: Floats = -log_probs[np.arange(len(following)), np.asarray(following, dtype=np.int64)]
    return found


def chunk_of(runtime: Runtime, window: Window | None = None, head: int = 0) -> int:
    """Tokens read at once: through a window no more than half of what may leave it, so that each of them
    is read with something before it."""
    most = min(CHUNK, runtime.facts.max_logit_rows, runtime.facts.max_step_tokens)
    return most if window is None else min(most, max(1, (window.size - head) // 2))


def stream(
    runtime: Runtime, tokens: Sequence[int], window: Window, progress: Progress = _nothing
) -> Streamed:
    """Read a text of any length through a window, as the engine does (window.py): each token is scored
    with what is in the cache then. Raises MeasureFailed where the cache cannot be shifted."""
    import numpy as np

    if not runtime.facts.can.evict and len(tokens) > window.size:
        raise MeasureFailed(f"{runtime.facts.backend} cannot shift this model's KV cache")
    head = window.head(0)
    chunk = chunk_of(runtime, window, head)
    sequence = runtime.open()
    parts: list[Floats] = []
    used: list[int] = []
    evicted = 0
    cells = runtime.facts.cells
    try:
        for start in range(0, len(tokens), chunk):
            part = tokens[start : start + chunk]
            leaving = window.num_leaving(runtime.length(sequence), len(part), head, ())
            if leaving:
                let_go(runtime, sequence, window, head, leaving)
                evicted += leaving
            logits = rows(runtime, sequence, part)
            parts.append(_nll_of(logits, tokens[start + 1 : start + 1 + len(part)]))
            used.append(cells - runtime.free_cells())
            progress((start + len(part)) / len(tokens))
    finally:
        runtime.free(sequence)
    return Streamed(np.concatenate(parts), tuple(used), evicted)


def recomputed(
    runtime: Runtime,
    tokens: Sequence[int],
    first: int,
    window: int,
    stride: int = CHUNK,
    progress: Progress = _nothing,
) -> Floats:
    """What no cache can beat: of the tokens from `first` on, each scored with `window - stride` to
    `window` tokens before it, read afresh every `stride` tokens. Shape (tokens - first,)."""
    import numpy as np

    step = chunk_of(runtime)
    parts: list[Floats] = []
    for start in range(first, len(tokens), stride):
        stop = min(start + stride, len(tokens))
        begin = max(0, stop - window)
        sequence = runtime.open()
        try:
            # Scored are the tokens [start, stop): by the rows of those before each.
            head = tokens[begin : start - 1]
            for at in range(0, len(head), runtime.facts.max_step_tokens):
                piece = head[at : at + runtime.facts.max_step_tokens]
                runtime.forward(Step([SequenceStep(sequence, piece, "none")]))
            for at in range(start - 1, stop - 1, step):
                piece = tokens[at : min(at + step, stop - 1)]
                parts.append(
                    _nll_of(rows(runtime, sequence, piece), tokens[at + 1 : at + 1 + len(piece)])
                )
        finally:
            runtime.free(sequence)
        progress((stop - first) / (len(tokens) - first))
    return np.concatenate(parts)


def agreement(
    runtime: Runtime, reference: Runtime, tokens: Sequence[int], progress: Progress = _nothing
) -> Agreement:
    """Both read the same text, each chunk of it in turn, so that nothing has to be stored. Raises
    MeasureFailed where it does not fit, or the vocabularies differ."""
    import numpy as np

    if runtime.facts.vocab_size != reference.facts.vocab_size:
        raise MeasureFailed("the two models have different vocabularies")
    most = min(runtime.facts.context, reference.facts.context)
    if len(tokens) > most:
        raise MeasureFailed(f"{len(tokens)} tokens do not fit into a context of {most}")
    kl: list[Floats] = []
    nll: list[Floats] = []
    reference_nll: list[Floats] = []
    same = 0
    chunk = min(chunk_of(runtime), chunk_of(reference))
    one, other = runtime.open(), reference.open()
    try:
        for start in range(0, len(tokens), chunk):
            part = tokens[start : start + chunk]
            following = tokens[start + 1 : start + 1 + len(part)]
            found, wanted = rows(runtime, one, part), rows(reference, other, part)
            q, p = log_softmax(found), log_softmax(wanted)
            kl.append((np.exp(p) * (p - q)).sum(axis=-1))
            same += int((found.argmax(axis=-1) == wanted.argmax(axis=-1)).sum())
            nll.append(_nll_of(found, following))
            reference_nll.append(_nll_of(wanted, following))
            progress((start + len(part)) / len(tokens))
    finally:
        runtime.free(one)
        reference.free(other)
    return Agreement(
        np.concatenate(kl), same / len(tokens), np.concatenate(nll), np.concatenate(reference_nll)
    )


def slices(nll: Floats, size: int) -> Iterator[tuple[int, float]]:
    """(first token, perplexity) of each whole slice of so many tokens."""
    for start in range(0, len(nll) - size + 1, size):
        yield start, perplexity(nll[start : start + size])
