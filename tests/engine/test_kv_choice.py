"""`--kv-type auto`: what is preferred, what is kept, and that the price is bounded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeinfer.backend import Backend, KvSpeed, Runtime, RuntimeSettings
from edgeinfer.client import LocalClient, OpenOptions
from edgeinfer.engine import kv_choice, memory
from edgeinfer.engine.kv_choice import (
    FASTER,
    GOOD_TYPES,
    LEAST,
    estimate,
    in_order,
    known_kv_speeds,
    preferred_kv_types,
)
from edgeinfer.engine.memory import load_fitted
from edgeinfer.machine.ledger import Automatic, MemoryLedger
from edgeinfer.machine.probe import probe_machine
from edgeinfer.registry import get_backend
from edgeinfer_backends.llamacpp import LlamaCppBackend
from edgeinfer_models.config import ModelConfig
from edgeinfer_models.resolve import ResolvedModel, resolve_model
from tests.fixtures_gguf import write_tiny_gguf

SETTINGS = RuntimeSettings(context=4096, threads=2, threads_batch=2, gpu_layers=0)


class Measuring(LlamaCppBackend):
    """llama.cpp, whose speeds are said here, the last one again; counts how often it was asked."""

    def __init__(self, *speeds: KvSpeed | None) -> None:
        self.speeds = speeds
        self.asked: list[str] = []

    def measure_kv_speed(
        self, config: ModelConfig, settings: RuntimeSettings, kv_type: str
    ) -> KvSpeed | None:
        self.asked.append(kv_type)
        return self.speeds[min(len(self.asked), len(self.speeds)) - 1]


@pytest.fixture
def model(tmp_path: Path) -> ResolvedModel:
    path = write_tiny_gguf(tmp_path / "m.gguf", layers=8, hidden=128, heads=4, kv_heads=4, head_dim=128)
    return resolve_model(str(path))


def test_only_types_that_cost_next_to_nothing_are_ever_chosen() -> None:
    assert GOOD_TYPES == ("q8_0",)
    assert all(kv_choice.MEAN_KL[kind] <= 0.002 for kind in GOOD_TYPES)
    assert (LEAST.decode, LEAST.prefill) == (0.9, 0.8)


@pytest.mark.parametrize(
    ("speed", "order"),
    [
        (None, ("f16",)),  # unknown is not good
        (KvSpeed(1.07, 1.0), ("f16",)),  # it may be less
        (KvSpeed(2.0, 0.83), ("f16",)),  # faster answers do not pay for slow prompts
        (KvSpeed(1.085, 0.85), ("f16", "q8_0")),  # if memory asks for it
        (KvSpeed(FASTER - 0.01, 1.0), ("f16", "q8_0")),
        (KvSpeed(FASTER, 0.85), ("q8_0", "f16")),
    ],
)
def test_the_order_is_by_what_was_measured(speed: KvSpeed | None, order: tuple[str, ...]) -> None:
    assert in_order({"q8_0": speed}) == order


def test_it_is_measured_once_for_each_shape_and_number_of_threads(
    model: ResolvedModel, tmp_path: Path
) -> None:
    folder, backend = tmp_path / "kept", Measuring(KvSpeed(1.5, 1.1))
    for _ in range(3):
        assert preferred_kv_types(backend, model.config, SETTINGS, folder) == ("q8_0", "f16")
    assert backend.asked == ["q8_0"]
    assert known_kv_speeds(backend, model.config, SETTINGS, folder) == {"q8_0": KvSpeed(1.5, 1.1)}
    for other in (
        (replace(model.config, head_dim_k=64), SETTINGS),
        (model.config, replace(SETTINGS, threads=1)),
    ):
        assert known_kv_speeds(backend, *other, folder) == {}
        preferred_kv_types(backend, *other, folder)
    assert len(backend.asked) == 3
    with pytest.MonkeyPatch.context() as patched:  # what was measured with rotated keys is no help
        patched.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
        assert known_kv_speeds(backend, model.config, SETTINGS, folder) == {}
    # A longer context is no other shape.
    preferred_kv_types(backend, model.config, replace(SETTINGS, context=8192), folder)
    assert len(backend.asked) == 3


@pytest.mark.parametrize(
    "kept", [[1.0], [1.0, "2"], [float("nan"), 1.0], [-1.0, 1.0], {"decode": 1.0}, None, [1, 2]]
)
def test_what_is_damaged_is_measured_again(model: ResolvedModel, tmp_path: Path, kept: Any) -> None:
    backend = Measuring(KvSpeed(1.5, 1.1))
    preferred_kv_types(backend, model.config, SETTINGS, tmp_path)
    (file,) = tmp_path.glob("*.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "costs": kept}))
    assert preferred_kv_types(backend, model.config, SETTINGS, tmp_path) == ("q8_0", "f16")
    assert len(backend.asked) == 2


@pytest.mark.parametrize(
    ("speeds", "result", "times"),
    [
        ([None], None, 1),
        ([KvSpeed(1.6, 1.0)], KvSpeed(1.6, 1.0), 1),  # however far it is off, it is as good
        ([KvSpeed(0.7, 1.0)], KvSpeed(0.7, 1.0), 1),
        ([KvSpeed(1.12, 0.7), KvSpeed(0.95, 0.95), KvSpeed(0.96, 0.9)], KvSpeed(0.96, 0.9), 3),
        ([KvSpeed(1.6, 0.86), KvSpeed(2.0, 0.7), KvSpeed(1.8, 0.8)], KvSpeed(1.8, 0.8), 3),
        ([KvSpeed(1.0, 1.0), None], KvSpeed(1.0, 1.0), 3),  # no memory to measure in any more
    ],
)
def test_where_it_decides_it_is_measured_again(
    model: ResolvedModel, speeds: list[KvSpeed | None], result: KvSpeed | None, times: int
) -> None:
    backend = Measuring(*speeds)
    assert estimate(backend, model.config, SETTINGS, "q8_0") == result
    assert len(backend.asked) == times


def leave(monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> None:
    machine = replace(probe_machine(), available_bytes=free_bytes)
    monkeypatch.setattr(memory, "probe_machine", lambda: machine)
    monkeypatch.setattr(memory, "resident_bytes", lambda: 0)


def loaded(
    backend: Backend, model: ResolvedModel, automatic: Automatic, settings: RuntimeSettings = SETTINGS
) -> tuple[str, tuple[str, ...]]:
    """(the KV type, warnings) of a load."""
    fit, runtime = load_fitted(
        backend, model.files, model.config, settings, 0, automatic, lambda _: True
    )
    try:
        facts = runtime.facts
        assert facts.kv_type_k == facts.kv_type_v == fit.settings.kv_type_k
        return facts.kv_type_k, (*fit.warnings, *facts.warnings)
    finally:
        runtime.close()


def test_memory_decides_where_speed_does_not(
    monkeypatch: pytest.MonkeyPatch, model: ResolvedModel
) -> None:
    allowed, slow = Measuring(KvSpeed(1.09, 1.0)), Measuring(KvSpeed(0.5, 1.0))
    automatic = Automatic(context=True, kv_type=True)
    assert loaded(allowed, model, automatic) == ("f16", ())
    whole = MemoryLedger(tuple(allowed.predict_memory(model.files, model.config, SETTINGS))).total()
    leave(monkeypatch, whole)  # and nothing to spare
    kind, (warning,) = loaded(allowed, model, automatic)
    assert kind == "q8_0"
    assert "is q8_0 instead of f16: 34 MiB instead of 64 MiB" in warning
    assert "--kv-type f16 insists" in warning
    kind, warnings = loaded(slow, model, automatic)
    assert kind == "f16"
    assert any("steps of" in line or "has a context of" in line for line in warnings)
    assert loaded(allowed, model, Automatic(context=True))[0] == "f16"  # asked for


class SlowToRead(Measuring):
    """Says of each q8_0 cache that it is read slowly."""

    def __init__(self) -> None:
        super().__init__(KvSpeed(2.0, 1.0))
        self.loads: list[str] = []

    def load(self, files: Any, settings: RuntimeSettings, progress: Any) -> Runtime:
        from edgeinfer_backends.llamacpp import unpacked_kv

        self.loads.append(settings.kv_type_k)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(unpacked_kv, "_context_parameters", lambda: None)
            return super().load(files, settings, progress)


def test_a_graph_that_is_read_slowly_gets_another_cache(model: ResolvedModel) -> None:
    backend = SlowToRead()
    assert loaded(backend, model, Automatic(kv_type=True)) == ("f16", ())
    assert backend.loads == ["q8_0", "f16"]
    asked = replace(SETTINGS, kv_type_k="q8_0", kv_type_v="q8_0")
    kind, (warning,) = loaded(backend, model, Automatic(), asked)
    assert (kind, warning.startswith("a prompt is read slowly")) == ("q8_0", True)


def test_one_type_that_was_asked_for_leaves_the_other_at_f16(model: ResolvedModel) -> None:
    path = str(model.files.paths[0])
    with LocalClient(OpenOptions(model=path, context=256, kv_type_k="q8_0")) as client:
        info = client.load()
    assert (info.kv_type_k, info.kv_type_v) == ("q8_0", "f16")


def test_a_worker_chooses_and_keeps_what_it_measured(
    model: ResolvedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEINFER_CACHE_DIR", str(tmp_path / "cache"))
    options = OpenOptions(model=str(model.files.paths[0]), context=256)
    kinds = []
    for _ in range(2):
        with LocalClient(options) as client:
            kinds.append(client.load().kv_type_k)
    backend = get_backend("llamacpp")
    from edgeinfer.open import plan_open

    settings = plan_open(options).command.settings
    known = known_kv_speeds(backend, model.config, settings, tmp_path / "cache" / "step-costs")
    assert kinds == [in_order(known)[0]] * 2
