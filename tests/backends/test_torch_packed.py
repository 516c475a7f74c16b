"""Packed folders in the torch backend: its kernels take the files' own codes, or they are unpacked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeinfer.backend import LoadAs, Runtime, RuntimeSettings, SequenceStep, Step
from edgeinfer.quantize.folders import FolderOptions, plan_folder, write
from edgeinfer.registry import get_backend
from edgeinfer_models.conversion.model import source_of_folder
from edgeinfer_models.model_files import ModelFiles
from tests.fixtures_hf import write_tiny_folder

torch = pytest.importorskip("torch")

SETTINGS = RuntimeSettings(
    context=128, step_tokens=64, logit_rows=64, threads=1, threads_batch=1, gpu_layers=0
)
TOKENS = list(range(20, 50))
Logits = Callable[[Path, LoadAs], Any]
TYPES = ("int8", "int4", "fp8", "mlx-4bit", "mlx-8bit")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    place = tmp_path_factory.mktemp("packed")
    found = {"plain": write_tiny_folder(place / "plain", hidden=128, head_dim=32, feed_forward=192)}
    model = source_of_folder(found["plain"])
    for name in TYPES:
        found[name] = place / name
        write(plan_folder(model, found["plain"], name, None, found[name], FolderOptions()))
    return found


@pytest.fixture
def load() -> Iterator[Callable[..., Runtime]]:
    loaded: list[Runtime] = []

    def load_one(path: Path, **settings: Any) -> Runtime:
        files = ModelFiles(path.name, (path / "model.safetensors",), "safetensors")
        loaded.append(get_backend("torch").load(files, replace(SETTINGS, **settings), lambda _: True))
        return loaded[-1]

    yield load_one
    for runtime in loaded:
        runtime.close()


def logits(runtime: Runtime) -> Any:
    result = runtime.forward(Step([SequenceStep(runtime.open(), TOKENS, "all")]))
    return np.stack([runtime.logits(result.starts[0] + i).copy() for i in range(len(TOKENS))])


def modules(runtime: Any) -> list[str]:
    return [type(module).__name__ for module in runtime._decoder.modules()]


@pytest.mark.parametrize(
    ("name", "load_as", "kernel"),
    [
        ("int8", "auto", "Linear"),
        ("int8", "int8", "Int8Linear"),
        ("int4", "auto", "Int4Linear"),
        ("int4", "f32", "Linear"),
        ("mlx-4bit", "auto", "Int4Linear"),
        ("mlx-8bit", "auto", "Linear"),
        ("fp8", "auto", "Linear"),
    ],
)
def test_kernels_take_what_a_file_has_packed(
    name: str,
    load_as: LoadAs,
    kernel: str,
    folders: Mapping[str, Path],
    load: Callable[..., Runtime],
) -> None:
    runtime = load(folders[name], load_as=load_as)
    assert modules(runtime).count(kernel) >= 14
    assert any("f32 unpacks" in each for each in runtime.facts.warnings) == (kernel != "Linear")


@pytest.mark.parametrize("name", ["int4", "mlx-4bit"])
def test_four_bits_in_the_kernel_are_the_unpacked_ones(
    name: str, folders: Mapping[str, Path], load: Callable[..., Runtime]
) -> None:
    """Within what bf16 rounds, where that is computed with."""
    one: Any = load(folders[name], load_as="int4")
    source = source_of_folder(folders[name]).source
    tensor = "model.layers.1.mlp.up_proj.weight"
    wanted = source.rows(tensor, 0, source.info(tensor).shape[0])
    found = one._decoder.get_submodule("layers.1.mlp.up_proj").dequantized().float().numpy()
    assert np.abs(found - wanted).max() <= 2**-7 * np.abs(wanted).max()
    unpacked = logits(load(folders[name], load_as="f32"))
    assert np.linalg.norm(logits(one) - unpacked) <= 0.03 * np.linalg.norm(unpacked)


def test_int8_in_the_kernel_has_the_file_s_codes(
    folders: Mapping[str, Path], load: Callable[..., Runtime]
) -> None:
    runtime: Any = load(folders["int8"], load_as="int8")
    source = source_of_folder(folders["int8"]).source
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        module = runtime._decoder.get_submodule(f"layers.1.{name}")
        tensor = f"model.layers.1.{name}.weight"
        wanted = source.rows(tensor, 0, source.info(tensor).shape[0])
        assert np.array_equal(module.dequantized().numpy(), wanted)


@pytest.mark.parametrize(
    ("name", "most"),
    [("int8", 0.05), ("int4", 0.5), ("fp8", 0.2), ("mlx-4bit", 0.6), ("mlx-8bit", 0.05)],
)
def test_logits_are_the_original_s_within_the_rounding(
    name: str, most: float, folders: Mapping[str, Path], load: Callable[..., Runtime]
) -> None:
    plain = logits(load(folders["plain"], load_as="f32"))
    found = logits(load(folders[name], load_as="f32"))
    off = np.linalg.norm(found - plain) / np.linalg.norm(plain)
    assert 0.0 < off <= most


def test_a_bias_stays_beside_packed_codes(tmp_path: Path, load: Callable[..., Runtime]) -> None:
    folder = write_tiny_folder(
        tmp_path / "qwen", model_type="qwen2", hidden=128, head_dim=32, feed_forward=192
    )
    write(plan_folder(source_of_folder(folder), folder, "int8", None, None, FolderOptions()))
    packed = tmp_path / "qwen-int8"
    runtime: Any = load(packed, load_as="int8")
    module = runtime._decoder.get_submodule("layers.0.self_attn.q_proj")
    assert type(module).__name__ == "Int8Linear" and module.bias.abs().max() > 0
    plain, found = logits(load(folder, load_as="f32")), logits(runtime)
    assert np.linalg.norm(found - plain) / np.linalg.norm(plain) < 0.1
