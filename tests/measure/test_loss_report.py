"""What quantizing cost, measured on a tiny model and told in every form."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from edgeinfer.client import OpenOptions
from edgeinfer.errors import EdgeInferError, UsageError
from edgeinfer.measure.loss import Divergence, Loss
from edgeinfer.measure.loss_report import LossReport, Sample, Size, Speed, check_report
from edgeinfer.measure.quantize_loss import PROMPTS, measure_loss
from edgeinfer.quality.tensor_error import TensorError
from edgeinfer.quantize.quantization import opened, plan_quantization, quantize
from edgeinfer_models.gguf_patch import patch_metadata, reserved
from tests.fixtures_gguf import write_tiny_gguf
from tests.fixtures_hf import write_tiny_folder

TEXT = "The sea is wide, and the sky above it is blue. " * 100
QUICK = OpenOptions(threads=1, threads_batch=1, gpu_layers=0)

REPORT = LossReport(
    Loss(
        "model-q4_0",
        "model",
        2000,
        Divergence(0.25, 0.2, 1.5, 0.8),
        Divergence(1e-5, 5e-6, 1e-4, 0.999),
        20.0,
        16.0,
    ),
    Size(400_000_000, 16.0),
    Size(100_000_000, 4.5),
    Speed(100.0, 20.0),
    Speed(200.0, 50.0),
    (Sample("Why?", "Because\nit is", "Be|cause\x1b[31m\n# no heading"),),
    (
        *(TensorError(f"blk.{n}.ffn_up.weight", "Q4_0", 0.001 * (n + 1)) for n in range(30)),
        TensorError("token_embd.weight", "Q6_K", 0.5),
    ),
    ("it was quantized already",),
)


def tiny(path: Path, **options: object) -> Path:
    # (written as it is and rounded, from the same numbers)
    return write_tiny_gguf(path, hidden=64, **options)  # type: ignore[arg-type]


def test_a_quantized_model_is_measured_against_its_original(tmp_path: Path) -> None:
    original = tiny(tmp_path / "model.gguf", weight_type="F16")
    result = tiny(tmp_path / "small.gguf", weight_type="Q4_0", metadata={"report": reserved(512)})
    told: list[tuple[str, float]] = []
    errors = (TensorError("blk.0.attn_q.weight", "Q4_0", 0.01),)
    report = measure_loss(
        original,
        result,
        TEXT,
        600,
        lambda what, share: told.append((what, share)),
        options=QUICK,
        errors=errors,
        notes=("a note",),
    )
    loss = report.loss
    assert loss.noise_floor.mean < 1e-4 < loss.divergence.mean
    assert 0 < loss.divergence.top1 < 1
    assert loss.perplexity != loss.reference_perplexity
    assert report.size_after.num_bytes < report.size_before.num_bytes
    assert 16 <= report.size_before.bits_per_weight < 17
    for speed in (report.speed_before, report.speed_after):
        assert speed is not None and speed.prefill > 0 and speed.decode > 0
    assert [sample.prompt for sample in report.samples] == list(PROMPTS)
    assert all(sample.before and sample.after for sample in report.samples)
    assert report.errors == errors and report.notes[0] == "a note"
    assert {"reading with model", "the noise floor", "reading with small"} <= {what for what, _ in told}
    patch_metadata(result, "report", report.essentials_text())


def test_an_original_that_is_a_folder_is_measured_by_the_results_backend(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "model", hidden=64)
    plan = plan_quantization(opened(folder), folder, "q8_0", tmp_path / "small.gguf", force=False)
    quantize(plan)
    report = measure_loss(folder, plan.out, TEXT, 300, options=QUICK, speed=False, samples=False)
    assert report.loss.noise_floor.mean < report.loss.divergence.mean < 0.05
    assert any("was converted to" in note for note in report.notes)


def test_the_quick_way_measures_predictions_alone(tmp_path: Path) -> None:
    model = tiny(tmp_path / "model.gguf")
    staged = tmp_path / ".model.gguf.part"
    staged.write_bytes(model.read_bytes())
    quick = {"options": QUICK, "speed": False, "samples": False}
    report = measure_loss(model, staged, TEXT, 300, name="result", **quick)  # type: ignore[arg-type]
    assert (report.loss.model, report.loss.reference) == ("result", "model")
    assert (report.loss.divergence.mean, report.loss.divergence.top1) == (0.0, 1.0)
    assert (report.speed_before, report.speed_after, report.samples) == (None, None, ())
    assert report.as_json()["speed"] is None
    assert report.as_markdown() and report.lines()


def test_ctrl_c_leaves_no_process(tmp_path: Path) -> None:
    model = tiny(tmp_path / "model.gguf")

    def interrupt(what: str, share: float) -> None:
        if what == "the noise floor":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_loss(model, model, TEXT, 5000, interrupt, options=QUICK)
    assert not [
        child for child in psutil.Process().children() if "eval_process" in " ".join(child.cmdline())
    ]


def test_a_result_that_cannot_be_opened_is_one_error(tmp_path: Path) -> None:
    model = tiny(tmp_path / "model.gguf")
    (tmp_path / "broken.gguf").write_bytes(model.read_bytes()[:-100])
    with pytest.raises(EdgeInferError, match=r"broken.gguf: 100 of"):
        measure_loss(model, tmp_path / "broken.gguf", TEXT, 300, options=QUICK)


def test_as_json_everything_is_there() -> None:
    found = json.loads(json.dumps(REPORT.as_json()))
    assert found["kl"] == {"mean": 0.25, "median": 0.2, "p99": 1.5}
    assert found["noise_floor"]["kl"]["mean"] == 1e-5
    assert found["bytes"] == {"before": 400_000_000, "after": 100_000_000}
    assert found["speed"]["decode"] == {"before": 20.0, "after": 50.0}
    assert len(found["errors"]) == 31
    assert found["samples"][0]["before"] == "Because\nit is"


def test_in_a_terminal_layers_are_columns_and_answers_are_harmless() -> None:
    lines = REPORT.lines(80)
    assert all(len(line) <= 80 or "after:" in line for line in lines)
    assert "weights                400.0 MB  100.0 MB  0.25 x" in lines
    assert any("decode, tok/s" in line and "2.50 x" in line for line in lines)
    (top,) = (line for line in lines if line.endswith("██") and "0.03" in line)
    assert top.index("│") < top.index("▂") and "   0.03 │".strip() in top
    assert any(line.strip().startswith("0 ") and line.endswith(" 29") for line in lines)
    assert not any("\x1b" in line for line in lines)
    assert lines[lines.index("  before:") + 1] == "    Because"


@pytest.mark.parametrize("layers", [1, 30, 80, 400])
def test_a_chart_fits_whatever_the_number_of_layers(layers: int) -> None:
    errors = [TensorError(f"blk.{n}.x", "Q4_0", float(n)) for n in range(layers)]
    lines = replace(REPORT, errors=tuple(errors), samples=()).lines(60)
    chart = [line for line in lines if "│" in line]
    assert len(chart) == 4 and all(len(line) <= 60 for line in chart)


def test_in_markdown_an_answer_cannot_break_out() -> None:
    text = REPORT.as_markdown()
    assert text.startswith("# model-q4\\_0 against model\n")
    assert "\n    # no heading\n" in text and "\n# no heading" not in text
    assert "| token\\_embd.weight | Q6_K | 5.000e-01 |" in text
    assert "- it was quantized already" in text


@pytest.mark.parametrize("name", ["r.md", "r.json", "r.svg", "r.PNG"])
def test_a_report_is_written_as_its_name_ends(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    check_report(path)
    REPORT.save(path)
    beginning = {"r.md": b"# model", "r.json": b"{\n", "r.svg": b"<?xml", "r.PNG": b"\x89PNG"}[name]
    assert path.read_bytes().startswith(beginning)
    assert [each.name for each in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["r.pdf", "r", "nowhere/r.md"])
def test_a_report_that_cannot_be_written_is_wrong_usage(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="--report"):
        check_report(tmp_path / name)


def test_the_essentials_fit_into_what_is_reserved_for_them() -> None:
    long = replace(REPORT, loss=replace(REPORT.loss, reference="m" * 500, perplexity=1.23456789e300))
    text = long.essentials_text()
    assert len(text.encode()) < 400
    assert json.loads(text)["kl_mean"] == 0.25
    assert REPORT.essentials()["edgeinfer.quantize.top1"] == 0.8
