"""`edgeinfer quantize`: from a folder to a file that llama.cpp runs, and back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgeinfer_models.conversion.imatrix import Columns, Imatrix, write_imatrix
from edgeinfer_models.gguf_header import read_gguf_header
from tests.cli.conftest import Console
from tests.fixtures_hf import write_tiny_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_folder(tmp_path / "tiny")


def answer(console: Console, model: Path) -> str:
    command = ("run", "--json", "--raw", "--temp", "0", "--max-tokens", "12", "--ctx", "256")
    done = console(*command, model, "the other in")
    assert done.code == 0, done.err
    return str(done.json["text"])


def test_a_folder_becomes_a_file_that_answers_and_a_folder_again(
    console: Console, folder: Path, tmp_path: Path
) -> None:
    done = console("quantize", folder, "--type", "f32", "--json")
    assert done.code == 0, done.err
    out = Path(done.json["output"])
    assert out == tmp_path / "tiny-f32.gguf"
    assert (done.json["type"], done.json["family"], done.json["notes"]) == ("f32", "llama", [])
    assert answer(console, out)
    back = tmp_path / "back"
    done = console("quantize", out, "--to", "safetensors", "--type", "f32", "-o", back)
    assert done.code == 0, done.err
    from safetensors.numpy import load_file

    one, other = load_file(folder / "model.safetensors"), load_file(back / "model.safetensors")
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)
    console("quantize", back, "--type", "f32", "-o", tmp_path / "again.gguf")
    assert answer(console, tmp_path / "again.gguf") == answer(console, out)


def test_what_is_there_is_replaced_only_with_force(
    console: Console, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"mine")
    done = console("quantize", folder, "--type", "f16", "-o", out)
    assert (done.code, out.read_bytes()) == (2, b"mine")
    assert "--force" in done.error_line
    assert console("quantize", folder, "--type", "f16", "-o", out, "--force").code == 0
    assert out.read_bytes()[:4] == b"GGUF"
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter").write_text("dear")
    done = console("quantize", out, "--to", "safetensors", "-o", mine, "--force")
    assert done.code == 2
    assert "not empty" in done.error_line and "--force" not in done.error_line
    assert [path.name for path in mine.iterdir()] == ["letter"]


def test_the_model_that_is_read_is_never_replaced(
    console: Console, folder: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model.gguf"
    assert console("quantize", folder, "--type", "f16", "-o", model).code == 0
    (tmp_path / "link.gguf").symlink_to(model)
    weights = folder / "model.safetensors"
    for source, out in ((folder, weights), (model, model), (model, tmp_path / "link.gguf")):
        before = out.read_bytes()
        for options in (("--type", "q4_0", "--method", "rtn", "--no-report"), ("--type", "f16")):
            done = console("quantize", source, *options, "-o", out, "--force")
            assert done.code == 2
            assert "is of the model that is read" in done.error_line or "already" in done.error_line
        assert out.read_bytes() == before
    # As the hub's cache has it: links to files that lie elsewhere.
    blob = tmp_path / "blob"
    weights.rename(blob)
    weights.symlink_to(blob)
    for out in (weights, blob):
        done = console("quantize", folder, "--type", "q4_0", "-o", out, "--force")
        assert (done.code, "is of the model that is read" in done.error_line) == (2, True)
    done = console("quantize", folder, "--type", "q4_0", "--report", folder / "config.json")
    assert (done.code, "--report" in done.error_line) == (2, True)
    assert blob.read_bytes()[:4] != b"GGUF" and json.loads((folder / "config.json").read_text())
    for out in (tmp_path, ""):
        done = console("quantize", folder, "--type", "q4_0", "-o", out, "--force")
        assert (done.code, "is a folder; give a file's name" in done.error_line) == (2, True)


def test_defaults_of_the_users_count_where_they_fit(
    console: Console, folder: Path, tmp_path: Path
) -> None:
    defaults = {
        "EDGEINFER_CALIBRATION_TOKENS": "2048",
        "EDGEINFER_MINUTES": "3",
        "EDGEINFER_REPORT": "x.md",
    }
    assert console("quantize", folder, "--type", "f16", **defaults).code == 0
    options = ("--type", "q4_0", "--method", "rtn", "--no-report")
    done = console("quantize", folder, *options, **defaults)
    assert done.code == 0, done.err
    done = console("quantize", folder, "--type", "mlx-8bit", EDGEINFER_METHOD="qat", **defaults)
    assert done.code == 0, done.err
    done = console("quantize", folder, "--type", "nope", **defaults)
    assert "--type 'nope' is not one of" in done.error_line
    done = console("quantize", folder, "--type", "f16", "--minutes", "3", "-o", tmp_path / "x.gguf")
    assert (done.code, "--minutes is for GGUF files of fewer bits" in done.error_line) == (2, True)


def test_a_folder_without_what_says_what_it_is(console: Console, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = console("quantize", tmp_path / "empty", "--type", "q4_0")
    assert (done.code, "neither a .gguf file nor safetensors" in done.error_line) == (1, True)
    (folder / "config.json").unlink()
    done = console("quantize", folder, "--type", "q4_0")
    assert (done.code, "no config.json" in done.error_line) == (1, True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--type", "q4_9"), "--type 'q4_9' is not one of"),
        (("--to", "onnx"), "--to 'onnx' is not one of"),
        (("--to", "safetensors"), "already"),
        (("-o", "/nowhere/at/all.gguf"), "no such folder"),
    ],
)
def test_wrong_options_are_one_line(
    console: Console, folder: Path, options: tuple[str, ...], said: str
) -> None:
    done = console("quantize", folder, *options)
    assert done.code == 2
    assert said in done.error_line


def test_a_family_that_is_not_known_says_which_are(console: Console, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    done = console("quantize", folder)
    assert done.code == 1
    assert "supported: llama" in done.error_line


def test_a_missing_shard_and_weights_alone_are_one_line(
    console: Console, folder: Path, tmp_path: Path
) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    done = console("quantize", folder)
    assert (done.code, "shard is missing" in done.error_line) == (1, True)
    alone = tmp_path / "alone"
    alone.mkdir()
    (folder / "model.safetensors").rename(alone / "model.safetensors")
    done = console("quantize", alone / "model.safetensors")
    assert (done.code, "config.json" in done.error_line) == (1, True)
    (alone / "weights.bin").write_bytes(b"\x80\x02}q\x00.")
    done = console("quantize", alone / "weights.bin")
    assert done.code == 1 and "pickle" in done.error_line


@pytest.mark.parametrize("command", ["quantize", "run"])
def test_a_folder_of_pickles_says_that_they_are_never_read(
    console: Console, folder: Path, command: str
) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    done = console(command, folder, *(["hi"] if command == "run" else []))
    assert done.code == 1
    assert "a Python pickle (pytorch_model.bin), which can run code and is never read" in done.error_line


PLAIN = ("--method", "rtn", "--no-report")


@pytest.mark.parametrize("type_name", ["q4_0", "q4_k_m", "q8_0"])
def test_a_folder_becomes_a_small_gguf_file_that_answers(
    console: Console, folder: Path, type_name: str
) -> None:
    done = console("quantize", folder, "--type", type_name, "--json", *PLAIN)
    assert done.code == 0
    out = Path(done.json["output"])
    assert out.name == f"{folder.name}-{type_name}.gguf"
    assert done.json["bits_per_weight"] < 12 and done.json["method"] == "rtn"
    assert sum(done.json["bytes_by_type"].values()) == done.json["bytes"]
    answered = console("run", "--temp", "0", "--max-tokens", "4", "--ctx", "128", out, "hello")
    assert answered.code == 0
    again = console("quantize", folder, "--type", type_name)
    assert (again.code, "--force" in again.err) == (2, True)


def test_a_type_that_there_is_not_names_those_there_are(console: Console, folder: Path) -> None:
    done = console("quantize", folder, "--type", "q4_k")
    assert done.code in (1, 2)
    assert "q4_k_m" in done.error_line
    packed = console("quantize", folder, "--type", "q4_0", "--to", "safetensors")
    assert "--type q4_0 is a type of GGUF files" in packed.error_line


def write_importance(path: Path, width: int = 64, *, name: str = "blk.{}.ffn_up.weight") -> Path:
    """Of one matrix in each of the tiny model's layers."""
    random = np.random.default_rng(1)
    tensors = {
        name.format(layer): Columns(
            random.gamma(1.0, 9.0, (1, width)).astype(np.float32), np.array([256])
        )
        for layer in range(2)
    }
    write_imatrix(path, Imatrix(tensors, ("wiki.txt",), chunk_size=128, chunk_count=2))
    return path


def test_an_importance_matrix_changes_its_tensors_and_is_named_in_the_file(
    console: Console, folder: Path, tmp_path: Path
) -> None:
    file = write_importance(tmp_path / "some.imatrix")
    plain, weighed = tmp_path / "plain.gguf", tmp_path / "weighed.gguf"
    done = console("quantize", folder, "--type", "q5_1", "-o", plain, "--json", *PLAIN)
    assert (done.code, done.json["method"]) == (0, "rtn")
    weighing = ("--imatrix", file, "--no-report")
    done = console("quantize", folder, "--type", "q5_1", "-o", weighed, "--json", *weighing)
    assert (done.code, done.json["method"]) == (0, "imatrix")
    headers = [read_gguf_header(path) for path in (plain, weighed)]
    data = [path.read_bytes() for path in (plain, weighed)]
    changed = set()
    for tensor in headers[0].tensors:
        twin = headers[1].tensor(tensor.name)
        assert twin is not None and twin.type_name == tensor.type_name
        begins = [h.data_offset + t.offset for h, t in zip(headers, (tensor, twin), strict=True)]
        one, other = (d[at : at + tensor.num_bytes] for d, at in zip(data, begins, strict=True))
        changed |= {tensor.name} if one != other else set()
    assert changed == {"blk.0.ffn_up.weight", "blk.1.ffn_up.weight"}
    said = {key: value for key, value in headers[1].metadata.items() if "imatrix" in key}
    assert said == {
        "quantize.imatrix.file": "some.imatrix",
        "quantize.imatrix.dataset": "wiki.txt",
        "quantize.imatrix.entries_count": 2,
        "quantize.imatrix.chunks_count": 2,
    }
    assert not any("imatrix" in key for key in headers[0].metadata)
    assert answer(console, weighed)
    # Rounded again without one, a file says no longer that it had one.
    done = console("quantize", weighed, "--type", "q4_0", "-o", tmp_path / "again.gguf", *PLAIN)
    assert done.code == 0
    assert not any("imatrix" in key for key in read_gguf_header(tmp_path / "again.gguf").metadata)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--type", "q4_0", "--method", "best"), 2, "--method 'best' is not one of auto, rtn, imatrix"),
        (
            ("--type", "q4_0", "--method", "rtn", "--imatrix", "FILE"),
            2,
            "--imatrix is for --method imatrix",
        ),
        (("--type", "f16", "--imatrix", "FILE"), 2, "--imatrix is for GGUF files of fewer bits"),
        (("--type", "f16", "--method", "rtn"), 2, "--method is for files and folders of fewer bits"),
        (("--type", "q4_0", "--imatrix", "/nowhere/at.all"), 1, "/nowhere/at.all: no such file"),
        (("--type", "q4_0", "--imatrix", "TEXT"), 1, "no importance matrix but seems to be a text file"),
        (("--type", "q4_0", "--imatrix", "OTHER"), 2, "none of its 2 entries ('layers.0.w', …) is of a"),
        (("--type", "q4_0", "--imatrix", "WIDE"), 2, "has 96 columns for 'blk.0.ffn_up.weight', which"),
    ],
)
def test_an_importance_matrix_that_cannot_be_used_is_one_line(
    console: Console, folder: Path, tmp_path: Path, options: tuple[str, ...], code: int, said: str
) -> None:
    files = {
        "FILE": write_importance(tmp_path / "a.imatrix"),
        "OTHER": write_importance(tmp_path / "b.imatrix", name="layers.{}.w"),
        "WIDE": write_importance(tmp_path / "c.imatrix", 96),
        "TEXT": tmp_path / "text.txt",
    }
    files["TEXT"].write_text("How the work goes on.\n" * 40)
    before = set(tmp_path.iterdir())
    done = console("quantize", folder, *(files.get(option, option) for option in options))
    assert done.code == code, done.err
    assert said in done.error_line
    assert set(tmp_path.iterdir()) == before
