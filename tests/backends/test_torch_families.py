"""Every family in torch: the logits that transformers makes of the same tiny random checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgeinfer.backend import RuntimeSettings, SequenceStep, Step
from edgeinfer_models.conversion.model import source_of_folder, source_of_gguf
from tests.fixtures_families import (
    CONFIGS,
    LONGROPE,
    converted,
    full,
    llama_cpp_logits,
    shape_of,
    write_folder,
)

torch = pytest.importorskip("torch")

CONTEXT = 256
# Beyond what the GGUF tests have: what llama.cpp leaves out or has no name for.
MORE: dict[str, dict[str, Any]] = {
    "llama linear": {
        "model_type": "llama",
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "llama yarn": {
        "model_type": "llama",
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama yarn with a factor of its own": {
        "model_type": "llama",
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "attention_factor": 1.4,
        },
    },
    "llama yarn with two scales": {
        "model_type": "llama",
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "mscale": 0.707,
            "mscale_all_dim": 1.2,
        },
    },
    "mistral with a window": {"model_type": "mistral", "sliding_window": 8},
    "phi3 with a window": {
        "model_type": "phi3",
        "sliding_window": 8,
        "original_max_position_embeddings": 256,
    },
    "phi3 of partial heads": {
        "model_type": "phi3",
        "sliding_window": None,
        "partial_rotary_factor": 0.75,
        "head_dim": 16,
        "original_max_position_embeddings": 256,
    },
    "phi3 long, past the original context": {
        "model_type": "phi3",
        "rope_scaling": LONGROPE,
        "original_max_position_embeddings": 32,
    },
}


def transformers_logits(
    folder: Path, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> npt.NDArray[np.float32]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        found: npt.NDArray[np.float32] = model(torch.tensor([tokens])).logits[0].numpy()
    return found


def torch_logits(folder: Path, tokens: list[int], context: int) -> npt.NDArray[np.float32]:
    from edgeinfer_backends.torch.layers import LayerAccess
    from edgeinfer_backends.torch.weights import load_decoder

    cpu = torch.device("cpu")
    decoder = load_decoder(source_of_folder(folder), torch.float32, cpu, "plain", lambda _: True)
    decoder.set_context(context, cpu)
    layers = LayerAccess(decoder, cpu, torch.float32, context)
    states = layers.embed([tokens])
    for layer in range(layers.num_layers):
        states = layers.run(layer, states)
    return layers.head(states)[0]


def runtime_of(folder: Path, context: int, *, heavy_hitters: bool) -> Any:
    """f32 throughout, and without a tokenizer, which these folders lack."""
    from edgeinfer_backends.torch.number_types import NumberTypes
    from edgeinfer_backends.torch.runtime import TorchRuntime
    from edgeinfer_backends.torch.weights import load_decoder

    cpu = torch.device("cpu")
    decoder = load_decoder(source_of_folder(folder), torch.float32, cpu, "plain", lambda _: True)
    settings = RuntimeSettings(
        context=context,
        sequences=2,
        logit_rows=64,
        kv_type_k="f32",
        kv_type_v="f32",
        threads=1,
        threads_batch=1,
        heavy_hitters=heavy_hitters,
    )
    no_tokenizer: Any = None
    types = NumberTypes("f32", "plain")
    return TorchRuntime(decoder, no_tokenizer, settings, cpu, torch.float32, types, {})


@pytest.mark.parametrize("config", [*CONFIGS.values(), *MORE.values()], ids=[*CONFIGS, *MORE])
def test_torch_computes_what_transformers_does(
    config: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**full(config), "pad_token_id": 0}
    folder = write_folder(tmp_path / "model", config)
    tokens = np.random.default_rng(3).integers(3, 290, 40).tolist()
    expected = transformers_logits(folder, tokens, monkeypatch)
    # LongRoPE's factors go by the context there is; transformers goes by the text's length.
    original = config.get("original_max_position_embeddings", CONTEXT)
    context = CONTEXT if len(tokens) > original else min(original, CONTEXT)
    found = torch_logits(folder, tokens, context)
    assert np.abs(expected).max() > 0.1
    assert np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize("heavy_hitters", [False, True])
@pytest.mark.parametrize("config", [*CONFIGS.values(), *MORE.values()], ids=[*CONFIGS, *MORE])
def test_a_cache_changes_nothing_of_what_a_family_computes(
    config: Mapping[str, Any], heavy_hitters: bool, tmp_path: Path
) -> None:
    """However a text is cut, beside another sequence; and keys that move down are those of their new
    positions."""
    config = {**full(config), "pad_token_id": 0}
    folder = write_folder(tmp_path / "model", config)
    tokens = np.random.default_rng(3).integers(3, 290, 60).tolist()
    expected = torch_logits(folder, tokens, CONTEXT)
    runtime = runtime_of(folder, CONTEXT, heavy_hitters=heavy_hitters)
    one, other = runtime.open(), runtime.open()
    found = []
    for count in (13, 1, 1, 7, 20, 1, 1, 16):
        at = runtime.length(one)
        parts = [SequenceStep(other, [5], "none"), SequenceStep(one, tokens[at : at + count], "all")]
        start = runtime.forward(Step(parts)).starts[1]
        found += [runtime.logits(start + row).copy() for row in range(count)]
    assert np.abs(np.stack(found) - expected).max() < 1e-4
    runtime.evict(one, 4, 14)
    fresh = runtime.open()
    runtime.forward(Step([SequenceStep(fresh, tokens[:4] + tokens[14:], "none")]))
    # The first layer's keys depend on a token and its position alone.
    moved, read = (runtime._sequences[each].rows(0, 0, 50)[0].numbers for each in (one, fresh))
    assert torch.allclose(moved, read, atol=1e-5)
    runtime.close()


IN_LLAMA_CPP = [name for name in MORE if "window" not in name and "past the original" not in name]


@pytest.mark.parametrize("name", IN_LLAMA_CPP)
def test_what_mlx_lm_has_no_name_for_is_the_same_in_llama_cpp(name: str, tmp_path: Path) -> None:
    config = {**full(MORE[name]), "pad_token_id": 0}
    folder = write_folder(tmp_path / "model", config)
    tokens = np.random.default_rng(3).integers(3, 290, 40).tolist()
    found = llama_cpp_logits(converted(folder, config), tokens)
    assert np.abs(found - torch_logits(folder, tokens, CONTEXT)).max() < 1e-4


@pytest.mark.parametrize("name", ["llama yarn", "llama yarn with a factor of its own"])
def test_yarn_comes_back_from_gguf(name: str, tmp_path: Path) -> None:
    config = full(MORE[name])
    shape = shape_of(config)
    again = source_of_gguf(converted(write_folder(tmp_path / "model", config), config)).shape
    factor = shape.rope.scaling.attention_factor if shape.rope.scaling else 0.0
    assert again.rope.scaling is not None
    assert again.rope.scaling.attention_factor == pytest.approx(factor, rel=1e-5)
    assert replace(again.rope.scaling, attention_factor=factor) == shape.rope.scaling


@pytest.mark.parametrize("name", CONFIGS)
def test_its_f16_gguf_computes_the_same_in_llama_cpp(name: str, tmp_path: Path) -> None:
    """llama.cpp rounds what it multiplies with F16 weights to F16: logits of 2.5 are within 0.02."""
    config = {**full(CONFIGS[name]), "pad_token_id": 0}
    folder = write_folder(tmp_path / "model", config, "float16")
    tokens = np.random.default_rng(3).integers(3, 290, 40).tolist()
    expected = torch_logits(folder, tokens, CONTEXT)
    found = llama_cpp_logits(converted(folder, config, "F16"), tokens)
    assert np.abs(found - expected).max() < 0.02
