"""The starter in the torch backend: as llama.cpp predicts, and what 8-bit KV caches cost."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from edgeinfer.backend import Runtime, RuntimeSettings
from edgeinfer.engine.window import Window
from edgeinfer.measure.long_texts import stream
from edgeinfer.measure.texts import measured_text
from edgeinfer.quality.agreement import agreement
from edgeinfer.quality.predictions import perplexity
from edgeinfer.registry import get_backend
from edgeinfer_backends.torch import TorchBackend
from edgeinfer_models.conversion.conversion import convert, prepare_conversion
from edgeinfer_models.conversion.model import source_of_folder, source_of_gguf
from edgeinfer_models.model_files import ModelFiles

FOUND = TorchBackend().probe()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.skipif(not FOUND.usable, reason=f"torch: {FOUND.reason}"),
]
# One thread: two OpenMP runtimes in a process wait for each other's spinning threads.
SETTINGS = RuntimeSettings(
    context=512, logit_rows=64, threads=1, threads_batch=1, gpu_layers=0, load_as="f32"
)
TOKENS = 400


@pytest.fixture(scope="module")
def in_f16(starter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """To a Hugging Face folder and back: the same weights as F16."""
    folder = tmp_path_factory.mktemp("starter")
    convert(prepare_conversion(source_of_gguf(starter), "safetensors", "F16", folder / "smollm2"))
    model = source_of_folder(folder / "smollm2")
    convert(prepare_conversion(model, "gguf", "F16", folder / "smollm2-f16.gguf"))
    yield folder / "smollm2-f16.gguf"
    shutil.rmtree(folder)  # half a gigabyte


@contextmanager
def loaded(backend: str, path: Path, settings: RuntimeSettings = SETTINGS) -> Iterator[Runtime]:
    files = ModelFiles("starter", (path,), "gguf")
    if backend == "llamacpp":
        settings = replace(settings, load_as="auto")
    runtime = get_backend(backend).load(files, settings, lambda done: True)
    try:
        yield runtime
    finally:
        runtime.close()


def some_text(runtime: Runtime) -> list[int]:
    text = measured_text(None)[: 8 * TOKENS]
    return runtime.tokenizer.encode(text, add_special=False, parse_special=False)[:TOKENS]


def test_torch_predicts_what_llamacpp_does(in_f16: Path) -> None:
    with loaded("llamacpp", in_f16) as reference, loaded("torch", in_f16) as runtime:
        tokens = some_text(reference)
        assert some_text(runtime) == tokens
        found = agreement(runtime, reference, tokens)
    assert found.mean_kl <= 0.0005  # measured: 0.00000; the bar's bound is 0.005
    assert found.top1 >= 0.99
    assert perplexity(found.nll) < 30.0, "this is a text it should know"


@pytest.mark.parametrize(("kind", "most_kl"), [("int8", 0.002), ("fp8", 0.02)])
def test_what_8_bits_of_kv_cache_cost_is_bounded(starter: Path, kind: str, most_kl: float) -> None:
    """Measured over 1,000 tokens: 0.0008 and 0.008."""
    small = replace(SETTINGS, kv_type_k=kind, kv_type_v=kind)
    with loaded("torch", starter) as reference, loaded("torch", starter, small) as runtime:
        found = agreement(runtime, reference, some_text(reference))
        share = runtime.facts.kv_bytes_per_token / reference.facts.kv_bytes_per_token
    assert 0.0 < found.mean_kl <= most_kl
    assert found.top1 >= 0.94
    assert share == pytest.approx((64 + 4) / 128)


def test_a_quarter_of_the_cache_with_heavy_hitters_still_reads_a_text(starter: Path) -> None:
    with loaded("torch", starter, replace(SETTINGS, heavy_hitters=True)) as runtime:
        tokens = some_text(runtime)
        whole = stream(runtime, tokens, Window(512, 4))
        small = stream(runtime, tokens, Window(100, 4, "h2o"))
        blind = stream(runtime, tokens, Window(100, 0))
    assert small.evicted > 0 and max(small.used_cells) <= 100
    assert perplexity(small.nll) < 1.4 * perplexity(whole.nll) < perplexity(blind.nll)
