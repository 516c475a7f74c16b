"""`edgeinfer quantize` with methods that look at text, a budget, and a report."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edgeinfer.cli.quantized_file import FileOptions, write_file
from edgeinfer.errors import ConversionFailed, QualityTooLow, UsageError
from edgeinfer.measure import quantize_loss
from edgeinfer.quantize import distillation
from edgeinfer.quantize.finished_tensors import kept_apart
from edgeinfer.quantize.prepared import Request, prepare
from edgeinfer_models.conversion.imatrix import read_imatrix
from edgeinfer_models.gguf_header import read_gguf_header
from tests.cli.conftest import Console
from tests.fixtures_hf import write_tiny_folder

pytest.importorskip("torch")

FEW = ("--calibration-tokens", "2048")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_folder(tmp_path / "tiny", hidden=64, feed_forward=256)


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("method", ["gptq", "awq", "awq+gptq", "imatrix"])
def test_each_method_writes_a_file_of_the_same_types(
    console: Console, folder: Path, tmp_path: Path, method: str
) -> None:
    plain, out = tmp_path / "plain.gguf", tmp_path / "out.gguf"
    options = ("--type", "q4_0", "--no-report", "--json")
    assert console("quantize", folder, "-o", plain, "--method", "rtn", *options).code == 0
    done = console("quantize", folder, "-o", out, "--method", method, *FEW, *options)
    assert done.code == 0, done.err
    assert (done.json["method"], done.json["report"]) == (method, None)
    one, other = read_gguf_header(plain), read_gguf_header(out)
    assert [(t.name, t.type_name) for t in one.tensors] == [(t.name, t.type_name) for t in other.tensors]
    assert plain.read_bytes() != out.read_bytes()
    assert left(tmp_path) == {"tiny", "plain.gguf", "out.gguf"}
    answer = console("run", out, "hi", "--max-tokens", "4", "--temp", "0", "--json")
    assert answer.code == 0, answer.err


def test_qat_learns_for_as_long_as_it_is_told(console: Console, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    options = ("--type", "q4_0", "--method", "qat", "--minutes", "0.05", "--no-report", *FEW)
    done = console("quantize", folder, "-o", out, *options)
    assert done.code == 0, done.err
    assert console("run", out, "hi", "--max-tokens", "4").code == 0
    assert left(tmp_path) == {"tiny", "out.gguf"}


def test_qat_goes_on_from_where_it_was_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "_KEPT_EVERY_S", 0.0)
    clock = itertools.count(0.0, 0.5)  # half a second a step: the test's pace is not the machine's
    monkeypatch.setattr(distillation, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    out, work = tmp_path / "out.gguf", tmp_path / "out.gguf.unfinished"
    request = Request("q4_0", "qat", out, calibration_tokens=2048, minutes=0.1)

    def learning(until: float) -> tuple[list[float], dict[str, bytes]]:
        """How far learning was, whenever it was told; and what came of it, if it was not stopped."""
        seen: list[float] = []

        def show(what: str, done: float) -> None:
            if what.startswith("qat: learning"):
                seen.append(done)
                if done > until:
                    raise KeyboardInterrupt

        try:
            with prepare(folder, request, show) as ready:
                return seen, {name: blocks.tobytes() for name, blocks in ready.stored.items()}
        except KeyboardInterrupt:
            return seen, {}

    first, _ = learning(until=0.5)
    with np.load(work / "learnt.npz") as kept:
        seconds = float(kept["seconds"])
    assert first[0] < 0.3 < seconds / 6 < first[-1]  # the last step was not kept
    second, blocks = learning(until=1.0)
    assert seconds / 6 < second[0] and second[-1] == 1.0
    third, again = learning(until=1.0)
    assert third == [] and again == blocks
    (work / "learnt.npz").write_bytes(b"PK\x03\x04 and no more")
    assert learning(until=0.05)[0][0] < 0.3


def test_two_at_work_on_one_file_do_not_meet(console: Console, folder: Path, tmp_path: Path) -> None:
    options = ("--type", "q4_0", "--method", "gptq", "--no-report", *FEW)
    with kept_apart(tmp_path / "out.gguf.unfinished"):
        done = console("quantize", folder, "-o", tmp_path / "out.gguf", *options)
        assert done.code == 2
        assert "another edgeinfer is at work on this file" in done.error_line
    assert left(tmp_path) == {"tiny"}
    (tmp_path / "out.gguf.unfinished").write_text("mine")
    done = console("quantize", folder, "-o", tmp_path / "out.gguf", *options)
    assert (done.code, "is in the way" in done.error_line) == (2, True)
    assert left(tmp_path) == {"tiny", "out.gguf.unfinished"}


def test_what_is_gone_on_from_and_what_is_not_is_said(folder: Path, tmp_path: Path) -> None:
    request = Request("q4_0", "gptq", tmp_path / "out.gguf", calibration_tokens=2048)
    said: list[str] = []
    for each in (request, request, replace(request, method="awq+gptq")):
        with prepare(folder, each, say=said.append):
            pass  # and what is finished stays
    assert len(said) == 2
    assert "going on from out.gguf.unfinished, where 14 tensors are finished" in said[0]
    assert "of another job" in said[1]


def test_what_is_finished_outlives_what_goes_wrong_with_the_report(folder: Path, tmp_path: Path) -> None:
    request = Request("q4_0", "gptq", tmp_path / "out.gguf", calibration_tokens=2048)
    with pytest.raises(ConversionFailed), prepare(folder, request):
        raise ConversionFailed("the disk is full")
    assert (tmp_path / "out.gguf.unfinished" / "finished.jsonl").is_file()
    mine = tmp_path / "out.gguf.unfinished" / "thesis.txt"
    mine.write_text("mine")
    (mine.parent / "job.json").unlink()
    with pytest.raises(UsageError, match="was not made by edgeinfer"), prepare(folder, request):
        pass
    assert mine.read_text() == "mine"


def test_a_damaged_model_leaves_nothing_beside_it(
    console: Console, folder: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = np.nan
    save_file(weights, folder / "model.safetensors")
    before = left(tmp_path)
    options = ("--type", "q4_0", "--method", "gptq", "--no-report", *FEW)
    done = console("quantize", folder, "-o", tmp_path / "out.gguf", *options)
    assert done.code == 1, done.err
    assert "model.layers.1.mlp.down_proj.weight" in done.error_line
    assert left(tmp_path) == before


def test_types_are_mixed_as_with_an_importance_matrix_where_text_is_looked_at(
    console: Console, tmp_path: Path
) -> None:
    wide = write_tiny_folder(tmp_path / "wide", hidden=256, feed_forward=512, layers=8)

    def types(type_name: str, method: str) -> set[str]:
        out = tmp_path / f"{type_name}-{method}.gguf"
        options = () if method == "rtn" else FEW
        done = console(
            "quantize", wide, "-o", out, "--type", type_name, "--method", method, "--no-report", *options
        )
        assert done.code == 0, done.err
        return {tensor.type_name for tensor in read_gguf_header(out).tensors if ".ffn_" in tensor.name}

    assert types("iq4_nl", "rtn") == {"F32", "IQ4_NL", "Q5_K"}
    assert types("iq4_nl", "gptq") == {"F32", "IQ4_NL"}
    assert types("q4_0", "gptq") == {"F32", "Q4_0"}
    assert types("q4_0", "imatrix") == {"F32", "Q4_0", "Q4_1"}
    for method in ("imatrix", "awq"):  # of no use without knowing which columns matter
        assert "IQ2_XS" in types("iq2_xs", method)
    done = console("quantize", wide, "--type", "iq2_xs", "--method", "rtn", "--no-report")
    assert done.code == 2 and "needs to know which weights matter" in done.error_line


def test_a_budget_is_kept_and_spent(console: Console, folder: Path, tmp_path: Path) -> None:
    options = ("--no-report", "--json", *FEW)
    done = console("quantize", folder, "--budget", "6.5bpw", *options)
    assert done.code == 0, done.err
    out = Path(done.json["output"])
    assert out == tmp_path / "tiny-6.5bpw.gguf"
    assert 6.2 < done.json["bits_per_weight"] <= 6.5
    most = out.stat().st_size - 2000
    done = console("quantize", folder, "--budget", str(most), "-o", tmp_path / "b.gguf", *options)
    assert done.code == 0, done.err
    assert (tmp_path / "b.gguf").stat().st_size <= most
    done = console(
        "quantize", folder, "--budget", "1bpw", "-o", tmp_path / "c.gguf", "--no-report", *FEW
    )
    assert done.code == 2
    assert "too small for this model" in done.error_line and "give at least" in done.error_line
    assert not (tmp_path / "c.gguf").exists()
    done = console("quantize", folder, "--budget", "1K", "-o", tmp_path / "c.gguf", "--no-report", *FEW)
    assert done.code == 2
    assert "too small for this model" in done.error_line
    least = done.error_line.rpartition(" or ")[2]
    for enough in (least, "30bpw"):
        done = console(
            "quantize", folder, "--budget", enough, "-o", tmp_path / f"{enough}.gguf", *options
        )
        assert done.code == 0, done.err
        assert ("more than the largest types take" in done.err) == (enough == "30bpw")


def test_what_imatrix_finds_is_a_file_that_can_be_given_again(
    console: Console, folder: Path, tmp_path: Path
) -> None:
    file, one, other = tmp_path / "found.gguf", tmp_path / "one.gguf", tmp_path / "other.gguf"
    options = ("--type", "q4_0", "--no-report")
    finding = ("--method", "imatrix", "--save-imatrix", file, *FEW)
    done = console("quantize", folder, "-o", one, *finding, *options)
    assert done.code == 0, done.err
    assert "blk.1.ffn_down.weight" in read_imatrix(file).tensors
    done = console("quantize", folder, "-o", other, "--imatrix", file, *options)
    assert done.code == 0, done.err
    headers = [read_gguf_header(path) for path in (one, other)]
    data = [
        path.read_bytes()[header.data_offset :]
        for path, header in zip((one, other), headers, strict=True)
    ]
    assert data[0] == data[1]


def test_the_report_is_told_kept_and_in_the_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quantize_loss, "ROUNDS", 1)
    out, report = tmp_path / "out.gguf", tmp_path / "report.json"
    wanted = FileOptions(
        method="gptq",
        calibration=None,
        calibration_tokens=2048,
        imatrix=None,
        save_imatrix=None,
        budget=None,
        minutes=None,
        max_kl=None,
        report=str(report),
        report_tokens=256,
        measures=True,
        refreshes=False,
        force=False,
        quiet=True,
        as_json=False,
    )
    write_file(folder, folder, str(out), "q4_0", wanted)
    told = capsys.readouterr().out
    assert "KL mean, nats a token" in told and "error by layer" in told
    kept = json.loads(report.read_text())
    assert kept["kl"]["mean"] > 0 and len(kept["samples"]) == 3
    assert {error["name"] for error in kept["errors"]} >= {
        "blk.0.attn_q.weight",
        "blk.1.ffn_down.weight",
    }
    said = json.loads(read_gguf_header(out).get_str("edgeinfer.quantize.report"))
    assert said["kl_mean"] == pytest.approx(kept["kl"]["mean"], rel=1e-2)
    # Of what is rounded without text, how far the numbers are off.
    rounded = replace(wanted, method="rtn", calibration_tokens=None, force=True)
    write_file(folder, folder, str(out), "q4_0", rounded)
    errors = json.loads(report.read_text())["errors"]
    off = [error["relative_error"] for error in errors if error["type"] == "Q4_0"]
    assert len(off) >= 14 and all(0.002 < error < 0.02 for error in off)
    # What lost too much is not kept, nor anything beside it.
    before = left(tmp_path)
    strict = replace(wanted, method="rtn", max_kl=1e-7, report=None, calibration_tokens=None)
    with pytest.raises(QualityTooLow, match="not written: it lost"):
        write_file(folder, folder, str(tmp_path / "bad.gguf"), "q4_0", strict)
    assert left(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--method", "gptq", "--calibration", "EMPTY"), "is empty"),
        (("--method", "gptq", "--calibration", "TINY"), "tokens; 2048 are needed at least"),
        (("--method", "gptq", "--calibration", "BINARY"), "is not valid UTF-8"),
        (("--method", "gptq", "--calibration", "/nowhere/text"), "cannot be read"),
        (("--method", "rtn", "--calibration", "TINY"), "looks at no text"),
        (("--minutes", "3"), "--minutes is for --method qat"),
        (("--method", "qat", "--minutes", "0"), "--minutes 0 is outside"),
        (("--calibration-tokens", "5"), "--calibration-tokens 5 is outside"),
        (("--save-imatrix", "x.gguf"), "--save-imatrix keeps what --method imatrix finds"),
        (("--report", "x.txt"), "must end in one of"),
        (("--report", "x.md", "--no-report"), "--report needs what --no-report leaves out"),
        (("--max-kl", "1", "--no-report"), "--max-kl needs what --no-report leaves out"),
        (("--budget", "lots"), "--budget 'lots' is no size; write for example 4.5bpw"),
    ],
)
def test_what_cannot_be_is_one_line(
    console: Console, folder: Path, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    files = {"EMPTY": b" \n", "TINY": b"a few words", "BINARY": b"\xff\xfe" * 4000}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    before = left(tmp_path)
    given = [str(tmp_path / option) if option in files else option for option in options]
    done = console("quantize", folder, "--type", "q4_0", "-o", tmp_path / "out.gguf", *given)
    assert done.code == 2, done.err
    assert said in done.error_line
    assert left(tmp_path) == before
