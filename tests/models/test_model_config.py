"""ModelConfig: the numbers `models show` and the memory plan rest on."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeinfer.errors import UsageError
from edgeinfer_models.config import config_from_gguf
from edgeinfer_models.ggml_types import KV_TYPES, row_bytes
from edgeinfer_models.gguf_model import read_gguf_model
from tests.fixtures_gguf import write_tiny_gguf


def test_a_gguf_header_becomes_a_config(tiny: Path) -> None:
    config = config_from_gguf(read_gguf_model(tiny))
    assert (config.architecture, config.name, config.licence) == ("llama", "Tiny Random", "apache-2.0")
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (2, 64, 128)
    assert (config.num_heads, config.num_kv_heads) == (2, (1, 1))
    assert (config.head_dim_k, config.head_dim_v, config.rope_dim) == (32, 32, 32)
    assert (config.vocab_size, config.context_trained, config.sliding_window) == (295, 4096, 0)
    assert config.quantization == "F16"
    assert config.file_bytes == tiny.stat().st_size
    assert 16 < config.bits_per_weight < 16.2


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("f32", 512), ("f16", 256), ("q8_0", 136), ("q5_0", 88), ("q4_0", 72)],
)
def test_kv_bytes_follow_the_type(tiny: Path, kind: str, expected: int) -> None:
    """2 layers, K and V, one head of 32."""
    assert config_from_gguf(read_gguf_model(tiny)).kv_bytes_per_token(kind, kind) == expected


def test_kv_bytes_count_layers_by_their_own_heads(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", metadata={"llama.attention.head_count_kv": [0, 2]})
    config = config_from_gguf(read_gguf_model(path))
    assert config.num_kv_heads == (0, 2)
    assert config.kv_bytes_per_token("f16", "q8_0") == 2 * 32 * 2 + 2 * 34


def test_an_unknown_kv_type_is_wrong_usage(tiny: Path) -> None:
    with pytest.raises(UsageError, match="'q3_x' does not exist"):
        config_from_gguf(read_gguf_model(tiny)).kv_bytes_per_token("q3_x")


def test_every_kv_type_we_name_exists() -> None:
    assert all(row_bytes(kind, 64) > 0 for kind in KV_TYPES)


def test_gemma_3_has_its_window(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", arch="gemma3")
    assert config_from_gguf(read_gguf_model(path)).sliding_window == 64


@pytest.mark.model
def test_the_starter_has_the_published_numbers(starter_model: Path) -> None:
    config = config_from_gguf(read_gguf_model(starter_model))
    assert (config.parameters, config.num_layers, config.vocab_size) == (134_515_008, 30, 49_152)
    assert config.kv_bytes_per_token("f16", "f16") == 23_040
