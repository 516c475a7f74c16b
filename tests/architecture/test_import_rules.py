"""Who may import whom: the contracts of pyproject.toml, and that they cover every room."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = {
    "edgeinfer": ROOT / "edgeinfer",
    "edgeinfer_backends": ROOT / "backends" / "edgeinfer_backends",
    "edgeinfer_models": ROOT / "models" / "edgeinfer_models",
    "edgeinfer_tui": ROOT / "tui" / "edgeinfer_tui",
}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def contract(wanted: str) -> dict[str, Any]:
    contracts: list[dict[str, Any]] = PYPROJECT["tool"]["importlinter"]["contracts"]
    (found,) = [each for each in contracts if each["id"] == wanted]
    return found


def lint_imports(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as m; m()"]
    return subprocess.run(
        [*command, "--no-cache", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_no_module_imports_what_it_may_not() -> None:
    result = lint_imports()
    assert result.returncode == 0, result.stdout + result.stderr
    kept = len(PYPROJECT["tool"]["importlinter"]["contracts"])
    assert f"{kept} kept, 0 broken" in result.stdout


@pytest.mark.parametrize(
    ("source", "imported"),
    [
        ("edgeinfer.errors", "edgeinfer.sampling"),
        ("edgeinfer_models.tokenizer", "edgeinfer.backend"),
        ("edgeinfer.engine.request", "edgeinfer_backends.scripted"),
        ("edgeinfer.engine.request", "edgeinfer.client"),
        ("edgeinfer_backends.scripted", "edgeinfer_backends.llamacpp"),
        ("edgeinfer_backends.scripted", "edgeinfer.engine"),
        ("edgeinfer_tui", "edgeinfer.engine.request"),
        ("edgeinfer.client", "llama_cpp"),
    ],
)
def test_the_rules_would_notice(tmp_path: Path, source: str, imported: str) -> None:
    result = _lint_empty_rooms(tmp_path, source, f"import {imported}\n")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "BROKEN" in result.stdout


def test_the_rules_allow_what_they_should(tmp_path: Path) -> None:
    result = _lint_empty_rooms(
        tmp_path, "edgeinfer.engine", "import edgeinfer.errors, edgeinfer_models\n"
    )
    assert result.returncode == 0, result.stdout + result.stderr


def _lint_empty_rooms(tmp_path: Path, module: str, text: str) -> subprocess.CompletedProcess[str]:
    """The rules on a copy of the rooms whose modules are empty, but for one."""
    for package in ROOMS:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    named = [name for each in PYPROJECT["tool"]["importlinter"]["contracts"] for name in _modules(each)]
    for name in {*named, module, "edgeinfer.engine.request", "edgeinfer_models.tokenizer"}:
        if name.split(".")[0] in ROOMS:
            _write(tmp_path, name, "")
    _write(tmp_path, module, text)
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return lint_imports(cwd=tmp_path)


def _modules(each: dict[str, Any]) -> list[str]:
    layers = [part for layer in each.get("layers", ()) for part in layer.replace(":", "|").split("|")]
    names = [*layers, *each.get("modules", ()), *each.get("source_modules", ())]
    return [name.strip(" ()") for name in [*names, *each.get("forbidden_modules", ())]]


def _write(root: Path, module: str, text: str) -> None:
    folder = root.joinpath(*module.split("."))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").write_text(text)


def test_every_module_of_the_runtime_has_a_place_in_the_layers() -> None:
    placed = set(_modules(contract("rooms")))
    for entry in ROOMS["edgeinfer"].iterdir():
        is_module = entry.suffix == ".py" or (entry / "__init__.py").is_file()
        if is_module and not entry.name.startswith("__"):
            assert f"edgeinfer.{entry.stem}" in placed, f"edgeinfer.{entry.stem} is in no layer"


def test_every_registered_backend_is_held_apart_from_the_others() -> None:
    apart = set(contract("backends")["modules"])
    for name, target in PYPROJECT["project"]["entry-points"]["edgeinfer.backends"].items():
        assert target.split(":")[0] in apart, f"{name} is not in the contract `backends`"
