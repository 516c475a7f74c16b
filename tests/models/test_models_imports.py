"""The room stays light: importing it loads no library that costs time or memory."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import edgeinfer_models

HEAVY = (
    "numpy",
    "gguf",
    "jinja2",
    "safetensors",
    "tokenizers",
    "platformdirs",
    "psutil",
    "huggingface_hub",
    "filelock",
    "httpx2",
    "llama_cpp",
    "rich",
    "typer",
)
MODULES = [module.name for module in pkgutil.iter_modules(edgeinfer_models.__path__)]


def loaded_by(code: str) -> list[str]:
    """The heavy packages, and ours beyond `edgeinfer.errors`, that `code` adds to an interpreter."""
    whole = (
        f"import sys, edgeinfer.errors; before = set(sys.modules); {code};"
        f"print(*[m for m in sys.modules if m in {HEAVY!r}],"
        " *[m for m in sys.modules if m.startswith('edgeinfer.') and m not in before])"
    )
    done = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_no_module_loads_a_heavy_package_or_another_room() -> None:
    code = "; ".join(f"import edgeinfer_models.{name}" for name in MODULES)
    assert loaded_by(code) == []


def test_the_check_can_fail() -> None:
    assert loaded_by("import numpy") == ["numpy"]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports_on_its_own(name: str) -> None:
    assert loaded_by(f"import edgeinfer_models.{name}") == []
