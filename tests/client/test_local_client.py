"""The client over a real worker process. The scripted backend answers, so no weights are needed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from edgeinfer.client import (
    Embedded,
    Ended,
    Event,
    LocalClient,
    Message,
    OpenOptions,
    Prefilled,
    Queued,
    Request,
    Text,
    local,
)
from edgeinfer.errors import (
    EdgeInferError,
    LoadFailed,
    PromptTooLong,
    RequestFailed,
    TemplateError,
    UsageError,
    WorkerDied,
)
from edgeinfer.open import OpenPlan
from edgeinfer.sampling import SamplingParams
from edgeinfer_models.chat_template import TemplateRenderer
from edgeinfer_models.converted import list_converted, remove_converted
from tests.fixtures_hf import write_tiny_folder

ClientMaker = Callable[..., LocalClient]


@pytest.fixture
def make_client(tmp_path: Path) -> Iterator[ClientMaker]:
    """Clients of scripts; closed, and their processes gone, when the test ends."""
    clients: list[LocalClient] = []

    def make(script: dict[str, Any] | None = None, **options: Any) -> LocalClient:
        path = tmp_path / f"script{len(clients)}.json"
        path.write_text(json.dumps(script or {"answers": {"*": "Hello there."}}))
        client = LocalClient(OpenOptions(model=str(path), backend="scripted", **options))
        clients.append(client)
        return client

    before = set(psutil.Process().children(recursive=True))
    yield make
    for client in clients:
        client.close()
    left = [p for p in psutil.Process().children(recursive=True) if p not in before]
    assert not left, f"processes left behind: {left}"


def asked(text: str, **options: Any) -> Request:
    return Request(messages=(Message("user", text),), **options)


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


def test_a_question_is_answered(make_client: ClientMaker) -> None:
    client = make_client()
    steps: list[tuple[str, float]] = []
    info = client.load(lambda what, fraction: steps.append((what, fraction)))
    assert (info.backend, info.context) == ("scripted", 4096)
    assert steps[-1][1] == 1.0
    assert client.start(asked("Hi")).text() == "Hello there."


def test_loading_twice_loads_once(make_client: ClientMaker) -> None:
    client = make_client()
    assert client.load() is client.load()


def test_starting_without_loading_loads(make_client: ClientMaker) -> None:
    assert make_client().start(asked("Hi")).text() == "Hello there."


def test_events_go_to_a_callback_when_one_is_given(make_client: ClientMaker) -> None:
    client = make_client()
    events: list[Event] = []
    client.start(asked("Hi"), on_event=events.append)
    until(lambda: bool(events) and isinstance(events[-1], Ended))
    assert "".join(e.text for e in events if isinstance(e, Text)) == "Hello there."


def test_tokens_are_counted_as_the_request_would_have_them(make_client: ClientMaker) -> None:
    client = make_client()
    request = asked("How many?")
    counted = client.count_tokens(request)
    assert counted == client.start(request).result().stats.usage.prompt_tokens


def test_several_requests_at_once_get_their_own_answers(make_client: ClientMaker) -> None:
    answers = {f"question {n}": f"answer {n} " * 5 for n in range(8)}
    client = make_client({"answers": answers, "step_s": 0.001}, sequences=3)
    generations = {text: client.start(asked(text)) for text in answers}
    assert {text: g.text() for text, g in generations.items()} == answers


def test_a_chat_goes_on_past_its_window(make_client: ClientMaker) -> None:
    client = make_client({"answers": {"*": "Yes, I see."}}, window=128)
    info = client.load()
    assert info.context == 128  # all that there is memory for, where no more was asked for
    messages: list[Message] = [Message("system", "Be kind. " * 4)]
    evicted = []
    for turn in range(8):
        messages.append(Message("user", f"This is question number {turn}."))
        ended = client.start(Request(messages=tuple(messages), overflow="stream")).result()
        assert (ended.outcome, ended.stats.text) == ("finished", "Yes, I see.")
        messages.append(Message("assistant", ended.stats.text))
        evicted.append(ended.stats.kv.evicted_tokens)
        if turn > 3:
            assert ended.stats.usage.prompt_tokens - ended.stats.usage.cached_tokens < 80
    assert evicted[0] == 0
    assert evicted[-1] > evicted[3] > 0
    with pytest.raises(PromptTooLong):
        client.start(Request(messages=tuple(messages))).result()


@pytest.mark.parametrize(
    ("messages", "rendered", "kept"),
    [
        ([("system", "Be kind."), ("user", "Hi")], "<s>Be kind.</s><u>Hi</u>", "<s>Be kind.</s><u>"),
        ([("system", " Hi "), ("user", "Hi")], "<u>Hi\n\nHi</u>", "<u>Hi\n\n"),
        ([("user", "Hi")], "<u>Hi</u>", ""),
        (
            [("user", "Hi")],
            f"<s>{'Be kind. ' * 9}</s><u>Hi</u>",
            f"<s>{'Be kind. ' * 9}</s><u>",
        ),
        ([("system", "Be kind."), ("user", "Hi")], "<u>something else</u>", ""),
        ([("system", "Be kind.")], "<s>Be kind.</s>", ""),
    ],
)
def test_the_system_prompt_is_found_in_what_was_rendered(
    messages: list[tuple[str, str]], rendered: str, kept: str
) -> None:
    request = Request(messages=tuple(Message(role, text) for role, text in messages))
    assert rendered[: local.system_length(request, rendered)] == kept


def test_a_cancelled_answer_ends_cancelled_and_the_next_one_works(make_client: ClientMaker) -> None:
    client = make_client({"answers": {"*": "x" * 3000}, "step_s": 0.005})
    generation = client.start(asked("Hi"))
    for event in generation.events():
        if isinstance(event, Text):
            generation.cancel()
            break
    ended = generation.result()
    assert (ended.outcome, ended.stats.finish_reason) == ("cancelled", "cancelled")
    generation.cancel()
    assert client.start(asked("Hi", max_tokens=3)).text() == "xxx"


def test_a_request_cancelled_before_it_was_sent_ends_cancelled(make_client: ClientMaker) -> None:
    client = make_client({"answers": {"*": "x"}, "load_s": 0.3})
    generation = client.start(asked("Hi"))
    generation.cancel()
    assert generation.result().outcome == "cancelled"


def test_a_cancel_interrupts_a_step_that_is_running(make_client: ClientMaker) -> None:
    # One step takes a minute: only an abort inside it can end this in time.
    client = make_client({"answers": {"*": "x"}, "step_s": 60})
    client.load()
    generation = client.start(asked("Hi"))
    events = generation.events()
    next(events)  # Started: the step is under way
    time.sleep(0.2)
    generation.cancel()
    assert generation.result().outcome == "cancelled"


def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(make_client: ClientMaker) -> None:
    client = make_client(context=64)
    with pytest.raises(PromptTooLong, match=r"\d+ tokens .* maximum context length is 64"):
        client.start(asked("word " * 100)).result()


def test_a_load_that_fails_says_why_and_may_be_tried_again(make_client: ClientMaker) -> None:
    client = make_client({"load_error": "the weights are made of cheese"})
    for _ in range(2):
        with pytest.raises(LoadFailed, match="made of cheese"):
            client.load()
    with pytest.raises(LoadFailed, match="made of cheese"):
        client.start(asked("Hi")).result()


def test_a_load_can_be_cancelled(make_client: ClientMaker) -> None:
    client = make_client({"load_s": 20, "load_steps": 400})
    begun = threading.Event()

    def progress(what: str, fraction: float) -> None:
        if fraction > 0:
            begun.set()

    def cancel() -> None:
        begun.wait(10)
        client.cancel_load()

    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(LoadFailed, match="cancelled"):
        client.load(progress)
    thread.join()


def test_a_cancelled_load_ends_a_conversion(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="the tiny folder's tokenizer is made by it")
    folder = write_tiny_folder(tmp_path / "tiny")
    told: list[str] = []

    def progress(what: str, fraction: float) -> None:
        told.append(what)
        if what.startswith("converting"):
            client.cancel_load()

    with LocalClient(OpenOptions(model=str(folder), backend="llamacpp")) as client:
        with pytest.raises(LoadFailed, match="loading was cancelled; nothing is left of the conversion"):
            client.load(progress)
        assert told[-1] == "converting tiny to GGUF (only once)"
        assert list_converted() == ()
        client.load()
    assert [each.source for each in list_converted()] == [str(folder)]


def test_a_conversion_that_was_deleted_meanwhile_is_made_again(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="the tiny folder's tokenizer is made by it")
    folder = write_tiny_folder(tmp_path / "tiny")
    with LocalClient(OpenOptions(model=str(folder), backend="llamacpp")) as client:
        client.load()
        assert client.unload()
        for each in list_converted():
            remove_converted(each.name)
        assert client.load().name == "tiny"
        (again,) = list_converted()
        assert again.source == str(folder)


def test_a_worker_that_dies_before_its_owner_is_ready_is_told_of(
    make_client: ClientMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def start_and_kill(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == "worker-events":
            for child in set(psutil.Process().children()) - before:
                child.kill()
            thread.join(0.5)

    client = make_client()
    before = set(psutil.Process().children())  # multiprocessing has one of its own, for good
    monkeypatch.setattr(threading.Thread, "start", start_and_kill)
    with pytest.raises(WorkerDied, match="SIGKILL"):  # and no thread raised, which pytest would tell
        client.load()


def test_a_killed_worker_fails_its_request_and_starts_again(make_client: ClientMaker) -> None:
    client = make_client({"answers": {"*": "x" * 2000}, "step_s": 0.005})
    client.load()
    first = client.worker_pid
    assert first is not None
    generation = client.start(asked("Hi"))
    text = ""
    for event in generation.events():
        if isinstance(event, Text):
            text += event.text
            if len(text) >= 5 and client.worker_pid == first:
                os.kill(first, signal.SIGKILL)
    assert text.startswith("xxxxx")
    ended = generation._ended
    assert ended is not None
    assert (ended.outcome, ended.error_type) == ("failed", "WorkerDied")
    assert "SIGKILL" in ended.error
    assert "started again" in ended.error
    assert client.start(asked("Hi", max_tokens=4)).text() == "xxxx"
    assert client.worker_pid != first


def test_a_crash_inside_the_model_is_reported_like_any_death(make_client: ClientMaker) -> None:
    client = make_client({"answers": {"*": "abcdef"}, "die_at_step": 4})
    with pytest.raises(EdgeInferError, match="exit code 9"):
        client.start(asked("Hi")).result()
    # The script dies at its fourth step again: the restarted process answers up to there.
    assert client.start(asked("Hi", max_tokens=2)).text() == "ab"


def test_a_worker_that_dies_while_loading_is_an_error_of_the_load(
    make_client: ClientMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client({"load_s": 30, "load_steps": 300})
    threading.Timer(1.0, lambda: os.kill(client.worker_pid or 0, signal.SIGKILL)).start()
    with pytest.raises(EdgeInferError, match="while it loaded"):
        client.load()


def test_every_request_on_a_dying_worker_ends_exactly_once(make_client: ClientMaker) -> None:
    client = make_client({"answers": {"*": "x" * 3000}, "step_s": 0.003}, sequences=2)
    client.load()
    ends: list[Ended] = []

    def keep(event: Event) -> None:
        if isinstance(event, Ended):
            ends.append(event)

    for n in range(6):
        client.start(asked(f"question {n}"), on_event=keep)
    time.sleep(0.2)
    os.kill(client.worker_pid or 0, signal.SIGKILL)
    until(lambda: len(ends) == 6)
    time.sleep(0.2)
    assert len(ends) == 6
    assert {end.outcome for end in ends} == {"failed"}
    assert client.start(asked("Hi", max_tokens=2)).text() == "xx"


def test_closing_ends_what_is_running_and_leaves_no_process(make_client: ClientMaker) -> None:
    client = make_client({"answers": {"*": "x" * 3000}, "step_s": 0.005})
    generation = client.start(asked("Hi"))
    next(generation.events())
    pid = client.worker_pid
    assert pid is not None
    client.close()
    client.close()
    assert generation.result().outcome == "cancelled"
    assert not psutil.pid_exists(pid)


def test_closing_in_the_middle_of_a_load_leaves_no_process(
    make_client: ClientMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client()
    start = local._start_renderer

    def closed_meanwhile(plan: OpenPlan) -> TemplateRenderer:
        renderer = start(plan)
        client.close()
        return renderer

    monkeypatch.setattr(local, "_start_renderer", closed_meanwhile)
    with pytest.raises(LoadFailed, match="closed"):
        client.load()


def test_a_closed_client_refuses_politely(make_client: ClientMaker) -> None:
    client = make_client()
    client.close()
    with pytest.raises(LoadFailed, match="closed"):
        client.start(asked("Hi")).result()


def test_a_worker_whose_owner_is_killed_ends_itself(tmp_path: Path) -> None:
    import subprocess
    import sys

    script = tmp_path / "script.json"
    script.write_text(json.dumps({"answers": {"*": "x" * 5000}, "step_s": 30}))
    program = (
        "from edgeinfer.client import *\n"
        f"c = LocalClient(OpenOptions(model={str(script)!r}, backend='scripted'))\n"
        "c.load()\n"
        "c.start(Request(prompt='Hi'))\n"
        "print(c.worker_pid, flush=True)\n"
        "import time; time.sleep(60)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    worker = psutil.Process(int(owner.stdout.readline()))
    owner.kill()
    owner.wait()
    owner.stdout.close()
    worker.wait(15)  # raises TimeoutExpired if it lives on


def test_a_template_that_fails_is_an_error_of_the_request(make_client: ClientMaker) -> None:
    client = make_client()
    client.load()
    request = Request(messages=({"not": "a message"},))  # type: ignore[arg-type]
    ended = [e for e in client.start(request).events() if isinstance(e, Ended)]
    assert ended[0].outcome == "failed"
    assert client.start(asked("Hi")).text() == "Hello there."
    assert issubclass(TemplateError, EdgeInferError)


def test_reading_a_long_prompt_is_told(make_client: ClientMaker) -> None:
    client = make_client({"answers": {"*": "x"}})
    events = list(client.start(asked("word " * 400, max_tokens=1)).events())
    assert any(isinstance(event, Prefilled) for event in events)


def test_logprobs_and_seed_come_through(make_client: ClientMaker) -> None:
    client = make_client()
    sampling = SamplingParams(seed=7)
    generation = client.start(asked("Hi", logprobs=2, sampling=sampling, max_tokens=3))
    logprobs = [
        item for event in generation.events() if isinstance(event, Text) for item in event.logprobs
    ]
    assert len(logprobs) == 3
    assert all(len(item.top) == 2 for item in logprobs)
    assert generation.result().stats.seed == 7


@pytest.mark.parametrize(
    "options",
    [{"context": 1}, {"context": -5}, {"sequences": 0}, {"threads": -1}, {"cache_bytes": -1}],
)
def test_absurd_options_are_refused_before_anything_starts(options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="outside"):
        OpenOptions(backend="scripted", **options)  # type: ignore[arg-type]


# -- questions beside answers ----------------------------------------------------------------------


def test_text_becomes_tokens_and_tokens_become_text(make_client: ClientMaker) -> None:
    client = make_client()
    found = client.tokenize("naïve <|im_end|>")
    assert client.detokenize([token.id for token in found]) == "naïve <|im_end|>"
    special = client.tokenize("<|im_end|>", parse_special=True)
    assert len(special) == 1
    assert special[0].text == "<|im_end|>"


def test_a_token_outside_the_vocabulary_is_refused(make_client: ClientMaker) -> None:
    client = make_client()
    with pytest.raises(RequestFailed, match="outside the vocabulary"):
        client.detokenize([10**8])
    assert client.detokenize([]) == ""


def test_a_request_is_known_to_be_answerable_while_another_runs(make_client: ClientMaker) -> None:
    client = make_client({"answers": {"*": "x" * 200}, "step_s": 0.05})
    first = client.start(asked("a", max_tokens=100))
    next(event for event in first.events() if isinstance(event, Text))
    second = client.start(asked("b", max_tokens=1))
    event = next(second.events())
    assert isinstance(event, Queued)
    assert event.prompt_tokens > 0
    first.cancel()
    assert second.result().outcome == "finished"


def test_the_status_counts_what_runs(make_client: ClientMaker) -> None:
    client = make_client({"answers": {"*": "x" * 500}, "step_s": 0.02})
    assert client.status() is None
    client.load()
    assert client.status() is not None
    running = client.start(asked("a", max_tokens=400))
    next(event for event in running.events() if isinstance(event, Text))
    status = client.status()
    assert status is not None
    assert (status.running, status.waiting) == (1, 0)
    assert 0 < status.used_cells < status.cells
    running.cancel()
    running.result()


def test_an_unloaded_model_is_loaded_by_the_next_request(make_client: ClientMaker) -> None:
    client = make_client()
    client.load()
    pid = client.worker_pid
    assert pid is not None
    assert client.unload()
    assert not psutil.pid_exists(pid)
    assert client.info is None
    assert not client.unload()
    assert client.start(asked("hi")).text() == "Hello there."
    assert client.worker_pid != pid


def test_a_model_in_use_is_not_unloaded(make_client: ClientMaker) -> None:
    client = make_client({"answers": {"*": "x" * 500}, "step_s": 0.02})
    client.load()
    running = client.start(asked("a", max_tokens=400))
    next(event for event in running.events() if isinstance(event, Text))
    assert not client.unload()
    running.cancel()
    assert running.result().outcome == "cancelled"
    assert client.unload()


def test_an_embedding_comes_as_an_event(make_client: ClientMaker) -> None:
    client = make_client()
    events = list(client.start(Request(prompt="some text", embedding=True)).events())
    vectors = [event.vector for event in events if isinstance(event, Embedded)]
    assert len(vectors) == 1
    assert sum(x * x for x in vectors[0]) == pytest.approx(1.0)
    assert isinstance(events[-1], Ended)
    assert events[-1].outcome == "finished"
