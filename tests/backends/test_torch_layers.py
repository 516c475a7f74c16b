"""Single layers, in memory and read as they are used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeinfer.backend import LayeredModel, RuntimeSettings
from edgeinfer.errors import LoadFailed
from edgeinfer.registry import get_backend
from edgeinfer_models.model_files import ModelFiles
from tests.fixtures_hf import write_tiny_folder

torch = pytest.importorskip("torch")

TOKENS = ((5, 9, 30, 2, 41, 7), (3, 3, 12, 60, 8, 1))


@pytest.fixture(params=["llama", "qwen3"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> ModelFiles:
    folder = write_tiny_folder(tmp_path / "tiny", model_type=request.param)
    return ModelFiles("tiny", tuple(sorted(folder.glob("*.safetensors"))), "safetensors")


@pytest.fixture
def streamed(files: ModelFiles) -> Iterator[LayeredModel]:
    found = get_backend("torch").open_layers(files, 64)
    yield found
    found.close()


def through(layers: Any) -> np.ndarray:
    states = layers.embed(TOKENS)
    for layer in range(layers.num_layers):
        states = layers.run(layer, states)
    return layers.head(states)


def test_layers_that_are_read_as_they_are_used_compute_the_same(
    files: ModelFiles, streamed: LayeredModel
) -> None:
    runtime: Any = get_backend("torch").load(files, RuntimeSettings(context=64), lambda _: True)
    try:
        assert np.array_equal(through(streamed.layers), through(runtime.layers()))
    finally:
        runtime.close()
    assert np.array_equal(through(streamed.layers), through(streamed.layers))


def test_only_the_layer_that_is_used_is_in_memory(streamed: LayeredModel) -> None:
    layers: Any = streamed.layers
    through(layers)
    layers.run(1, layers.embed(TOKENS))
    held = {
        name.split(".")[1] if name.startswith("layers.") else name
        for name, parameter in layers._decoder.named_parameters()
        if not parameter.is_meta
    }
    assert held == {"1"}
    streamed.close()
    assert all(parameter.is_meta for parameter in layers._decoder.parameters())


def test_what_replaced_a_matrix_goes_with_its_layer(streamed: LayeredModel) -> None:
    layers = streamed.layers
    states = layers.embed(TOKENS)
    before = layers.run(0, states)
    name = layers.matrices(0)[0]
    layers.replace(0, name, np.zeros_like(layers.weight(0, name)))
    assert not np.array_equal(layers.run(0, states), before)
    layers.run(1, states)
    assert np.array_equal(layers.run(0, states), before)


def test_matrices_that_are_given_the_same_share_an_array(streamed: LayeredModel) -> None:
    _, captured = streamed.layers.capture(0, streamed.layers.embed(TOKENS))
    q, k, v = (captured[f"self_attn.{name}_proj"] for name in "qkv")
    assert q is k and k is v
    assert captured["self_attn.o_proj"] is not q
    assert captured["mlp.gate_proj"] is captured["mlp.up_proj"]


def test_the_head_has_a_slope(streamed: LayeredModel) -> None:
    layers = streamed.layers
    states = layers.embed(TOKENS)
    logits = layers.head(states)
    gradient = np.random.default_rng(1).standard_normal(logits.shape).astype(np.float32)
    slope = layers.differentiate_head(states, gradient)
    moved = np.random.default_rng(2).standard_normal(states.shape).astype(np.float32) * 1e-3
    lost = (layers.head(states + moved) - layers.head(states - moved)) / 2
    assert float((lost * gradient).sum()) == pytest.approx(float((slope * moved).sum()), rel=2e-2)
    with pytest.raises(ValueError, match="shape"):
        layers.differentiate_head(states, gradient[..., :-1])


def test_files_that_are_no_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\0" * 64)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LoadFailed):
        get_backend("torch").open_layers(ModelFiles("broken", (path,), "safetensors"), 64)
