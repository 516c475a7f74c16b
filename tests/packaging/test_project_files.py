"""What the files at the top promise each other."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from scripts.setup_environment import pinned_version

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = (ROOT / "constraints.txt").read_text()


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_makefile_has_the_promised_targets() -> None:
    assert targets() >= {"setup", "check", "test", "chat", "run", "bench", "bars", "clean", "help"}


@pytest.mark.parametrize("document", ["README.md", "CHANGELOG.md"])
def test_every_make_command_in_the_documents_exists(document: str) -> None:
    text = (ROOT / document).read_text()
    named = set(re.findall(r"`make ((?:[a-z]+)(?: [a-z]+)*)", text))
    named |= set(re.findall(r"^make ([a-z]+)", text, re.MULTILINE))
    used = {word for words in named for word in words.split()}
    assert used or document != "README.md"
    assert used <= targets()


def test_every_edgeinfer_command_in_the_readme_exists() -> None:
    text = (ROOT / "README.md").read_text()
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    used = set(re.findall(r"^edgeinfer ([a-z-]+)", blocks, re.MULTILINE))
    used |= set(re.findall(r"^\| `edgeinfer ([a-z-]+)", text, re.MULTILINE))
    assert {"chat", "run", "models", "doctor"} <= used
    for command in sorted(used):
        done = subprocess.run(
            [str(Path(sys.executable).with_name("edgeinfer")), command, "--help"],
            capture_output=True,
        )
        assert done.returncode == 0, command


def test_plain_make_prints_the_targets() -> None:
    done = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    for target in ("setup", "check", "test", "chat", "run", "bench", "bars", "clean"):
        assert re.search(rf"^  {target}\s+\S", done.stdout, re.MULTILINE), target


def test_make_run_without_a_prompt_says_how_before_it_sets_anything_up() -> None:
    done = subprocess.run(["make", "run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert 'make run PROMPT="' in done.stderr


@pytest.mark.parametrize(
    "prompt", ["it's", 'say "hi"', "$HOME $(shell date) `id`", "a; false", "#1", "-5"]
)
def test_make_gives_the_prompt_on_as_it_was_typed(prompt: str, tmp_path: Path) -> None:
    """The real Makefile, with a stand-in for the installed command."""
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    command = tmp_path / ".venv" / "bin" / "edgeinfer"
    command.parent.mkdir(parents=True)
    command.write_text('#!/bin/sh\nfor last; do :; done\nprintf "%s" "$last" > got\n')
    command.chmod(0o755)
    subprocess.run(
        ["make", "PYTHON=true", "run", f"PROMPT={prompt}"], cwd=tmp_path, check=True, capture_output=True
    )
    assert (tmp_path / "got").read_text() == prompt


def test_constraints_are_exact_versions_and_name_no_place_to_get_them() -> None:
    lines = [line.partition("#")[0].strip() for line in CONSTRAINTS.splitlines()]
    for line in filter(None, lines):
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+]+", line), line
    assert "://" not in CONSTRAINTS
    assert "--" not in CONSTRAINTS


def test_constraints_hold_what_the_design_fixes() -> None:
    assert pinned_version(CONSTRAINTS, "torch") == "2.13.0"
    major, minor = pinned_version(CONSTRAINTS, "numpy").split(".")[:2]
    assert (int(major), int(minor)) < (2, 4)


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [
        r for e in ("dev", "plot", "mlx", "torch") for r in project["optional-dependencies"][e]
    ]
    for requirement in wanted:
        pinned_version(CONSTRAINTS, re.split(r"[<>=!~\[; ]", requirement)[0])


def test_the_licence_is_apache_2_word_for_word() -> None:
    text = (ROOT / "LICENSE").read_bytes()
    assert hashlib.sha256(text).hexdigest() == (
        "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    )


def test_ci_runs_make_test_and_can_be_executed() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.search(r"^make test$", script.read_text(), re.MULTILINE)
    assert "set -euo pipefail" in script.read_text()
