from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from edgeinfer.machine.cost_store import FORMAT, costs_path, load_costs, save_costs
from edgeinfer.machine.step_cost import StepClass, StepCosts, padded_sizes, thread_candidates

CONDITIONS = {"machine": "here", "weights": "abc", "build": "1"}


def table(**seconds: float) -> StepCosts:
    costs = StepCosts()
    for name, value in seconds.items():
        threads, tokens = (int(part) for part in name[1:].split("_"))
        costs.observe(StepClass.of(threads, tokens, tokens, 0), value)
    return costs


def test_prefill_is_kept_by_token_and_small_steps_by_size() -> None:
    assert StepClass.of(2, 300, 1, 700) == StepClass(2, 0, 0, 1)
    assert StepClass.of(2, 63, 3, 511) == StepClass(2, 63, 3, 0)


def test_estimates_lie_between_measured_sizes_and_need_their_own_threads() -> None:
    costs = table(t1_1=1.0, t1_4=2.0, t1_8=6.0)
    assert costs.estimate(StepClass.of(1, 4, 4, 0)) == 2.0
    assert costs.estimate(StepClass.of(1, 6, 6, 0)) == 4.0
    assert costs.estimate(StepClass.of(1, 16, 16, 0)) == 12.0
    assert costs.estimate(StepClass.of(2, 4, 4, 0)) is None
    assert costs.estimate(StepClass.of(1, 4, 4, 5000)) == 2.0  # a shorter context's


def test_a_burst_of_slow_steps_does_not_move_the_mean_and_a_lasting_one_does() -> None:
    costs = table(t1_1=1.0)
    kind = StepClass.of(1, 1, 1, 0)
    for _ in range(5):
        costs.observe(kind, 1.0)
    for _ in range(30):
        costs.observe(kind, 9.0)
    assert costs.known(kind) == pytest.approx(1.0)
    costs.observe(kind, 1.0)
    for _ in range(70):
        costs.observe(kind, 9.0)
    assert costs.known(kind) == pytest.approx(9.0)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf"), 1e9])
def test_what_is_no_time_is_not_learnt(seconds: float) -> None:
    costs = StepCosts()
    costs.observe(StepClass.of(1, 1, 1, 0), seconds)
    assert len(costs) == 0


def test_what_was_saved_is_loaded_under_the_same_conditions_only(tmp_path: Path) -> None:
    costs = table(t1_1=0.25, t2_4=0.5)
    assert save_costs(tmp_path, CONDITIONS, costs)
    loaded = load_costs(tmp_path, CONDITIONS)
    assert loaded is not None
    assert loaded.as_json() == costs.as_json()
    for key in CONDITIONS:
        assert load_costs(tmp_path, {**CONDITIONS, key: "other"}) is None
    assert load_costs(tmp_path, {**CONDITIONS, "more": "x"}) is None


def test_a_file_put_in_anothers_place_is_not_used(tmp_path: Path) -> None:
    save_costs(tmp_path, CONDITIONS, table(t1_1=0.25))
    elsewhere = {**CONDITIONS, "machine": "there"}
    costs_path(tmp_path, CONDITIONS).rename(costs_path(tmp_path, elsewhere))
    assert load_costs(tmp_path, elsewhere) is None


@pytest.mark.parametrize(
    "costs",
    [None, 5, [5], [[1, 1, 1, 0, 1.0]], [[1, 1, 1, 0, "x", 1]], [[1, 1, -1, 0, 1.0, 1]],
     [[1, 1, 1, 0, -1.0, 1]], [[1.5, 1, 1, 0, 1.0, 1]], [[True, 1, 1, 0, 1.0, 1]],
     [[1, 1, 1, 0, 1e300, 1]]],
)  # fmt: skip
def test_damaged_costs_are_measured_again(tmp_path: Path, costs: object) -> None:
    data = {"format": FORMAT, "conditions": CONDITIONS, "costs": costs}
    costs_path(tmp_path, CONDITIONS).write_text(json.dumps(data))
    assert load_costs(tmp_path, CONDITIONS) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", "[" * 100_000, '{"format": 99}'])
def test_a_file_that_is_none_of_ours_is_skipped_and_replaced(tmp_path: Path, text: str) -> None:
    costs_path(tmp_path, CONDITIONS).write_text(text)
    assert load_costs(tmp_path, CONDITIONS) is None
    assert save_costs(tmp_path, CONDITIONS, table(t1_1=0.25))
    assert load_costs(tmp_path, CONDITIONS) is not None
    assert [file.suffix for file in tmp_path.iterdir()] == [".json"]


def test_what_a_killed_writer_left_goes_and_what_another_one_writes_stays(tmp_path: Path) -> None:
    left, written = tmp_path / "left.part", tmp_path / "written.part"
    left.write_text("{")
    written.write_text("{")
    long_ago = time.time() - 7200
    os.utime(left, (long_ago, long_ago))
    assert save_costs(tmp_path, CONDITIONS, table(t1_1=0.25))
    assert not left.exists()
    assert written.exists()


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert not save_costs(tmp_path / "file", CONDITIONS, table(t1_1=0.25))


def test_candidates_are_few_and_include_one_and_all() -> None:
    assert thread_candidates(1) == (1,)
    assert thread_candidates(2) == (1, 2)
    assert thread_candidates(8) == (1, 2, 4, 6, 7, 8)
    assert len(thread_candidates(128)) <= 11


def test_padding_goes_to_the_next_tile_only() -> None:
    assert list(padded_sizes(3, 4, 63)) == [3, 4]
    assert list(padded_sizes(4, 4, 63)) == [4]
    assert list(padded_sizes(1, 4, 63)) == [1]
    assert list(padded_sizes(62, 4, 63)) == [62]
