"""`edgeinfer quantize` to folders of packed weights, as a user runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Console
from tests.fixtures_gguf import write_tiny_gguf
from tests.fixtures_hf import write_tiny_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_folder(tmp_path / "tiny")


@pytest.mark.parametrize("type_name", ["mlx-4bit", "mlx-8bit", "int8", "int4", "fp8"])
def test_a_folder_becomes_a_small_folder_that_answers(
    console: Console, folder: Path, type_name: str
) -> None:
    pytest.importorskip("torch")
    done = console("quantize", folder, "--type", type_name, "--method", "rtn", "--json")
    assert done.code == 0, done.err
    out = Path(done.json["output"])
    assert out == folder.with_name(f"tiny-{type_name}")
    assert (done.json["type"], done.json["method"]) == (type_name, "rtn")
    assert 4 < done.json["bits_per_weight"] < 26
    sizes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert 0 <= sizes - done.json["bytes"] < 16_384  # the header
    options = ("--backend", "torch", "--raw", "--temp", "0", "--max-tokens", "4", "--ctx", "128")
    answered = console("run", *options, out, "the other in")
    assert answered.code == 0, answered.err
    for force in ((), ("--force",)):
        again = console("quantize", folder, "--type", type_name, *force)
        assert again.code == 2
        assert "not empty; no folder is replaced" in again.error_line


@pytest.mark.parametrize(
    ("type_name", "method", "became"),
    [
        ("mlx-4bit", "auto", "awq+gptq"),
        ("mlx-8bit", "awq", "awq"),
        ("int4", "gptq", "gptq"),
        ("int8", "awq+gptq", "awq+gptq"),
        ("fp8", "auto", "rtn"),
    ],
)
def test_a_folder_fitted_to_text_answers(
    console: Console, folder: Path, tmp_path: Path, type_name: str, method: str, became: str
) -> None:
    pytest.importorskip("torch")
    (tmp_path / "text.txt").write_text("the other in the house " * 1000)
    text = () if became == "rtn" else ("--calibration", tmp_path / "text.txt")
    few = (*text, "--calibration-tokens", "2048")
    out = tmp_path / "out"
    options = ("--type", type_name, "--method", method, "--group-size", "32", *few, "--json")
    if type_name in ("int8", "fp8"):
        options = tuple(option for option in options if option not in ("--group-size", "32"))
    done = console("quantize", folder, "-o", out, *options)
    assert done.code == 0, done.err
    assert (done.json["type"], done.json["method"]) == (type_name, became)
    options = ("--backend", "torch", "--raw", "--temp", "0", "--max-tokens", "4", "--ctx", "128")
    answered = console("run", *options, out, "the other in")
    assert answered.code == 0, answered.err
    assert {path.name for path in tmp_path.iterdir()} == {"tiny", "text.txt", "out"}


def test_to_mlx_alone_is_4_bits_and_with_a_float_type_plain(
    console: Console, folder: Path, tmp_path: Path
) -> None:
    done = console("quantize", folder, "--to", "mlx", "--method", "rtn", "--json")
    assert (done.code, done.json["type"]) == (0, "mlx-4bit")
    gguf = write_tiny_gguf(tmp_path / "other.gguf")
    plain = console("quantize", gguf, "--to", "mlx", "--type", "f16", "--json")
    assert plain.code == 0, plain.err
    assert Path(plain.json["output"]).name == "other-mlx-f16"
    assert (plain.json["method"], plain.json["bits_per_weight"]) == (None, 16.0)


def test_a_packed_folder_becomes_a_gguf_file_that_answers(
    console: Console, folder: Path, tmp_path: Path
) -> None:
    for type_name in ("mlx-4bit", "int8"):
        assert console("quantize", folder, "--type", type_name, "--method", "rtn").code == 0
        out = tmp_path / f"{type_name}.gguf"
        done = console("quantize", tmp_path / f"tiny-{type_name}", "--type", "f16", "-o", out)
        assert done.code == 0, done.err
        answered = console("run", "--temp", "0", "--max-tokens", "4", "--ctx", "128", out, "hello")
        assert answered.code == 0, answered.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--type", "mlx-5bit"), "--type 'mlx-5bit' is not one of"),
        (("--type", "mlx-4bit", "--to", "gguf"), "leave --to out"),
        (("--type", "int4", "--to", "mlx"), "a folder for --to mlx is of mlx-4bit"),
        (("--type", "q4_0", "--to", "mlx"), "a folder for --to mlx is of mlx-4bit"),
        (("--type", "mlx-4bit", "--group-size", "48"), "32, 64, 128"),
        (("--type", "int8", "--group-size", "64"), "--group-size is for"),
        (("--type", "q4_0", "--group-size", "64"), "--group-size is for"),
        (("--type", "q4_0", "--scale-type", "f32"), "--scale-type is for"),
        (("--type", "mlx-4bit", "--scale-type", "f8"), "--scale-type 'f8' is not one of"),
        (("--type", "int4", "-o", "/nowhere/at/all"), "no such folder"),
        (("--type", "int4", "--method", "best"), "--method 'best' is not one of"),
        (("--type", "int4", "--method", "qat"), "--method qat is for GGUF files"),
        (("--type", "fp8", "--method", "gptq"), "--method gptq is for whole numbers"),
        (
            ("--type", "int8", "--calibration", __file__),
            "int8 is rounded without looking at text",
        ),
        (("--type", "int4", "--method", "gptq", "--calibration", "/nowhere/text"), "cannot be read"),
        (("--type", "int4", "--calibration-tokens", "5"), "--calibration-tokens 5 is outside"),
        (("--to", "mlx", "--type", "f16", "--method", "gptq"), "--method is for weights of fewer bits"),
        (("--type", "int4", "--max-kl", "1"), "--max-kl is for GGUF files of fewer bits"),
        (("--type", "mlx-4bit", "--budget", "4bpw"), "--budget is for GGUF files of fewer bits"),
        (("--type", "mlx-4bit", "--report", "x.md"), "--report is for GGUF files of fewer bits"),
        (("--to", "mlx", "--minutes", "3"), "--minutes is for GGUF files of fewer bits"),
    ],
)
def test_wrong_options_of_folders_are_one_line(
    console: Console, folder: Path, options: tuple[str, ...], said: str
) -> None:
    done = console("quantize", folder, *options)
    assert done.code == 2
    assert said in done.error_line
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]


def test_nothing_is_left_of_a_folder_that_could_not_be_written(
    console: Console, folder: Path, tmp_path: Path
) -> None:
    import numpy as np
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for type_name in ("mlx-4bit", "int4"):
        done = console("quantize", folder, "--type", type_name, "--method", "rtn")
        assert done.code == 1
        assert "NaN (row 3, column 5)" in done.error_line
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
