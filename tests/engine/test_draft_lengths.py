"""How long drafts are: against trying every way of sharing a step out."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence

import pytest

from edgeinfer.engine.draft_lengths import LEAST_GAIN, share_out

# SmolLM2 on two cores, relative to one token (4, 8 and 16 are whole tiles).
STEPPED = {1: 1.0, 2: 1.6, 3: 2.1, 4: 2.0, 5: 2.8, 6: 3.2, 7: 3.7, 8: 3.0, 12: 4.0, 16: 4.4}


def by_total(costs: Mapping[int, float]) -> Callable[[Sequence[int]], float | None]:
    """Where it does not matter whose tokens they are."""
    return lambda tokens: costs.get(sum(tokens))


def brought(odds: list[list[float]], lengths: tuple[int, ...]) -> float:
    return sum(
        1 + sum(math.prod(own[: place + 1]) for place in range(length))
        for own, length in zip(odds, lengths, strict=True)
    )


@pytest.mark.parametrize("seed", range(30))
def test_no_other_way_brings_more(seed: int) -> None:
    draw = random.Random(seed)
    odds = [[draw.random() for _ in range(draw.randrange(5))] for _ in range(draw.randrange(1, 4))]
    costs = {1: 1.0}
    for size in range(2, 20):
        costs[size] = costs[size - 1] + draw.choice((0.02, 0.1, 0.5))
    most = draw.randrange(len(odds), 12)
    lengths, gain = share_out(odds, by_total(costs), most)
    best = max(
        brought(odds, ways) / costs[len(odds) + sum(ways)]
        for ways in itertools.product(*(range(len(own) + 1) for own in odds))
        if len(odds) + sum(ways) <= most
    )
    plain = len(odds) / costs[len(odds)]
    found = brought(odds, tuple(lengths)) / costs[len(odds) + sum(lengths)]
    if best > LEAST_GAIN * plain:
        assert found == pytest.approx(best)
        assert gain == pytest.approx(best / plain)
    else:
        assert not any(lengths) and gain == 1.0


def test_a_lone_copy_fills_whole_tiles() -> None:
    assert share_out([[0.97] * 20], by_total(STEPPED), 17)[0] == [15]
    assert share_out([[0.8] * 20], by_total(STEPPED), 17)[0] == [3]
    assert share_out([[0.3] * 20], by_total(STEPPED), 17)[0] == [0]
    assert share_out([[]], by_total(STEPPED), 17) == ([0], 1.0)


def test_without_known_costs_nothing_is_drafted() -> None:
    assert share_out([[0.99] * 4], by_total({}), 17) == ([0], 1.0)
    assert share_out([[0.99] * 4], by_total({1: 1.0}), 17) == ([0], 1.0)


def test_several_share_by_what_their_tokens_bring() -> None:
    lengths, gain = share_out([[0.9] * 8, [0.2] * 8, []], lambda tokens: 1.0, 8)
    assert lengths == [5, 0, 0] or lengths[0] > lengths[1]
    assert gain > 1.5
