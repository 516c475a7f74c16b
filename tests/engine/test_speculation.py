"""Drafts change when tokens are computed, never which: over the scripted backend, whose logits depend on
every cell, with drafters that are right as often as it takes."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from edgeinfer.backend import Capabilities, RuntimeSettings, Step, StepResult
from edgeinfer.constraint import Constraint
from edgeinfer.engine.draft import Draft, Outcome
from edgeinfer.engine.engine import Engine
from edgeinfer.engine.request import Request, Text
from edgeinfer.engine.speculation import Speculation, impossible
from edgeinfer.engine.tuner import Choice, Tuner
from edgeinfer.engine.window import Window
from edgeinfer.machine.step_cost import StepCosts
from edgeinfer.sampling import SamplingParams
from edgeinfer_backends.scripted import SCRIPTED_FILES, Script, ScriptedBackend
from tests.engine.test_engine import Driver, asked, tokens_of

Answers = dict[tuple[int, ...], list[int]]


class Oracle:
    """Knows the answer, and is wrong now and then."""

    def __init__(self, prompt: Sequence[int], answers: Answers, wrong: float, seed: int) -> None:
        self._answer = answers[tuple(prompt)]
        self._draw, self._wrong, self._at = random.Random(seed), wrong, 0

    def append(self, token: int) -> Outcome | None:
        assert token == self._answer[self._at]
        self._at += 1
        return None

    def propose(self, most: int) -> Draft:
        rest = self._answer[self._at : self._at + self._draw.randrange(1, 9)][:most]
        tokens = tuple(97 if self._draw.random() < self._wrong else token for token in rest)
        return Draft(tokens, (0,) * len(tokens))


def engine_of(
    speculation: Speculation | None, *, sequences: int = 1, context: int = 512, window: int | None = None
) -> Engine:
    settings = RuntimeSettings(context=context, sequences=sequences, step_tokens=128)
    runtime = ScriptedBackend(Script()).load(SCRIPTED_FILES, settings, lambda _: True)
    return Engine(
        runtime,
        model="scripted",
        max_running=sequences,
        cache_bytes=2**26,
        window=None if window is None else Window(window, 4),
        speculation=speculation,
    )


def plain_and_drafted(
    requests: Sequence[Request],
    *,
    wrong: float = 0.3,
    seed: int = 0,
    cancelled: int | None = None,
    **options: Any,
) -> tuple[Driver, Driver]:
    plain = Driver(engine_of(None, **options))
    answers: Answers = {}
    for key, request in enumerate(requests):
        plain.submit(key, request)
    tokens: dict[int, list[int]] = {}
    while plain.engine.has_work:
        for running in plain.engine._running:
            tokens[running.key] = running.answered
        plain.step()
    for key, request in enumerate(requests):
        answers[tuple(request.tokens or ())] = tokens[key]
    positions = options.get("window") or options.get("context", 512)
    speculation = Speculation(
        lambda tokens, context: 1.0,
        100,
        positions,
        lambda prompt: Oracle(prompt, answers, wrong, seed),
    )
    drafted = Driver(engine_of(speculation, **options))
    for key, request in enumerate(requests):
        drafted.submit(key, request)
    if cancelled is not None:
        for _ in range(12):
            drafted.step()
        drafted.cancel(cancelled)
    drafted.run()
    return plain, drafted


@pytest.mark.parametrize("wrong", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("sequences", [1, 3])
def test_answers_are_the_same(wrong: float, sequences: int) -> None:
    sampled = SamplingParams(temperature=0.8, seed=3, repeat_penalty=1.3, penalty_last_n=32)
    requests = [asked(tokens_of(number, 20 + number), 60) for number in range(3)]
    requests += [asked(tokens_of(9, 30), 50, sampling=sampled, logprobs=2)]
    plain, drafted = plain_and_drafted(requests, wrong=wrong, sequences=sequences)
    for key in range(len(requests)):
        one, other = plain.stats(key), drafted.stats(key)
        assert other.text == one.text and other.finish_reason == one.finish_reason
        assert other.usage.completion_tokens == one.usage.completion_tokens
        assert other.speculation.steps > 0
        share = other.speculation.accepted / other.speculation.drafted
        assert share == 1.0 if wrong == 0.0 else share < 1.0


SAMPLED = SamplingParams(temperature=0.8, seed=3)


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("wrong", [0.0, 0.5])
def test_the_same_tokens_leave_a_full_window(wrong: float, sequences: int) -> None:
    requests = [
        asked(tokens_of(number, 30), 200, sampling=SAMPLED, overflow="stream") for number in range(3)
    ]
    plain, drafted = plain_and_drafted(requests, wrong=wrong, sequences=sequences, window=96)
    for key in range(len(requests)):
        one, other = plain.stats(key), drafted.stats(key)
        assert other.text == one.text
        assert other.kv.evicted_tokens == one.kv.evicted_tokens > 0
        assert other.speculation.accepted > 0


def test_a_stop_string_ends_an_answer_in_the_middle_of_a_draft() -> None:
    whole, _ = plain_and_drafted([asked(tokens_of(1, 20), 60, sampling=SAMPLED)])
    stop = whole.stats(0).text[20:22]
    request = asked(tokens_of(1, 20), 60, sampling=SAMPLED, stop=(stop,))
    plain, drafted = plain_and_drafted([request], wrong=0.0)
    assert drafted.answer(0) == plain.answer(0)
    assert drafted.stats(0).finish_reason == plain.stats(0).finish_reason == "stop"


def test_masks_advance_with_a_draft_and_go_back_with_it() -> None:
    constraint = Constraint("regex", "(ab|cd|[0-9]{2} ){5,20}")
    requests = [
        asked(tokens_of(number, 20), 60, sampling=SAMPLED, constraint=constraint, ignore_eos=False)
        for number in range(3)
    ]
    plain, drafted = plain_and_drafted(requests, wrong=0.4, sequences=3)
    for key in range(len(requests)):
        assert drafted.answer(key) == plain.answer(key)
        assert re.fullmatch(constraint.text, drafted.answer(key))
        assert drafted.stats(key).speculation.accepted > 0


def test_logprobs_are_those_of_steps_of_one_token() -> None:
    plain, drafted = plain_and_drafted([asked(tokens_of(4, 30), 80, sampling=SAMPLED, logprobs=3)])
    told = [
        [each for event in driver.events[0] if isinstance(event, Text) for each in event.logprobs]
        for driver in (plain, drafted)
    ]
    assert told[0] == told[1] and len(told[0]) == 80


def test_who_is_cancelled_leaves_the_others_what_they_say() -> None:
    requests = [asked(tokens_of(number, 40), 120, sampling=SAMPLED) for number in range(3)]
    plain, drafted = plain_and_drafted(requests, wrong=0.5, sequences=3, cancelled=1)
    for key in (0, 2):
        assert drafted.answer(key) == plain.answer(key)
    assert drafted.end(1).outcome == "cancelled"


def test_a_conversation_goes_on_after_drafts() -> None:
    """What is kept of it is what was said, without what was taken back."""
    first = asked(tokens_of(5, 40), 40, sampling=SAMPLED)
    _, drafted = plain_and_drafted([first], wrong=0.5)
    said = [*tokens_of(5, 40), *drafted.stats(0).text.encode(), *tokens_of(6, 9)]
    drafted.engine._speculation = None
    drafted.submit(1, asked(said, 20, sampling=SAMPLED))
    drafted.run()
    assert drafted.stats(1).usage.cached_tokens >= 40
    afresh = Driver(engine_of(None))
    afresh.submit(1, asked(said, 20, sampling=SAMPLED))
    afresh.run()
    assert drafted.answer(1) == afresh.answer(1)


def test_cells_of_rejected_drafts_are_free_again() -> None:
    plain, drafted = plain_and_drafted([asked(tokens_of(7, 30), 400)], wrong=1.0)
    stats = drafted.stats(0).speculation
    assert stats.drafted > 1000 and stats.accepted < 20  # the letter may be right by chance
    assert drafted.engine.runtime.free_cells() == plain.engine.runtime.free_cells()


def test_steps_whose_cost_is_not_known_are_tried_where_a_draft_is_likely() -> None:
    known = {1: 1.0}
    asked_for: list[int] = []

    def seconds(tokens: int, context: int) -> float | None:
        return known.get(tokens)

    speculation = Speculation(seconds, 16, 512)
    engine = engine_of(speculation)
    forward = engine.runtime.forward

    def counted(step: Step) -> StepResult:
        asked_for.append(step.num_tokens)
        if asked_for[-1] in (4, 8, 16):
            known[asked_for[-1]] = 100.0  # it is dear
        return forward(step)

    engine.runtime.forward = counted  # type: ignore[method-assign]
    driver = Driver(engine)
    driver.submit(1, asked([97, 98, 99] * 30, 100))
    driver.run()
    tried = [size for size in asked_for if 1 < size <= 16]
    assert sorted(set(tried)) == sorted(tried) and set(tried) <= {4, 8, 16}


def test_where_streams_have_passes_of_their_own_each_is_paid_for() -> None:
    """One draft beside three plain streams: a pass of all four, and one of the rest of the draft."""
    costs = {1: 1.0, 2: 1.6, 3: 2.1, 4: 2.0, 8: 3.0}

    def speculation(*, has_passes: bool) -> Speculation:
        return Speculation(lambda tokens, _: costs.get(tokens), 16, 512, has_passes=has_passes)

    assert speculation(has_passes=True).seconds_of([5, 1, 1, 1]) == 2.0 + 2.0
    assert speculation(has_passes=False).seconds_of([5, 1, 1, 1]) == 3.0
    assert speculation(has_passes=True).seconds_of([2, 2, 2, 2]) == 3.0  # all in one
    assert speculation(has_passes=True).seconds_of([4]) == 2.0
    assert speculation(has_passes=True).seconds_of([6, 1]) is None  # a pass of five


def test_a_request_that_fails_in_a_step_leaves_the_others_their_rows() -> None:
    requests = [
        asked(tokens_of(number, 40), 200, sampling=SAMPLED, overflow="error" if number == 0 else "stop")
        for number in range(3)
    ]
    drivers = [Driver(engine_of(None, sequences=3, context=120)) for _ in range(2)]
    for driver in drivers:
        for key, request in enumerate(requests if driver is drivers[0] else requests[1:], 0):
            driver.submit(key, request)
        driver.run()
    both, others = drivers
    assert both.end(0).error_type == "ContextFull"
    assert [both.answer(1), both.answer(2)] == [others.answer(0), others.answer(1)]
    assert both.engine.runtime.free_cells() >= 0


def test_a_step_of_prefill_size_has_no_cost_here() -> None:
    tuner = Tuner.of_padding(1, 1)
    tuner.observe(Choice(1), 64, 64, 0, 0.64)
    assert tuner.step_seconds(64, 0) is None
    tuner.observe(Choice(1), 4, 4, 0, 0.02)
    assert tuner.step_seconds(3, 0) == 0.02 and tuner.step_seconds(3, 0, is_padded=False) is None


def test_threads_that_were_asked_for_stay_for_prompts_too() -> None:
    costs = StepCosts()
    tuner = Tuner(costs, (2,), (2, 4), lambda: None, is_fixed=True)
    for seconds in (0.1, 0.1, 0.9, 0.9):
        tuner.observe(Choice(2), 128, 1, 0, seconds)
        tuner.observe(Choice(4), 128, 1, 0, 10 * seconds)
        assert tuner.choose(128, 1, 0, 512).threads == 4


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"speculate": "off"}, "--speculate off"),
        ({"window": Window(64, 4, "h2o")}, "h2o"),
        ({"tuner": None}, "not measured"),
        ({"can": Capabilities(rewind=False)}, "take tokens back"),
        ({}, ""),
    ],
)
def test_why_nothing_is_drafted(change: dict[str, Any], why: str) -> None:
    values: dict[str, Any] = {
        "speculate": "auto",
        "window": Window(64, 4),
        "tuner": Tuner.of_padding(1, 1),
        "can": Capabilities(),
    } | change  # fmt: skip
    runtime = ScriptedBackend().load(SCRIPTED_FILES, RuntimeSettings(context=64), lambda _: True)
    facts = replace(runtime.facts, can=values["can"])
    found = impossible(values["speculate"], facts, values["window"], values["tuner"])
    assert found == why if not why else why in found
