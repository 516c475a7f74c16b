"""A text of any length, read through a window as the engine does, or read afresh all the time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeinfer.backend import Runtime, SequenceStep, Step
from edgeinfer.engine.eviction import let_go
from edgeinfer.engine.window import Window
from edgeinfer.errors import MeasureFailed
from edgeinfer.quality.predictions import CHUNK, Progress, chunk_of, nll_of, nothing, perplexity, rows

if TYPE_CHECKING:
    from edgeinfer.quality.predictions import Floats


@dataclass(frozen=True)
class Streamed:
    """A text read once from end to end.

    nll: of each token but the first; shape (tokens - 1,). used_cells: in the cache after each step.
    evicted: tokens that left on the way.
    """

    nll: Floats
    used_cells: tuple[int, ...]
    evicted: int


def chunk_through(runtime: Runtime, window: Window, head: int = 0) -> int:
    """Tokens read at once: no more than half of what may leave the window, so that each of them is read
    with something before it."""
    return min(chunk_of(runtime), max(1, (window.size - head) // 2))


def stream(
    runtime: Runtime, tokens: Sequence[int], window: Window, progress: Progress = nothing
) -> Streamed:
    """Read a text of any length through a window, as the engine does (window.py): each token is scored
    with what is in the cache then. Raises MeasureFailed where the cache cannot be shifted."""
    import numpy as np

    if not runtime.facts.can.evict and len(tokens) > window.size:
        raise MeasureFailed(f"{runtime.facts.backend} cannot shift this model's KV cache")
    head = window.head(0)
    chunk = chunk_through(runtime, window, head)
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
            parts.append(nll_of(logits, tokens[start + 1 : start + 1 + len(part)]))
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
    progress: Progress = nothing,
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
                    nll_of(rows(runtime, sequence, piece), tokens[at + 1 : at + 1 + len(piece)])
                )
        finally:
            runtime.free(sequence)
        progress((stop - first) / (len(tokens) - first))
    return np.concatenate(parts)


def slices(nll: Floats, size: int) -> Iterator[tuple[int, float]]:
    """(first token, perplexity) of each whole slice of so many tokens."""
    for start in range(0, len(nll) - size + 1, size):
        yield start, perplexity(nll[start : start + size])
