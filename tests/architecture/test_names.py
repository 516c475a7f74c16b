"""Names: modules say what they are about, and what a package exports is there."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("edgeinfer", "backends", "models", "tui", "tests", "benchmarks", "scripts")
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}


def test_no_module_has_a_name_that_says_nothing() -> None:
    modules = [path for source in SOURCES for path in (ROOT / source).rglob("*.py")]
    assert len(modules) > 20
    bad = [path for path in modules if EMPTY_NAMES & {path.parent.name, *path.stem.split("_")}]
    assert bad == []


@pytest.mark.parametrize("package", ["edgeinfer", "edgeinfer.client", "edgeinfer_backends.scripted"])
def test_exported_names_exist(package: str) -> None:
    module = importlib.import_module(package)
    names = module.__all__
    assert len(names) == len(set(names))
    for name in names:
        assert hasattr(module, name), f"{package}.{name} is exported and not there"
