"""Every family: its numbers and tensors both ways, and its GGUF computes what its folder does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgeinfer.errors import ModelFileInvalid, UnsupportedModel
from edgeinfer_models.conversion.sources import GgufSource
from edgeinfer_models.conversion.to_safetensors import write_safetensors
from edgeinfer_models.families import NAMES, family, family_of_config, family_of_gguf
from edgeinfer_models.families.changes import pair_rows, part_rows
from edgeinfer_models.families.shape import DecoderShape
from edgeinfer_models.gguf_header import read_gguf_header
from tests.fixtures_families import (
    CONFIGS,
    SMALL,
    converted,
    full,
    llama_cpp_logits,
    shape_of,
    write_folder,
)

EACH = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def read_back(path: Path) -> tuple[DecoderShape, GgufSource]:
    header = read_gguf_header(path)
    found = family_of_gguf(header)
    plain = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
    factors = {
        name: np.fromfile(
            path, "<f4", tensor.elements, offset=header.data_offset + tensor.offset
        ).tolist()
        for name in plain
        if (tensor := header.tensor(name)) is not None
    }
    shape = found.shape_from_gguf(header, factors)
    return shape, GgufSource(header, found.rules(shape))


# -- numbers ---------------------------------------------------------------------------------------


def test_every_family_has_a_configuration_here() -> None:
    assert {shape_of(full(config)).family for config in CONFIGS.values()} == set(NAMES)


@EACH
def test_a_configuration_comes_back_from_its_own_config_json(config: dict[str, Any]) -> None:
    shape = shape_of(full(config))
    again = family(shape.family).shape_to_hf(shape)
    assert shape_of(json.loads(json.dumps(again))) == shape


@EACH
def test_a_configuration_comes_back_from_gguf(config: dict[str, Any], tmp_path: Path) -> None:
    config = full(config)
    shape = shape_of(config)
    found, _ = read_back(converted(write_folder(tmp_path / "model", config), config))
    if shape.family == "mistral":  # a Llama there
        shape = replace(shape, family="llama")
    assert replace(found, rope=shape.rope) == shape
    assert found.rope.base == shape.rope.base and found.rope.dim == shape.rope.dim
    scaling, expected = found.rope.scaling, shape.rope.scaling
    assert (scaling is None) == (expected is None)
    if scaling is not None and expected is not None:
        assert (scaling.kind, scaling.original_context) == (expected.kind, expected.original_context)
        assert np.allclose(scaling.long_factors, expected.long_factors)


# -- tensors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@EACH
def test_tensors_come_back_from_gguf_bit_for_bit(
    config: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    config = full(config)
    folder = write_folder(tmp_path / "model", config, dtype)
    shape, source = read_back(converted(folder, config, "F32" if dtype == "float32" else "F16"))
    rules = family(shape.family).rules(shape)
    out = tmp_path / "back"
    back_dtype = "F32" if dtype == "float32" else "F16"
    write_safetensors(out, source, rules, {"config.json": json.dumps(config)}, dtype=back_dtype)
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    offset = {name for rule in rules if rule.change == "add_one" for name in rule.hf}
    for name, values in before.items():
        if name in offset:
            assert np.allclose(values, after[name], atol=1e-3 if dtype == "float16" else 1e-6)
        else:
            assert np.array_equal(values, after[name]), name


def test_rows_are_paired_as_rope_turns_them() -> None:
    rows = np.arange(2 * 6 * 3).reshape(12, 3)
    paired = pair_rows(rows, 2)
    assert paired[:, 0].tolist() == [0, 9, 3, 12, 6, 15, 18, 27, 21, 30, 24, 33]
    assert np.array_equal(part_rows(paired, 2), rows)


# -- what they compute -----------------------------------------------------------------------------


def mlx_logits(folder: Path, config: Mapping[str, Any], tokens: list[int]) -> npt.NDArray[np.float32]:
    mx = pytest.importorskip("mlx.core")
    from mlx_lm.utils import load_model

    with mx.stream(mx.cpu):
        model, _ = load_model(folder)
        return np.array(model(mx.array([tokens]))[0].astype(mx.float32))


@EACH
def test_its_gguf_computes_what_mlx_lm_makes_of_its_folder(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config = full(config)
    folder = write_folder(tmp_path / "model", config)
    tokens = np.random.default_rng(3).integers(3, 290, 40).tolist()
    expected = mlx_logits(folder, config, tokens)
    found = llama_cpp_logits(converted(folder, config), tokens)
    name = config["model_type"]
    if name == "gemma2":  # mlx-lm has no sliding window there
        expected, found = expected[:8], found[:8]
    assert np.abs(expected).max() > 0.1
    # llama.cpp looks Gemma's GELU up in a table of f16.
    assert np.abs(found - expected).max() < (5e-3 if name.startswith("gemma") else 1e-4)


# -- what cannot be --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"hidden_size": "64"}, "'hidden_size' is '64'"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "do not share 3 heads"),
        ({"rms_norm_eps": float("nan")}, "'rms_norm_eps' is nan"),
        ({"rope_theta": 0}, "'rope_theta' is 0"),
        ({"rope_scaling": [1]}, "not an object"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "'factor' is 0.5"),
        ({"partial_rotary_factor": 2.0}, "'partial_rotary_factor' is 2.0"),
        ({"tie_word_embeddings": 1}, "not true or false"),
    ],
)
def test_a_configuration_that_cannot_be_is_one_line(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelFileInvalid) as caught:
        shape_of({**SMALL, "model_type": "llama", **change})
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_family_says_what_is_supported() -> None:
    for config in ({"model_type": "mamba"}, {}, {"model_type": ["llama"]}):
        with pytest.raises(UnsupportedModel, match="supported: llama, mistral"):
            family_of_config(config, "config.json")


def test_what_llama_cpp_would_compute_otherwise_is_refused() -> None:
    gemma = {**SMALL, **CONFIGS["gemma3"]}
    for change in ({"query_pre_attn_scalar": 77}, {"layer_types": ["full_attention"] * 7}):
        shape = shape_of({**gemma, **change})
        with pytest.raises(UnsupportedModel, match=r"llama\.cpp"):
            family("gemma3").shape_to_gguf(shape)
    moe = shape_of({**SMALL, **CONFIGS["qwen3_moe"], "norm_topk_prob": False})
    with pytest.raises(UnsupportedModel, match="norm_topk_prob"):
        family("qwen3_moe").shape_to_gguf(moe)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_named(tmp_path: Path, number: float) -> None:
    from safetensors.numpy import load_file, save_file

    config = full(CONFIGS["llama"])
    folder = write_folder(tmp_path / "model", config)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = number
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelFileInvalid, match=r"up_proj.weight' holds .*row 5, column 7"):
        converted(folder, config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("change", ["missing", "shape", "left over"])
def test_tensors_that_are_not_the_models_are_named_before_anything_is_written(
    tmp_path: Path, change: str
) -> None:
    from safetensors.numpy import load_file, save_file

    config = full(CONFIGS["llama"])
    folder = write_folder(tmp_path / "model", config)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "shape":
        tensors[name] = tensors[name][:-1]
    else:
        name = "model.layers.3.mlp.up_proj.weight"
        tensors[name] = np.zeros((2, 2), np.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelFileInvalid, match=name.replace(".", r"\.")):
        converted(folder, config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
