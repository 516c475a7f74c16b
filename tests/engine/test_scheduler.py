from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeinfer.engine.scheduler import Demand, Limits, chunk, plan

LIMITS = Limits(step_tokens=512, stable_chunk=64, prefill_beside_decode=128)


def decode(key: int, tokens: int = 1) -> Demand:
    return Demand(key, tokens, 0)


def prompt(key: int, tokens: int) -> Demand:
    return Demand(key, 0, tokens)


def test_a_lone_prompt_gets_the_whole_step() -> None:
    assert plan([prompt(1, 2000)], LIMITS) == [(1, 512)]


def test_everyone_who_decodes_gets_a_token_before_any_prompt() -> None:
    assert plan([prompt(1, 2000), decode(2), decode(3)], LIMITS) == [(2, 1), (3, 1), (1, 128)]


def test_a_draft_is_taken_whole_or_not_at_all() -> None:
    assert plan([decode(1, 510), decode(2, 4), decode(3)], LIMITS) == [(1, 510), (3, 1)]


def test_prompts_share_a_step() -> None:
    assert plan([prompt(1, 2000), prompt(2, 2000)], LIMITS) == [(1, 256), (2, 256)]


def test_a_short_prompt_leaves_its_share_to_the_others() -> None:
    assert plan([prompt(1, 20), prompt(2, 2000)], LIMITS) == [(1, 20), (2, 492)]


def test_a_prompt_is_not_cut_into_a_piece_below_the_stable_chunk() -> None:
    assert plan([prompt(1, 530)], LIMITS) == [(1, 466)]
    assert plan([prompt(1, 64)], LIMITS) == [(1, 64)]


def test_a_long_prompt_beside_streams_still_moves_when_the_machine_is_slow() -> None:
    slow = Limits(step_tokens=512, stable_chunk=64, prefill_beside_decode=3)
    assert plan([decode(1), prompt(2, 1000)], slow) == [(1, 1), (2, 64)]


def test_a_prompt_too_short_to_cut_waits_when_it_does_not_fit() -> None:
    assert chunk(remaining=100, share=64, budget=80, stable=64) == 0
    assert chunk(remaining=100, share=64, budget=100, stable=64) == 100


@given(
    st.lists(
        st.one_of(
            st.integers(1, 9).map(lambda n: (n, 0)), st.integers(1, 5000).map(lambda n: (0, n))
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(64, 600),
    st.integers(0, 600),
)
def test_a_plan_keeps_its_budget_and_moves_somebody(
    wants: list[tuple[int, int]], budget: int, beside: int
) -> None:
    demands = [Demand(key, *want) for key, want in enumerate(wants)]
    limits = Limits(budget, 64, beside)
    allotted = plan(demands, limits)
    assert sum(tokens for _, tokens in allotted) <= budget
    assert len({key for key, _ in allotted}) == len(allotted)
    by_key = dict(enumerate(wants))
    for key, tokens in allotted:
        drafted, prompt_left = by_key[key]
        if drafted:
            assert tokens == drafted
        else:
            assert 0 < tokens <= prompt_left
            left = prompt_left - tokens
            assert left == 0 or left >= 64
            assert tokens >= 64 or tokens == prompt_left
    if budget >= 128 or any(drafted for drafted, _ in wants):
        assert allotted


@pytest.mark.parametrize("total", [1, 63, 64, 65, 127, 128, 129, 500, 513, 530, 1100, 4097])
def test_a_prompt_is_prefilled_to_the_end_in_stable_chunks(total: int) -> None:
    left, pieces = total, []
    while left:
        ((_, tokens),) = plan([prompt(1, left)], LIMITS)
        pieces.append(tokens)
        left -= tokens
    assert sum(pieces) == total
    assert all(piece >= 64 for piece in pieces) or len(pieces) == 1
