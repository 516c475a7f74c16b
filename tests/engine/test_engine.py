"""The engine over the scripted backend, whose logits depend on every cell of a sequence: a mistake in
the bookkeeping shows up in the text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from edgeinfer.backend import Runtime, RuntimeSettings, Step, StepResult
from edgeinfer.constraint import Constraint
from edgeinfer.engine.engine import FIRST_SLICE, Engine
from edgeinfer.engine.request import Ended, Event, Prefilled, Request, RunStats, Started, Text
from edgeinfer.engine.tuner import Tuner
from edgeinfer.errors import PromptTooLong, StepAborted
from edgeinfer.machine.step_cost import PREFILL_TOKENS, StepClass, StepCosts
from edgeinfer.sampling import SamplingParams
from edgeinfer_backends.scripted import SCRIPTED_FILES, Script, ScriptedBackend

GREEDY = SamplingParams(temperature=0.0)


def make_engine(
    script: Script | None = None,
    *,
    context: int = 1024,
    sequences: int = 1,
    max_running: int | None = None,
    cache_bytes: int = 2**26,
    tell_interval_s: float = 0.0,
    tuner: Tuner | None = None,
) -> Engine:
    settings = RuntimeSettings(context=context, sequences=sequences, step_tokens=256)
    runtime = ScriptedBackend(script or Script()).load(SCRIPTED_FILES, settings, lambda _: True)
    return Engine(
        runtime,
        model="scripted",
        max_running=max_running or sequences,
        cache_bytes=cache_bytes,
        tell_interval_s=tell_interval_s,
        tuner=tuner,
    )


def tokens_of(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(97, 123), k=count)


def asked(tokens: Sequence[int], max_tokens: int = 12, **options: object) -> Request:
    values = {"sampling": GREEDY, "ignore_eos": True, **options}
    return Request(tokens=tuple(tokens), max_tokens=max_tokens, **values)  # type: ignore[arg-type]


class Driver:
    """Runs an engine and keeps every request's events."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.events: dict[int, list[Event]] = {}

    def submit(self, key: int, request: Request) -> None:
        assert request.tokens is not None
        self.events.setdefault(key, [])
        self._keep(self.engine.submit(key, request, request.tokens))

    def step(self) -> None:
        self._keep(self.engine.step())
        self.engine.check_integrity()

    def run(self) -> None:
        for _ in range(5000):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError("the engine does not come to an end")

    def cancel(self, key: int) -> None:
        self._keep(self.engine.cancel(key))

    def _keep(self, events: list[tuple[int, Event]]) -> None:
        for key, event in events:
            assert not any(isinstance(e, Ended) for e in self.events[key]), "an event after the end"
            self.events[key].append(event)

    def end(self, key: int) -> Ended:
        ends = [event for event in self.events[key] if isinstance(event, Ended)]
        assert len(ends) == 1, "a request ends exactly once"
        return ends[0]

    def stats(self, key: int) -> RunStats:
        ended = self.end(key)
        assert ended.outcome == "finished", ended.error
        return ended.stats

    def answer(self, key: int) -> str:
        streamed = "".join(e.text for e in self.events[key] if isinstance(e, Text))
        assert streamed == self.stats(key).text
        return streamed


def alone(tokens: Sequence[int], max_tokens: int = 12, script: Script | None = None) -> str:
    driver = Driver(make_engine(script))
    driver.submit(1, asked(tokens, max_tokens))
    driver.run()
    return driver.answer(1)


def test_a_request_starts_streams_and_ends() -> None:
    driver = Driver(make_engine())
    driver.submit(1, asked(tokens_of(1, 700), 5))
    driver.run()
    kinds = [type(event).__name__ for event in driver.events[1]]
    assert kinds == [
        "Started",
        "Prefilled",
        "Prefilled",
        "Text",
        "Text",
        "Text",
        "Text",
        "Text",
        "Ended",
    ]
    stats = driver.stats(1)
    assert stats.finish_reason == "length"
    assert (stats.usage.prompt_tokens, stats.usage.completion_tokens) == (700, 5)
    assert stats.timings.ttft_s > 0
    assert stats.kv.bytes > 0


NEVER = 1e9  # seconds between two tellings: text comes only where something else calls for it


def test_text_is_told_at_the_first_token_and_at_the_end_and_in_between_now_and_then() -> None:
    full = alone(tokens_of(1, 20), 30)
    driver = Driver(make_engine(tell_interval_s=NEVER))
    driver.submit(1, asked(tokens_of(1, 20), 30, logprobs=1))
    driver.run()
    texts = [event for event in driver.events[1] if isinstance(event, Text)]
    assert [(event.text, event.num_tokens) for event in texts] == [(full[0], 1), (full[1:], 30)]
    assert [len(event.logprobs) for event in texts] == [1, 29]
    assert driver.answer(1) == full


def test_text_held_back_is_told_before_a_cancel_ends_it() -> None:
    full = alone(tokens_of(1, 20), 30)
    driver = Driver(make_engine(tell_interval_s=NEVER))
    driver.submit(1, asked(tokens_of(1, 20), 30))
    for _ in range(12):
        driver.step()
    driver.cancel(1)
    answered = driver.end(1).stats.usage.completion_tokens
    assert 5 < answered < 30
    assert "".join(e.text for e in driver.events[1] if isinstance(e, Text)) == full[:answered]
    assert driver.end(1).stats.text == full[:answered]


def test_a_stop_string_is_met_at_its_token_though_text_is_held_back() -> None:
    full = alone(tokens_of(1, 20), 60)
    stop = full[20:23]
    driver = Driver(make_engine(tell_interval_s=NEVER))
    driver.submit(1, asked(tokens_of(1, 20), 60, stop=(stop,)))
    driver.run()
    assert driver.answer(1) == full[: full.index(stop)]
    assert driver.stats(1).usage.completion_tokens == full.index(stop) + len(stop)


def test_text_is_not_held_back_while_a_prompt_is_read() -> None:
    driver = Driver(make_engine(tell_interval_s=NEVER, sequences=2))
    driver.submit(1, asked(tokens_of(1, 20), 40))
    for _ in range(8):
        driver.step()
    before = len(driver.events[1])
    driver.submit(2, asked(tokens_of(2, 700), 5))
    driver.step()  # admits the second
    first = next(r for r in driver.engine._running if r.key == 1)
    while not any(isinstance(event, Text) for event in driver.events[2]):
        driver.step()
        told = [event for event in driver.events[1] if isinstance(event, Text)][-1]
        assert told.num_tokens == first.num_answered
    assert len(driver.events[1]) > before + 2


def test_no_more_requests_run_than_there_are_sequences() -> None:
    runtime = make_engine(sequences=2).runtime
    assert Engine(runtime, model="m", max_running=1000).max_running == runtime.facts.max_sequences


def test_texts_of_many_streams_are_told_more_rarely() -> None:
    driver = Driver(make_engine(tell_interval_s=NEVER, sequences=8))
    found = []
    for number in range(1, 9):
        driver.submit(number, asked(tokens_of(number, 5), 40))
        driver.step()
        found.append(driver.engine._tell_stretch())
    assert found == [1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.0, 3.0]


def test_the_model_ends_its_answer_itself() -> None:
    driver = Driver(make_engine(Script(answers={"*": "Hi there."})))
    prompt = b"<|im_start|>assistant\n"
    tokens = driver.engine.runtime.tokenizer.encode(
        "<|im_start|>user\nHello<|im_end|>\n" + prompt.decode(), add_special=False, parse_special=True
    )
    driver.submit(1, Request(tokens=tuple(tokens), sampling=GREEDY))
    driver.run()
    assert driver.answer(1) == "Hi there."
    assert driver.stats(1).finish_reason == "stop"


def test_a_stop_string_ends_the_answer_before_it() -> None:
    prompt = tokens_of(2, 30)
    full = alone(prompt, 40)
    stop = full[10:13]
    driver = Driver(make_engine())
    driver.submit(1, asked(prompt, 40, stop=(stop,)))
    driver.run()
    assert driver.answer(1) == full[: full.index(stop)]
    assert driver.stats(1).finish_reason == "stop"


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers() -> None:
    driver = Driver(make_engine(context=100))
    driver.submit(1, asked(tokens_of(1, 100)))
    ended = driver.end(1)
    assert (ended.outcome, ended.error_type) == ("failed", PromptTooLong.__name__)
    assert "100 tokens" in ended.error
    assert "length is 100" in ended.error


def test_an_answer_that_reaches_the_end_of_the_context_stops_with_length() -> None:
    driver = Driver(make_engine(context=64))
    driver.submit(1, asked(tokens_of(1, 50), 1000))
    driver.run()
    stats = driver.stats(1)
    assert stats.finish_reason == "length"
    assert stats.usage.prompt_tokens + stats.usage.completion_tokens == 65


def test_an_empty_prompt_and_a_foreign_token_are_refused() -> None:
    driver = Driver(make_engine())
    driver.submit(1, Request(tokens=()))
    driver.submit(2, asked([10**6]))
    assert driver.end(1).outcome == driver.end(2).outcome == "failed"


def test_the_next_turn_prefills_only_what_is_new() -> None:
    driver = Driver(make_engine())
    prompt = tokens_of(1, 500)
    driver.submit(1, asked(prompt))
    driver.run()
    answer = list(driver.answer(1).encode())
    turn = [*prompt, *answer, *tokens_of(9, 20)]
    driver.submit(2, asked(turn))
    driver.run()
    stats = driver.stats(2)
    assert stats.usage.cached_tokens >= len(prompt) + len(answer) - 1
    assert (stats.cache.hit, stats.cache.tier) == (True, "live")
    assert driver.answer(2) == alone(turn)


def test_conversations_that_alternate_keep_their_prefixes_in_host_memory() -> None:
    driver = Driver(make_engine())
    histories = {name: tokens_of(name, 400) for name in (1, 2, 3)}
    known: dict[int, int] = {}
    key = 0
    for turn in range(3):
        for name, history in histories.items():
            key += 1
            driver.submit(key, asked(history))
            driver.run()
            stats = driver.stats(key)
            assert driver.answer(key) == alone(history)
            if turn:
                assert stats.cache.tier == "memory"
                assert stats.usage.cached_tokens >= known[name]
            known[name] = len(history)
            history += [*driver.answer(key).encode(), *tokens_of(100 + key, 15)]


def test_an_idle_conversation_leaves_the_kv_cache_when_another_runs() -> None:
    engine = make_engine()
    driver = Driver(engine)
    driver.submit(1, asked(tokens_of(1, 400)))
    driver.run()
    driver.submit(2, asked(tokens_of(2, 10)))
    driver.run()
    assert engine.runtime.free_cells() >= engine.runtime.facts.cells - 32


def test_without_host_memory_an_idle_conversation_is_forgotten() -> None:
    driver = Driver(make_engine(cache_bytes=0))
    for key, name in enumerate((1, 2, 1)):
        driver.submit(key, asked(tokens_of(name, 300)))
        driver.run()
        assert driver.stats(key).usage.cached_tokens == 0


def test_regenerating_an_answer_runs_no_step_before_its_first_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine()
    driver = Driver(engine)
    steps: list[Step] = []
    forward = engine.runtime.forward
    monkeypatch.setattr(engine.runtime, "forward", lambda step: (steps.append(step), forward(step))[1])
    prompt = tokens_of(3, 300)
    for key in (1, 2):
        driver.submit(key, asked(prompt, 40, logprobs=2))
        driver.run()
        told = [e for e in driver.events[key] if not isinstance(e, Prefilled)]
        steps_of_key = len(steps)
    assert driver.answer(1) == driver.answer(2)
    assert driver.stats(2).usage.cached_tokens == 300
    assert [len(step.parts[0].tokens) for step in steps] == [256, 44, *[1] * 39, *[1] * 39]
    assert steps_of_key == 2 + 2 * 39
    assert isinstance(told[0], Started) and isinstance(told[1], Text)
    assert texts_with_logprobs(driver, 1) == texts_with_logprobs(driver, 2)


def texts_with_logprobs(driver: Driver, key: int) -> list[object]:
    return [entry for e in driver.events[key] if isinstance(e, Text) for entry in e.logprobs]


@pytest.mark.parametrize(
    "options",
    [
        {"sampling": SamplingParams(seed=5)},
        {"sampling": SamplingParams(seed=5, repeat_penalty=1.3, dry_multiplier=1.0)},
        {
            "constraint": Constraint("regex", "[a-f]{4,9}x"),
            "sampling": SamplingParams(seed=5),
            "ignore_eos": False,
        },
    ],
    ids=["drawn", "penalties", "constrained"],
)
def test_a_regenerated_answer_is_the_one_that_was_given(options: dict[str, object]) -> None:
    driver = Driver(make_engine())
    prompt = tokens_of(3, 300)
    for key in (1, 2, 3):
        if key == 3:  # from host memory, where no logits are
            driver.submit(9, asked(tokens_of(4, 100)))
            driver.run()
        driver.submit(key, asked(prompt, 30, **options))
        driver.run()
    assert driver.answer(1) == driver.answer(2) == driver.answer(3)
    assert driver.stats(2).usage.cached_tokens == 300
    assert driver.stats(3).usage.cached_tokens == 299


def test_kept_logits_are_used_for_their_own_prompt_only() -> None:
    driver = Driver(make_engine())
    prompt = tokens_of(3, 300)
    begun = [prompt, [*prompt, 97], prompt[:200], prompt[:200], [*prompt[:200], 98], prompt]
    for key, tokens in enumerate(begun):
        driver.submit(key, asked(tokens, 1 + key % 2))
        driver.run()
        assert driver.answer(key) == alone(tokens, 1 + key % 2)
    cached = [driver.stats(key).usage.cached_tokens for key in range(len(begun))]
    assert cached == [0, 300, 199, 200, 200, 299]  # the last from host memory


def test_requests_that_run_together_answer_as_if_alone() -> None:
    prompts = {key: tokens_of(key, 30 + 90 * key) for key in range(6)}
    driver = Driver(make_engine(sequences=4))
    for key, prompt in prompts.items():  # late joins: two wait, and others leave before them
        driver.submit(key, asked(prompt, 8 + 5 * key))
        driver.step()
    driver.run()
    for key, prompt in prompts.items():
        assert driver.answer(key) == alone(prompt, 8 + 5 * key)


def test_a_long_prompt_does_not_stall_a_stream() -> None:
    driver = Driver(make_engine(sequences=2, context=4096))
    driver.submit(1, asked(tokens_of(1, 10), 60))
    driver.step()
    driver.submit(2, asked(tokens_of(2, 3000), 2))
    while not any(isinstance(event, Text) for event in driver.events[2]):
        before = len([e for e in driver.events[1] if isinstance(e, Text)])
        driver.step()
        driver.step()
        assert len([e for e in driver.events[1] if isinstance(e, Text)]) > before
    driver.run()
    assert driver.answer(1) == alone(tokens_of(1, 10), 60)


def slices_beside_a_stream(tuner: Tuner | None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of a long prompt in each step, while a stream has its own one in all of them."""
    slices: list[int] = []
    engine = make_engine(sequences=2, context=4096, tuner=tuner)
    forward = engine.runtime.forward

    def noted(step: Step) -> StepResult:
        if len(step.parts) == 2:
            slices.append(step.num_tokens - 1)
        return forward(step)

    monkeypatch.setattr(engine.runtime, "forward", noted)
    driver = Driver(engine)
    driver.submit(1, asked(tokens_of(1, 10), 60))
    for _ in range(4):
        driver.step()
    driver.submit(2, asked(tokens_of(2, 1500), 2))
    driver.run()
    return slices


@pytest.mark.parametrize(("s_per_token", "size"), [(0.004, 200), (0.0001, 255), (0.1, 8)])
def test_a_slice_beside_a_stream_follows_the_measured_costs(
    s_per_token: float, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = StepCosts()
    costs.observe(StepClass.of(1, PREFILL_TOKENS, 0, 0), s_per_token)
    monkeypatch.setattr(costs, "observe", lambda *_: None)  # what is known stays as it is here
    tuner = Tuner(costs, (1,), (1, 1), lambda: None)
    assert slices_beside_a_stream(tuner, monkeypatch)[:3] == [size] * 3


def test_a_slice_begins_small_where_nothing_was_measured_and_grows_with_what_it_took(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tuner = Tuner(StepCosts(), (1,), (1, 1), lambda: None)
    slices = slices_beside_a_stream(tuner, monkeypatch)
    assert slices[0] == FIRST_SLICE
    assert slices[1] == 255  # a scripted step takes no time worth mentioning


def test_without_a_tuner_the_engine_learns_what_prefill_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(slices_beside_a_stream(None, monkeypatch)) == 255


def test_a_running_prefix_is_shared_without_prefilling_it_again() -> None:
    system = tokens_of(1, 300)
    driver = Driver(make_engine(sequences=2))
    driver.submit(1, asked([*system, 1, 2, 3], 30))
    for _ in range(5):
        driver.step()
    driver.submit(2, asked([*system, 4, 5, 6], 10))
    driver.run()
    assert driver.stats(2).usage.cached_tokens == 300
    assert driver.stats(2).cache.tier == "live"
    assert driver.answer(1) == alone([*system, 1, 2, 3], 30)
    assert driver.answer(2) == alone([*system, 4, 5, 6], 10)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_a_cancelled_request_ends_cancelled_and_frees_its_place(steps: int) -> None:
    driver = Driver(make_engine())
    driver.submit(1, asked(tokens_of(1, 600), 50))
    for _ in range(steps):
        driver.step()
    driver.cancel(1)
    driver.cancel(1)
    ended = driver.end(1)
    assert (ended.outcome, ended.stats.finish_reason) == ("cancelled", "cancelled")
    driver.submit(2, asked(tokens_of(2, 20)))
    driver.run()
    assert driver.answer(2) == alone(tokens_of(2, 20))


def test_a_cancelled_answer_stays_cached_for_the_next_turn() -> None:
    driver = Driver(make_engine())
    prompt = tokens_of(1, 300)
    driver.submit(1, asked(prompt, 50))
    for _ in range(8):
        driver.step()
    driver.cancel(1)
    driver.submit(2, asked([*prompt, 5, 6], 5))
    driver.run()
    assert driver.stats(2).usage.cached_tokens == 300


def test_an_aborted_step_is_planned_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    driver = Driver(engine)
    driver.submit(1, asked(tokens_of(1, 300)))
    forward = engine.runtime.forward
    calls = iter([True, False, True])

    def sometimes(step):  # type: ignore[no-untyped-def]
        if next(calls, False):
            raise StepAborted("interrupted")
        return forward(step)

    monkeypatch.setattr(engine.runtime, "forward", sometimes)
    driver.run()
    assert driver.answer(1) == alone(tokens_of(1, 300))


def test_a_failed_step_fails_its_requests_and_the_next_one_works() -> None:
    driver = Driver(make_engine(Script(fail_at_step=3)))
    driver.submit(1, asked(tokens_of(1, 20)))
    driver.run()
    assert (driver.end(1).outcome, driver.end(1).error_type) == ("failed", "StepFailed")
    driver.submit(2, asked(tokens_of(2, 20)))
    driver.run()
    assert driver.end(2).outcome == "finished"


@pytest.mark.parametrize("error", [MemoryError(), RecursionError(), RuntimeError("a bug")])
def test_whatever_goes_wrong_at_its_beginning_a_request_ends_and_the_next_one_works(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    engine = make_engine()
    driver = Driver(engine)
    driver.submit(1, asked(tokens_of(1, 300)))
    driver.run()

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(engine.conversations.prefixes, "match", fail)
        driver.submit(2, asked(tokens_of(2, 50)))
        driver.run()
    assert driver.end(2).outcome == "failed"
    assert type(error).__name__ in driver.end(2).error
    for key in (3, 4):
        driver.submit(key, asked(tokens_of(key, 50)))
        driver.run()
        assert driver.answer(key) == alone(tokens_of(key, 50))


def test_what_cannot_be_copied_for_want_of_memory_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    driver = Driver(engine)

    def fail(*_: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr(engine.runtime, "snapshot", fail)
    for key in (1, 2):
        driver.submit(key, asked(tokens_of(key, 300)))
        driver.run()
        assert driver.answer(key) == alone(tokens_of(key, 300))
        while engine.use_idle():
            pass


def test_the_same_seed_gives_the_same_text_and_another_seed_another() -> None:
    texts = []
    for seed in (5, 5, 6):
        driver = Driver(make_engine())
        sampling = SamplingParams(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=seed)
        driver.submit(1, asked(tokens_of(1, 40), 40, sampling=sampling))
        driver.run()
        texts.append(driver.answer(1))
        assert driver.stats(1).seed == seed
    assert texts[0] == texts[1] != texts[2]


def test_a_drawn_seed_is_reported_and_repeats_the_answer() -> None:
    sampling = SamplingParams(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0)
    first = Driver(make_engine())
    first.submit(1, asked(tokens_of(1, 40), 30, sampling=sampling))
    first.run()
    again = Driver(make_engine())
    seeded = SamplingParams(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=first.stats(1).seed)
    again.submit(1, asked(tokens_of(1, 40), 30, sampling=seeded))
    again.run()
    assert first.answer(1) == again.answer(1)


def test_logprobs_are_of_the_whole_distribution() -> None:
    driver = Driver(make_engine())
    driver.submit(1, asked(tokens_of(1, 40), 6, logprobs=3))
    driver.run()
    texts = [event for event in driver.events[1] if isinstance(event, Text)]
    logprobs = [item for event in texts for item in event.logprobs]
    assert len(logprobs) == 6
    for item in logprobs:
        assert item.logprob <= 0
        assert len(item.top) == 3
        assert item.top[0][1] == pytest.approx(item.logprob)  # greedy: the likeliest was taken
        assert [value for _, value in item.top] == sorted((v for _, v in item.top), reverse=True)


def test_a_refused_snapshot_is_said_and_the_prompt_prefilled_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine()
    driver = Driver(engine)
    first = tokens_of(1, 300)
    driver.submit(1, asked(first))
    driver.run()
    driver.submit(2, asked(tokens_of(2, 50)))
    driver.run()
    prefixes = engine.conversations.prefixes
    for block in list(prefixes._blocks.values()):
        damaged = block.payload[: len(block.payload) // 2]
        monkeypatch.setitem(
            prefixes._blocks,
            block.key,
            replace(block, payload=damaged),
        )
    engine.conversations.prefixes.num_bytes = sum(
        b.num_bytes for b in engine.conversations.prefixes._blocks.values()
    )
    driver.submit(3, asked(first))
    driver.run()
    assert driver.answer(3) == alone(first)
    assert any("not used" in warning for warning in driver.stats(3).warnings)


@pytest.mark.parametrize("missing", ["snapshot", "fork", "rewind"])
def test_a_backend_without_a_capability_still_answers(missing: str) -> None:
    script = Script(without=(missing,))
    driver = Driver(make_engine(script, sequences=2))
    prompt = tokens_of(1, 200)
    for key in range(4):
        driver.submit(key, asked([*prompt, key], 8))
        driver.step()
    driver.run()
    for key in range(4):
        assert driver.answer(key) == alone([*prompt, key], 8, script)


@pytest.mark.parametrize("seed", range(8))
def test_random_use_keeps_every_promise(seed: int) -> None:
    rng = random.Random(seed)
    engine = make_engine(
        sequences=3,
        context=512,
        cache_bytes=rng.choice([0, 40_000, 2**26]),
        tell_interval_s=rng.choice([0.0, NEVER]),
    )
    driver = Driver(engine)
    prompts: dict[int, list[int]] = {}
    cancelled = set()
    roots = [tokens_of(name, 200) for name in range(3)]
    for key in range(25):
        prompts[key] = [*rng.choice(roots)[: rng.randint(1, 200)], *tokens_of(key, rng.randint(1, 150))]
        driver.submit(key, asked(prompts[key], rng.randint(1, 30)))
        for _ in range(rng.randint(0, 12)):
            driver.step()
        if rng.random() < 0.3:
            victim = rng.choice(list(prompts))
            driver.cancel(victim)
            cancelled.add(victim)
    driver.run()
    for key, prompt in prompts.items():
        ended = driver.end(key)
        if key not in cancelled:
            assert ended.outcome == "finished"
            assert driver.answer(key) == alone(prompt, ended.stats.usage.completion_tokens)


def test_events_are_what_they_say() -> None:
    driver = Driver(make_engine())
    driver.submit(1, asked(tokens_of(1, 600), 3))
    driver.run()
    first = driver.events[1][0]
    assert first == Started(prompt_tokens=600, cached_tokens=0)
    progress = [event for event in driver.events[1] if isinstance(event, Prefilled)]
    assert [event.done for event in progress] == sorted({event.done for event in progress})
    assert all(event.total == 600 for event in progress)


def test_closing_frees_the_runtime() -> None:
    engine = make_engine()
    engine.close()
    engine.close()
    runtime: Runtime = engine.runtime
    with pytest.raises(ValueError):
        runtime.open()


def test_a_conversation_that_rests_is_copied_while_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(context=1024)
    driver = Driver(engine)
    taken: list[tuple[int, int]] = []
    snapshot = engine.runtime.snapshot

    def counted(sequence: int, start: int, stop: int) -> bytes:
        taken.append((start, stop))
        return snapshot(sequence, start, stop)

    monkeypatch.setattr(engine.runtime, "snapshot", counted)
    first = tokens_of(1, 600)
    driver.submit(1, asked(first))
    driver.run()
    assert taken == []
    pieces = 0
    while engine.use_idle():
        pieces += 1
        assert len(taken) <= pieces  # a block at a time: whoever comes waits for no more
    assert [start for start, _ in taken] == [0, 256, 512]
    driver.submit(2, asked(tokens_of(2, 100)))
    driver.run()
    assert len(taken) == 3, "a request waited for what could have been copied before"
    driver.submit(3, asked([*first, *tokens_of(3, 10)]))
    driver.run()
    assert driver.stats(3).cache.tier == "memory"
    assert driver.stats(3).usage.cached_tokens >= 600


def test_nothing_is_copied_where_nothing_is_kept() -> None:
    engine = make_engine(cache_bytes=0)
    driver = Driver(engine)
    driver.submit(1, asked(tokens_of(1, 100)))
    driver.run()
    while engine.use_idle():
        pass
    assert engine.conversations.prefixes.num_bytes == 0
