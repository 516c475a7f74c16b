"""A Hugging Face folder from the command line: answered by MLX."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeinfer.backend import Probe
from edgeinfer.errors import BackendUnavailable
from edgeinfer.open import OpenOptions, plan_open
from edgeinfer_backends.mlx import MlxBackend
from tests.cli.conftest import Console
from tests.fixtures_hf import write_tiny_folder

FOUND = MlxBackend().probe()
pytest.importorskip("tokenizers", reason="mlx: the extra is not installed")
needs_mlx = pytest.mark.skipif(not FOUND.usable, reason=f"mlx: {FOUND.reason}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_folder(tmp_path / "tiny", model_type="qwen3")


@needs_mlx
def test_a_folder_is_answered_by_mlx(console: Console, folder: Path) -> None:
    command = ("run", "--json", "--temp", "0", "--max-tokens", "8", "--ctx", "256", folder, "hello")
    done = console(*command)
    assert (done.code, done.err) == (0, "")
    assert (done.json["backend"], done.json["model"]) == ("mlx", "tiny")
    assert done.json["usage"]["completion_tokens"] == 8
    assert done.json["warnings"] == []
    assert console(*command).json["text"] == done.json["text"]


@needs_mlx
def test_a_damaged_folder_is_one_line(console: Console, folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"decoder": {"type": "ByteLevel"}}')
    done = console("run", folder, "hello")
    assert done.code == 1
    assert "tokenizer.json" in done.error_line


@needs_mlx
def test_the_plan_names_the_backend_the_shards_and_the_template(folder: Path) -> None:
    plan = plan_open(OpenOptions(model=str(folder)))
    assert plan.command.backend == "mlx"
    assert plan.command.files.paths == (folder / "model.safetensors",)
    assert "<|im_start|>" in plan.template.text
    assert plan.warnings == ()


def test_mlx_that_was_asked_for_and_is_not_usable_says_so_and_the_way_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "mlx is not installed; run `pip install edgeinfer[mlx]`"
    monkeypatch.setattr(MlxBackend, "probe", lambda self: Probe(False, reason))
    said = r"pip install edgeinfer\[mlx\]`; or leave --backend out"
    with pytest.raises(BackendUnavailable, match=said):
        plan_open(OpenOptions(model=str(folder), backend="mlx"))
