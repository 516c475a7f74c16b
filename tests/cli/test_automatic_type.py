"""`edgeinfer quantize` with no type: measured, chosen, told.

Speeds were measured before (made up here, so that what is chosen follows), but in one test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeinfer.machine.cost_store import costs_folder
from edgeinfer.quantize import type_speeds
from edgeinfer.quantize.auto import type_table
from edgeinfer.quantize.quantization import opened
from edgeinfer_models.conversion.imatrix import Columns, Imatrix, write_imatrix
from edgeinfer_models.gguf_header import read_gguf_header
from tests.cli.conftest import Console
from tests.fixtures_gguf import write_tiny_gguf
from tests.fixtures_hf import write_tiny_folder

PLAIN = ("--method", "rtn", "--no-report")  # what is chosen is tried here, not how it is made
SPEEDS = {"q4_0": 9.0, "iq4_nl": 8.0, "q4_k_m": 7.0, "q5_k_m": 6.0, "q8_0": 5.0, "q6_k": 4.0, "f16": 3.0}


class Measured:
    def __init__(self, _: str, job: dict[str, Any], __: object) -> None:
        self._keys = list(job["paths"])

    def rows(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [{"free_cores": None}]
        for key in self._keys:
            took = [0.01 / SPEEDS[key.partition("-")[0]]] * 3
            found.append({"key": key, "decode": {"1": took}, "prefill": {"2": took}})
        return found


@pytest.fixture
def known_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type_speeds, "MeasuringProcess", Measured)


def write_model(folder: Path) -> Path:
    path = write_tiny_folder(folder / "tiny", hidden=256, heads=4, head_dim=64, feed_forward=512)
    type_table(opened(path), path, None, costs_folder())
    return path


def write_file(folder: Path) -> Path:
    path = write_tiny_gguf(folder / "tiny.gguf")
    type_table(opened(path), path, None, costs_folder())
    return path


@pytest.mark.usefixtures("known_speeds")
def test_the_fastest_type_is_taken_where_it_may_lose_as_much(console: Console, tmp_path: Path) -> None:
    done = console("quantize", write_model(tmp_path), "--max-kl", "10", "--json", *PLAIN)
    assert done.code == 0, done.err
    rows = {row["type_name"]: row for row in done.json["table"]}
    assert list(rows) == list(SPEEDS)
    assert done.json["type"] == "q4_0"
    assert rows["q4_0"]["verdict"] == "taken" and 0 < rows["q4_0"]["kl"] < 10
    assert rows["q8_0"]["kl"] is None
    assert done.json["reason"].startswith("q4_0: 500 tokens read")
    assert Path(done.json["output"]) == tmp_path / "tiny-q4_0.gguf"
    assert Path(done.json["output"]).read_bytes()[:4] == b"GGUF"


@pytest.mark.usefixtures("known_speeds")
def test_a_smaller_loss_costs_speed_and_the_table_says_why(console: Console, tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    done = console("quantize", folder, "--max-kl", "10", "--json", *PLAIN)
    loss = done.json["table"][0]["kl"]
    done = console("quantize", folder, "--max-kl", str(0.5 * loss), "-o", tmp_path / "out.gguf", *PLAIN)
    assert done.code == 0, done.err
    heads, first, *rest = (line.split("\t") for line in done.out.splitlines())
    assert heads[0] == "type"
    assert first[0] == "q4_0" and first[-1].startswith("loses more than")
    assert any(line[-1] == "taken" for line in rest)
    assert "what is faster loses more: q4_0" in done.out


@pytest.mark.usefixtures("known_speeds")
def test_a_file_that_no_type_is_good_enough_for_stays_as_it_is(console: Console, tmp_path: Path) -> None:
    file = write_file(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    done = console("quantize", file, "--max-kl", "0", "--quiet")
    assert done.code == 2
    assert "the model stays as it is" in done.error_line
    assert "f16 (as it is)" in done.out  # the table
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--max-kl", "-1"), "--max-kl -1 is outside"),
        (("--max-kl", "nan"), "--max-kl nan is outside"),
        (("-o", "/nowhere/at/all.gguf"), "no such folder"),
        (("--type", "q4_0", "--refresh"), "--refresh is for --type auto"),
        (("--to", "safetensors", "--refresh"), "--refresh is for GGUF files of fewer bits"),
        (("--group-size", "64"), "--group-size is for --type"),
    ],
)
def test_wrong_options_are_one_line_before_anything_is_measured(
    console: Console, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    done = console("quantize", write_tiny_gguf(tmp_path / "tiny.gguf"), *options)
    assert done.code == 2
    assert said in done.error_line


def test_a_file_that_is_there_is_said_before_anything_is_measured(
    console: Console, tmp_path: Path
) -> None:
    file, out = write_tiny_gguf(tmp_path / "tiny.gguf"), tmp_path / "out.gguf"
    out.write_bytes(b"mine")
    done = console("quantize", file, "-o", out)
    assert (done.code, out.read_bytes()) == (2, b"mine")
    assert "--force" in done.error_line


@pytest.mark.usefixtures("known_speeds")
def test_an_importance_matrix_weighs_what_is_measured_and_the_result(
    console: Console, tmp_path: Path
) -> None:
    folder = write_model(tmp_path)
    file, other = tmp_path / "a.imatrix", tmp_path / "other.imatrix"
    for path, name in ((file, "blk.0.ffn_up.weight"), (other, "layers.0.w")):
        sums = np.linspace(0.01, 9.0, 256, dtype=np.float32)[None] ** 4
        tensors = {name: Columns(sums, np.array([512]))}
        write_imatrix(path, Imatrix(tensors, ("a.txt",), chunk_size=128, chunk_count=4))
    losses = []
    for options in (PLAIN, ("--imatrix", file, "--no-report")):
        out = tmp_path / f"{len(losses)}.gguf"
        done = console("quantize", folder, "--max-kl", "10", "--json", "-o", out, *options)
        assert done.code == 0, done.err
        assert done.json["method"] == ("rtn" if options is PLAIN else "imatrix")
        losses.append(done.json["table"][0]["kl"])
        assert ("quantize.imatrix.file" in read_gguf_header(out).metadata) == (options is not PLAIN)
    assert losses[0] != losses[1]
    done = console("quantize", folder, "--imatrix", other)
    assert done.code == 2
    assert "none of its 1 entries ('layers.0.w', …) is of a tensor of this model" in done.error_line


@pytest.mark.slow
def test_speeds_are_really_measured(tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf", layers=1)
    rows = type_table(opened(file), file, None, costs_folder()).rows
    assert {row.type_name for row in rows} >= {"q4_0", "q8_0", "f16"}
    assert all(row.decode_tok_s > 0 and row.prefill_tok_s > row.decode_tok_s for row in rows)
