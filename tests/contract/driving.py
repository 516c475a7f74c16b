"""Steps that nearly every contract test takes, and what it means for a failed call to change nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import pytest

from edgeinfer.backend import BLOCK_TOKENS, Runtime, SequenceStep, Step

Logits = npt.NDArray[np.float32]

CHUNK = 128  # at least every backend's stable_chunk_tokens
rounding = 0.0  # of the runtime that is tested; set by conftest.py


def require(runtime: Runtime, *capabilities: str) -> None:
    """Skip the test, naming the capability that the runtime does not declare."""
    for name in capabilities:
        if not getattr(runtime.facts.can, name):
            pytest.skip(f"{runtime.facts.backend} does not declare `{name}`")


def require_one_pool(runtime: Runtime) -> None:
    """Skip the test where each sequence has room for a whole context, whatever the others hold."""
    facts = runtime.facts
    if facts.cells >= facts.max_sequences * facts.context:
        pytest.skip(f"{facts.backend} here has a stream of cells for each sequence")


def ordinary_tokens(runtime: Runtime) -> list[int]:
    """Every token that is text."""
    tokenizer = runtime.tokenizer
    return [t for t in range(runtime.facts.vocab_size) if not tokenizer.is_control(t)]


def some_tokens(runtime: Runtime, count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(ordinary_tokens(runtime), k=count)


def feed(runtime: Runtime, sequence: int, tokens: Sequence[int], chunk: int = CHUNK) -> Logits:
    """Append tokens in chunks; a copy of the logits after the last."""
    for start in range(0, len(tokens), chunk):
        piece = tokens[start : start + chunk]
        is_last = start + chunk >= len(tokens)
        step = Step([SequenceStep(sequence, piece, "last" if is_last else "none")])
        result = runtime.forward(step)
    return runtime.logits(result.starts[0]).copy()


def opened(runtime: Runtime, tokens: Sequence[int]) -> int:
    """A new sequence that holds `tokens`."""
    sequence = runtime.open()
    if tokens:
        feed(runtime, sequence, tokens)
    return sequence


def decode(runtime: Runtime, sequence: int, tokens: Sequence[int]) -> list[Logits]:
    """Append tokens one step each; the logits after every one."""
    return [feed(runtime, sequence, [token]) for token in tokens]


def decode_together(runtime: Runtime, tokens: dict[int, int], padding: int = 0) -> dict[int, Logits]:
    """One token each for several sequences in one step; the logits by sequence."""
    parts = [SequenceStep(sequence, [token]) for sequence, token in tokens.items()]
    result = runtime.forward(Step(parts, padding))
    return {p.sequence: runtime.logits(r).copy() for p, r in zip(parts, result.starts, strict=True)}


def probe(runtime: Runtime, sequence: int) -> Logits:
    """The logits after one more token, which is taken back."""
    length = runtime.length(sequence)
    logits = feed(runtime, sequence, some_tokens(runtime, 1, seed=99))
    runtime.rewind(sequence, length)
    return logits


def is_same(left: Logits, right: Logits) -> bool:
    """Bit-identical."""
    return np.array_equal(left, right)


def is_alike(left: Logits, right: Logits) -> bool:
    """Of the same tokens, read in other steps: bit-identical, or within the rounding of a runtime that
    is not exact."""
    return np.array_equal(left, right) or bool(np.abs(left - right).max() <= rounding)


@contextmanager
def unchanged(runtime: Runtime, *sequences: int) -> Iterator[None]:
    """What happens inside leaves every sequence's length and predictions, and the free cells."""
    before = [(runtime.length(s), runtime.is_in_order(s), probe(runtime, s)) for s in sequences]
    free = runtime.free_cells()
    yield
    assert runtime.free_cells() == free
    for sequence, (length, in_order, logits) in zip(sequences, before, strict=True):
        assert runtime.length(sequence) == length
        assert runtime.is_in_order(sequence) == in_order
        assert is_same(probe(runtime, sequence), logits)


def snapshots(runtime: Runtime, sequence: int) -> list[tuple[bytes, int]]:
    """A sequence as (payload, positions) for each of its blocks, the last one partial."""
    length = runtime.length(sequence)
    spans = [(start, min(start + BLOCK_TOKENS, length)) for start in range(0, length, BLOCK_TOKENS)]
    return [(runtime.snapshot(sequence, start, stop), stop - start) for start, stop in spans]


def restored(runtime: Runtime, blocks: Sequence[tuple[bytes, int]]) -> int:
    """A new sequence made of blocks."""
    sequence = runtime.open()
    for payload, num_positions in blocks:
        runtime.restore(sequence, payload, num_positions)
    return sequence
