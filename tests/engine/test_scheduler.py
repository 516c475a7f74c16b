from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeinfer.engine.scheduler import Demand, Limits, Plan, chunk, plan

LIMITS = Limits(step_tokens=512, stable_chunk=64, small_step=63, prefill_beside_decode=128)
PRIVATE = Limits(step_tokens=512, stable_chunk=64, small_step=512, prefill_beside_decode=128)


def decode(key: int, tokens: int = 1) -> Demand:
    return Demand(key, tokens, 0)


def prompt(key: int, tokens: int) -> Demand:
    return Demand(key, 0, tokens)


def test_a_lone_prompt_gets_the_whole_step() -> None:
    assert plan([prompt(1, 2000)], LIMITS) == Plan(((1, 512),), True)


def test_streams_and_a_long_prompt_take_turns() -> None:
    demands = [prompt(1, 2000), decode(2), decode(3)]
    assert plan(demands, LIMITS, last_was_large=True) == Plan(((2, 1), (3, 1)))
    assert plan(demands, LIMITS, last_was_large=False) == Plan(((1, 128),), True)


def test_a_short_prompt_rides_with_the_streams() -> None:
    assert plan([prompt(1, 20), decode(2)], LIMITS) == Plan(((1, 20), (2, 1)))


def test_small_pieces_never_add_up_to_a_large_step() -> None:
    demands = [prompt(key, 40) for key in range(3)]
    assert plan(demands, LIMITS).parts == ((0, 40),)


def test_private_cells_let_small_pieces_share_a_step_of_any_size() -> None:
    demands = [prompt(key, 40) for key in range(20)]
    assert plan(demands, PRIVATE).parts == tuple((key, 40) for key in range(12))
    assert plan([*demands, prompt(20, 64)], PRIVATE, last_was_large=True).parts[-1] == (11, 40)


def test_short_prompts_together_are_cut_to_what_streams_wait_for() -> None:
    demands = [decode(0), *[prompt(key, 40) for key in range(1, 20)]]
    assert plan(demands, PRIVATE).parts == ((0, 1), (1, 40), (2, 40), (3, 40))


def test_a_draft_is_taken_whole_or_not_at_all() -> None:
    assert plan([decode(1, 60), decode(2, 5), decode(3)], LIMITS).parts == ((1, 60), (3, 1))


def test_a_prefill_chunk_has_its_step_to_itself() -> None:
    assert plan([prompt(1, 70), prompt(2, 2000)], LIMITS).parts == ((1, 70),)


def test_a_prompt_is_not_cut_into_a_piece_below_the_stable_chunk() -> None:
    assert plan([prompt(1, 530)], LIMITS).parts == ((1, 466),)
    assert plan([prompt(1, 64)], LIMITS).parts == ((1, 64),)


def test_a_long_prompt_beside_streams_still_moves_when_the_machine_is_slow() -> None:
    slow = Limits(step_tokens=512, stable_chunk=64, small_step=63, prefill_beside_decode=3)
    assert plan([decode(1), prompt(2, 1000)], slow).parts == ((2, 64),)
    assert plan([decode(1), prompt(2, 128)], slow).parts == ((2, 64),)
    assert plan([decode(1), prompt(2, 127)], slow).parts == ((2, 127),)


def test_a_chunk_leaves_no_short_piece() -> None:
    assert chunk(remaining=200, budget=127, stable=64) == 127
    assert chunk(remaining=130, budget=127, stable=64) == 66
    assert chunk(remaining=100, budget=127, stable=64) == 100


def test_without_classes_prompts_ride_with_the_streams() -> None:
    limits = Limits(step_tokens=100, stable_chunk=1, small_step=1, prefill_beside_decode=30)
    demands = [prompt(1, 2000), decode(2), decode(3, 4), prompt(4, 10)]
    assert plan(demands, limits).parts == ((2, 1), (3, 4), (1, 15), (4, 10))


@given(
    st.lists(
        st.one_of(st.integers(1, 9).map(lambda n: (n, 0)), st.integers(1, 5000).map(lambda n: (0, n))),
        min_size=1,
        max_size=12,
    ),
    st.integers(128, 600),
    st.integers(0, 600),
    st.booleans(),
    st.booleans(),
)
def test_a_plan_keeps_its_budget_and_its_classes_and_moves_somebody(
    wants: list[tuple[int, int]], budget: int, beside: int, last_was_large: bool, private: bool
) -> None:
    demands = [Demand(key, *want) for key, want in enumerate(wants)]
    planned = plan(demands, Limits(budget, 64, budget if private else 63, beside), last_was_large)
    total = sum(tokens for _, tokens in planned.parts)
    assert 0 < total <= budget
    assert planned.is_large == any(tokens >= 64 for _, tokens in planned.parts)
    assert private or planned.is_large == (total >= 64)
    assert len({key for key, _ in planned.parts}) == len(planned.parts)
    for key, tokens in planned.parts:
        drafted, prompt_left = wants[key]
        if drafted:
            assert tokens == drafted
            assert not planned.is_large
        else:
            left = prompt_left - tokens
            assert tokens > 0
            assert left == 0 or left >= 64
            assert (tokens >= 64) == planned.is_large


@pytest.mark.parametrize("total", [1, 63, 64, 65, 127, 128, 129, 500, 513, 530, 1100, 4097])
@pytest.mark.parametrize("beside_a_stream", [False, True])
def test_a_prompt_is_prefilled_to_the_end_in_stable_chunks(total: int, beside_a_stream: bool) -> None:
    left, pieces, streamed, large = total, [], 0, False
    streams = [decode(2)] if beside_a_stream else []
    served: set[int] = set()
    for _ in range(1000):
        if not left:
            break
        demands = sorted([*streams, prompt(1, left)], key=lambda d: d.key in served)
        planned = plan(demands, LIMITS, large)
        large = planned.is_large
        taken = dict(planned.parts)
        served = set(taken)
        streamed += taken.get(2, 0)
        if 1 in taken:
            pieces.append(taken[1])
            left -= taken[1]
    assert sum(pieces) == total
    assert all(piece >= 64 for piece in pieces) or len(pieces) == 1
    assert streamed >= (len(pieces) - 1 if beside_a_stream else 0)
