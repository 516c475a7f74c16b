"""Large steps over a quantized KV cache: unpacked for tiled attention, or said to be slow."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgeinfer.backend import KvLayout, RuntimeSettings, SequenceStep, Step
from edgeinfer.errors import StepAborted
from edgeinfer.registry import get_backend
from edgeinfer_backends.llamacpp import native, unpacked_kv
from edgeinfer_backends.llamacpp.prediction import TILE
from edgeinfer_backends.llamacpp.runtime import LlamaCppRuntime
from edgeinfer_models.resolve import resolve_model
from tests.fixtures_gguf import write_tiny_gguf

LAYERS = 3
LAYOUTS: list[KvLayout] = ["shared", "private"]
TOKENS = [(7 * i) % 250 + 5 for i in range(400)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    return write_tiny_gguf(
        folder / "tiny.gguf", layers=LAYERS, hidden=128, heads=4, kv_heads=2, head_dim=64
    )


def load(path: Path, k: str, v: str, layout: KvLayout = "private", **more: Any) -> LlamaCppRuntime:
    files = resolve_model(str(path)).files
    settings = RuntimeSettings(
        context=512, sequences=2, kv_type_k=k, kv_type_v=v, kv_layout=layout, threads=2, **more
    )
    runtime = get_backend("llamacpp").load(files, settings, lambda _: True)
    assert isinstance(runtime, LlamaCppRuntime)
    return runtime


def slow(monkeypatch: pytest.MonkeyPatch, path: Path, k: str, v: str, **more: Any) -> LlamaCppRuntime:
    """As llama.cpp does it alone."""
    with monkeypatch.context() as patched:
        patched.setattr(unpacked_kv, "_context_parameters", lambda: None)
        return load(path, k, v, **more)


def after(runtime: LlamaCppRuntime, *chunks: int) -> npt.NDArray[np.float32]:
    """The logits after TOKENS[: sum(chunks)], read in chunks; then after one more token."""
    sequence, start = runtime.open(), 0
    for count in chunks:
        runtime.forward(Step([SequenceStep(sequence, TOKENS[start : start + count])]))
        start += count
    found = [runtime.logits(0).copy()]
    runtime.forward(Step([SequenceStep(sequence, [TOKENS[start]])]))
    found.append(runtime.logits(0).copy())
    runtime.check_integrity()
    runtime.free(sequence)
    return np.stack(found)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("k", "v"),
    [
        *((kind, kind) for kind in native.KV_TYPES if kind not in ("f16", "f32")),
        ("q8_0", "f16"),
        ("f16", "q4_0"),
        ("bf16", "q5_1"),
    ],
)
def test_a_large_step_reads_what_llamacpp_would_have_read(
    monkeypatch: pytest.MonkeyPatch, model: Path, k: str, v: str, layout: KvLayout
) -> None:
    quick, plain = load(model, k, v, layout), slow(monkeypatch, model, k, v, layout=layout)
    unquantized = load(model, "f16", "f16", layout)
    found, expected = after(quick, 200), after(plain, 200)
    assert quick._unpacked is not None
    assert (quick._unpacked.num_unpacked, quick._unpacked.num_refused) == (LAYERS, 0)
    # llama.cpp rounds the queries to 8 bits besides, so the two differ as q8_0 differs from f16; rows
    # of another layer, head or position would differ by as much as the logits themselves.
    apart = np.abs(found - expected).max()
    assert apart < 0.05 * np.abs(expected).max()
    true = after(unquantized, 200)
    assert np.abs(found - true).mean() < 1.2 * np.abs(expected - true).mean() + 1e-3
    for runtime in (quick, plain, unquantized):
        runtime.close()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_however_a_prompt_is_cut_the_results_are_the_same(
    tmp_path: Path, kind: str, layout: KvLayout
) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", hidden=128, head_dim=64, weight_type="Q4_0")
    runtime = load(path, kind, kind, layout, threads_batch=1)
    whole = after(runtime, 300)
    for chunks in ((64, 236), (128, 64, 108), (100, 100, 100)):
        assert np.array_equal(after(runtime, *chunks), whole), chunks
    runtime.close()


def test_only_large_steps_are_looked_at(model: Path) -> None:
    """llama.cpp asks Python about each node of a step's graph only where that pays."""
    runtime = load(model, "q8_0", "q8_0")
    unpacked = runtime._unpacked
    assert unpacked is not None
    asked: list[int] = []
    look = unpacked._unpack_for
    unpacked._unpack_for = lambda node: (asked.append(1), look(node))[1]  # type: ignore[method-assign,func-returns-value]
    sequence = runtime.open()
    runtime.forward(Step([SequenceStep(sequence, TOKENS[: TILE - 1])]))
    runtime.forward(Step([SequenceStep(sequence, TOKENS[:1])]))
    assert not asked
    runtime.forward(Step([SequenceStep(sequence, TOKENS[:TILE])]))
    assert len(asked) == LAYERS
    runtime.forward(Step([SequenceStep(sequence, TOKENS[:1])]))
    assert len(asked) == LAYERS
    runtime.close()


def test_a_step_of_short_parts_is_left_as_it_is(model: Path) -> None:
    """In streams of their own: none of them has a tile of rows."""
    runtime = load(model, "q8_0", "q8_0")
    one, other = runtime.open(), runtime.open()
    runtime.forward(Step([SequenceStep(one, TOKENS[:40]), SequenceStep(other, TOKENS[:40])]))
    unpacked = runtime._unpacked
    assert unpacked is not None
    assert (unpacked.num_unpacked, unpacked.num_refused) == (0, 0)
    runtime.check_integrity()
    runtime.close()


def test_large_parts_of_two_streams_are_right_if_slow(
    monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    runtime, plain = load(model, "q8_0", "q8_0"), slow(monkeypatch, model, "q8_0", "q8_0")
    found = []
    for each in (runtime, plain):
        one, other = each.open(), each.open()
        each.forward(Step([SequenceStep(one, TOKENS[:80]), SequenceStep(other, TOKENS[80:160])]))
        found.append(np.stack([each.logits(0), each.logits(1)]))
    assert np.abs(found[0] - found[1]).max() < 0.05 * np.abs(found[1]).max()
    for each in (runtime, plain):
        each.close()


def test_a_graph_that_is_used_again_is_still_right(model: Path) -> None:
    """The same number of tokens and cells: llama.cpp keeps the graph it has, changed as it is."""
    runtime = load(model, "q8_0", "q8_0")
    first, again = after(runtime, 200), after(runtime, 200)
    assert np.array_equal(first, again)
    sequence = runtime.open()
    runtime.forward(Step([SequenceStep(sequence, TOKENS[:100])]))
    runtime.rewind(sequence, 0)
    runtime.forward(Step([SequenceStep(sequence, TOKENS[100:200])]))
    runtime.rewind(sequence, 0)
    runtime.forward(Step([SequenceStep(sequence, TOKENS[:100])]))
    again = runtime.logits(0).copy()
    runtime.free(sequence)
    assert np.array_equal(after(runtime, 100)[0], again)
    runtime.close()


def test_a_step_that_was_interrupted_is_taken_again(model: Path) -> None:
    runtime = load(model, "q8_0", "q8_0")
    expected = after(runtime, 300)
    sequence = runtime.open()
    stop = threading.Event()

    def interrupt() -> None:
        while not stop.is_set():
            runtime.abort()

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(StepAborted):
        for _ in range(1000):
            runtime.forward(Step([SequenceStep(sequence, TOKENS[:300])]))
            runtime.rewind(sequence, 0)
    stop.set()
    interrupter.join()
    assert runtime.length(sequence) == 0
    runtime.free(sequence)
    assert np.array_equal(after(runtime, 300), expected)
    runtime.close()


def test_where_tokens_leave_and_a_prompt_follows_the_keys_are_those_moved(
    monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    runtime, plain = load(model, "q8_0", "q8_0"), slow(monkeypatch, model, "q8_0", "q8_0")
    found = []
    for each in (runtime, plain):
        sequence = each.open()
        each.forward(Step([SequenceStep(sequence, TOKENS[:300])]))
        each.evict(sequence, 4, 132)
        each.forward(Step([SequenceStep(sequence, TOKENS[300:400])]))
        found.append(each.logits(0).copy())
        each.check_integrity()
        each.close()
    assert np.abs(found[0] - found[1]).max() < 0.05 * np.abs(found[1]).max()


def test_a_sliding_window_is_read_the_same_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write_tiny_gguf(
        tmp_path / "tiny.gguf", arch="gemma3", tokenizer="spm", layers=6, hidden=128, head_dim=64
    )
    runtime, plain = load(path, "q8_0", "q8_0", "auto"), slow(monkeypatch, path, "q8_0", "q8_0")
    found, expected = after(runtime, 200), after(plain, 200)
    assert runtime._unpacked is not None
    assert (runtime._unpacked.num_unpacked, runtime._unpacked.num_refused) == (6, 0)
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    for each in (runtime, plain):
        each.close()


def _without_the_symbol(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(unpacked_kv, "_context_parameters", lambda: None)


def _with_tensors_of_another_form(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(unpacked_kv, "_OBJECT_BYTES", 24)


def _with_the_callback_elsewhere(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(unpacked_kv, "_WORDS", 4)


def _with_another_graph(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(unpacked_kv, "_PERMUTATION", (0, 1, 2, 3))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "change",
    [
        _without_the_symbol,
        _with_tensors_of_another_form,
        _with_the_callback_elsewhere,
        _with_another_graph,
    ],
)
def test_a_llamacpp_of_another_form_is_slow_and_said_to_be(
    monkeypatch: pytest.MonkeyPatch, model: Path, layout: KvLayout, change: Any
) -> None:
    usual = load(model, "q8_0", "q8_0", layout)
    assert usual.facts.warnings == ()
    with monkeypatch.context() as patched:
        change(patched)
        runtime = load(model, "q8_0", "q8_0", layout)
    (warning,) = runtime.facts.warnings
    assert "q8_0/q8_0" in warning
    assert "--kv-type f16" in warning
    expected = after(usual, 200)
    assert np.abs(after(runtime, 200) - expected).max() < 0.05 * np.abs(expected).max()
    assert "unpacked" not in {item.name for item in runtime.memory()}
    usual.close()
    runtime.close()


def test_f16_needs_none_of_it(model: Path) -> None:
    runtime = load(model, "f16", "f16")
    assert runtime._unpacked is None
    assert runtime.facts.warnings == ()
    runtime.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_its_memory_is_in_the_ledger(model: Path, layout: KvLayout) -> None:
    runtime = load(model, "q8_0", "q8_0", layout)
    resolved = resolve_model(str(model))
    settings = RuntimeSettings(
        context=512, sequences=2, kv_type_k="q8_0", kv_type_v="q8_0", kv_layout=layout, threads=2
    )
    predicted = get_backend("llamacpp").predict_memory(resolved.files, resolved.config, settings)
    (told,) = [item.num_bytes for item in runtime.memory() if item.name == "unpacked"]
    (foreseen,) = [item.num_bytes for item in predicted if item.name == "unpacked"]
    assert told == foreseen
    # keys and values of 2 heads of 64, in f32, of the cells that a row sees
    cells = runtime.facts.cells // (2 if layout == "private" else 1)
    assert told == 2 * 2 * 64 * 4 * cells
    runtime.close()
