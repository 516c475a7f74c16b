"""`edgeinfer models`: exact output, exit codes, one JSON object."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from edgeinfer.cli.models import app
from edgeinfer_models import catalogue
from tests.fixtures_gguf import CHATML, write_tiny_gguf

Run = Callable[..., Result]


@pytest.fixture
def run(data_dir: Path) -> Run:
    return lambda *arguments, **options: CliRunner().invoke(app, [str(a) for a in arguments], **options)


@pytest.fixture
def starter(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`smollm2` is the tiny model; its file, for `--from`."""
    content = tiny.read_bytes()
    entry = replace(
        catalogue.CATALOGUE["smollm2"],
        sha256=hashlib.sha256(content).hexdigest(),
        num_bytes=len(content),
    )
    monkeypatch.setitem(catalogue.CATALOGUE, "smollm2", entry)
    return tiny


def test_list_names_what_can_be_pulled_and_what_is_here(run: Run, starter: Path) -> None:
    before = run("list")
    assert (before.exit_code, before.stderr) == (0, "")
    assert before.stdout.split("\t")[:4] == ["smollm2", "can be pulled", "0.2 MB", "Apache-2.0"]
    run("pull", "smollm2", "--from", starter)
    assert run("list").stdout.split("\t")[1] == "installed"
    listed = json.loads(run("list", "--json").stdout)
    assert listed["damaged"] == []
    assert listed["models"][0]["installed"] is True
    assert listed["models"][0]["path"].endswith(".gguf")


def test_pull_says_where_the_model_is(run: Run, starter: Path, data_dir: Path) -> None:
    done = run("pull", "smollm2", "--from", starter)
    assert done.exit_code == 0
    assert done.stdout.startswith(f"smollm2 is installed and verified: {data_dir}")
    assert run("pull", "smollm2").stdout.startswith("smollm2 is already installed: ")
    again = json.loads(run("pull", "smollm2", "--json").stdout)
    assert again["already_installed"] is True
    assert again["sha256"] == hashlib.sha256(starter.read_bytes()).hexdigest()


def test_pull_of_an_unknown_name_fails_in_one_line(run: Run) -> None:
    done = run("pull", "zzz")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == (
        "edgeinfer: there is no model 'zzz' in the catalogue; `edgeinfer models list` shows what"
        " there is\n"
    )
    failed = run("pull", "zzz", "--json")
    assert failed.exit_code == 1
    assert json.loads(failed.stdout)["error"]["type"] == "model_not_found"


def test_show_prints_what_the_issue_asks_for(run: Run, tiny: Path) -> None:
    done = run("show", tiny)
    assert (done.exit_code, done.stderr) == (0, "")
    shown = dict(line.split("\t") for line in done.stdout.splitlines())
    assert shown["Model"] == "tiny (Tiny Random)"
    assert shown["Architecture"] == "llama, 2 layers of 64"
    assert shown["Parameters"] == "0.1 million"
    assert shown["Bits per weight"] == "16.05 (F16)"
    assert shown["Context"] == "4,096 tokens"
    assert shown["KV bytes per token"] == (
        "f32 512, f16 256, bf16 256, q8_0 136, q5_1 96, q5_0 88, q4_1 80, q4_0 72, iq4_nl 72"
    )
    assert shown["Template"] == "the model's own"
    assert shown["Licence"] == "apache-2.0"
    assert shown["File"] == str(tiny)
    assert re.fullmatch(
        r"\d\d MiB at 4,096 tokens: weights \(mapped\) 0 MiB \+ kv cache .*", shown["Memory"]
    )


def test_show_json_has_every_fact(run: Run, starter: Path) -> None:
    run("pull", "smollm2", "--from", starter)
    facts = json.loads(run("show", "--json").stdout)
    assert facts["name"] == "smollm2"
    assert facts["kv_bytes_per_token"] == {
        "f32": 512,
        "f16": 256,
        "bf16": 256,
        "q8_0": 136,
        "q5_1": 96,
        "q5_0": 88,
        "q4_1": 80,
        "q4_0": 72,
        "iq4_nl": 72,
    }
    assert facts["template"] == {"origin": "model", "name": "model"}
    assert len(facts["sha256"]) == 64
    memory = facts["memory"]
    assert memory["context"] == 4096
    assert memory["bytes"] == sum(item["num_bytes"] for item in memory["items"])
    assert facts["bytes"] == starter.stat().st_size


def test_show_template_prints_the_template_alone(run: Run, tiny: Path) -> None:
    assert run("show", tiny, "--template").stdout == CHATML + "\n"
    facts = json.loads(run("show", tiny, "--template", "--json").stdout)
    assert facts["template"]["text"] == CHATML


def test_show_names_the_fallback(run: Run, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "bare.gguf", template=None)
    assert "none in the model; 'chatml' is used instead" in run("show", path).stdout


def test_a_models_name_cannot_write_to_the_terminal(run: Run, tmp_path: Path) -> None:
    hostile = "evil\x1b]0;owned\x07\x1b[2J\nsecond line"
    path = write_tiny_gguf(
        tmp_path / "m.gguf",
        template=hostile,
        metadata={"general.name": hostile, "general.license": hostile},
    )
    for output in (run("show", path).stdout, run("show", path, "--template").stdout):
        assert "\x1b" not in output
        assert "\x07" not in output
    assert len(run("show", path).stdout.splitlines()) == len(run("show", path).stdout.split("\n")) - 1


def test_rm_needs_a_yes(run: Run, starter: Path, data_dir: Path) -> None:
    run("pull", "smollm2", "--from", starter)
    refused = run("rm", "smollm2")
    assert refused.exit_code == 2
    assert "give --yes" in refused.stderr
    assert (data_dir / "models" / "smollm2").is_dir()
    removed = run("rm", "smollm2", "--yes")
    assert removed.exit_code == 0
    assert removed.stdout == "smollm2 is removed; 0.2 MB are free again\n"
    assert not (data_dir / "models" / "smollm2").exists()
    gone = run("rm", "smollm2", "--yes", "--json")
    assert gone.exit_code == 1
    assert json.loads(gone.stdout)["error"]["type"] == "model_not_found"


def test_a_damaged_model_is_told_on_stderr_and_can_be_removed(
    run: Run, starter: Path, data_dir: Path
) -> None:
    run("pull", "smollm2", "--from", starter)
    (data_dir / "models" / "smollm2" / "manifest.json").write_text("{")
    listed = run("list")
    assert "its manifest is damaged" in listed.stderr
    assert "can be pulled" in listed.stdout
    assert run("rm", "smollm2", "--yes").exit_code == 0


@pytest.mark.parametrize("arguments", [["show", "--wat"], ["pull"], ["frob"]])
def test_wrong_usage_is_exit_code_2(run: Run, arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2
