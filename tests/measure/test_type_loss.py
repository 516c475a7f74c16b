"""What `--type auto` asks of a type: how far it lies from the model as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from edgeinfer.errors import MeasureFailed
from edgeinfer.measure import type_loss
from edgeinfer.measure.texts import measured_text
from edgeinfer.measure.type_loss import TypeLoss
from edgeinfer.quantize.measuring_process import MeasuringProcess
from edgeinfer.quantize.quantization import opened
from tests.fixtures_gguf import write_tiny_gguf
from tests.fixtures_hf import write_tiny_folder


def quiet(_: str, __: float) -> None:
    pass


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Any]]:
    """Those that processes were started for, as they go on to be."""
    found: list[Mapping[str, Any]] = []

    def started(
        module: str, job: Mapping[str, Any], progress: Callable[[str, float], None]
    ) -> MeasuringProcess:
        found.append(job)
        return MeasuringProcess(module, job, progress)

    monkeypatch.setattr(type_loss, "MeasuringProcess", started)
    return found


@pytest.mark.parametrize("form", ["file", "folder"])
def test_the_original_is_read_once_for_all_types_and_finer_ones_lose_less(
    form: str, tmp_path: Path, jobs: list[Mapping[str, Any]]
) -> None:
    write = {"file": lambda: write_tiny_gguf(tmp_path / "tiny.gguf")}
    write["folder"] = lambda: write_tiny_folder(tmp_path / "tiny")
    path = write[form]()
    with TypeLoss(opened(path), path, measured_text(None), quiet, tokens=256) as measure:
        losses = [measure(name) for name in ("q4_0", "q8_0")]
        folder = Path(jobs[0]["predictions"]).parent
        assert [each.name for each in folder.iterdir()] == ["predictions"]
    assert 0 < losses[1] < losses[0]
    assert [job["is_original"] for job in jobs] == [True, False, False]
    assert not folder.exists()


def test_a_text_that_is_too_short_is_one_line(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    with (
        TypeLoss(opened(path), path, "Too short.", quiet) as measure,
        pytest.raises(MeasureFailed, match="it needs 128 at least"),
    ):
        measure("q4_0")


def test_predictions_that_were_damaged_meanwhile_are_one_line(
    tmp_path: Path, jobs: list[Mapping[str, Any]]
) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    with TypeLoss(opened(path), path, measured_text(None), quiet, tokens=256) as measure:
        measure("q8_0")
        kept = Path(jobs[0]["predictions"])
        kept.write_bytes(kept.read_bytes()[:-1])
        with pytest.raises(MeasureFailed, match="was damaged; try again"):
            measure("q4_0")
