"""The choice of a weight type, on made-up figures."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from edgeinfer.errors import UsageError
from edgeinfer.quantize.choice import AS_FAST, DEFAULT_MAX_KL, NoTypeFits, TypeRow, choose_type


def row(name: str, speed: float, size: int = 100, kl: float | None = None) -> TypeRow:
    """speed: 1.0 answers in 10 s."""
    return TypeRow(
        name,
        num_bytes=size,
        bits_per_weight=4.5,
        prefill_tok_s=100 * speed,
        decode_tok_s=40 * speed,
        memory_bytes=2 * size,
        kl=kl,
    )


@dataclass
class Losses:
    """What is asked for is remembered."""

    of: dict[str, float]
    asked: list[str] = field(default_factory=list)

    def __call__(self, name: str) -> float:
        self.asked.append(name)
        return self.of[name]


ROWS = (row("q8_0", 1.0), row("q4_0", 2.0), row("q4_k_m", 1.5), row("f16", 0.5, kl=0.0))


def test_the_fastest_that_loses_little_enough_is_taken() -> None:
    losses = Losses({"q4_0": 0.3, "q4_k_m": 0.04, "q8_0": 0.001})
    found = choose_type(ROWS, 0.05, None, losses)
    assert found.chosen.type_name == "q4_k_m"
    assert [each.type_name for each in found.table] == ["q4_0", "q4_k_m", "q8_0", "f16"]
    verdicts = [each.verdict for each in found.table]
    assert verdicts == ["loses more than 0.05", "taken", "slower", "slower"]
    assert "q4_0 (0.300)" in found.reason


def test_a_type_that_cannot_win_any_more_is_not_compared() -> None:
    losses = Losses({"q4_0": 0.01})
    assert choose_type(ROWS, 0.05, None, losses).chosen.type_name == "q4_0"
    assert losses.asked == ["q4_0"]


def test_of_types_that_are_as_fast_the_one_that_loses_least_is_taken() -> None:
    rows = (row("q4_0", 1.0), row("iq4_nl", 1 / (AS_FAST - 0.01)), row("q8_0", 1 / (AS_FAST + 0.01)))
    losses = Losses({"q4_0": 0.04, "iq4_nl": 0.02, "q8_0": 0.001})
    found = choose_type(rows, None, None, losses)
    assert found.chosen.type_name == "iq4_nl"
    assert losses.asked == ["q4_0", "iq4_nl"]
    assert found.table[0].verdict == "as fast, but loses more"


def test_as_fast_counts_from_the_fastest_that_is_good_enough() -> None:
    """Not from one that loses too much, and not from the one before."""
    steps = [AS_FAST**-0.9, AS_FAST**-1.8, AS_FAST**-2.7]
    rows = (row("a", 1.0), *(row(name, speed) for name, speed in zip("bcd", steps, strict=True)))
    losses = Losses({"a": 9.0, "b": 0.04, "c": 0.03, "d": 0.01})
    assert choose_type(rows, 0.05, None, losses).chosen.type_name == "c"


def test_of_equal_losses_the_smaller_file_is_taken() -> None:
    rows = (row("large", 1.01, size=200), row("small", 1.0, size=100))
    losses = Losses({"large": 0.01, "small": 0.01})
    assert choose_type(rows, None, None, losses).chosen.type_name == "small"


def test_what_does_not_fit_into_memory_is_neither_taken_nor_compared() -> None:
    rows = (row("fast", 2.0, size=500), row("small", 1.0, size=50))
    losses = Losses({"small": 0.01})
    found = choose_type(rows, None, 200, losses)
    assert found.chosen.type_name == "small"
    assert losses.asked == ["small"]
    assert "of memory" in found.table[0].verdict


def test_where_nothing_fits_the_error_says_what_the_smallest_takes() -> None:
    with pytest.raises(NoTypeFits, match=r"0\.1 GB of memory are free.*q4_0 takes 2\.0"):
        choose_type((row("q4_0", 1.0, size=10**9),), None, 10**8, Losses({}))


def test_where_all_lose_too_much_the_error_names_the_best_and_the_table_is_whole() -> None:
    losses = Losses({"q4_0": 0.3, "q8_0": 0.01})
    with pytest.raises(
        UsageError, match=r"at most 0\.001 .*q8_0 loses least \(0\.0100\).*--max-kl"
    ) as met:
        choose_type((row("q4_0", 2.0), row("q8_0", 1.0)), 0.001, None, losses)
    assert isinstance(met.value, NoTypeFits)
    assert [each.kl for each in met.value.table] == [0.3, 0.01]


def test_the_model_as_it_is_is_taken_where_nothing_else_is_good_enough() -> None:
    losses = Losses({"q4_0": 0.3, "q4_k_m": 0.2, "q8_0": 0.1})
    assert choose_type(ROWS, None, None, losses).chosen.type_name == "f16"
    assert min(losses.of.values()) > DEFAULT_MAX_KL


def test_a_model_that_loses_without_a_bound_is_never_taken() -> None:
    losses = Losses({"q4_0": float("nan"), "q4_k_m": float("inf"), "q8_0": 0.01})
    assert choose_type(ROWS, 0.05, None, losses).chosen.type_name == "q8_0"
