"""`edgeinfer train-exit` from end to end, on a tiny model: what it writes, and what it says of what
cannot be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from edgeinfer_models.exit_file import read_exit_file, require_exit_of
from edgeinfer_models.gguf_header import read_gguf_header
from tests.cli.conftest import CONSOLE_SCRIPT
from tests.fixtures_families import llama_cpp_logits
from tests.fixtures_gguf import write_tiny_gguf

pytest.importorskip("torch")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "tiny.gguf", layers=4, weight_type="F16", context=1024)


def environment(tmp_path: Path) -> dict[str, str]:
    folders = {"EDGEINFER_DATA_DIR": tmp_path / "data", "EDGEINFER_CACHE_DIR": tmp_path / "cache"}
    return {**os.environ, **{name: str(path) for name, path in folders.items()}}


def started(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [CONSOLE_SCRIPT, "train-exit", *arguments],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def trained(tmp_path: Path, *arguments: str) -> tuple[int, str, str]:
    process = started(tmp_path, *arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def test_an_exit_and_a_draft_model_come_of_it(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("what I ask about. " * 400)
    draft = tmp_path / "draft.gguf"
    arguments = (str(model), "--minutes", "0.1", "--text", str(text), "--export-draft", str(draft))
    code, out, err = trained(tmp_path, *arguments, "--json")
    assert code == 0, err
    told = json.loads(out)
    path = tmp_path / "data" / "exits" / "tiny.exit.gguf"
    assert told["output"] == str(path) and told["layer"] == 1 and told["curve"]
    found = read_exit_file(path)
    require_exit_of(found, read_gguf_header(model))
    assert found.layer == 1 and found.told["agreement"] and found.told["learnt_tokens"] > 0
    assert "texts of yours" in err and "texts to learn from" in err
    assert llama_cpp_logits(draft, [5, 9, 40]).shape == llama_cpp_logits(model, [5, 9, 40]).shape
    assert not list((tmp_path / "cache" / "train-exit").glob("*"))
    code, _, err = trained(tmp_path, *arguments)
    assert code == 2 and "--force" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(("minutes", "done"), [("5", "texts"), ("0.4", "learnt")])
def test_what_is_interrupted_goes_on(model: Path, tmp_path: Path, minutes: str, done: str) -> None:
    process = started(tmp_path, str(model), "--minutes", minutes, "--layer", "2")
    kept = tmp_path / "cache" / "train-exit"
    deadline = time.monotonic() + 120
    while not list(kept.glob(f"*/{done}")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on from there" in err
    assert list(kept.glob(f"*/{done}")) and not list((tmp_path / "data").rglob("*.exit.gguf"))
    code, _, err = trained(tmp_path, str(model), "--minutes", "0.1", "--layer", "2")
    assert code == 0 and "goes on where it stopped" in err
    assert not list(kept.glob("*"))


def test_a_damaged_beginning_is_said_and_left(model: Path, tmp_path: Path) -> None:
    process = started(tmp_path, str(model), "--minutes", "5")
    kept = tmp_path / "cache" / "train-exit"
    deadline = time.monotonic() + 120
    while not list(kept.glob("*/texts")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=60)
    (texts,) = kept.glob("*/texts")
    texts.write_bytes(texts.read_bytes()[:-100])
    code, _, err = trained(tmp_path, str(model), "--minutes", "0.1")
    assert code == 0 and "begins anew" in err and "goes on" not in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--layer", "4"), "--layer 4: the model has 4 layers; an exit lies after layer 1 to 3"),
        (("--layer", "x"), "'x' is no place of an exit; write 8, or 8x2"),
        (("--minutes", "0"), "--minutes 0 is outside [0.05, 10000]"),
        (("--text", "nosuch.txt"), "--text nosuch.txt: no such file"),
        (("-o", "here.gguf"), "the name of an exit ends in .exit.gguf"),
        (("--device", "cuda"), "no NVIDIA GPU"),
        (("--export-draft", "{model}"), "is of the model that is read"),
        (("--export-draft", "nosuch/draft.gguf"), "there is no such folder"),
        (("-o", "a.exit.gguf", "--export-draft", "a.exit.gguf"), "name one file"),
        (("--layer", "2x9"), "an exit has at most the model's 4 layers"),
    ],
)
def test_what_cannot_be_is_one_line(
    model: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    filled = [each.replace("{model}", str(model)) for each in arguments]
    code, out, err = trained(tmp_path, str(model), *filled)
    assert code in (1, 2) and out == ""
    assert said in err.splitlines()[-1], err
    assert not list(tmp_path.rglob("*.exit.gguf"))


def test_models_whose_exits_llama_cpp_would_not_run_are_refused(tmp_path: Path) -> None:
    model = write_tiny_gguf(tmp_path / "tiny.gguf", arch="gemma3", layers=4)
    code, _, err = trained(tmp_path, str(model))
    assert code == 1 and "no exit can be trained for models of the architecture gemma3" in err


def test_without_torch_it_says_what_to_install(model: Path, tmp_path: Path) -> None:
    """A package of that name that cannot be found."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
    )
    path = os.pathsep.join([str(hidden), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = subprocess.run(
        [CONSOLE_SCRIPT, "train-exit", str(model)],
        env={**environment(tmp_path), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 1 and "torch is not installed" in found.stderr
    assert len(found.stderr.splitlines()) == 1
