"""A model that drafts: over scripted runtimes, of which one says what the target says and others do not.
Whatever it drafts, answers are the target's; and its cells follow the target's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgeinfer.backend import RuntimeSettings, SequenceStep, Step
from edgeinfer.constraint import Constraint
from edgeinfer.engine.draft import Draft
from edgeinfer.engine.draft_lengths import planned_length
from edgeinfer.engine.draft_model import DraftModel, Wanted
from edgeinfer.engine.engine import Engine
from edgeinfer.engine.model_drafting import ModelDrafting, odds_needed
from edgeinfer.engine.request import Request
from edgeinfer.engine.sequence import RunningRequest
from edgeinfer.engine.speculation import Speculation
from edgeinfer.engine.window import Window
from edgeinfer.errors import StepFailed
from edgeinfer.sampling import SamplingParams
from edgeinfer_backends.scripted import SCRIPTED_FILES, Script, ScriptedBackend, ScriptedRuntime
from tests.engine.test_engine import Driver, asked, tokens_of

GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=0.8, seed=3)


def runtime_of(script: Script, *, sequences: int = 1, context: int = 512) -> ScriptedRuntime:
    settings = RuntimeSettings(context=context, sequences=sequences, step_tokens=128)
    runtime = ScriptedBackend(script).load(SCRIPTED_FILES, settings, lambda _: True)
    assert isinstance(runtime, ScriptedRuntime)
    return runtime


def driver_of(
    drafting: Script | None, *, sequences: int = 1, context: int = 512, window: int | None = None
) -> Driver:
    speculation = None
    if drafting is not None:
        speculation = Speculation(lambda tokens, _: 1.0, 100, window or context, None)
        draft = runtime_of(drafting, sequences=sequences, context=context)
        speculation.use_model(DraftModel(draft, "draft"))
    return Driver(
        Engine(
            runtime_of(Script(), sequences=sequences, context=context),
            model="scripted",
            max_running=sequences,
            cache_bytes=2**26,
            window=None if window is None else Window(window, 4),
            speculation=speculation,
        )
    )


def answers(requests: list[Request], drafting: Script | None, **options: Any) -> Driver:
    driver = driver_of(drafting, **options)
    for key, request in enumerate(requests):
        driver.submit(key, request)
    driver.run()
    return driver


def steps_of(driver: Driver) -> list[int]:
    """The sizes of the drafting model's steps from now on."""
    speculation = driver.engine._speculation
    assert speculation is not None and speculation._model is not None
    runtime, sizes = speculation._model._model.runtime, []
    forward = runtime.forward

    def counted(step: Step) -> Any:
        sizes.append(step.num_tokens)
        return forward(step)

    runtime.forward = counted  # type: ignore[method-assign]
    return sizes


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_answers_are_the_targets(sequences: int, sampling: SamplingParams) -> None:
    requests = [asked(tokens_of(number, 20 + number), 60, sampling=sampling) for number in range(4)]
    plain = answers(requests, None, sequences=sequences)
    same = answers(requests, Script(), sequences=sequences)
    other = answers(requests, Script(seed=5), sequences=sequences)
    for key in range(4):
        for drafted in (same, other):
            assert drafted.answer(key) == plain.answer(key)
        stats = same.stats(key).speculation
        assert stats.mode == "draft" and stats.accepted > 0
        if sampling is GREEDY:
            assert stats.accepted == stats.drafted


@pytest.mark.parametrize("sequences", [1, 2])
def test_what_leaves_a_full_window_leaves_the_draft_too(sequences: int) -> None:
    requests = [
        asked(tokens_of(number, 30), 200, sampling=GREEDY, overflow="stream") for number in range(2)
    ]
    plain = answers(requests, None, sequences=sequences, window=96)
    drafted = driver_of(Script(), sequences=sequences, window=96)
    steps = steps_of(drafted)
    for key, request in enumerate(requests):
        drafted.submit(key, request)
    drafted.run()
    for key in range(2):
        one, other = plain.stats(key), drafted.stats(key)
        assert other.text == one.text
        assert other.kv.evicted_tokens == one.kv.evicted_tokens > 0
        assert other.speculation.accepted > 0
    # Its cells are evicted too: nothing but the two prompts is read in pieces.
    assert len([size for size in steps if size > 16]) == 2


def test_masks_hold_for_a_models_drafts() -> None:
    constraint = Constraint("regex", "(ab|cd|[0-9]{2} ){5,20}")
    request = asked(tokens_of(1, 20), 60, sampling=SAMPLED, constraint=constraint, ignore_eos=False)
    plain, drafted = answers([request], None), answers([request], Script())
    assert drafted.answer(0) == plain.answer(0)


def test_the_next_turn_reads_only_what_is_new() -> None:
    driver = driver_of(Script())
    speculation = driver.engine._speculation
    assert speculation is not None and speculation._model is not None
    model = speculation._model._model
    driver.submit(0, asked(tokens_of(5, 40), 40, sampling=GREEDY))
    driver.run()
    said = [*tokens_of(5, 40), *driver.stats(0).text.encode(), *tokens_of(6, 9)]
    read = steps_of(driver)
    driver.submit(1, asked(said, 20, sampling=GREEDY))
    driver.run()
    assert driver.stats(1).speculation.accepted > 0
    assert sum(read) < 9 + 2 * 20 + 20 and len(model._resting) == 1


def test_one_that_fails_is_not_asked_again_and_answers_go_on() -> None:
    requests = [asked(tokens_of(1, 30), 50, sampling=GREEDY)]
    plain = answers(requests, None)
    driver = driver_of(Script())
    speculation = driver.engine._speculation
    assert speculation is not None and speculation._model is not None
    calls = []

    def failing(step: Step) -> Any:
        calls.append(step)
        raise StepFailed("out of order")

    speculation._model._model.runtime.forward = failing  # type: ignore[method-assign]
    driver.submit(0, requests[0])
    driver.run()
    assert driver.answer(0) == plain.answer(0) and len(calls) == 1
    assert driver.stats(0).speculation.reason == "the draft failed: out of order"


def test_a_draft_has_no_more_tokens_than_there_is_room_for() -> None:
    """At the end of the context, and of the answer."""
    for limit in (None, 7):
        request = asked(tokens_of(2, 100), limit, sampling=GREEDY)
        plain = answers([request], None, context=128)
        drafted = answers([request], Script(), context=128)
        assert drafted.answer(0) == plain.answer(0)
        assert drafted.stats(0).finish_reason == "length"


def running_with(tokens: list[int]) -> RunningRequest:
    driver = driver_of(None)
    driver.submit(0, asked(tokens, 50, sampling=GREEDY))
    driver.step()
    driver.step()
    return driver.engine._running[0]


def test_kept_tokens_are_named_as_the_target_names_them() -> None:
    running = running_with(tokens_of(3, 20))
    whole, part = DraftModel(runtime_of(Script()), "draft"), runtime_of(Script())
    kept = np.arange(10, 200, dtype=np.int32)
    logits = part.logits
    part.logits = lambda row: logits(row)[kept]  # type: ignore[method-assign]
    asked_of = [(running, 4)]

    def draft(model: DraftModel) -> Draft:

        return model.propose([Wanted(each, most, lambda _: True) for each, most in asked_of])[0]

    found = draft(DraftModel(part, "exit", kept, 256))
    assert found.tokens == draft(whole).tokens and len(found) == 4


def test_a_draft_stops_where_another_token_is_not_worth_its_step() -> None:

    running = running_with(tokens_of(3, 20))
    model = DraftModel(runtime_of(Script()), "draft")
    found = model.propose([Wanted(running, 9, lambda kinds: len(kinds) < 3)])[0]
    assert len(found) == 3
    assert model.unread(running) == 0


# -- what is drafted, and when ---------------------------------------------------------------------

COSTS = {1: 1.0, 2: 1.6, 3: 2.1, 4: 2.0, 8: 3.0}  # of a small model on two cores


def costs(tokens: list[int]) -> float | None:
    return COSTS.get(sum(tokens))


def test_lengths_are_those_that_save_most() -> None:
    assert planned_length((0.9,) * 8, 1, 1, costs, 0.0)[0] == 7
    assert planned_length((0.75,) * 8, 1, 1, costs, 0.05)[0] == 3
    assert planned_length((0.5,) * 8, 1, 1, costs, 0.3) == (0, 0.0)
    assert planned_length((0.9,) * 8, 1, 1, lambda _: None, 0.0) == (0, 0.0)
    length, saved = planned_length((1.0,) * 3, 1, 1, costs, 0.2)
    assert length == 3 and saved == pytest.approx(4.0 - 2.0 - 0.6)


def test_the_share_of_right_guesses_that_pays() -> None:
    assert odds_needed(costs, 5.0) is None  # not even were they all right
    needed = odds_needed(costs, 0.2)
    assert needed is not None and 0.6 < needed < 0.8
    assert planned_length((needed,) * 15, 1, 1, costs, 0.2)[0] > 0
    assert planned_length((needed - 0.01,) * 15, 1, 1, costs, 0.2)[0] == 0


def drafting_of(step_s: float, typical: tuple[float, ...], plain_s: float) -> ModelDrafting:
    model = DraftModel(runtime_of(Script()), "exit", np.arange(512, dtype=np.int32))
    model._step_s[1] = step_s
    seconds = lambda tokens: None if (cost := costs(tokens)) is None else plain_s * cost  # noqa: E731
    return ModelDrafting(model, seconds, typical)


def test_what_can_never_pay_is_never_run() -> None:
    drafting = drafting_of(step_s=5.0, typical=(0.9,), plain_s=1.0)
    running = running_with(tokens_of(3, 20))
    for _ in range(200):
        assert drafting.drafts([running], {0: 8}) == ({}, 0.0)
    assert drafting.num_tries == 0 and "were it always right" in drafting.reason()


def test_what_seldom_pays_is_tried_within_a_share_of_the_time() -> None:
    drafting = drafting_of(step_s=0.3, typical=(0.4,), plain_s=1.0)
    running = running_with(tokens_of(3, 20))
    drafted = 0
    for _ in range(4000):
        found, _ = drafting.drafts([running], {0: 8})
        drafting._model._step_s[1] = 0.3  # (as if it had taken so long)
        if found:
            drafted += 1
            drafting._spare_s -= 1.9  # what the try cost
    assert 0 < drafted <= (16 + 4000 * 0.005) / 1.9 + 1
    assert "too seldom" in drafting.reason()


def test_what_it_drafted_teaches_it_how_often_it_is_right() -> None:
    drafting = drafting_of(step_s=0.01, typical=(0.9,), plain_s=1.0)
    running = running_with(tokens_of(3, 20))
    was_drafted = []
    for _ in range(40):
        found, _ = drafting.drafts([running], {0: 8})
        was_drafted.append(bool(found))
        running.append((found[0].tokens[0] + 1) % 256 if found else 1)
        running.num_computed += 1
    assert was_drafted[0] and not any(was_drafted[-10:])  # it is no longer expected to pay
    assert drafting._by_position.odds(0) < 0.7 and drafting.num_tries == 0


def test_a_step_has_the_tokens_of_its_drafts() -> None:
    """That the model's sequences are as long as what was said, whatever became of drafts."""
    driver = driver_of(Script(seed=5), sequences=2)
    for key in range(2):
        driver.submit(key, asked(tokens_of(key, 30), 40, sampling=GREEDY))
    speculation = driver.engine._speculation
    assert speculation is not None and speculation._model is not None
    model = speculation._model._model
    while driver.engine.has_work:
        driver.step()
        for key, own in model._followed.items():
            assert model.runtime.length(own.handle) == len(own.cells)
            running = next((r for r in driver.engine._running if r.key == key), None)
            if running is not None:
                assert own.cells[: own.agreed] == running.tokens[: own.agreed]
        model.runtime.check_integrity()


def test_a_step_of_it_is_what_is_measured() -> None:
    model = DraftModel(runtime_of(Script()), "draft")
    model.measure()
    assert model.step_seconds(1) > 0.0 and model.step_seconds(3) == 3 * model.step_seconds(1)
    assert model.runtime.free_cells() == model.runtime.facts.cells
    handle = model.runtime.open()
    model.runtime.forward(Step([SequenceStep(handle, [1])]))


def test_where_cells_run_out_what_rests_gives_way() -> None:
    """Over a cache that all sequences share, and that those of ended requests still fill."""
    model = DraftModel(runtime_of(Script(), sequences=2, context=64), "draft")
    cells = model.runtime.facts.cells
    first, second = running_with(tokens_of(3, 60)), running_with(tokens_of(4, 60))
    third = running_with(tokens_of(5, 60))
    for key, running in enumerate((first, second, third)):
        running.key = key
    drafts = []
    for running in (first, second, third, third):
        drafts.append(model.propose([Wanted(running, 2, lambda _: True)])[0])
        if running is not third:
            model.end(running.key)
    assert model.runtime.free_cells() < cells
    assert len(drafts[0]) == len(drafts[1]) == 2 and model.failure == ""
    assert len(drafts[-1]) == 2  # at the latest when it is asked again
