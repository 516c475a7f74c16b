"""The safetensors reader agrees with the library on good files and says one line on bad ones."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from edgeinfer.errors import ModelError, ModelFileInvalid, ModelNotFound, UnsupportedModel
from edgeinfer_models.config import config_from_hf
from edgeinfer_models.safetensors_header import read_safetensors_folder, read_safetensors_header


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def f32(start: int, stop: int, shape: list[int]) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}


def test_the_header_agrees_with_the_library(tmp_path: Path) -> None:
    import numpy as np
    from safetensors import safe_open
    from safetensors.numpy import save_file

    path = tmp_path / "model.safetensors"
    arrays = {"a": np.ones((3, 5), np.float16), "b": np.zeros(7, np.int64), "c": np.ones((), np.float32)}
    save_file(arrays, path, metadata={"format": "pt"})
    header = read_safetensors_header(path)
    with safe_open(path, "numpy") as theirs:
        assert {t.name for t in header.tensors} == set(theirs.keys())
        for tensor in header.tensors:
            part = theirs.get_slice(tensor.name)
            assert (list(tensor.shape), tensor.dtype) == (part.get_shape(), part.get_dtype())
            content = path.read_bytes()[tensor.start : tensor.start + tensor.num_bytes]
            assert content == theirs.get_tensor(tensor.name).tobytes()
    assert header.metadata == {"format": "pt"}


def test_metadata_may_be_null_as_mlx_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw({"__metadata__": None, "a": f32(0, 4, [1])}, bytes(4)))
    assert read_safetensors_header(path).metadata == {}


BAD = {
    "empty": (b"", ModelFileInvalid, "is empty"),
    "text": (b"hello there, this is a text\n" * 9, ModelFileInvalid, "a text file"),
    "web page": (b"<!DOCTYPE html><html></html>", ModelFileInvalid, "a web page"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", ModelFileInvalid, "git-lfs pointer"),
    "a GGUF": (b"GGUF" + bytes(60), ModelFileInvalid, "a GGUF model"),
    "claims terabytes": (raw({}, length=2**42), ModelFileInvalid, "claims 4,398,046,511,104 bytes"),
    "not an object": (raw(b"[1, 2]"), ModelFileInvalid, "not a JSON object"),
    "broken JSON": (raw(b'{"a": '), ModelFileInvalid, "cannot be read"),
    "not UTF-8": (raw(b'{"\xff": 1}'), ModelFileInvalid, "cannot be read"),
    "deep JSON": (raw(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), ModelFileInvalid, "too deeply"),
    "long number": (raw(b'{"a": ' + b"9" * 9000 + b"}"), ModelFileInvalid, "cannot be read"),
    "twice": (raw(b'{"a": {}, "a": {}}'), ModelFileInvalid, "twice"),
    "no dtype": (
        raw({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)), ModelFileInvalid, "lacks",
    ),
    "negative shape": (raw({"a": f32(0, 4, [-1])}, bytes(4)), ModelFileInvalid, "lacks"),
    "true as size": (raw({"a": f32(0, 4, [True])}, bytes(4)), ModelFileInvalid, "lacks"),
    "wrong size": (raw({"a": f32(0, 4, [2])}, bytes(4)), ModelFileInvalid, "does not fill"),
    "unknown dtype": (
        raw({"a": {"dtype": "Q7", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        UnsupportedModel, "'Q7'",
    ),
    "gap": (
        raw({"a": f32(0, 4, [1]), "b": f32(8, 12, [1])}, bytes(12)), ModelFileInvalid, "'b' does not",
    ),
    "overlap": (
        raw({"a": f32(0, 8, [2]), "b": f32(4, 8, [1])}, bytes(8)), ModelFileInvalid, "'b' does not",
    ),
    "truncated": (raw({"a": f32(0, 400, [100])}, bytes(390)), ModelFileInvalid, "10 of "),
    "too long": (raw({"a": f32(0, 4, [1])}, bytes(9)), ModelFileInvalid, "5 bytes after"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content, kind, expected = BAD[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(kind, match=r"^model\.safetensors: ") as caught:
        read_safetensors_header(path)
    assert expected in str(caught.value)


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 10,
    "max_position_embeddings": 128,
    "rope_theta": 5e5,
}


def hf_folder(folder: Path, config: Any = CONFIG, *, sharded: bool = False) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    if not sharded:
        (folder / "model.safetensors").write_bytes(raw({"a": f32(0, 320, [10, 8])}, bytes(320)))
        return folder
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for tensor, name in names.items():
        (folder / name).write_bytes(raw({tensor: f32(0, 320, [10, 8])}, bytes(320)))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def test_a_hugging_face_folder_becomes_a_config(tmp_path: Path) -> None:
    config = config_from_hf(hf_folder(tmp_path / "llama"))
    assert (config.architecture, config.name, config.licence) == ("LlamaForCausalLM", "llama", "mit")
    assert (config.num_layers, config.num_kv_heads, config.head_dim_k) == (2, (2, 2), 2)
    assert (config.parameters, config.weights_bytes, config.quantization) == (80, 320, "F32")
    assert config.rope_freq_base == 5e5
    assert config.kv_bytes_per_token() == 2 * 2 * (2 * 2) * 2  # layers, K and V, heads x size, bytes


def test_a_sharded_folder_is_joined(tmp_path: Path) -> None:
    model = read_safetensors_folder(hf_folder(tmp_path / "m", sharded=True))
    assert [t.name for t in model.tensors] == ["a", "b"]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "m", sharded=True)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelNotFound, match=r"model-00002-of-00002\.safetensors: shard is missing"):
        read_safetensors_folder(folder)


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ("{}", "no 'weight_map'"),
        ('{"weight_map": {"a": "../../etc/x.safetensors"}}', "not a file beside it"),
        ('{"weight_map": {"zzz": "model-00001-of-00002.safetensors"}}', "'zzz' is not in"),
        ("nonsense", "cannot be read"),
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, index: str, expected: str) -> None:
    folder = hf_folder(tmp_path / "m", sharded=True)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelFileInvalid, match=expected):
        read_safetensors_folder(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": None},
        {"num_hidden_layers": "two"},
        {"num_hidden_layers": 10**9},
        {"hidden_size": -1},
        {"vocab_size": 1.5},
    ],
)
def test_a_config_that_cannot_be_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        config_from_hf(hf_folder(tmp_path / "m", {**CONFIG, **change}))
