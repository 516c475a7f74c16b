"""Folders in compressed-tensors' forms: what is written is read back, and damage is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeinfer.errors import EdgeInferError, ModelFileInvalid, UnsupportedModel
from edgeinfer.quantize.folders import FolderOptions, plan_folder, write
from edgeinfer_models.config import config_from_hf
from edgeinfer_models.conversion.compressed_folder import KINDS
from edgeinfer_models.conversion.floats import to_float32
from edgeinfer_models.conversion.model import SourceModel, source_of_folder, source_of_gguf
from edgeinfer_models.conversion.packed_rows import compressed_packing
from edgeinfer_models.conversion.sources import SafetensorsSource
from edgeinfer_models.conversion.symmetric import Kind, round_to_nearest, to_e4m3
from edgeinfer_models.safetensors_header import read_safetensors_folder
from tests.fixtures_families import CONFIGS, converted, full, write_folder
from tests.fixtures_hf import write_tiny_folder
from tests.models.test_conversion import write_raw

ALL = (*KINDS, "mlx-4bit", "mlx-8bit")
MOST_ERROR = {"int8": 1 / 127, "int4": 1 / 7.5, "fp8": 1 / 14}  # of a row's or group's largest


def made(model: SourceModel, out: Path, type_name: str, **options: Any) -> Path:
    write(plan_folder(model, out, type_name, None, out, FolderOptions(**options)))
    return out


def values(source: Any, name: str, rows: int) -> Any:
    return to_float32(source.rows(name, 0, rows), source.info(name).dtype)


# -- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_the_nearest_to_what_will_be_read(kind: Kind, dtype: str) -> None:
    rows = np.random.default_rng(3).standard_normal((16, 128)).astype(np.float32)
    rows[0] = 0.0
    codes, scales = round_to_nearest(rows, kind, 32, dtype)
    read = to_float32(codes, "F8_E4M3") if kind == "fp8" else codes.astype(np.float32)
    found = read.reshape(16, 4, 32) * scales[:, :, None]
    groups = rows.reshape(16, 4, 32)
    largest = np.abs(groups).max(axis=2, keepdims=True)
    assert (np.abs(found - groups) <= 0.55 * MOST_ERROR[kind] * largest + 1e-12).all()


def test_every_e4m3_number_and_every_middle_is_rounded_as_torch_rounds_it() -> None:
    torch = pytest.importorskip("torch")
    known = to_float32(np.arange(256, dtype=np.uint8), "F8_E4M3")
    positive = np.sort(known[:127])
    middles = (positive[1:] + positive[:-1]) / 2
    around = np.random.default_rng(0).standard_normal(2000).astype(np.float32) * 10
    numbers = np.concatenate([known[~np.isnan(known)], middles, -middles, around]).astype(np.float32)
    wanted = torch.from_numpy(numbers).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(to_e4m3(numbers), wanted)
    assert to_e4m3(np.float32([1e9, -1e9])).tolist() == [0x7E, 0xFE]


# -- folders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "qwen3_moe", "qwen2_moe"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_read_back_within_its_rounding(kind: Kind, name: str, tmp_path: Path) -> None:
    plain = source_of_folder(write_folder(tmp_path / "model", full(CONFIGS[name])))
    packed = source_of_folder(made(plain, tmp_path / "out", kind))
    for rule in plain.family.rules(plain.shape):
        for tensor in rule.hf:
            before = values(plain.source, tensor, rule.shape[0])
            after = values(packed.source, tensor, rule.shape[0])
            is_packed = packed.source.info(tensor).dtype == "F32" and not np.array_equal(before, after)
            assert np.abs(after - before).max() <= 0.52 * MOST_ERROR[kind] * np.abs(before).max()
            assert is_packed == (
                rule.layer >= 0 and len(rule.shape) == 2 and "gate.weight" not in tensor
            ), tensor


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_scales_of_a_gguf_source_are_those_of_its_original(kind: Kind, tmp_path: Path) -> None:
    config = full(CONFIGS["llama"])
    folder = write_folder(tmp_path / "model", config)
    one = made(source_of_folder(folder), tmp_path / "one", kind, scale_type="bf16")
    gguf = source_of_gguf(converted(folder, config))
    other = made(gguf, tmp_path / "other", kind, scale_type="bf16")
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.mark.parametrize("type_name", ALL)
def test_a_configuration_counts_the_weights_that_are_packed(type_name: str, tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "tiny")
    out = made(source_of_folder(folder), tmp_path / "out", type_name)
    plain, packed = config_from_hf(folder), config_from_hf(out)
    assert packed.parameters == plain.parameters
    assert packed.quantization == type_name.upper()
    assert packed.weights_bytes < plain.weights_bytes


def test_a_folder_says_what_others_ask_of_it(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "tiny", config={"auto_map": {"AutoModel": "code.Model"}})
    (folder / "code.py").write_text("raise SystemExit")
    out = made(source_of_folder(folder), tmp_path / "out", "int4", group=64)
    config = json.loads((out / "config.json").read_text())
    assert "auto_map" not in config and not (out / "code.py").exists()
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors"
    assert quantization["config_groups"]["group_0"]["weights"]["group_size"] == 64
    # Rows of 96 are no whole groups of 64.
    assert quantization["ignore"] == [
        "lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj",
    ]  # fmt: skip


# -- what others wrote -----------------------------------------------------------------------------


def scheme(form: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


@pytest.mark.parametrize("shape", [(8, 1), (8,), (1,), ()])
def test_bytes_with_a_scale_for_each_row_or_for_all_are_read(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    draw = np.random.default_rng(1)
    codes = draw.integers(-128, 128, (8, 16)).astype(np.int8)
    scales = draw.random(shape, dtype=np.float32) if shape else np.float32(0.5)
    write_raw(
        tmp_path / "model.safetensors",
        {"a.weight": ("I8", codes), "a.weight_scale": ("F32", np.asarray(scales))},
    )
    (tmp_path / "config.json").write_text("{}")
    given_scheme = scheme("int-quantized", type="int", num_bits=8, symmetric=True, strategy="channel")
    source = SafetensorsSource(
        read_safetensors_folder(tmp_path), compressed_packing(given_scheme, "config.json")
    )
    wanted = codes * (np.reshape(scales, (8, 1)) if np.size(scales) == 8 else np.float32(scales))
    assert source.names == ["a.weight"]
    assert np.array_equal(source.rows("a.weight", 0, 8), wanted.astype(np.float32))
    assert np.array_equal(source.rows("a.weight", 3, 5), wanted[3:5].astype(np.float32))


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        (scheme("pack-quantized", type="int", num_bits=4, symmetric=False, strategy="group"), "zero"),
        (scheme("pack-quantized", type="int", num_bits=4, strategy="group", actorder="group"), "order"),
        (scheme("nvfp4-pack-quantized", type="float", num_bits=4), "nvfp4"),
        (scheme("pack-quantized", type="int", num_bits=[4], strategy="group"), "pack-quantized"),
        (scheme("pack-quantized", type="int", num_bits=4, strategy="group", group_size=1e9), "pack"),
        ({"quant_method": "compressed-tensors"}, "several ways"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": 3}}, "several ways"),
    ],
)
def test_schemes_that_cannot_be_unpacked_say_so(quantization: Mapping[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModel, match=said) as error:
        compressed_packing(quantization, "config.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["scale", "type", "missing", "order", "shape"])
def test_parts_that_do_not_fit_are_one_line(damage: str, tmp_path: Path) -> None:
    tensors: dict[str, tuple[str, Any]] = {
        "a.weight_packed": ("I32", np.zeros((8, 8), np.int32)),
        "a.weight_scale": ("F32", np.zeros((8, 2), np.float32)),
        "a.weight_shape": ("I64", np.asarray([8, 64])),
    }
    if damage == "scale":
        tensors["a.weight_scale"] = ("F32", np.zeros((8, 3), np.float32))
    if damage == "type":
        tensors["a.weight_packed"] = ("F32", np.zeros((8, 8), np.float32))
    if damage == "missing":
        del tensors["a.weight_scale"]
    if damage == "order":
        tensors["a.weight_g_idx"] = ("I32", np.zeros(64, np.int32))
    if damage == "shape":
        tensors["a.weight_shape"] = ("I64", np.asarray([8, 64, 1]))
    write_raw(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text("{}")
    packing = compressed_packing(
        scheme("pack-quantized", type="int", num_bits=4, strategy="group", group_size=32), "config.json"
    )
    with pytest.raises((ModelFileInvalid, UnsupportedModel), match=r"a\.weight_"):
        SafetensorsSource(read_safetensors_folder(tmp_path), packing)


# -- damage ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    place = tmp_path_factory.mktemp("sound")
    model = source_of_folder(write_folder(place / "model", full(CONFIGS["llama"])))
    return {name: made(model, place / name, name) for name in ALL}


AWKWARD: tuple[Any, ...] = (None, True, -1, 0, 1, 3, 2.5, "", "x", [], {}, 2**63, 1e400)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else ()
    return [path, *(leaf for key, each in inner for leaf in leaves(each, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    return {
        key: replaced(each, path[1:], new) if key == path[0] else each for key, each in value.items()
    }


@given(
    name=st.sampled_from(ALL),
    what=st.sampled_from(["config", "header", "bytes", "cut"]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=400)
def test_a_damaged_folder_is_read_or_refused_in_one_line(
    sound: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory, name: str, what: str, seed: int
) -> None:
    draw = random.Random(seed)
    config = json.loads((sound[name] / "config.json").read_text())
    raw = (sound[name] / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
    if what == "config":
        of_packing = [leaf for leaf in leaves(config) if leaf and leaf[0].startswith("quantization")]
        config = replaced(config, draw.choice(of_packing), draw.choice(AWKWARD))
    elif what == "header":
        tensor = draw.choice([key for key in header if key != "__metadata__"])
        entry = dict(header[tensor])
        shape = list(entry["shape"])
        if draw.random() < 0.5 and len(shape) == 2:  # the same bytes, cut otherwise
            factor = draw.choice([2, 4, 8, shape[0]])
            shape = [max(shape[0] // factor, 1), shape[1] * factor]
            entry["shape"] = shape
        else:
            entry["dtype"] = draw.choice(["F32", "I32", "U32", "I8", "U8", "F16", "BF16", "F8_E4M3"])
        header[tensor] = entry
        if draw.random() < 0.3:
            header[f"{tensor}x"] = header.pop(tensor)
    elif what == "bytes":
        for _ in range(8):
            data[draw.randrange(len(data))] = draw.randrange(256)
    else:
        del data[draw.randrange(len(data)) :]
    folder = tmp_path_factory.mktemp("damaged")
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (folder / "config.json").write_text(json.dumps(config))
    try:
        config_from_hf(folder)
        model = source_of_folder(folder)
        for rule in model.family.rules(model.shape):
            for tensor in rule.hf:
                if model.source.info(tensor).shape == rule.shape:
                    assert model.source.rows(tensor, 0, rule.shape[0]).shape == rule.shape
    except EdgeInferError as error:
        assert "\n" not in str(error)
