"""The estimate of a KV type's speed: real kernels on a model's shape; declined where it cannot be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import psutil
import pytest

from edgeinfer.backend import KvSpeed, RuntimeSettings
from edgeinfer.registry import get_backend
from edgeinfer_backends.llamacpp import attention_speed, unpacked_kv
from edgeinfer_models.config import INPUT, OUTPUT, ModelConfig, WeightGroup
from edgeinfer_models.resolve import resolve_model
from tests.fixtures_gguf import write_tiny_gguf

SETTINGS = RuntimeSettings(threads=2, threads_batch=2, gpu_layers=0)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("speed")
    path = write_tiny_gguf(folder / "m.gguf", layers=2, hidden=128, heads=4, kv_heads=2, head_dim=64)
    return resolve_model(str(path)).config


def measured(
    config: ModelConfig, kv_type: str = "q8_0", settings: RuntimeSettings = SETTINGS
) -> KvSpeed | None:
    return get_backend("llamacpp").measure_kv_speed(config, settings, kv_type)


@pytest.mark.parametrize("heads", [(4, 2), (9, 3), (4, 1), (32, 8)])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_shapes_of_all_kinds_are_measured(config: ModelConfig, heads: tuple[int, int], dim: int) -> None:
    shape = replace(
        config, num_heads=heads[0], num_kv_heads=(heads[1],) * 2, head_dim_k=dim, head_dim_v=dim
    )
    speed = measured(shape)
    assert speed is not None
    assert 0.0 < speed.decode < math.inf
    assert 0.0 < speed.prefill < math.inf


def test_a_steps_ratio_counts_its_layers_and_its_weights(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 ms a layer over f16, 1 over q8_0; 10 ms for the weights of a row, 100 for those of a tile."""

    @contextmanager
    def attending(shape: object, kv_type: str, rows: int, threads: int) -> Iterator[Callable[[], float]]:
        seen.append((kv_type, rows, threads))
        yield lambda: 0.002 if kv_type == "f16" else 0.001

    @contextmanager
    def multiplying(kind: str, rows: int, threads: int) -> Iterator[Callable[[], float]]:
        seen.append((kind, rows, threads))
        yield lambda: 0.00001 if rows == 1 else 0.0001

    seen: list[tuple[str, int, int]] = []
    monkeypatch.setattr(attention_speed, "_attending", attending)
    monkeypatch.setattr(attention_speed, "_multiplying", multiplying)
    groups = (WeightGroup(0, "Q4_K", 500), WeightGroup(1, "Q4_K", 500))
    shape = replace(config, weights=groups, num_layers=2, num_kv_heads=(2, 2))
    speed = measured(shape, settings=replace(SETTINGS, threads=1))
    assert speed == KvSpeed(pytest.approx(14 / 12), pytest.approx(104 / 102))
    assert seen == [
        *[("f16", 1, 1), ("q8_0", 1, 1), ("Q4_K", 1, 1)],
        *[("f16", 64, 2), ("q8_0", 64, 2), ("Q4_K", 64, 2)],
    ]


def test_the_memory_is_given_back(config: ModelConfig) -> None:
    measured(config)
    before = psutil.Process().memory_info().rss
    for _ in range(3):
        measured(config)
    assert psutil.Process().memory_info().rss - before < 4 * 2**20


@pytest.mark.parametrize(
    "change",
    [
        {"head_dim_k": 80},  # not rotated: keys lose more and cannot be shifted
        {"head_dim_v": 32},
        {"num_kv_heads": (0, 0)},  # no attention
        {"num_heads": 5},
        {"caches_values": False},  # MLA
        {"head_dim_k": 2**26, "head_dim_v": 2**26},  # a header that is wrong
        {"num_kv_heads": (2**20, 2**20), "num_heads": 2**20},
    ],
)
def test_other_models_are_declined(config: ModelConfig, change: dict[str, object]) -> None:
    assert measured(replace(config, **change)) is None  # type: ignore[arg-type]


def test_other_circumstances_are_declined(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured(config, "bf16") is None
    assert measured(config, settings=replace(SETTINGS, flash_attention=False)) is None
    with monkeypatch.context() as patched:
        patched.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
        assert measured(config) is None
    with monkeypatch.context() as patched:
        patched.setattr(unpacked_kv, "_context_parameters", lambda: None)
        assert measured(config) is None
    with monkeypatch.context() as patched:
        patched.setattr(attention_speed, "_can_compute", lambda: False)
        assert measured(config) is None


def test_no_memory_to_measure_in_is_no_reason_not_to_load(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object, **_more: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(attention_speed.mmap, "mmap", refuse)
    assert measured(config) is None


def test_the_weights_of_a_step(config: ModelConfig) -> None:
    groups = (
        WeightGroup(INPUT, "Q8_0", 1000),
        WeightGroup(0, "F32", 10),
        WeightGroup(0, "Q4_K", 300),
        WeightGroup(1, "Q4_K", 300),
        WeightGroup(OUTPUT, "Q6_K", 500),
    )
    dense = replace(config, weights=groups, is_tied=False)
    assert attention_speed._weights(dense, 1) == ("Q4_K", 1110)
    assert attention_speed._weights(dense, 64) == ("Q4_K", 610)  # one row's output, of many
    tied = replace(dense, weights=groups[:-1], is_tied=True)
    assert attention_speed._weights(tied, 1) == ("Q8_0", 1610)
    experts = replace(dense, num_experts=8, num_experts_used=2)
    assert attention_speed._weights(experts, 64) == ("Q4_K", 152.5)
    strange = replace(dense, weights=(WeightGroup(0, "I32", 300),))
    assert attention_speed._weights(strange, 1) == ("Q8_0", 300)  # no product of integers
