"""Files of exits: what is written is read, and what does not fit a model is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeinfer.errors import EdgeInferError, ModelFileInvalid, UnsupportedModel
from edgeinfer.quantize.quantization import opened, plan_quantization, quantize
from edgeinfer_models.exit_file import (
    ARCHITECTURE,
    ExitTensor,
    fingerprint,
    read_exit_file,
    require_exit_of,
    write_exit_file,
)
from edgeinfer_models.gguf_header import GgufHeader, read_gguf_header
from tests.fixtures_gguf import write_tiny_gguf


@pytest.fixture
def model(tmp_path: Path) -> GgufHeader:
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path)
    return read_gguf_header(path)


def exit_of(model: GgufHeader, path: Path, **changed: Any) -> Path:
    """With the model's first layer as its own."""
    tensors = {
        tensor.name: ExitTensor("F32", tensor.shape, bytes(4 * tensor.elements))
        for tensor in model.tensors
        if tensor.name.startswith("blk.0.") or tensor.name == "output_norm.weight"
    }
    values: dict[str, Any] = {
        "fingerprint": fingerprint(model),
        "model_name": "tiny",
        "layer": 1,
        "new_layers": 1,
        "kept": np.array([1, 4, 9], np.int32),
        "tensors": tensors,
        "told": {"agreement": {"chat": 0.5}},
    }
    write_exit_file(path, **{**values, **changed})
    return path


def test_what_is_written_is_read(model: GgufHeader, tmp_path: Path) -> None:
    found = read_exit_file(exit_of(model, tmp_path / "tiny.exit.gguf"))
    assert (found.layer, found.new_layers, found.kept.tolist()) == (1, 1, [1, 4, 9])
    assert found.told == {"agreement": {"chat": 0.5}}
    require_exit_of(found, model)


def test_every_quantization_is_the_same_model_and_another_seed_is_not(
    model: GgufHeader, tmp_path: Path
) -> None:
    plan = plan_quantization(
        opened(model.path), model.path, "q8_0", tmp_path / "small.gguf", force=False
    )
    quantize(plan)
    assert fingerprint(read_gguf_header(tmp_path / "small.gguf")) == fingerprint(model)
    write_tiny_gguf(tmp_path / "other.gguf", seed=7)
    other = read_gguf_header(tmp_path / "other.gguf")
    with pytest.raises(UnsupportedModel, match="is the exit of another model"):
        require_exit_of(read_exit_file(exit_of(model, tmp_path / "a.exit.gguf")), other)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"kept": np.array([], np.int32)}, "no tokens"),
        ({"kept": np.array([4, 1], np.int32)}, "not in order"),
        ({"kept": np.array([1, 10**6], np.int32)}, "outside the vocabulary"),
        ({"layer": 0}, "lies after layer 0"),
        ({"layer": 99}, "behind the model's last layer"),
        ({"new_layers": 2}, "tensors of its layers are missing"),
        ({"tensors": {}}, "tensors of its layers are missing"),
        (
            {
                "tensors": {
                    "blk.0.attn_q.weight": ExitTensor("F32", (32, 3), bytes(384)),
                    "output_norm.weight": ExitTensor("F32", (32,), bytes(128)),
                }
            },
            "is not of the model's shape",
        ),
    ],
)
def test_what_cannot_be_is_one_line(
    model: GgufHeader, tmp_path: Path, changed: dict[str, Any], why: str
) -> None:
    path = exit_of(model, tmp_path / "bad.exit.gguf", **changed)
    with pytest.raises(ModelFileInvalid, match=why):
        require_exit_of(read_exit_file(path), model)


def test_a_model_is_no_exit_and_a_torn_file_neither(model: GgufHeader, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="not an exit of one"):
        read_exit_file(model.path)
    whole = exit_of(model, tmp_path / "whole.exit.gguf").read_bytes()
    torn = tmp_path / "torn.exit.gguf"
    for length in (0, 3, 30, len(whole) // 2, len(whole) - 40):
        torn.write_bytes(whole[:length])
        with pytest.raises(EdgeInferError):
            read_exit_file(torn)


@pytest.mark.parametrize(
    ("told", "kept"),
    [("[" * 100_000, [1, 2]), ("{}", [1, 2**31]), ("{}", [1, 2**63]), ("{}", [-1, 2])],
)
def test_numbers_and_texts_that_there_cannot_be_are_refused_or_left(
    tmp_path: Path, told: str, kept: list[int]
) -> None:
    """As a hostile file has them, written by another library."""
    import gguf

    path = tmp_path / "hostile.exit.gguf"
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    for key, value in (("version", 1), ("layer", 1), ("new_layers", 1)):
        writer.add_uint32(f"{ARCHITECTURE}.{key}", value)
    writer.add_string(f"{ARCHITECTURE}.told", told)
    kind = gguf.GGUFValueType.UINT64 if max(kept) >= 2**31 else gguf.GGUFValueType.INT32
    writer.add_key_value(f"{ARCHITECTURE}.kept", kept, gguf.GGUFValueType.ARRAY, sub_type=kind)
    for name in ("blk.0.attn_norm.weight", "output_norm.weight"):
        writer.add_tensor(name, np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelFileInvalid):
        read_exit_file(path)
