"""Types chosen within so many bytes."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeinfer.errors import UsageError
from edgeinfer.quantize.budget import bits_per_weight_of, choose_within

SIZES = {"small": 10, "middle": 14, "large": 20}


def total(losses: dict[str, dict[str, float]], chosen: dict[str, str]) -> float:
    return sum(losses[name][kind] for name, kind in chosen.items())


def test_bytes_go_where_they_buy_most() -> None:
    losses = {
        "dull": {"small": 0.2, "middle": 0.19, "large": 0.18},
        "sharp": {"small": 2.0, "middle": 0.4, "large": 0.1},
    }
    sizes = dict.fromkeys(losses, SIZES)
    assert choose_within(losses, sizes, 20) == {"dull": "small", "sharp": "small"}
    assert choose_within(losses, sizes, 24) == {"dull": "small", "sharp": "middle"}
    assert choose_within(losses, sizes, 30) == {"dull": "small", "sharp": "large"}
    assert choose_within(losses, sizes, 100) == {"dull": "large", "sharp": "large"}


def test_a_type_that_costs_more_and_loses_more_is_never_taken() -> None:
    losses = {"one": {"small": 0.5, "middle": 0.7, "large": 0.1}}
    assert choose_within(losses, {"one": SIZES}, 19) == {"one": "small"}
    assert choose_within(losses, {"one": SIZES}, 20) == {"one": "large"}


def test_what_is_too_little_is_said() -> None:
    with pytest.raises(UsageError, match="1 bytes larger"):
        choose_within({"one": {"small": 1.0}}, {"one": {"small": 10}}, 9)


@given(
    st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=1, max_size=5),
    st.integers(0, 60),
)
def test_nearly_nothing_is_lost_against_trying_all(
    drawn: list[tuple[float, float, float]], extra: int
) -> None:
    losses = {
        str(index): dict(zip(SIZES, sorted(each, reverse=True), strict=True))
        for index, each in enumerate(drawn)
    }
    sizes = dict.fromkeys(losses, SIZES)
    budget = 10 * len(losses) + extra
    chosen = choose_within(losses, sizes, budget)
    assert sum(SIZES[kind] for kind in chosen.values()) <= budget
    least = min(
        total(losses, dict(zip(losses, kinds, strict=True)))
        for kinds in product(SIZES, repeat=len(losses))
        if sum(SIZES[kind] for kind in kinds) <= budget
    )
    # The last bytes may be left over: at most what one tensor's largest step buys.
    step = max(max(each.values()) - min(each.values()) for each in losses.values())
    assert total(losses, chosen) <= least + step + 1e-9


@pytest.mark.parametrize(
    ("text", "bits"), [("4.5bpw", 4.5), (" 6 BPW ", 6.0), ("100M", None), ("bpw", None), ("-1bpw", None)]
)
def test_bits_for_each_weight_are_told_from_sizes(text: str, bits: float | None) -> None:
    assert bits_per_weight_of(text) == bits
