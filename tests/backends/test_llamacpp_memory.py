"""The predicted buffers against llama.cpp's own figures: contexts that are planned and not allocated."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.shapes import SHAPES, write_shape
from edgeinfer.backend import KvLayout, MemoryItem, RuntimeSettings
from edgeinfer.registry import get_backend
from edgeinfer_backends.llamacpp.native import _context_params, _layout, _memory_items
from edgeinfer_backends.llamacpp.prediction import native_sequences, num_logit_rows
from edgeinfer_models.resolve import ResolvedModel, resolve_model
from tests.fixtures_gguf import write_tiny_gguf

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

BASE = RuntimeSettings(context=4096, logit_rows=16, threads=1, threads_batch=1, gpu_layers=0)
SETTINGS = {
    "default": BASE,
    "small": replace(BASE, context=1024),
    "large": replace(BASE, context=16384),
    "short steps": replace(BASE, step_tokens=128),
    "many rows": replace(BASE, logit_rows=128),
    "q8_0": replace(BASE, kv_type_k="q8_0", kv_type_v="q8_0"),
    "four": replace(BASE, sequences=4, logit_rows=32),
    "four, shared": replace(BASE, sequences=4, logit_rows=32, kv_layout="shared"),
    "four, small, many rows": replace(BASE, sequences=4, logit_rows=128, context=1024),
    "no flash attention": replace(BASE, flash_attention=False),
    "no flash attention, large": replace(BASE, flash_attention=False, context=16384),
}


def write_experts(path: Path) -> Path:
    """Eight experts, of which two are used."""
    import numpy as np

    layers, hidden, wide, experts = 3, 256, 512, 8
    shapes = {
        "gate_inp": (experts, hidden),
        "gate_exps": (experts, wide, hidden),
        "up_exps": (experts, wide, hidden),
        "down_exps": (experts, hidden, wide),
    }
    tensors: dict[str, Any] = {}
    for layer in range(layers):
        for name in ("gate", "up", "down"):
            tensors[f"blk.{layer}.ffn_{name}.weight"] = None
        for name, shape in shapes.items():
            tensors[f"blk.{layer}.ffn_{name}.weight"] = np.zeros(shape, np.float32)
    counts = {"llama.expert_count": experts, "llama.expert_used_count": 2}
    form = {"layers": layers, "hidden": hidden, "heads": 4, "kv_heads": 2, "head_dim": 64}
    return write_tiny_gguf(
        path, feed_forward=wide, weight_type="F32", metadata=counts, tensors=tensors, **form
    )


Make = Callable[[Path], Path]
MODELS: dict[str, Make] = {
    "llama": lambda path: write_tiny_gguf(path, layers=3, hidden=512, heads=8, kv_heads=2, head_dim=64,
                                          feed_forward=2048),
    "qwen3": lambda path: write_tiny_gguf(path, arch="qwen3", layers=4, hidden=256, heads=8, kv_heads=2,
                                          head_dim=64, feed_forward=1024),
    "gemma3": lambda path: write_tiny_gguf(path, arch="gemma3", tokenizer="spm", layers=7, hidden=256,
                                           heads=4, kv_heads=1, head_dim=128, feed_forward=1536),
    "small": lambda path: write_tiny_gguf(path),
    "experts": write_experts,
}  # fmt: skip
# llama.cpp's compute buffer has holes, whose size depends on the order of the graph's tensors: the
# formula may be this much too small, or too large, as shares of it.
TOO_SMALL, TOO_LARGE = 0.04, 0.20


@pytest.fixture(scope="module", params=[*MODELS, "starter's vocabulary"])
def planned(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, starter: Path
) -> Iterator[tuple[ResolvedModel, Any, Any]]:
    """A model's header, the library and the model as it would be loaded."""
    from edgeinfer_backends.llamacpp.library import library

    path = tmp_path_factory.mktemp("planned") / "model.gguf"
    if request.param in MODELS:
        MODELS[request.param](path)
    else:
        write_shape(path, SHAPES["tiny"], starter)
    lib = library()
    params = lib.llama_model_default_params()
    params.no_alloc = True
    params.load_mode = 0
    params.n_gpu_layers = 0
    paths = (ctypes.c_char_p * 1)(str(path).encode())
    model = lib.llama_model_load_from_splits(paths, 1, params)
    assert model
    yield resolve_model(str(path)), lib, model
    lib.llama_model_free(model)


def said(lib: Any, model: Any, settings: RuntimeSettings) -> dict[str, int]:
    from edgeinfer_backends.llamacpp.library import native_log

    native_log.clear()
    params, _flag = _context_params(lib, settings, _layout(lib, model, settings))
    context = lib.llama_init_from_model(model, params)
    assert context, native_log.reason()
    lib.llama_free(context)
    return {item.name: item.num_bytes for item in _memory_items(native_log.size_lines())}


def predicted(model: ResolvedModel, settings: RuntimeSettings) -> list[MemoryItem]:
    return get_backend("llamacpp").predict_memory(model.files, model.config, settings)


@pytest.mark.parametrize("what", SETTINGS)
def test_the_compute_buffer_is_what_llama_cpp_reserves(
    planned: tuple[ResolvedModel, Any, Any], what: str
) -> None:
    model, lib, native = planned
    settings = SETTINGS[what]
    real = said(lib, native, settings)
    (compute,) = [i.num_bytes for i in predicted(model, settings) if i.name == "compute"]
    assert real["compute"] * (1 - TOO_SMALL) <= compute <= real["compute"] * (1 + TOO_LARGE)
    # At first for a row of each sequence; it grows once, to the most rows of a step.
    (logits,) = [i.num_bytes for i in predicted(model, settings) if i.name == "logits"]
    least = native_sequences(settings, _layout(lib, native, settings) == "private")
    at_first = logits * least / num_logit_rows(settings)
    assert real.get("logits", 0) == pytest.approx(at_first, abs=16 * 1024)


@pytest.mark.parametrize(
    ("sequences", "layout", "cells"), [(1, "private", 512), (4, "private", 2048), (1, "shared", 2048)]
)
def test_copies_are_of_a_sequence_or_of_blocks_of_a_lone_one(
    planned: tuple[ResolvedModel, Any, Any], sequences: int, layout: KvLayout, cells: int
) -> None:
    model = planned[0]
    settings = replace(BASE, context=2048, sequences=sequences, kv_layout=layout)
    (copies,) = [i.num_bytes for i in predicted(model, settings) if i.name == "copies"]
    per_token = model.config.kv_bytes_per_token(settings.kv_type_k, settings.kv_type_v)
    assert copies == cells * per_token


WEIGHTS: dict[str, dict[str, Any]] = {
    "F16, mapped": {"weight_type": "F16"},
    "Q4_0, read and repacked": {"weight_type": "Q4_0"},
    "Q8_0, mapped": {"weight_type": "Q8_0"},
    "Q4_0, embeddings are the output": {"weight_type": "Q4_0", "tensors": {"output.weight": None}},
    "Gemma": {"arch": "gemma3", "tokenizer": "spm", "layers": 7, "weight_type": "Q8_0"},
}


@pytest.mark.parametrize("what", WEIGHTS)
@pytest.mark.parametrize(("kv_type", "sequences"), [("f16", 1), ("q8_0", 3)])
def test_weights_and_cache_are_where_and_as_large_as_llama_cpp_says(
    tmp_path: Path, what: str, kv_type: str, sequences: int
) -> None:
    form = {"layers": 3, "hidden": 256, "feed_forward": 512, **WEIGHTS[what]}
    path = write_tiny_gguf(tmp_path / "model.gguf", **form)
    model = resolve_model(str(path))
    settings = replace(
        BASE, context=1024, sequences=sequences, kv_type_k=kv_type, kv_type_v=kv_type, logit_rows=32
    )
    runtime = get_backend("llamacpp").load(model.files, settings, lambda done: True)
    real = {(i.name, i.form): i.num_bytes for i in runtime.memory() if i.name in ("weights", "kv cache")}
    runtime.close()
    wanted = {
        (i.name, i.form): i.num_bytes
        for i in predicted(model, settings)
        if i.name in ("weights", "kv cache")
    }
    # llama.cpp says hundredths of a MiB, and what a mapping's first and last page leave out.
    assert real == pytest.approx(wanted, abs=16 * 1024)


def test_a_gpu_gets_the_last_layers_and_then_the_output(tmp_path: Path) -> None:
    from edgeinfer.backend import Device

    model = resolve_model(str(write_tiny_gguf(tmp_path / "model.gguf", layers=4)))
    gpu = (Device("card", "gpu", 2**30, 2**30),)

    def on_gpu(layers: int, name: str) -> int:
        items = get_backend("llamacpp").predict_memory(
            model.files, model.config, replace(BASE, gpu_layers=layers), gpu
        )
        return sum(i.num_bytes for i in items if i.device == "gpu" and i.name == name)

    weights = [on_gpu(layers, "weights") for layers in range(6)]
    caches = [on_gpu(layers, "kv cache") for layers in range(6)]
    layer = weights[2] - weights[1]
    assert weights[0] == caches[0] == caches[1] == on_gpu(0, "compute") == 0
    assert weights[1] > 0  # the output
    assert [b - a for a, b in pairwise(weights[1:])] == [layer] * 4
    assert caches[5] == 4 * caches[2] > 0
    assert (on_gpu(-1, "weights"), on_gpu(99, "weights")) == (weights[5], weights[5])


def test_as_many_sequences_as_can_be_asked_for_do_not_abort_the_process(tmp_path: Path) -> None:
    """llama.cpp asserts that a step may have a row for each of its sequences."""
    model = resolve_model(str(write_tiny_gguf(tmp_path / "model.gguf")))
    settings = replace(BASE, context=256, sequences=64, logit_rows=16)
    runtime = get_backend("llamacpp").load(model.files, settings, lambda done: True)
    assert runtime.facts.max_logit_rows == 16
    runtime.close()
