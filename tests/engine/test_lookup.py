"""Drafts copied from what was said, against the plainest way of finding them."""

from __future__ import annotations

import random

import pytest

from edgeinfer.engine.draft import NO_DRAFT, Acceptance, Outcome
from edgeinfer.engine.lookup import KINDS, LEAST_MATCH, MOST_LOOKED_AT, Lookup, kind_of


def longest_match(said: list[int]) -> tuple[int, int]:
    """(where it goes on, its length), of the newest places; (-1, 0) if there is none."""
    found, looked_at = (-1, 0), 0
    for end in range(len(said) - 1, LEAST_MATCH - 1, -1):
        if said[end - LEAST_MATCH : end] != said[-LEAST_MATCH:]:
            continue
        length = LEAST_MATCH
        while length < KINDS[-1] and length < end and said[end - length - 1] == said[-length - 1]:
            length += 1
        if length > found[1]:
            found = (end, length)
        looked_at += 1
        if looked_at == MOST_LOOKED_AT or found[1] == KINDS[-1]:
            break
    return found


@pytest.mark.parametrize("seed", range(20))
def test_the_longest_match_goes_first(seed: int) -> None:
    draw = random.Random(seed)
    said = draw.choices(range(draw.choice((2, 3, 8))), k=draw.randrange(3, 200))
    if draw.random() < 0.5:
        said += said[: draw.randrange(len(said))]
    draft = Lookup(said).propose(5)
    start, length = longest_match(said)
    if start < 0:
        assert draft is NO_DRAFT
        return
    around = said[start:] * 5
    assert draft.tokens == tuple(around[:5])
    assert draft.kinds == tuple(kind_of(length + number) for number in range(5))


def test_a_copy_is_followed_to_its_end() -> None:
    text = list(range(100, 160))
    lookup = Lookup([*text, 7, *text[:3]])
    assert lookup.propose(4).tokens == tuple(text[3:7])
    outcomes = [lookup.append(token) for token in text[3:]]
    assert all(outcome is not None and outcome.is_hit for outcome in outcomes)
    assert lookup.propose(3).kinds == (len(KINDS) - 1,) * 3
    assert lookup.append(8) == Outcome(len(KINDS) - 1, False)  # what came then was 7
    assert lookup.propose(3) is NO_DRAFT
    assert lookup.append(9) is None


def test_what_repeats_itself_is_drafted_to_go_on() -> None:
    lookup = Lookup([1, 2, 3, 1, 2, 3])
    assert lookup.propose(7).tokens == (1, 2, 3, 1, 2, 3, 1)
    assert lookup.propose(0) is NO_DRAFT
    assert Lookup([]).propose(4) is Lookup([5]).propose(4) is NO_DRAFT


def test_kinds_are_ordered_by_length() -> None:
    kinds = [kind_of(length) for length in range(LEAST_MATCH, 50)]
    assert kinds == sorted(kinds) and set(kinds) == set(range(len(KINDS)))


def test_acceptance_begins_with_what_is_known_and_forgets() -> None:
    acceptance = Acceptance((0.5, 0.9), weight=4.0, memory=16.0)
    assert [acceptance.odds(kind) for kind in (0, 1)] == [0.5, 0.9]
    for _ in range(200):
        acceptance.learn(Outcome(0, False))
    assert acceptance.odds(0) < 0.12 and acceptance.odds(1) == 0.9
    for _ in range(200):
        acceptance.learn(Outcome(0, True))
    assert 0.88 < acceptance.odds(0) < 1.0
