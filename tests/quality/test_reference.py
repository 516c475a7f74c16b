"""Predictions that were stored, beside those worked out in full."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from edgeinfer.backend import Runtime, RuntimeSettings
from edgeinfer.errors import MeasureFailed
from edgeinfer.quality.predictions import log_softmax
from edgeinfer.quality.reference import (
    Page,
    Reference,
    _Found,
    _kl,
    _noted,
    agreement_with,
    kept_reference,
    write_reference,
)
from edgeinfer.quality.windows import Windows, predictions, windows_of
from edgeinfer_backends.scripted import SCRIPTED_FILES, Script, ScriptedBackend
from tests.engine.test_engine import tokens_of

WINDOWS = Windows(tuple(tokens_of(1, 300)), size=100)


def load(script: Script | None = None, rows: int = 64) -> Runtime:
    settings = RuntimeSettings(context=128, logit_rows=rows)
    return ScriptedBackend(script or Script()).load(SCRIPTED_FILES, settings, lambda _: True)


def stored(windows: Windows = WINDOWS, source: str = "") -> bytes:
    file = io.BytesIO()
    write_reference(file, load(), windows, source)
    return file.getvalue()


def exact_kl(one: Runtime, reference: Runtime, windows: Windows) -> np.ndarray:
    found = []
    for window in windows:
        pairs = zip(
            predictions(one, window, windows.first, 64),
            predictions(reference, window, windows.first, 64),
            strict=True,
        )
        for (logits, _), (wanted, _) in pairs:
            q, p = log_softmax(logits), log_softmax(wanted)
            found.append((np.exp(p) * (p - q)).sum(axis=-1))
    return np.concatenate(found)


def test_a_model_agrees_with_what_was_stored_of_it() -> None:
    found = agreement_with(Reference.read(io.BytesIO(stored())), load(), WINDOWS)
    assert (found.mean_kl, found.p99_kl, found.top1) == (0.0, 0.0, 1.0)
    assert found.perplexity == found.reference_perplexity
    assert len(found.kl) == 297, "each window's last token has nothing after it"


def test_another_model_is_as_far_away_as_side_by_side() -> None:
    other = load(Script(seed=5))
    found = agreement_with(Reference.read(io.BytesIO(stored())), other, WINDOWS)
    assert np.allclose(found.kl, exact_kl(other, load(), WINDOWS), atol=1e-6)
    assert found.top1 < 0.5
    assert found.perplexity != found.reference_perplexity


def test_what_counts_does_not_change_what_is_predicted() -> None:
    half = Windows(WINDOWS.tokens, size=100, first=70)
    other = load(Script(seed=5))
    all_of_it = agreement_with(Reference.read(io.BytesIO(stored())), other, WINDOWS)
    found = agreement_with(Reference.read(io.BytesIO(stored(half))), other, half)
    assert np.array_equal(found.kl, all_of_it.kl.reshape(3, 99)[:, 70:].ravel())


def test_a_beginning_of_the_windows_may_be_read_in_other_steps() -> None:
    reference = Reference.read(io.BytesIO(stored()))
    told: list[float] = []
    found = agreement_with(reference, load(), WINDOWS.beginning(2), told.append, chunk=7)
    assert len(found.kl) == 198
    assert (found.mean_kl, told[-1]) == (0.0, 1.0)


def test_a_bos_stands_for_each_windows_first_token() -> None:
    windows = Windows(tuple(range(10, 21)), size=4, begin=1)
    assert list(windows) == [[1, 11, 12, 13], [1, 15, 16, 17], [1, 19, 20]]
    assert windows.counts == [3, 3, 2]
    assert [len(window) for window in Windows(tuple(range(9)), size=4)] == [4, 4], "one token alone"
    assert windows.digest != Windows(windows.tokens, size=4).digest


def test_of_a_large_vocabulary_the_tail_is_estimated() -> None:
    random = np.random.default_rng(3)
    wanted = (3 * random.standard_normal((400, 5000))).astype(np.float32)
    for spread in (0.001, 0.3):
        logits = (wanted + spread * random.standard_normal(wanted.shape)).astype(np.float32)
        page = Page(*_noted(wanted, [0] * 400, 256, 64, random))
        q, p = log_softmax(logits), log_softmax(wanted)
        exact = (np.exp(p) * (p - q)).sum(axis=-1)
        found = _kl(_Found(logits), page, slice(0, 400), 256)
        bare = Page(page.ids[:, :256], page.log_probs[:, :256], page.tail, page.following)
        bound = _kl(_Found(logits), bare, slice(0, 400), 256)
        assert abs(found.mean() / exact.mean() - 1) < 0.01
        assert abs(np.median(found) / np.median(exact) - 1) < 0.03
        assert (bound <= exact + 1e-6).all() and bound.mean() < 0.95 * exact.mean()


def test_a_prediction_that_is_certain_leaves_no_tail() -> None:
    logits = np.zeros((2, 1000), np.float32)
    logits[:, 7] = 500.0
    page = Page(*_noted(logits, [7, 8], 256, 64, np.random.default_rng(0)))
    assert np.isneginf(page.tail).all()
    assert (_kl(_Found(logits), page, slice(0, 2), 256) == 0).all()
    flat = np.zeros((2, 1000), np.float32)
    assert np.allclose(_kl(_Found(flat), page, slice(0, 2), 256), np.log(1000), atol=1e-4)


def test_a_model_that_is_certain_of_the_wrong_token_is_far_away_and_no_infinity() -> None:
    flat = np.zeros((2, 1000), np.float32)
    page = Page(*_noted(flat, [7, 8], 256, 64, np.random.default_rng(0)))
    sharp = flat.copy()
    sharp[:, 7] = 500.0
    found = _kl(_Found(sharp), page, slice(0, 2), 256)
    assert np.isfinite(found).all() and (found > 100).all()


@pytest.mark.parametrize("place", [3, 40, 200, 5000, -5])
def test_damage_anywhere_is_found(place: int) -> None:
    data = bytearray(stored())
    data[place] ^= 0x20
    with pytest.raises(MeasureFailed, match=r"the file: damaged, or cut off"):
        Reference.read(io.BytesIO(bytes(data)), "the file")


def test_a_file_that_is_cut_off_or_goes_on_is_refused() -> None:
    data = stored()
    for part in (b"", data[:10], data[:100], data[:-1], data + b"x"):
        with pytest.raises(MeasureFailed, match="cut off"):
            Reference.read(io.BytesIO(part))


def test_damage_after_the_check_is_one_line_too() -> None:
    data = stored()
    file = io.BytesIO(data)
    reference = Reference.read(file)
    file.truncate(len(data) // 2)
    with pytest.raises(MeasureFailed, match="damaged meanwhile"):
        agreement_with(reference, load(), WINDOWS)


def test_what_was_kept_is_taken_for_the_same_text_and_model_only(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    assert kept_reference(path, WINDOWS, 300, "a model") is None
    path.write_bytes(stored(source="a model"))
    vocab_size = load().facts.vocab_size
    found = kept_reference(path, WINDOWS, vocab_size, "a model")
    assert found is not None
    found.close()
    assert kept_reference(path, WINDOWS, vocab_size, "another") is None
    assert kept_reference(path, WINDOWS, vocab_size + 1, "a model") is None
    assert kept_reference(path, WINDOWS.beginning(2), vocab_size, "a model") is None
    path.write_bytes(path.read_bytes()[:-20])
    assert kept_reference(path, WINDOWS, vocab_size, "a model") is None


def test_vocabularies_that_differ_are_told() -> None:
    file = io.BytesIO()
    reference = write_reference(file, load(), WINDOWS)
    reference.vocab_size += 1
    with pytest.raises(MeasureFailed, match="different vocabularies"):
        agreement_with(reference, load(), WINDOWS)


def test_a_text_is_read_as_far_as_asked_for() -> None:
    text = "The sea is wide. " * 100
    windows = windows_of(load(), text, 400)
    assert (len(windows.tokens), windows.size) == (400, 128)
    with pytest.raises(MeasureFailed, match="the text has 14 tokens; it needs 128 at least"):
        windows_of(load(), "The sea is wide.", 400)
