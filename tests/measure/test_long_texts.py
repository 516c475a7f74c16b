"""What an approximation costs, over the scripted backend, where right answers can be worked out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgeinfer.backend import Runtime, RuntimeSettings, SequenceStep, Step
from edgeinfer.engine.window import Window
from edgeinfer.errors import MeasureFailed, UsageError
from edgeinfer.measure.evaluation import Setting, parse_settings
from edgeinfer.measure.long_texts import recomputed, slices, stream
from edgeinfer.measure.recall import recall
from edgeinfer.measure.texts import measured_text
from edgeinfer.quality.agreement import agreement
from edgeinfer.quality.predictions import log_softmax, perplexity
from edgeinfer_backends.scripted import SCRIPTED_FILES, Script, ScriptedBackend
from tests.engine.test_engine import tokens_of

KV = ("f16", "q8_0", "q4_0")


def load(context: int = 1024, script: Script | None = None) -> Runtime:
    settings = RuntimeSettings(context=context, logit_rows=64)
    return ScriptedBackend(script or Script()).load(SCRIPTED_FILES, settings, lambda _: True)


def nll_one_by_one(tokens: list[int], size: int, sinks: int, chunk: int) -> list[float]:
    """As `stream`, said plainly: the same chunks, everything else by hand."""
    runtime = load(size + 64)
    sequence = runtime.open()
    held = 0
    found = []
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        over = held + len(part) - size
        if over > 0:
            leaving = max(over, (size - sinks) // 4)
            runtime.evict(sequence, sinks, sinks + leaving)
            held -= leaving
        result = runtime.forward(Step([SequenceStep(sequence, part, "all")]))
        for row in range(len(part)):
            if start + row + 1 < len(tokens):
                p = log_softmax(runtime.logits(result.starts[0] + row))
                found.append(-float(p[tokens[start + row + 1]]))
        held += len(part)
    return found


@pytest.mark.parametrize(
    ("size", "sinks", "chunk"), [(256, 4, 64), (32, 4, 14), (32, 0, 16), (256, 250, 3), (33, 32, 1)]
)
def test_a_stream_is_scored_as_the_window_has_it(size: int, sinks: int, chunk: int) -> None:
    tokens = tokens_of(1, 1000)
    found = stream(load(size), tokens, Window(size, sinks))
    assert np.allclose(found.nll, nll_one_by_one(tokens, size, sinks, chunk))
    assert size - chunk < max(found.used_cells) <= size
    assert found.evicted == 1000 - found.used_cells[-1]


def test_a_stream_that_fits_is_the_text_itself() -> None:
    tokens = tokens_of(1, 500)
    found = stream(load(), tokens, Window(1024, 4))
    assert found.evicted == 0
    assert np.allclose(found.nll[99:], recomputed(load(), tokens, 100, 1024))


def test_the_recompute_has_a_window_of_fresh_context() -> None:
    tokens = tokens_of(1, 400)
    found = recomputed(load(), tokens, 300, 128)
    runtime = load()
    sequence = runtime.open()
    # The tokens 300 to 363 are read with those from 364 - 128 on.
    runtime.forward(Step([SequenceStep(sequence, tokens[236:299], "none")]))
    result = runtime.forward(Step([SequenceStep(sequence, tokens[299:363], "all")]))
    for token in range(300, 364):
        p = log_softmax(runtime.logits(result.starts[0] + token - 300))
        assert math.isclose(found[token - 300], -float(p[tokens[token]]))
    assert len(found) == 100


def test_a_model_agrees_with_itself_and_not_with_another() -> None:
    tokens = tokens_of(1, 300)
    same = agreement(load(), load(), tokens)
    assert (same.mean_kl, same.p99_kl, same.top1) == (0.0, 0.0, 1.0)
    assert np.array_equal(same.nll, same.reference_nll)
    other = agreement(load(script=Script(seed=5)), load(), tokens)
    assert other.mean_kl > 0.1
    assert other.top1 < 0.5
    assert (other.kl >= -1e-12).all()
    assert len(other.kl) == 300
    with pytest.raises(MeasureFailed, match="do not fit into a context of 64"):
        agreement(load(64), load(), tokens)


def test_a_cache_that_cannot_be_shifted_cannot_stream() -> None:
    runtime = load(256, Script(without=("evict",)))
    with pytest.raises(MeasureFailed, match="cannot shift"):
        stream(runtime, tokens_of(1, 300), Window(256, 4))


def test_perplexities_and_slices() -> None:
    nll = np.log(np.array([2.0, 8.0, 4.0, 4.0, 9.0]))
    assert math.isclose(perplexity(nll[:2]), 4.0)
    assert [(at, round(value, 6)) for at, value in slices(nll, 2)] == [(0, 4.0), (2, 4.0)]


def test_recall_asks_at_each_place() -> None:
    said = "the sea is wide and the sky is blue. " * 60
    text = load().tokenizer.encode(said, add_special=False, parse_special=False)
    told: list[float] = []
    found = recall(load(256), text, Window(256, 4), 2, told.append)
    assert [each.place for each in found] == ["in the window", "evicted", "in the sinks"]
    assert all(each.facts == 2 and 0 <= each.share <= 1 for each in found)
    assert told[-1] == 1.0


def test_settings_are_read_and_refused() -> None:
    both = parse_settings("kv", "q8_0, q8_0/q4_0,q8_0", KV)
    assert both == (Setting("q8_0", "q8_0"), Setting("q8_0", "q4_0"))
    (one,) = parse_settings("stream", "f16:512:0", KV)
    assert (one.window, one.sinks, str(one)) == (512, 0, "f16:512:0")
    assert str(parse_settings("stream", "f16/q8_0:64", KV)[0]) == "f16/q8_0:64:4"
    for suite, text in (
        ("kv", "q9"),
        ("kv", ""),
        ("kv", "q8_0:512"),
        ("kv", "q8_0,"),
        ("stream", "q8_0"),
        ("stream", "q8_0:31"),
        ("stream", "f16:64:64"),
        ("stream", "f16:99999999"),
        ("recall", "f16:x"),
        ("kv", "x" * 5000),
    ):
        with pytest.raises(UsageError, match="--settings") as caught:
            parse_settings(suite, text, KV)  # type: ignore[arg-type]
        assert len(str(caught.value)) < 300


def test_there_is_text_to_measure_on(tmp_path: object) -> None:
    text = measured_text(None)
    assert len(text) > 200_000
    assert "assert" in text
