"""`edgeinfer eval` over the scripted backend: the table, the JSON, the picture, and what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Console, Invoke, Script


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The sea is wide, and the sky above it is blue. " * 100)
    return path


def test_kv_types_are_compared(console: Console, script: Script, text: Path, tmp_path: Path) -> None:
    picture = tmp_path / "kv.svg"
    options = ("--text", str(text), "--tokens", "300", "--plot", str(picture))
    done = console("eval", "--json", *options, *script()).json
    assert (done["suite"], done["partial"]) == ("kv", False)
    assert [row["setting"] for row in done["rows"]] == ["noise floor", "q8_0", "q4_0"]
    assert done["rows"][0]["mean_kl"] == 0
    assert done["rows"][0]["top1"] == 1
    assert picture.read_text().startswith("<?xml")
    shown = console("eval", *options, *script())
    assert shown.out.count("\n") == 3


def test_a_window_is_measured_over_a_long_text(
    console: Console, script: Script, text: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "stream.png"
    settings = ("--settings", "f16:256:4,f16:256:0", "--tokens", "3000", "--plot", str(picture))
    done = console("eval", "--json", "--suite", "stream", "--text", str(text), *settings, *script()).json
    first = done["rows"][0]
    assert first["evicted"] > 2700
    assert first["cells"] <= 256
    assert len(first["slices"]) == 2
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_recall_is_measured_by_place(console: Console, script: Script, text: Path) -> None:
    options = ("--suite", "recall", "--text", str(text), "--settings", "f16:256:4")
    done = console("eval", *options, *script())
    assert done.code == 0
    assert [line.split("\t")[1] for line in done.out.splitlines()] == [
        *("in the window", "evicted", "in the sinks"),
    ]


def test_a_text_that_is_too_short_says_so(console: Console, script: Script, tmp_path: Path) -> None:
    (tmp_path / "short").write_text("Too short.")
    done = console("eval", "--text", str(tmp_path / "short"), *script())
    assert (done.code, done.out) == (1, "")
    assert "the text has 10 tokens; it needs 128 at least" in done.error_line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--suite x", "does not exist; there are kv, stream, recall"),
        ("--settings q9", "is not a KV cache type"),
        ("--suite stream --settings q8_0", "needs a window"),
        ("--tokens 5", "--tokens 5 is outside"),
        ("--text /nowhere/text", "--text /nowhere/text: cannot be read"),
        ("--plot x.gif", "must end in .svg or .png"),
    ],
)
def test_what_cannot_be_measured_is_wrong_usage(
    invoke: Invoke, script: Script, options: str, message: str
) -> None:
    done = invoke("eval", *options.split(), *script())
    assert (done.code, done.out) == (2, "")
    assert message in done.error_line


def test_a_model_that_dies_is_one_line(console: Console, script: Script, text: Path) -> None:
    done = console("eval", "--text", str(text), *script(die_at_step=3))
    assert done.code == 1
    assert "the model's process ended with exit code 9" in done.error_line
