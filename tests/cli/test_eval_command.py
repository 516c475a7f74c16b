"""`edgeinfer eval` over the scripted backend: the table, the JSON, the picture, and what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Console, Invoke, Script
from tests.fixtures_gguf import tiny_vocabulary, write_tiny_gguf


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


def test_a_model_is_compared_with_another(
    console: Console, script: Script, text: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"seed": 5}')
    picture = tmp_path / "kl.svg"
    options = ("--text", str(text), "--tokens", "700", "--plot", str(picture), "--reference", str(other))
    found = console("eval", "--json", *options, *script()).json
    assert (found["suite"], found["model"], found["reference"]) == ("reference", "scripted", "other")
    assert found["tokens"] == 698, "two windows, each of whose last tokens has nothing after it"
    assert found["kl"]["mean"] > 0.1 and found["kl"]["p99"] > found["kl"]["median"] > 0
    assert found["top1"] < 0.9
    assert found["perplexity"] != found["reference_perplexity"]
    assert found["noise_floor"] == {"kl": {"mean": 0, "median": 0, "p99": 0}, "top1": 1}
    assert picture.read_text().startswith("<?xml")
    shown = console("eval", *options, *script())
    assert [line.split("\t")[0] for line in shown.out.splitlines()] == ["noise floor", "scripted"]


def test_a_model_agrees_with_itself(invoke: Invoke, script: Script, text: Path) -> None:
    arguments = script()
    done = invoke("eval", "--json", "--text", text, "--reference", arguments[-1], *arguments)
    assert (done.code, done.err) == (0, "")
    assert (done.json["kl"]["p99"], done.json["top1"]) == (0, 1)
    assert done.json["perplexity"] == done.json["reference_perplexity"]


def test_models_of_two_vocabularies_are_not_compared(
    invoke: Invoke, tiny: Path, text: Path, tmp_path: Path
) -> None:
    other = write_tiny_gguf(tmp_path / "other.gguf", metadata=tiny_vocabulary(700))
    done = invoke("eval", "-q", "--text", text, "--reference", other, "--threads", "1", tiny)
    assert (done.code, done.out) == (1, "")
    assert "the two models have different vocabularies" in done.error_line


def test_models_that_read_a_text_as_other_tokens_are_not_compared(
    invoke: Invoke, tiny: Path, text: Path, tmp_path: Path
) -> None:
    other = write_tiny_gguf(tmp_path / "other.gguf", metadata={"tokenizer.ggml.merges": ["t h", "h e"]})
    done = invoke("eval", "-q", "--text", text, "--reference", other, "--threads", "1", tiny)
    assert (done.code, done.out) == (1, "")
    assert "the two models have different tokenizers" in done.error_line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--suite kv", "--suite does not go with --reference"),
        ("--settings q8_0", "--settings does not go with --reference"),
        ("--tokens 5", "--tokens 5 is outside"),
    ],
)
def test_what_two_models_have_no_use_for_is_wrong_usage(
    invoke: Invoke, script: Script, options: str, message: str
) -> None:
    arguments = script()
    done = invoke("eval", "--reference", arguments[-1], *options.split(), *arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.error_line


def test_a_reference_that_is_not_there_is_one_line(invoke: Invoke, script: Script) -> None:
    done = invoke("eval", "--reference", "/nowhere/model.json", *script())
    assert done.code == 1
    assert "/nowhere/model.json" in done.error_line
