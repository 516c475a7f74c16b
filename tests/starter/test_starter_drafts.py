"""Answers of the real model with drafts are its answers without (benchmarks/bars/08_lossless.py: more of
them)."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest

from edgeinfer.backend import RuntimeSettings
from edgeinfer.client import LocalClient, Message, OpenOptions, Request
from edgeinfer.engine.draft_source import DraftSource, load_draft
from edgeinfer.engine.engine import Engine
from edgeinfer.engine.lookup import Lookup
from edgeinfer.engine.request import Ended, RunStats
from edgeinfer.engine.speculation import Speculation
from edgeinfer.engine.window import Window
from edgeinfer.machine.cost_store import costs_folder
from edgeinfer.measure.kinds_of_work import KINDS, question
from edgeinfer.measure.streams import GREEDY
from edgeinfer.open import find_exit
from edgeinfer.registry import get_backend
from edgeinfer_models.exit_file import SHIPPED_EXITS, read_exit_file, require_exit_of
from edgeinfer_models.gguf_model import read_gguf_model
from edgeinfer_models.model_files import ModelFiles
from edgeinfer_models.resolve import resolve_model

pytestmark = pytest.mark.model

TOKENS = 48


def answers(
    path: Path, kv: str, layout: str, *, at_once: int, window: int, drafts: str = ""
) -> list[RunStats]:
    """drafts: "lookup", "exit", or neither."""
    settings = RuntimeSettings(
        context=512,
        sequences=at_once,
        kv_type_k=kv,
        kv_type_v=kv,
        kv_layout=layout,  # type: ignore[arg-type]
        threads=1,
        threads_batch=1,
    )
    backend, files = get_backend("llamacpp"), ModelFiles("starter", (path,), "gguf")
    runtime = backend.load(files, settings, lambda _: True)
    speculation = None
    if drafts:  # of any length, whatever it costs
        draw = random.Random(1)
        most = min(runtime.facts.max_logit_rows, runtime.facts.stable_chunk_tokens - 1)
        lookup = Lookup if drafts == "lookup" else None
        speculation = Speculation(lambda tokens, _: 1.0 + draw.random() * tokens, most, window, lookup)
    if speculation is not None and drafts == "exit":
        source = DraftSource(exit_path=SHIPPED_EXITS / "smollm2.exit.gguf")
        folder = costs_folder().parent / "drafts"
        loaded = load_draft(source, backend, files, 30, runtime, settings, folder, 2**40)
        speculation.use_model(loaded.model, loaded.typical)
    engine = Engine(
        runtime, model="starter", max_running=at_once, window=Window(window), speculation=speculation
    )
    ends: dict[int, Ended] = {}
    with contextlib.closing(engine), contextlib.ExitStack() as stack:
        if speculation is not None:
            stack.callback(speculation.close)
        for number, kind in enumerate(KINDS):
            text = f"<|im_start|>user\n{question(kind, number)}<|im_end|>\n<|im_start|>assistant\n"
            found = runtime.tokenizer.encode(text, add_special=True, parse_special=True)
            tokens = (1000 + number, *found)  # no two begin alike
            request = Request(
                tokens=tokens, max_tokens=TOKENS, sampling=GREEDY, ignore_eos=True, overflow="stream"
            )
            engine.submit(number, request, tokens)
        while engine.has_work:
            for key, event in engine.step():
                if isinstance(event, Ended):
                    ends[key] = event
        engine.check_integrity()
    return [ends[number].stats for number in range(len(KINDS))]


@pytest.mark.parametrize(
    ("kv", "layout", "at_once", "window", "drafts"),
    [
        ("f16", "private", 4, 512, "lookup"),
        ("f16", "shared", 4, 512, "lookup"),
        ("q8_0", "private", 4, 128, "lookup"),
        ("f16", "private", 1, 128, "lookup"),
        ("f16", "private", 4, 128, "exit"),
        ("q8_0", "shared", 4, 512, "exit"),
    ],
)
def test_answers_are_those_without_drafts(
    starter: Path, kv: str, layout: str, at_once: int, window: int, drafts: str
) -> None:
    plain = answers(starter, kv, layout, at_once=1, window=window)
    drafted = answers(starter, kv, layout, at_once=at_once, window=window, drafts=drafts)
    assert [one.text for one in drafted] == [one.text for one in plain]
    assert sum(one.speculation.accepted for one in drafted) > 0
    assert [one.kv.evicted_tokens for one in drafted] == [one.kv.evicted_tokens for one in plain]


def test_the_worker_says_who_drafted_or_why_nobody_did(starter: Path) -> None:
    ask = Request(messages=(Message("user", "Say: one two three."),), max_tokens=8, sampling=GREEDY)
    for speculate, why in (("off", "--speculate off"), ("auto", "")):
        options = OpenOptions(model=str(starter), context=512, threads=1, speculate=speculate)  # type: ignore[arg-type]
        with LocalClient(options) as client:
            client.load()
            told = client.start(ask).result().stats.speculation
        assert told.mode in ("none", "lookup")
        assert told.reason == why if why else (told.steps > 0) == (told.reason == "none")


def test_the_exit_that_comes_with_edgeinfer_is_found(starter: Path) -> None:
    found = find_exit(resolve_model(str(starter)))
    assert found == SHIPPED_EXITS / "smollm2.exit.gguf"
    exit_file = read_exit_file(found)
    require_exit_of(exit_file, read_gguf_model(starter))
    assert exit_file.layer == 4 and exit_file.told["agreement"][0] > 0.5
