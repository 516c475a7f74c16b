"""The contract of what a runtime says about itself, of its tokenizer, embeddings and end."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeinfer.backend import RuntimeSettings
from edgeinfer.errors import EdgeInferError, LoadFailed, OutOfCells
from edgeinfer_models.model_files import ModelFiles
from tests.contract.checked_runtime import CheckedRuntime
from tests.contract.driving import (
    CHUNK,
    feed,
    is_same,
    opened,
    ordinary_tokens,
    probe,
    require,
    some_tokens,
    unchanged,
)
from tests.contract.runtimes import RuntimeFactory

Load = Callable[..., CheckedRuntime]

TEXTS = (
    "hello world",
    "The answer is 42.",
    "two\nlines\n\n\tand a tab",
    "  spaces  inside  ",
    "naïve café Ünïcödé",
    "日本語のテキスト",
    "smile 😀 and 👩‍👩‍👧‍👦 families",
    "a" * 500,
    "\u0000 zero",
)
SPECIAL = ("<|im_start|>", "<|im_end|>")


# -- facts -----------------------------------------------------------------------------------------


def test_facts_agree_with_what_was_asked_for(load: Load) -> None:
    facts = load(context=512, sequences=2, step_tokens=256, logit_rows=32).facts
    assert facts.context >= 512
    assert facts.cells >= 2 * 512
    assert facts.max_sequences >= 2
    assert facts.max_step_tokens >= 256
    assert facts.max_logit_rows >= 32
    assert 1 <= facts.stable_chunk_tokens <= CHUNK
    assert facts.vocab_size > 0
    assert facts.embedding_size > 0
    assert facts.context_trained >= 0
    assert facts.kv_bytes_per_token > 0
    assert facts.kv_layout in ("shared", "private")
    assert facts.threads >= 1
    assert facts.threads_batch >= 1
    assert facts.device


def test_only_a_runtime_that_says_so_is_not_exact(
    runtime: CheckedRuntime, factory: RuntimeFactory
) -> None:
    assert runtime.facts.exact == (factory.rounding == 0.0)


def test_a_fresh_runtime_has_all_its_cells_free(runtime: CheckedRuntime) -> None:
    assert runtime.free_cells() == runtime.facts.cells


def test_memory_items_are_positive_and_the_kv_cache_adds_up(runtime: CheckedRuntime) -> None:
    items = runtime.memory()
    assert all(item.num_bytes > 0 and item.name and item.device for item in items)
    (kv,) = [item for item in items if item.name == "kv cache"]
    rounding = 10 * 1024  # llama.cpp tells hundredths of MiB
    assert kv.num_bytes + rounding > runtime.facts.cells * runtime.facts.kv_bytes_per_token
    assert any(item.name == "weights" for item in items)


def test_memory_is_predicted_without_loading(factory: RuntimeFactory, model_folder: Path) -> None:
    settings = factory.settings
    items = factory.predict(model_folder, settings)
    assert all(item.num_bytes > 0 and item.name and item.device for item in items)
    assert {"weights", "kv cache", "compute", "process"} <= {item.name for item in items}

    def kv_cache(**changes: Any) -> int:
        predicted = factory.predict(model_folder, replace(settings, **changes))
        return sum(item.num_bytes for item in predicted if item.name == "kv cache")

    assert kv_cache(context=4096) > kv_cache(context=1024)
    assert kv_cache(sequences=12) > kv_cache(sequences=1)


def test_what_was_allocated_was_predicted(
    load: Load, factory: RuntimeFactory, model_folder: Path
) -> None:
    predicted = factory.predict(model_folder, factory.settings)
    for real in load().memory():
        same = [
            i for i in predicted if (i.name, i.device, i.form) == (real.name, real.device, real.form)
        ]
        assert same, f"{real} was not predicted"
        if real.name in ("weights", "kv cache"):
            slack = max(0.02 * real.num_bytes, 16 * 1024)
            assert sum(i.num_bytes for i in same) == pytest.approx(real.num_bytes, abs=slack)


def test_an_identity_is_text_and_names_what_decides(load: Load) -> None:
    runtime = load()
    identity = dict(runtime.identity())
    assert identity
    assert all(isinstance(k, str) and isinstance(v, str) for k, v in identity.items())
    opened(runtime, some_tokens(runtime, 5))
    assert dict(runtime.identity()) == identity
    assert dict(load().identity()) == identity


def test_a_probe_says_what_it_found(factory: RuntimeFactory) -> None:
    found = factory.find_backend().probe()
    assert found.usable
    assert found.reason == ""
    assert found.version
    assert found.devices


def test_a_cancelled_load_says_so(factory: RuntimeFactory, model_folder: Path) -> None:
    backend = factory.find_backend()
    with pytest.raises(LoadFailed, match="cancel"):
        backend.load(factory.make_files(model_folder), RuntimeSettings(context=256), lambda done: False)


def test_progress_rises_to_one(factory: RuntimeFactory, model_folder: Path) -> None:
    seen: list[float] = []

    def progress(done: float) -> bool:
        seen.append(done)
        return True

    files = factory.make_files(model_folder)
    factory.find_backend().load(files, RuntimeSettings(context=256), progress).close()
    assert seen == sorted(seen)
    assert all(0.0 <= done <= 1.0 for done in seen)
    assert seen[-1] == 1.0


def test_a_file_that_is_not_there_is_one_clear_line(factory: RuntimeFactory, tmp_path: Path) -> None:
    backend = factory.find_backend()
    files = ModelFiles(name="gone", paths=(tmp_path / "gone.model",), format=backend.formats[0])  # type: ignore[arg-type]
    with pytest.raises(EdgeInferError, match="gone"):
        backend.load(files, RuntimeSettings(context=256), lambda done: True)


# -- tokenizer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_encoding_and_decoding(runtime: CheckedRuntime, text: str) -> None:
    tokenizer = runtime.tokenizer
    tokens = tokenizer.encode(text, add_special=False, parse_special=False)
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)
    assert tokenizer.decode(tokens) == text
    assert b"".join(tokenizer.piece(token) for token in tokens).decode() == text


def test_no_text_is_no_tokens(runtime: CheckedRuntime) -> None:
    assert runtime.tokenizer.encode("", add_special=False, parse_special=True) == []
    assert runtime.tokenizer.decode([]) == ""


def test_special_text_is_only_special_where_it_is_parsed(runtime: CheckedRuntime) -> None:
    tokenizer = runtime.tokenizer
    text = "".join(f"{special}user" for special in SPECIAL)
    plain = tokenizer.encode(text, add_special=False, parse_special=False)
    assert not any(tokenizer.is_control(token) for token in plain)
    assert tokenizer.decode(plain) == text
    parsed = tokenizer.encode(text, add_special=False, parse_special=True)
    control = [token for token in parsed if tokenizer.is_control(token)]
    assert [tokenizer.text(token) for token in control] == list(SPECIAL)
    assert tokenizer.decode(parsed) == "useruser"
    assert [tokenizer.piece(token) for token in control] == [b"", b""]


def test_special_tokens_are_added_where_the_model_expects_them(runtime: CheckedRuntime) -> None:
    tokenizer = runtime.tokenizer
    plain = tokenizer.encode("hello", add_special=False, parse_special=False)
    full = tokenizer.encode("hello", add_special=True, parse_special=False)
    assert (full[0] == tokenizer.bos and full[1:] == plain) if tokenizer.adds_bos else full == plain


def test_the_tokenizer_knows_the_ends_of_a_turn(runtime: CheckedRuntime) -> None:
    tokenizer = runtime.tokenizer
    assert tokenizer.vocab_size == runtime.facts.vocab_size
    assert tokenizer.eos is not None
    assert tokenizer.is_end(tokenizer.eos)
    assert not any(tokenizer.is_end(token) for token in ordinary_tokens(runtime))
    for token in (tokenizer.bos, tokenizer.eos):
        assert token is None or tokenizer.is_control(token)


def test_every_token_has_a_piece_and_a_text(runtime: CheckedRuntime) -> None:
    tokenizer = runtime.tokenizer
    for token in range(tokenizer.vocab_size):
        assert tokenizer.text(token) != "" or tokenizer.piece(token) == b""
        if tokenizer.is_control(token):
            assert tokenizer.piece(token) == b""


def test_half_a_character_becomes_a_replacement_character(runtime: CheckedRuntime) -> None:
    tokenizer = runtime.tokenizer
    tokens = tokenizer.encode("😀", add_special=False, parse_special=False)
    assert len(tokens) > 1, "the vocabulary should hold the smiley in pieces"
    assert "\ufffd" in tokenizer.decode(tokens[:-1])


# -- embeddings ------------------------------------------------------------------------------------


def embedded(runtime: CheckedRuntime, tokens: list[int], chunk: int = 512) -> list[float]:
    """The hidden states' sum of a text in a sequence of its own."""
    sequence = runtime.open()
    parts = [runtime.embed(sequence, tokens[i : i + chunk]) for i in range(0, len(tokens), chunk)]
    assert runtime.length(sequence) == len(tokens)
    runtime.free(sequence)
    return [sum(values) for values in zip(*parts, strict=True)]


def test_an_embedding_repeats_and_depends_on_the_text(runtime: CheckedRuntime) -> None:
    require(runtime, "embeddings")
    tokens = some_tokens(runtime, 20)
    vector = embedded(runtime, tokens)
    assert len(vector) == runtime.facts.embedding_size
    assert np.linalg.norm(vector) > 0
    assert embedded(runtime, tokens[:1]) != vector
    assert embedded(runtime, some_tokens(runtime, 20, seed=1)) != vector
    assert embedded(runtime, tokens) == vector


def test_an_embedding_does_not_depend_on_how_the_text_is_cut(
    runtime: CheckedRuntime, factory: RuntimeFactory
) -> None:
    require(runtime, "embeddings")
    tokens = some_tokens(runtime, 40)
    whole = embedded(runtime, tokens)
    slack = max(1e-3, 5 * factory.rounding)
    assert embedded(runtime, tokens, chunk=7) == pytest.approx(whole, rel=slack, abs=slack)


def test_embedding_appends_to_its_sequence_and_leaves_the_others(runtime: CheckedRuntime) -> None:
    require(runtime, "embeddings")
    sequence = opened(runtime, some_tokens(runtime, CHUNK))
    text = some_tokens(runtime, 10, seed=1)
    plain = opened(runtime, text)
    expected = probe(runtime, plain)
    runtime.free(plain)
    with unchanged(runtime, sequence):
        other = runtime.open()
        runtime.embed(other, text)
        assert is_same(probe(runtime, other), expected)
        runtime.free(other)
    other = runtime.open()
    runtime.embed(other, text)
    assert is_same(probe(runtime, other), expected)
    feed(runtime, sequence, some_tokens(runtime, 3))
    assert runtime.is_in_order(sequence)


def test_what_cannot_be_embedded_is_refused(runtime: CheckedRuntime) -> None:
    require(runtime, "embeddings")
    sequence = opened(runtime, some_tokens(runtime, CHUNK))
    with unchanged(runtime, sequence):
        for tokens in ([], [-1], [runtime.facts.vocab_size]):
            with pytest.raises(ValueError):
                runtime.embed(sequence, tokens)
        with pytest.raises((ValueError, OutOfCells)):
            runtime.embed(sequence, [1] * (runtime.facts.cells + 1))
        with pytest.raises(ValueError):
            runtime.embed(sequence + 1000, [1])


# -- threads ---------------------------------------------------------------------------------------


def test_a_runtime_loaded_in_one_thread_runs_in_another(load: Load) -> None:
    """A user interface loads where it does not block and a worker steps where it likes."""

    def in_thread(work: Callable[[], Any]) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(work).result()

    runtime, here = in_thread(load), load()
    tokens = some_tokens(here, CHUNK)
    sequence = in_thread(lambda: opened(runtime, tokens))
    if runtime.facts.can.evict:
        runtime.evict(sequence, 4, 10)
        in_thread(lambda: runtime.evict(sequence, 4, 10))
    if runtime.facts.can.snapshot:
        payload = in_thread(lambda: runtime.snapshot(sequence, 0, 50))
        runtime.restore(runtime.open(), payload, 50)
    other = runtime.open()
    assert (feed(runtime, other, tokens) == feed(here, here.open(), tokens)).all()
    ids = in_thread(lambda: runtime.tokenizer.encode("hi", add_special=False, parse_special=False))
    assert runtime.tokenizer.decode(ids) == "hi"
    in_thread(runtime.close)


# -- the end ---------------------------------------------------------------------------------------


def test_closing_twice_is_harmless(load: Load) -> None:
    runtime = load()
    opened(runtime, some_tokens(runtime, 5))
    runtime.close()
    runtime.close()  # nothing is freed twice: native code would end the process here


def test_runtimes_come_and_go(load: Load) -> None:
    found = []
    for _ in range(5):
        runtime = load(context=256, sequences=1)
        found.append(feed(runtime, runtime.open(), some_tokens(runtime, 20)))
        runtime.close()
    assert all((logits == found[0]).all() for logits in found)


def test_two_runtimes_live_side_by_side(load: Load) -> None:
    one, other = load(), load()
    mine, theirs = (opened(r, some_tokens(r, CHUNK)) for r in (one, other))
    with unchanged(one, mine):
        feed(other, theirs, some_tokens(other, 5))
        other.close()
