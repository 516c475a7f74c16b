"""What doctor says of the KV cache of the model that is opened when none is named."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from edgeinfer.backend import KvSpeed
from edgeinfer.cli.doctor import examine, render
from edgeinfer.engine import kv_choice
from edgeinfer.machine.cost_store import save_measured
from edgeinfer.open import OpenOptions, plan_open
from edgeinfer.registry import get_backend
from edgeinfer_models.store import record_last_used
from tests.fixtures_gguf import write_tiny_gguf


def test_bytes_of_a_token_and_what_auto_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EDGEINFER_DATA_DIR", "EDGEINFER_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    path = write_tiny_gguf(tmp_path / "m.gguf", layers=2, hidden=128, heads=2, kv_heads=1, head_dim=64)
    record_last_used(str(path))
    found = examine()
    assert found["kv_cache"]["bytes_per_token"] == {"f16": 512, "q8_0": 272}
    assert (found["kv_cache"]["auto"], found["kv_cache"]["speed"]) == (None, {})
    assert "KV cache   bytes a token of m: f16 512, q8_0 272\n" in render(found)
    assert "--kv-type auto:" not in render(found)

    command = plan_open(OpenOptions()).command
    assert command.config is not None
    conditions = kv_choice._conditions(get_backend("llamacpp"), command.config, command.settings, "q8_0")
    speed = KvSpeed(decode=1.5, prefill=0.95)
    save_measured(Path(command.costs_folder), conditions, [speed.decode, speed.prefill])
    found = examine()
    assert found["kv_cache"]["speed"] == {"q8_0": asdict(speed)}
    assert "answers 1.50 x as fast, reads prompts 0.95 x" in render(found)
    assert "--kv-type auto: q8_0, as far as memory allows" in render(found)
