"""Speeds of weight types: what is written, what is measured, and what is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgeinfer.errors import LoadFailed, MeasureFailed
from edgeinfer.machine.processor_cache import ASSUMED_BYTES, last_level_cache_bytes
from edgeinfer.quantize import type_speeds
from edgeinfer.quantize.auto import type_table
from edgeinfer.quantize.candidates import Candidate, candidates
from edgeinfer.quantize.made_up_rows import MadeUpRows
from edgeinfer.quantize.quantization import Source, opened
from edgeinfer.quantize.type_speeds import measure_type_speeds
from edgeinfer.registry import get_backend
from edgeinfer_models.conversion.stand_in import layer_of, write_stand_in
from edgeinfer_models.gguf_model import read_gguf_model
from tests.fixtures_gguf import write_tiny_gguf
from tests.fixtures_hf import write_tiny_folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "tiny.gguf", layers=4, hidden=256, heads=4, head_dim=64)


def by_name(source: Source, path: Path) -> dict[str, Candidate]:
    return {each.type_name: each for each in candidates(source, path, None)[0]}


class Scripted:
    """In place of the measuring process: layers and head of so many seconds a token."""

    layer_s, head_s = 0.001, 0.004

    def __init__(self) -> None:
        self.jobs: list[dict[str, Any]] = []
        self.free_cores: float | None = None

    def __call__(self, module: str, job: dict[str, Any], progress: object) -> Scripted:
        self.jobs.append(job)
        return self

    def rows(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [{"free_cores": self.free_cores}]
        for key, path in self.jobs[-1]["paths"].items():
            header = read_gguf_model(Path(path))
            size = sum(t.num_bytes for t in header.tensors if layer_of(t.name) >= 0) / 2**20
            took = self.head_s + size * self.layer_s
            disturbed = [took, 9 * took, took]
            found.append({"key": key, "decode": {"1": disturbed}, "prefill": {"2": [took / 10] * 3}})
        return found


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    process = Scripted()
    monkeypatch.setattr(type_speeds, "MeasuringProcess", process)
    return process


def test_a_stand_in_has_the_shapes_and_types_of_the_model_and_is_one(file: Path, tmp_path: Path) -> None:
    source = opened(file)
    chosen = by_name(source, file)["q4_k_m"]
    rows = get_backend("llamacpp").row_quantizer(1)
    out = tmp_path / "stand-in.gguf"
    write_stand_in(out, source, 4, chosen.made_up, chosen.file_type, MadeUpRows(rows))
    rows.close()
    header = read_gguf_model(out)
    assert {t.name: t.type_name for t in header.tensors} == chosen.types
    assert {t.name: t.shape for t in header.tensors} == {
        name: tuple(reversed(shape)) for name, shape in chosen.shapes.items()
    }


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_stand_in_of_fewer_layers_is_a_model_that_runs(form: str, tmp_path: Path) -> None:
    from edgeinfer.backend import RuntimeSettings, SequenceStep, Step
    from edgeinfer_models.resolve import resolve_model

    if form == "file":
        path = write_tiny_gguf(
            tmp_path / "tiny.gguf",
            arch="gemma3",
            layers=6,
            metadata={"gemma3.attention.sliding_window_pattern": [True, False] * 3},
        )
    else:
        path = write_tiny_folder(tmp_path / "tiny", layers=6)
    source = opened(path)
    chosen = by_name(source, path)["q8_0"]
    backend = get_backend("llamacpp")
    rows = backend.row_quantizer(1)
    out = tmp_path / "stand-in.gguf"
    kept = {name: kind for name, kind in chosen.made_up.items() if layer_of(name) < 3}
    write_stand_in(out, source, 3, kept, chosen.file_type, MadeUpRows(rows))
    rows.close()
    assert read_gguf_model(out).get_int("{arch}.block_count") == 3
    runtime = backend.load(resolve_model(str(out)).files, RuntimeSettings(context=256), lambda _: True)
    result = runtime.forward(Step([SequenceStep(runtime.open(), [1, 2, 3])]))
    assert all(abs(value) < 1e6 for value in runtime.logits(result.starts[0]))
    runtime.close()


def test_types_that_come_to_the_same_are_measured_once(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")  # rows of 64 and 128: no blocks of 256
    found, notes = candidates(opened(path), path, None)
    names = [each.type_name for each in found]
    assert "q8_0" in names and "q6_k" not in names
    assert "q6_k is the same as q8_0 for this model" in notes
    types = [each.types for each in found]
    assert all(types.count(each) == 1 for each in types)
    assert found[-1].is_original and names[-1] == "f16"


def test_a_large_model_is_measured_on_two_files_of_fewer_layers(
    file: Path, tmp_path: Path, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = opened(file)
    found = by_name(source, file)
    monkeypatch.setattr(type_speeds, "_layer_counts", lambda *_: (1, 2))
    speeds, _ = measure_type_speeds(source, list(found.values()), tmp_path / "kept")
    assert {speed.layers for speed in speeds.values()} == {(1, 2)}
    for name, speed in speeds.items():
        each = found[name]
        layers = sum(each.bytes_of(tensor) for tensor in each.types if layer_of(tensor) >= 0) / 2**20
        took = Scripted.head_s + layers * Scripted.layer_s
        assert speed.decode_tok_s == pytest.approx(1 / took)  # and not what one round was disturbed by
        assert speed.prefill_tok_s == pytest.approx(10 / took)
        assert speed.threads == (1, 2)


def test_a_large_model_is_measured_on_layers_that_are_larger_than_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", layers=24)
    candidate = by_name(opened(path), path)["q4_0"]
    layer = sum(candidate.bytes_of(name) for name in candidate.types if layer_of(name) == 0)
    monkeypatch.setattr(type_speeds, "last_level_cache_bytes", lambda: 3 * layer)
    assert type_speeds._layer_counts(candidate, 24) == (24,)  # small enough to be written whole
    monkeypatch.setattr(type_speeds, "WHOLE_BYTES", 0)
    assert type_speeds._layer_counts(candidate, 24) == (5, 10)
    monkeypatch.setattr(type_speeds, "last_level_cache_bytes", lambda: 100 * layer)
    assert type_speeds._layer_counts(candidate, 24) == (24,)


def test_what_was_measured_is_kept_and_measured_again_only_when_asked(
    file: Path, tmp_path: Path, scripted: Scripted
) -> None:
    source = opened(file)
    first = type_table(source, file, None, tmp_path / "kept")
    assert type_table(source, file, None, tmp_path / "kept") == first
    assert len(scripted.jobs) == 1
    type_table(source, file, None, tmp_path / "kept", refresh=True)
    assert len(scripted.jobs) == 2
    assert {row.type_name for row in first.rows} >= {"q4_0", "iq4_nl", "q4_k_m", "q8_0", "f16"}
    assert all(row.memory_bytes > row.num_bytes for row in first.rows)


def test_what_was_measured_beside_busy_programs_is_not_kept_and_says_so(
    file: Path, tmp_path: Path, scripted: Scripted
) -> None:
    scripted.free_cores = 0.1
    notes = type_table(opened(file), file, None, tmp_path / "kept").notes
    assert any("other programs were busy" in note for note in notes)
    type_table(opened(file), file, None, tmp_path / "kept")
    assert len(scripted.jobs) == 2


@pytest.mark.parametrize(
    "damaged",
    [
        "[]",
        '[{"type_name": "q4_0"}]',
        '[{"type_name": "q4_0", "prefill_tok_s": -1.0, "decode_tok_s": 1.0, "spread": 0.0,'
        ' "threads": [1, 1], "layers": [4], "rounds": 3}]',
        '"text"',
    ],
)
def test_what_is_kept_and_damaged_is_measured_again(
    damaged: str, file: Path, tmp_path: Path, scripted: Scripted
) -> None:
    import json

    folder = tmp_path / "kept"
    type_table(opened(file), file, None, folder)
    (kept,) = folder.glob("*.json")
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "costs": json.loads(damaged)}))
    type_table(opened(file), file, None, folder)
    assert len(scripted.jobs) == 2


def test_a_process_that_dies_is_one_line(file: Path, tmp_path: Path) -> None:
    from edgeinfer.quantize.measuring_process import MeasuringProcess

    with pytest.raises(MeasureFailed, match="exit code 1"):
        list(MeasuringProcess("no.such.module", {}, lambda *_: None).rows())


def test_a_model_that_cannot_be_measured_says_what_to_do_instead(
    file: Path, tmp_path: Path, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> list[dict[str, Any]]:
        raise LoadFailed("it does not load")

    monkeypatch.setattr(Scripted, "rows", fail)
    with pytest.raises(MeasureFailed, match=r"\(it does not load\); name one: --type"):
        type_table(opened(file), file, None, tmp_path / "kept")


def test_the_last_cache_is_read_as_the_system_tells_it(tmp_path: Path) -> None:
    for index, size in enumerate(("48K", "2048K", "32M", "odd")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert last_level_cache_bytes(tmp_path) == 32 * 2**20
    assert last_level_cache_bytes(tmp_path / "none") == ASSUMED_BYTES
