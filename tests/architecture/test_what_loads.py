"""Importing edgeinfer is cheap: no framework, and nothing that only one surface needs."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    "coremltools",
    "fastapi",
    "gguf",
    "huggingface_hub",
    "jinja2",
    "llama_cpp",
    "mlx",
    "mlx_lm",
    "numpy",
    "textual",
    "tokenizers",
    "torch",
    "transformers",
)


def loaded_by(module: str) -> set[str]:
    """Top-level modules in a fresh interpreter after the import."""
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize(
    "module", ["edgeinfer", "edgeinfer.cli", "edgeinfer.client", "edgeinfer.backend"]
)
def test_importing_it_loads_no_framework(module: str) -> None:
    assert loaded_by(module) & set(HEAVY) == set()


def test_the_check_sees_what_is_loaded() -> None:
    assert {"numpy", "edgeinfer"} <= loaded_by("edgeinfer_backends.scripted")


@pytest.mark.parametrize("backend", ["llamacpp", "mlx", "scripted", "torch"])
def test_importing_a_backend_does_not_load_its_framework(backend: str) -> None:
    frameworks = {"coremltools", "llama_cpp", "mlx", "mlx_lm", "torch", "transformers"}
    assert loaded_by(f"edgeinfer_backends.{backend}") & frameworks == set()


@pytest.mark.parametrize("module", ["kv_types", "number_types", "prediction"])
def test_what_is_only_arithmetic_in_the_torch_room_does_not_load_torch(module: str) -> None:
    assert "torch" not in loaded_by(f"edgeinfer_backends.torch.{module}")


@pytest.mark.parametrize("module", ["checked_folder", "devices", "loading", "model", "runtime"])
def test_importing_a_part_of_the_mlx_room_does_not_load_mlx(module: str) -> None:
    assert loaded_by(f"edgeinfer_backends.mlx.{module}") & {"mlx", "mlx_lm", "tokenizers"} == set()
