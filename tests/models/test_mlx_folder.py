"""Folders for mlx-lm, made without MLX: bit for bit what mlx-lm's own conversion makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edgeinfer.errors import UnsupportedModel
from edgeinfer_models.conversion.affine import nearest, round_to_nearest
from edgeinfer_models.conversion.bit_packing import pack_codes, unpack_codes
from edgeinfer_models.conversion.floats import from_float32, to_float32
from edgeinfer_models.conversion.mlx_folder import mlx_pieces, packing_for, write_mlx
from edgeinfer_models.conversion.model import SourceModel, source_of_folder, source_of_gguf
from edgeinfer_models.conversion.own_files import kept_as
from edgeinfer_models.safetensors_header import read_safetensors_folder
from tests.fixtures_families import CONFIGS, converted, full, write_folder
from tests.fixtures_hf import write_tiny_folder

mx = pytest.importorskip("mlx.core", exc_type=ImportError)
Floats = npt.NDArray[np.float32]
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@pytest.fixture(autouse=True)
def on_the_processor() -> None:
    mx.set_default_device(mx.cpu)


def made(
    model: SourceModel, out: Path, bits: int = 4, group: int = 64, dtype: str | None = None
) -> Path:
    packing = packing_for(model, bits, group)
    wanted = dtype or kept_as(model)
    write_mlx(out, model, packing, mlx_pieces(model, packing, dtype=wanted), dtype=wanted)
    return out


def bytes_of(array: Any) -> bytes:
    return bytes(memoryview(np.array(array.view(mx.uint8))))


# -- numbers ---------------------------------------------------------------------------------------


def same_as_mlx(rows: Floats, bits: int, group: int, name: str) -> None:
    given_rows = mx.array(rows).astype(getattr(mx, name))
    words, scales, biases = mx.quantize(given_rows, group_size=group, bits=bits)
    seen = np.array(given_rows.astype(mx.float32))
    codes, *ours = round_to_nearest(seen, bits, group)
    assert pack_codes(codes, bits).tobytes() == bytes_of(words)
    for mine, theirs in zip(ours, (scales, biases), strict=True):
        assert from_float32(mine, DTYPES[name]).tobytes() == bytes_of(theirs)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_rounding_and_packing_are_mlx_s_bit_for_bit(bits: int, group: int, name: str) -> None:
    random = np.random.default_rng(bits * group)
    rows = random.standard_normal((64, 256)).astype(np.float32)
    rows *= random.choice([1e-9, 1e-4, 1.0, 30.0], (64, 1)).astype(np.float32)
    rows[0], rows[1], rows[2] = 0.0, np.abs(rows[1]), -np.abs(rows[2])
    rows[3], rows[4] = 5.0, -1e-8
    same_as_mlx(rows, bits, group, name)


@given(
    rows=arrays.arrays(np.float32, (2, 64), elements=st.floats(-6e4, 6e4, width=32)),
    bits=st.sampled_from([4, 8]),
    name=st.sampled_from(list(DTYPES)),
)
def test_any_numbers_round_as_mlx_rounds_them(rows: Floats, bits: int, name: str) -> None:
    same_as_mlx(rows, bits, 32, name)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_codes_come_back(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (5, 96)).astype(np.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (5, 12 * bits)
    assert np.array_equal(unpack_codes(packed, bits), codes)


# -- folders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, 32)])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_every_family_s_folder_is_the_one_that_mlx_lm_makes(
    config: dict[str, Any], bits: int, group: int, tmp_path: Path
) -> None:
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model, quantize_model

    # MLX's build for the processor multiplies stacks of experts in float32 only.
    dtype = "float32" if any("experts" in key for key in config) else "float16"
    config = full({**config, "intermediate_size": 128})
    folder = write_folder(tmp_path / "model", config, dtype)
    ours = made(source_of_folder(folder), tmp_path / "ours", bits, group)
    theirs, their_config = quantize_model(*load_model(folder, lazy=True), group, bits)
    wanted = dict(tree_flatten(theirs.parameters()))
    found = mx.load(str(ours / "model.safetensors"))
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert (found[name].dtype, found[name].shape) == (values.dtype, values.shape), name
        assert bytes_of(found[name]) == bytes_of(values), name
    written = json.loads((ours / "config.json").read_text())
    assert written["quantization"] == their_config["quantization"]
    assert written["quantization_config"] == their_config["quantization_config"]
    index = json.loads((ours / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys()
    tokens = mx.array([[1, 2, 3, 4]])
    loaded, _ = load_model(ours)
    assert mx.array_equal(loaded(tokens), theirs(tokens))


@pytest.mark.parametrize("name", ["llama", "llama tied, biased, scaled", "qwen3", "mixtral", "granite"])
def test_a_gguf_file_becomes_the_folder_that_its_original_becomes(name: str, tmp_path: Path) -> None:
    config = full(CONFIGS[name])
    folder = write_folder(tmp_path / "model", config)
    from_folder = made(source_of_folder(folder), tmp_path / "one", dtype="F16")
    from_gguf = made(source_of_gguf(converted(folder, config)), tmp_path / "other", dtype="F16")
    one, other = (mx.load(str(path / "model.safetensors")) for path in (from_folder, from_gguf))
    assert one.keys() == other.keys()
    for tensor, values in one.items():
        assert bytes_of(values) == bytes_of(other[tensor]), tensor


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_it_answers_what_mlx_lm_s_own_conversion_answers(model_type: Any, tmp_path: Path) -> None:
    import mlx_lm

    folder = write_tiny_folder(tmp_path / "tiny", model_type=model_type)
    settings = {"eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    mlx_lm.convert(str(folder), str(tmp_path / "theirs"), quantize=True)
    ours = made(source_of_folder(folder), tmp_path / "ours")
    answers = []
    for path in (ours, tmp_path / "theirs"):
        model, tokenizer = mlx_lm.load(str(path))[:2]
        prompt = tokenizer.encode("the other in")
        answers.append(list(mlx_lm.generate(model, tokenizer, prompt, max_tokens=16)))
    assert answers[0] == answers[1]
    assert answers[0]


def test_what_rounds_otherwise_is_packed_as_it_says(tmp_path: Path) -> None:
    model = source_of_folder(write_folder(tmp_path / "model", full(CONFIGS["llama"])))
    seen: list[tuple[str, int, int]] = []

    def rounding(bits: int, group: int) -> Any:
        inner = nearest(bits, group)

        def encode(name: str, rows: Floats, first_row: int) -> Any:
            seen.append((name, first_row, rows.shape[0]))
            codes, scales, biases = inner(name, rows, first_row)
            return np.zeros_like(codes), scales, biases

        return encode

    packing = packing_for(model, 4, 32)
    pieces = mlx_pieces(model, packing, dtype="F32", rounding=rounding)
    write_mlx(tmp_path / "out", model, packing, pieces, dtype="F32")
    found = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert not found["model.layers.0.mlp.up_proj.weight"].any()
    assert ("model.layers.0.mlp.up_proj.weight", 0, 96) in seen
    assert ("lm_head.weight", 0, 320) in seen


# -- back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral", "qwen3_moe", "granite"])
def test_a_folder_that_mlx_packed_is_read_back(name: str, bits: int, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", full(CONFIGS[name]), "float16")
    plain = source_of_folder(folder)
    packed = source_of_folder(made(plain, tmp_path / "out", bits, 32))
    for rule in plain.family.rules(plain.shape):
        for tensor in rule.hf:
            before = to_float32(plain.source.rows(tensor, 0, rule.shape[0]), "F16")
            after = packed.source.rows(tensor, 0, rule.shape[0])
            dtype = packed.source.info(tensor).dtype
            step = np.ptp(before.reshape(-1, before.shape[-1])) / (2**bits - 1) if before.ndim > 1 else 0
            assert np.abs(to_float32(after, dtype) - before).max() <= 1.1 * step + 1e-3, tensor
            middle = rule.shape[0] // 2
            assert np.array_equal(packed.source.rows(tensor, middle, rule.shape[0]), after[middle:])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_unpacks_to_the_same_numbers(bits: int, tmp_path: Path) -> None:
    model = source_of_folder(write_folder(tmp_path / "model", full(CONFIGS["llama"])))
    source = source_of_folder(made(model, tmp_path / "out", bits, 32)).source
    found = mx.load(str(tmp_path / "out" / "model.safetensors"))
    stem = "model.layers.1.self_attn.q_proj"
    parts = [found[f"{stem}.{part}"] for part in ("weight", "scales", "biases")]
    wanted = mx.dequantize(*parts, group_size=32, bits=bits)
    assert np.allclose(source.rows(f"{stem}.weight", 0, 64), np.array(wanted), atol=1e-6)


def test_modes_and_types_that_cannot_be_are_one_line(tmp_path: Path) -> None:
    folder = made(
        source_of_folder(write_folder(tmp_path / "model", full(CONFIGS["llama"]))), tmp_path / "out"
    )
    config = json.loads((folder / "config.json").read_text())
    for changed, said in (
        ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, "mode 'mxfp4'"),
        ({"group_size": 64, "bits": 7}, "7 bits"),
        ({"group_size": 64, "bits": 8}, "has the shape"),
        ({"group_size": 64}, "None bits"),
        ({"group_size": 64, "bits": 4, "lm_head": {"group_size": 64, "bits": 8}}, "lm_head"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, "quantization": changed}))
        with pytest.raises(Exception, match=said) as error:
            source_of_folder(folder)
        assert "\n" not in str(error.value)


def test_a_family_that_mlx_lm_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeinfer_models.conversion import mlx_folder

    monkeypatch.setattr(mlx_folder, "MLX_LM_TYPES", frozenset(("qwen3",)))
    with pytest.raises(UnsupportedModel, match="no class for a llama"):
        packing_for(source_of_folder(write_tiny_folder(tmp_path / "tiny")), 4, 64)


def test_the_metadata_says_mlx(tmp_path: Path) -> None:
    out = made(source_of_folder(write_tiny_folder(tmp_path / "tiny")), tmp_path / "out")
    assert read_safetensors_folder(out).shards[0].metadata == {"format": "mlx"}
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "tiny/tokenizer.json").read_bytes()
