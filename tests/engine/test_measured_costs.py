"""Measuring on the scripted backend: what is measured, that nobody waits for it, what is kept."""

from __future__ import annotations

import threading
from pathlib import Path

from edgeinfer.backend import Runtime, RuntimeSettings
from edgeinfer.engine.measured_costs import MeasuredCosts
from edgeinfer.engine.step_measure import PREFILL, SIZES, StepMeasurement
from edgeinfer.machine.step_cost import StepClass, StepCosts
from edgeinfer_backends.scripted import SCRIPTED_FILES, Script, ScriptedBackend

FOREVER = Script(step_s=3600.0)  # a step that only an abort ends


def runtime_of(script: Script | None = None, **settings: int) -> Runtime:
    values = {"context": 1024, "step_tokens": 256, **settings}
    return ScriptedBackend(script or Script()).load(
        SCRIPTED_FILES, RuntimeSettings(**values), lambda _: True
    )


def test_every_size_is_measured_for_every_thread_count_and_nothing_stays_behind() -> None:
    runtime, costs = runtime_of(), StepCosts()
    measurement = StepMeasurement(runtime, costs, (1, 2), 60.0)
    cells = runtime.free_cells()
    while measurement.run_one():
        pass
    assert measurement.is_done
    for threads in (1, 2):
        for tokens in (*SIZES, PREFILL):
            assert costs.count(StepClass.of(threads, tokens, tokens, 0)) >= 1
    assert runtime.free_cells() == cells
    runtime.check_integrity()


def test_what_is_known_is_not_measured_again() -> None:
    runtime, costs = runtime_of(), StepCosts()
    first = StepMeasurement(runtime, costs, (1,), 60.0)
    while first.run_one():
        pass
    changes = costs.num_changes
    again = StepMeasurement(runtime, costs, (1,), 60.0)
    assert again.is_done
    assert not again.run_one()
    assert costs.num_changes == changes


def test_the_budget_bounds_what_is_begun() -> None:
    runtime, costs = runtime_of(Script(step_s=0.02)), StepCosts()
    measurement = StepMeasurement(runtime, costs, (1, 2), 0.2)
    while measurement.run_one():
        pass
    assert measurement.is_done
    assert 0 < len(costs) < 6  # 14 pieces of at least 0.04 s each


def test_a_step_that_was_interrupted_is_taken_again() -> None:
    runtime, costs = runtime_of(Script(step_s=0.3)), StepCosts()
    measurement = StepMeasurement(runtime, costs, (1,), 60.0)
    timer = threading.Timer(0.1, runtime.abort)
    timer.start()
    assert not measurement.run_one()
    timer.join()
    assert not measurement.is_done
    assert len(costs) == 0
    assert measurement.run_one()
    assert costs.count(StepClass.of(1, 1, 1, 0)) > 0


def test_a_cache_without_room_is_left_alone() -> None:
    runtime, costs = runtime_of(context=64), StepCosts()
    sequence = runtime.open()
    from edgeinfer.backend import SequenceStep, Step

    runtime.forward(Step((SequenceStep(sequence, list(range(97, 97 + 26)) * 2 + [97] * 12),)))
    assert not StepMeasurement(runtime, costs, (1,), 60.0).run_one()
    assert runtime.length(sequence) == 64


def test_a_command_ends_a_piece_at_once_and_holds_the_next_back(tmp_path: Path) -> None:
    costs = MeasuredCosts(runtime_of(FOREVER), tmp_path, 0.0)
    timer = threading.Timer(0.1, costs.command_arrives)
    timer.start()
    assert not costs.use_idle()
    assert not costs.use_idle()  # not before the command was taken
    assert len(costs.costs) == 0


def test_the_first_measurement_ends_in_time_with_steps_of_any_length(tmp_path: Path) -> None:
    costs = MeasuredCosts(runtime_of(FOREVER), tmp_path, 0.0)
    costs.measure_first()
    assert len(costs.costs) == 0


def test_what_was_measured_is_there_at_the_next_load(tmp_path: Path) -> None:
    first = MeasuredCosts(runtime_of(), tmp_path, 0.0)
    first.measure_first()
    while first.use_idle():
        pass
    first.save()
    again = MeasuredCosts(runtime_of(), tmp_path, 0.0)
    assert again.costs.as_json() == first.costs.as_json()
    assert not again.use_idle()


def test_a_later_load_measures_what_is_missing_after_its_first_request(tmp_path: Path) -> None:
    first = MeasuredCosts(runtime_of(), tmp_path, 0.0)
    assert first.use_idle()
    first.save()
    again = MeasuredCosts(runtime_of(), tmp_path, 0.0)
    again.measure_first()
    assert not again.use_idle()
    assert again.costs.as_json() == first.costs.as_json()
    again.command_arrives()
    again.command_taken()
    assert again.use_idle()
    assert len(again.costs) > len(first.costs)


def test_a_piece_that_outlasts_the_budget_is_ended_and_was_the_last(tmp_path: Path) -> None:
    costs = MeasuredCosts(runtime_of(FOREVER), tmp_path, 0.0)
    costs.budget_s = 0.1
    costs._measurement = StepMeasurement(costs._runtime, costs.costs, (1,), costs.budget_s)
    assert not costs.use_idle()
    assert costs._measurement is None
    assert len(costs.costs) == 0


def test_another_model_finds_nothing_of_it(tmp_path: Path) -> None:
    first = MeasuredCosts(runtime_of(), tmp_path, 0.0)
    while first.use_idle():
        pass
    first.save()
    other = MeasuredCosts(runtime_of(Script(seed=5)), tmp_path, 0.0)
    assert len(other.costs) == 0


def test_other_options_of_the_load_find_nothing_of_it(tmp_path: Path) -> None:
    first = MeasuredCosts(runtime_of(), tmp_path, 0.0, {"gpu_layers": "0"})
    while first.use_idle():
        pass
    first.save()
    assert len(MeasuredCosts(runtime_of(), tmp_path, 0.0, {"gpu_layers": "0"}).costs) > 0
    assert len(MeasuredCosts(runtime_of(), tmp_path, 0.0, {"gpu_layers": "10"}).costs) == 0
