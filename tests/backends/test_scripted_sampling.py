"""The reference samplers on distributions worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgeinfer.sampling import SamplingParams
from edgeinfer_backends.sampling_reference import (
    ReferenceSampler,
    allowed_tokens,
    distribution,
    subtract_dry,
    subtract_penalties,
)

PLAIN = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
HALVES = np.log([0.5, 0.25, 0.125, 0.0625, 0.0625])


def kept(params: SamplingParams, logits: np.ndarray = HALVES) -> list[int]:
    return np.flatnonzero(distribution(logits, params)).tolist()


def test_nothing_set_is_softmax() -> None:
    assert distribution(HALVES, PLAIN) == pytest.approx([0.5, 0.25, 0.125, 0.0625, 0.0625])


def test_temperature_comes_after_the_cuts() -> None:
    hot = replace(PLAIN, temperature=2.0, top_p=0.74)
    root = np.sqrt([0.5, 0.25])
    assert distribution(HALVES, hot) == pytest.approx([*(root / root.sum()), 0, 0, 0])


@pytest.mark.parametrize(
    ("params", "tokens"),
    [
        (replace(PLAIN, top_k=2), [0, 1]),
        (replace(PLAIN, top_k=99), [0, 1, 2, 3, 4]),
        (replace(PLAIN, top_k=4), [0, 1, 2, 3]),  # a tie goes to the lower id
        (replace(PLAIN, top_p=0.74), [0, 1]),
        (replace(PLAIN, top_p=0.76), [0, 1, 2]),
        (replace(PLAIN, top_p=0.01), [0]),
        (replace(PLAIN, min_p=0.24), [0, 1, 2]),
        (replace(PLAIN, min_p=0.26), [0, 1]),
        (replace(PLAIN, min_p=1.0), [0]),
        # Entropy 1.875 bits, surprises 1, 2, 3, 4, 4 bits: token 1 is the nearest, then 0, then 2.
        (replace(PLAIN, typical_p=0.2), [1]),
        (replace(PLAIN, typical_p=0.3), [0, 1]),
        (replace(PLAIN, typical_p=0.8), [0, 1, 2]),
    ],
)
def test_cuts_keep_what_they_should(params: SamplingParams, tokens: list[int]) -> None:
    assert kept(params) == tokens


def test_penalties_by_hand() -> None:
    scores = np.array([2.0, -2.0, 1.0, 3.0])
    params = replace(PLAIN, repeat_penalty=2.0, frequency_penalty=0.25, presence_penalty=0.5)
    subtract_penalties(scores, [0, 1, 1, 0, 0], params)
    assert scores == pytest.approx([1.0 - 0.75 - 0.5, -4.0 - 0.5 - 0.5, 1.0, 3.0])


def test_dry_by_hand() -> None:
    """llama.cpp's own example: a b c c b c y a b c, where c would make 3 -> 4, b 1 -> 2, y 2 -> 3."""
    a, b, c, y, other = range(5)
    scores = np.zeros(5)
    params = replace(PLAIN, dry_multiplier=2.0, dry_base=3.0, dry_allowed_length=1)
    subtract_dry(scores, [a, b, c, c, b, c, y, a, b, c], params)
    assert scores == pytest.approx([0.0, -2.0, -2.0 * 9, -2.0 * 3, 0.0])
    scores = np.zeros(5)
    subtract_dry(scores, [a, b, c, c, b, c, y, a, b, c], replace(params, dry_allowed_length=3))
    assert scores == pytest.approx([0.0, 0.0, -2.0, 0.0, 0.0])
    assert other == 4


def test_dry_does_not_overflow() -> None:
    scores = np.zeros(3)
    subtract_dry(scores, [1] * 1000, replace(PLAIN, dry_multiplier=1.0, dry_base=10.0))
    assert np.isfinite(scores).all()
    assert scores[1] < -1e30


@pytest.mark.parametrize("history", [[], [1], [1, 1], [1, 2, 3]])
def test_short_histories_are_no_trouble(history: list[int]) -> None:
    params = replace(PLAIN, dry_multiplier=1.0, repeat_penalty=1.1, penalty_last_n=0)
    assert distribution(HALVES, params, history).sum() == pytest.approx(1.0)


def test_a_mask_is_read_least_significant_bit_first() -> None:
    assert np.flatnonzero(allowed_tokens(bytes([0b10, 0b1]), 10)).tolist() == [1, 8]
    with pytest.raises(ValueError, match="no token"):
        allowed_tokens(bytes([0, 0b100]), 10)
    with pytest.raises(ValueError, match="1 bytes"):
        allowed_tokens(b"\xff", 10)


def test_draws_follow_the_distribution() -> None:
    sampler = ReferenceSampler(PLAIN, seed=1, vocab_size=5)
    counts = np.bincount([sampler.draw(HALVES) for _ in range(4000)], minlength=5) / 4000
    assert counts == pytest.approx(np.exp(HALVES), abs=0.04)


def test_tokens_drawn_and_accepted_both_count() -> None:
    params = replace(PLAIN, temperature=0.0, presence_penalty=10.0)
    sampler = ReferenceSampler(params, seed=1, vocab_size=5)
    sampler.accept(0)
    assert [sampler.draw(HALVES) for _ in range(3)] == [1, 2, 3]
