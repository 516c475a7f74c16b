"""Every family in torch: the logits that transformers makes of the same tiny random checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgeinfer_models.conversion.model import source_of_folder
from tests.fixtures_families import CONFIGS, LONGROPE, full, write_folder

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
