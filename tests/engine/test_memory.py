"""A model is made to fit where it is loaded, and what it took is compared with what was predicted."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from edgeinfer.backend import Device, MemoryItem, RuntimeSettings
from edgeinfer.client import LocalClient, OpenOptions
from edgeinfer.engine import memory
from edgeinfer.engine.memory import fit_here, report_memory, resident_bytes, room_here
from edgeinfer.engine.wire import config_from_wire
from edgeinfer.errors import ModelTooLarge
from edgeinfer.machine.ledger import Automatic, MemoryLedger
from edgeinfer.machine.probe import probe_machine
from edgeinfer.registry import get_backend
from edgeinfer_backends.scripted import SCRIPTED_FILES, ScriptedBackend
from edgeinfer_models.resolve import resolve_model
from tests.fixtures_gguf import write_tiny_gguf

MIB = 2**20
WIDE = {"layers": 8, "heads": 4, "kv_heads": 4, "head_dim": 128}  # 16 KiB of KV cache a token


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "wide.gguf", context=2**24, **WIDE)  # type: ignore[arg-type]


def leave(monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> None:
    """A machine on which a model may take so much, its process included."""
    machine = replace(probe_machine(), available_bytes=free_bytes)
    monkeypatch.setattr(memory, "probe_machine", lambda: machine)
    monkeypatch.setattr(memory, "resident_bytes", lambda: 0)


def test_a_context_is_lowered_to_what_is_free(monkeypatch: pytest.MonkeyPatch, wide: Path) -> None:
    model = resolve_model(str(wide))
    leave(monkeypatch, 100 * MIB)
    given = (get_backend("llamacpp"), model.files, model.config, RuntimeSettings(context=4096), 2**30)
    found = fit_here(*given, Automatic(context=True))
    assert found.settings.context < 4096
    assert found.cache_bytes < 2**30
    assert "wide has a context of" in found.warnings[0]
    with pytest.raises(ModelTooLarge, match=r"100 MiB of .* memory is free; --ctx \d+"):
        fit_here(*given, Automatic())
    leave(monkeypatch, 2**30)
    assert fit_here(*given, Automatic(context=True)).settings == RuntimeSettings(context=4096)


def test_the_worker_refuses_what_cannot_fit_and_takes_the_next(wide: Path) -> None:
    with LocalClient(OpenOptions(model=str(wide), context=2**24)) as client:
        with pytest.raises(ModelTooLarge, match=r"256 GiB for 16777216 tokens .* --ctx \d+"):
            client.load()
        pid = client.worker_pid
        client.reopen(OpenOptions(model=str(wide), context=256))
        info = client.load()
        assert client.worker_pid == pid
    assert info.predicted_bytes > 40 * MIB
    assert 0.7 < info.resident_bytes / info.predicted_bytes < 1.1
    (kv,) = [use for use in info.memory if use.name == "kv cache"]
    assert kv.predicted_bytes == kv.real_bytes == 256 * 16 * 1024
    assert 0 < info.cache_bytes <= 2**30


def test_a_configuration_survives_the_pipe(wide: Path) -> None:
    import json
    from dataclasses import asdict

    config = resolve_model(str(wide)).config
    assert config.weights
    assert config_from_wire(json.loads(json.dumps(asdict(config)))) == config


def test_a_prediction_that_is_far_off_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "edgeinfer.memory")
    runtime = ScriptedBackend().load(SCRIPTED_FILES, RuntimeSettings(), lambda done: True)
    right = MemoryLedger((MemoryItem("process", resident_bytes()),))
    report = report_memory("model", right, runtime)
    assert report.uses
    assert {record.levelno for record in caplog.records} == {logging.INFO}
    caplog.clear()
    report_memory("model", MemoryLedger((MemoryItem("process", resident_bytes() // 2),)), runtime)
    assert caplog.records[-1].levelno == logging.WARNING
    assert "resident (+" in caplog.text


def test_gpus_that_do_not_say_what_is_free_are_not_planned_for() -> None:
    card = Device("card", "gpu", 8 * 2**30, 6 * 2**30)
    assert room_here((card, card)).gpu_bytes == 12 * 2**30
    assert room_here((card, replace(card, free_bytes=0))).gpu_bytes is None
    assert room_here((Device("cpu", "cpu", 1, 1),)).gpu_bytes is None
