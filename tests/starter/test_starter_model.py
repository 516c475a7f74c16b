"""The real starter model through the real engine, worker and client."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from edgeinfer.backend import Runtime, RuntimeSettings, SequenceStep, Step
from edgeinfer.client import LocalClient, Message, OpenOptions, Request, Text, local
from edgeinfer.engine.engine import Engine
from edgeinfer.engine.request import Ended, TokenLogprob
from edgeinfer.engine.tuner import Choice, Tuner
from edgeinfer.engine.window import Window
from edgeinfer.machine.gpus import Gpu
from edgeinfer.machine.step_cost import StepCosts
from edgeinfer.registry import get_backend
from edgeinfer.sampling import SamplingParams
from edgeinfer_models.model_files import ModelFiles

pytestmark = pytest.mark.model

GREEDY = SamplingParams(temperature=0.0)
LICENCE = (Path(__file__).parents[2] / "LICENSE").read_text()


def load(path: Path, **options: object) -> Runtime:
    # One thread: with more, flash attention splits long caches by thread and batch (last bits differ).
    settings = RuntimeSettings(**{"context": 2048, "threads": 1, "threads_batch": 1, **options})  # type: ignore[arg-type]
    files = ModelFiles("starter", (path,), "gguf")
    return get_backend("llamacpp").load(files, settings, lambda _: True)


# Cells that three sequences share, and a stream of cells for each of three.
LAYOUTS = ({"kv_layout": "shared", "sequences": 2}, {"kv_layout": "private", "sequences": 3})


@pytest.fixture(params=LAYOUTS, ids=lambda options: options["kv_layout"])
def engine(starter: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    runtime = load(starter, **request.param)
    assert runtime.facts.kv_layout == request.param["kv_layout"]
    engine = Engine(runtime, model="starter", max_running=3, cache_bytes=2**28)
    yield engine
    engine.check_integrity()
    engine.close()


def run(
    engine: Engine, requests: dict[int, tuple[list[int], int]], stagger: int = 0
) -> dict[int, Ended]:
    ends: dict[int, Ended] = {}

    def keep(events: list) -> None:  # type: ignore[type-arg]
        for key, event in events:
            if isinstance(event, Ended):
                ends[key] = event

    for key, (tokens, max_tokens) in requests.items():
        request = Request(tokens=tuple(tokens), max_tokens=max_tokens, sampling=GREEDY, ignore_eos=True)
        keep(engine.submit(key, request, tokens))
        for _ in range(stagger):
            keep(engine.step())
    while engine.has_work:
        keep(engine.step())
    return ends


def text_tokens(engine: Engine, start: int, characters: int) -> list[int]:
    return engine.runtime.tokenizer.encode(
        LICENCE[start : start + characters], add_special=False, parse_special=False
    )


def test_answers_together_are_those_alone(engine: Engine, starter: Path) -> None:
    requests = {key: (text_tokens(engine, 700 * key, 150 + 500 * key), 10 + 8 * key) for key in range(5)}
    together = run(engine, requests, stagger=4)
    for key, request in requests.items():
        runtime = load(starter)
        single = Engine(runtime, model="starter")
        alone = run(single, {key: request})
        single.close()
        assert together[key].outcome == alone[key].outcome == "finished"
        assert together[key].stats.text == alone[key].stats.text


def test_short_prompts_read_in_one_step_are_answered_as_alone(starter: Path) -> None:
    runtime = load(starter, kv_layout="private", sequences=4)
    engine = Engine(runtime, model="starter", max_running=4)
    sizes = (41, 63, 17, 58)
    requests = {key: (text_tokens(engine, 900 * key, 400)[:size], 24) for key, size in enumerate(sizes)}
    steps: list[Step] = []
    forward = runtime.forward
    runtime.forward = lambda step: steps.append(step) or forward(step)  # type: ignore[func-returns-value, method-assign]
    together = run(engine, requests)
    engine.check_integrity()
    engine.close()
    assert steps[0].num_tokens == sum(sizes)
    for key, request in requests.items():
        single = Engine(load(starter), model="starter")
        alone = run(single, {key: request})
        single.close()
        assert together[key].stats.text == alone[key].stats.text


@pytest.mark.parametrize(
    ("options", "kv_type"), [(LAYOUTS[0], "q8_0"), (LAYOUTS[1], "f16")], ids=("shared", "private")
)
def test_a_conversation_goes_on_past_its_window(
    starter: Path, options: dict[str, object], kv_type: str
) -> None:
    """Alone, and alternating with another one, which sends it to host memory after every turn: the same
    answers, and only what is new is read."""

    def talk(num_others: int) -> list[tuple[str, int, int]]:
        runtime = load(starter, context=256, kv_type_k=kv_type, kv_type_v=kv_type, **options)
        engine = Engine(runtime, model="starter", cache_bytes=2**28, window=Window(200))
        history: list[int] = []
        found = []
        for turn in range(7):
            history += text_tokens(engine, 300 * turn, 130)
            request = Request(tokens=tuple(history), max_tokens=14, sampling=GREEDY, ignore_eos=True)
            request = replace(request, overflow="stream")
            engine.submit(turn, request, history)
            running = engine._waiting[0]
            while engine.has_work:
                engine.step()
            engine.check_integrity()
            history += running.answered
            found.append(("".join(running.text), running.num_prefilled, running.evicted))
            for other in range(num_others):
                run(engine, {100 + other: (text_tokens(engine, 5000 + 100 * turn, 100), 2)})
        engine.close()
        return found

    alone = talk(0)
    assert alone[-1][2] > 90
    assert all(num_prefilled < 60 for _, num_prefilled, _ in alone)
    assert talk(1) == alone


class PaddingTuner(Tuner):
    """Pads every step of several tokens, by a number that changes from step to step."""

    def __init__(self) -> None:
        super().__init__(StepCosts(), (1,), (1, 1), lambda: None)
        self.num_padded = 0

    def choose(self, tokens: int, rows: int, context: int, most: int) -> Choice:
        if not 1 < tokens < most:
            return Choice(1)
        self.num_padded += 1
        return Choice(1, min(1 + self.num_padded % 5, most - tokens))


@pytest.mark.parametrize("options", LAYOUTS, ids=lambda options: options["kv_layout"])
def test_padded_answers_are_those_alone(starter: Path, options: dict[str, object]) -> None:
    runtime = load(starter, **options)
    tuner = PaddingTuner()
    engine = Engine(runtime, model="starter", max_running=3, tuner=tuner)
    requests = {key: (text_tokens(engine, 500 * key, 200 + 300 * key), 12 + 6 * key) for key in range(4)}
    together = run(engine, requests, stagger=3)
    assert tuner.num_padded > 20
    engine.check_integrity()
    engine.close()
    for key, request in requests.items():
        single = Engine(load(starter), model="starter")
        alone = run(single, {key: request})
        single.close()
        assert together[key].stats.text == alone[key].stats.text


def test_a_restored_conversation_answers_as_if_it_had_never_left(engine: Engine) -> None:
    first = text_tokens(engine, 0, 1500)
    other = text_tokens(engine, 4000, 600)
    before = run(engine, {1: (first, 12)})[1].stats
    run(engine, {2: (other, 4)})
    after = run(engine, {3: (first, 12)})[3].stats
    assert after.cache.tier == "memory"
    assert after.usage.cached_tokens == len(first) - 64  # read as a prompt is
    assert after.text == before.text


def test_a_prompt_asked_again_is_answered_from_the_logits_it_had(engine: Engine) -> None:
    """The same bits live and from host memory; and not from those of a prompt whose end was read in a
    small step, which is not how it is read afresh."""
    prompt = text_tokens(engine, 0, 1500)
    longer = [*prompt, *text_tokens(engine, 3000, 40)]
    asked: dict[int, tuple[list[int], list[TokenLogprob], int]] = {}

    def ask(key: int, tokens: list[int]) -> None:
        request = Request(tokens=tuple(tokens), max_tokens=12, sampling=GREEDY, ignore_eos=True)
        engine.submit(key, replace(request, logprobs=3), tokens)
        running = engine._waiting[0]
        told: list[TokenLogprob] = []
        while engine.has_work:
            told += [p for _, e in engine.step() if isinstance(e, Text) for p in e.logprobs]
        asked[key] = (running.answered, told, running.num_cached)

    for key, tokens in enumerate((prompt, prompt, text_tokens(engine, 5000, 300), prompt)):
        ask(key, tokens)
    assert asked[0][:2] == asked[1][:2] == asked[3][:2]
    assert [asked[key][2] for key in (0, 1, 3)] == [0, len(prompt), len(prompt) - 64]
    for key in (4, 5, 6):
        ask(key, longer)
    assert asked[5][:2] == asked[6][:2]
    assert [asked[key][2] for key in (4, 5, 6)] == [len(prompt), len(longer) - 64, len(longer)]


def test_a_prompt_is_aborted_inside_a_step(starter: Path) -> None:
    runtime = load(starter)
    tokens = runtime.tokenizer.encode(LICENCE, add_special=False, parse_special=False)[:500]
    sequence = runtime.open()
    import threading

    threading.Timer(0.05, runtime.abort).start()
    try:
        runtime.forward(Step([SequenceStep(sequence, tokens)]))
    except Exception as error:
        assert type(error).__name__ == "StepAborted"
        assert runtime.length(sequence) == 0
    else:  # a machine that reads 500 tokens in 50 ms
        assert runtime.length(sequence) == 500
    runtime.check_integrity()
    runtime.close()


def test_a_chat_of_two_turns_prefills_only_the_new_tokens(starter: Path) -> None:
    with LocalClient(OpenOptions(model=str(starter), context=1024)) as client:
        history = [Message("user", "Name three colours, separated by commas.")]
        first = (
            client.start(Request(messages=tuple(history), sampling=GREEDY, max_tokens=40)).result().stats
        )
        assert first.text.strip()
        history += [Message("assistant", first.text), Message("user", "And three animals.")]
        second = (
            client.start(Request(messages=tuple(history), sampling=GREEDY, max_tokens=20)).result().stats
        )
    new = second.usage.prompt_tokens - second.usage.cached_tokens
    assert second.cache.tier == "live"
    assert second.usage.cached_tokens >= first.usage.prompt_tokens + first.usage.completion_tokens - 1
    assert new <= 20


def test_the_worker_killed_in_mid_answer_is_said_and_replaced(starter: Path) -> None:
    with LocalClient(OpenOptions(model=str(starter), context=1024)) as client:
        client.load()
        question = Request(prompt="Once upon a time", max_tokens=400, ignore_eos=True, sampling=GREEDY)
        generation = client.start(question)
        victim = client.worker_pid
        assert victim is not None
        for event in generation.events():
            if isinstance(event, Text) and event.num_tokens >= 3 and client.worker_pid == victim:
                os.kill(victim, signal.SIGKILL)
            if isinstance(event, Ended):
                assert (event.outcome, event.error_type) == ("failed", "WorkerDied")
        again = client.start(Request(prompt="Once upon a time", max_tokens=3, sampling=GREEDY)).result()
        assert again.stats.usage.completion_tokens == 3


def test_step_costs_are_measured_kept_and_found_again(starter: Path) -> None:
    question = Request(prompt="Once upon a time", max_tokens=20, ignore_eos=True, sampling=GREEDY)
    kept = []
    for _ in range(2):
        with LocalClient(
            OpenOptions(model=str(starter), kv_type_k="f16", kv_type_v="f16", context=1024)
        ) as client:
            client.load()
            client.start(question).result()
        files = list((Path(os.environ["EDGEINFER_CACHE_DIR"]) / "step-costs").iterdir())
        assert len(files) == 1
        kept.append({tuple(row[:4]): row[5] for row in json.loads(files[0].read_text())["costs"]})
    first, second = kept
    assert any(tokens == rows == 1 for _, tokens, rows, _ in first)
    assert all(second[kind] >= count for kind, count in first.items())
    assert sum(second.values()) > sum(first.values())


def test_a_card_that_this_build_cannot_use_is_one_warning_at_load(
    starter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = (Gpu("NVIDIA H200", "cuda", True), Gpu("AMD GPU", "vulkan", True))
    monkeypatch.setattr(local, "find_gpus", lambda: cards)
    said = []
    for layers in (None, 0):  # 0: the user does not want it
        with LocalClient(OpenOptions(model=str(starter), context=512, gpu_layers=layers)) as client:
            info = client.load()
            said.append([w for w in info.warnings if "ACCEL=" in w])
    if info.device != "cpu":
        pytest.skip("this build uses a GPU")
    assert [len(warnings) for warnings in said] == [1, 0]
    assert "make setup ACCEL=cuda" in said[0][0]


def test_threads_that_were_asked_for_are_measured_alone_and_only_to_weigh_drafts(
    starter: Path,
) -> None:
    costs = Path(os.environ["EDGEINFER_CACHE_DIR"]) / "step-costs"
    options = OpenOptions(
        model=str(starter), kv_type_k="f16", kv_type_v="f16", context=1024, threads=1, speculate="off"
    )
    for each in (options, replace(options, speculate="auto")):
        assert not costs.exists()
        with LocalClient(each) as client:
            client.load()
            client.start(Request(prompt="Hi", max_tokens=3, sampling=GREEDY)).result()
    (path,) = costs.glob("*.json")
    assert {row[0] for row in json.loads(path.read_text())["costs"]} == {1}
