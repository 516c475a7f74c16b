"""The runtimes that the contract is tested on. A new backend is one more line in RUNTIMES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest

from edgeinfer.backend import Backend, LoadAs, MemoryItem, RuntimeSettings
from edgeinfer.errors import BackendUnavailable
from edgeinfer.registry import get_backend
from edgeinfer_backends.scripted import SCRIPTED_FILES, Script, ScriptedBackend
from edgeinfer_models.model_files import ModelFiles
from edgeinfer_models.resolve import resolve_model
from tests.contract.checked_runtime import CheckedRuntime
from tests.fixtures_hf import ModelType

SETTINGS = RuntimeSettings(
    context=1024, sequences=3, step_tokens=512, logit_rows=64, threads=1, threads_batch=1, gpu_layers=0
)


# Of logits with a standard deviation of 2.4; with 8 bits a number may fall to the other side.
_F16_ROUNDING, _INT8_ROUNDING, _FP8_ROUNDING, _BF16_ROUNDING = 1e-3, 0.02, 0.1, 0.2


@dataclass(frozen=True)
class RuntimeFactory:
    """A backend and a small model for it. The model's file is made when it is first needed."""

    name: str
    find_backend: Callable[[], Backend]
    make_files: Callable[[Path], ModelFiles]
    kv_layout: Literal["auto", "shared", "private"] = "auto"
    least_sequences: int = 1  # where there are as many handles as sequences
    kv_type: str = "f16"
    rounding: float = 0.0  # of logits, where `facts.exact` is False
    heavy_hitters: bool = False
    load_as: LoadAs = "auto"
    gpu_layers: int = 0

    @property
    def settings(self) -> RuntimeSettings:
        """Those of a test that asks for no others."""
        return replace(
            SETTINGS,
            kv_type_k=self.kv_type,
            kv_type_v=self.kv_type,
            heavy_hitters=self.heavy_hitters,
            load_as=self.load_as,
            gpu_layers=self.gpu_layers,
        )

    def predict(self, folder: Path, settings: RuntimeSettings) -> list[MemoryItem]:
        files = self.make_files(folder)
        config = resolve_model(str(_opened(files))).config if files.paths else None
        backend = self.find_backend()
        devices = backend.probe().devices if settings.gpu_layers else ()
        return backend.predict_memory(files, config, self._adapted(settings), devices)

    def load(self, folder: Path, settings: RuntimeSettings) -> CheckedRuntime:
        files, settings = self.make_files(folder), self._adapted(settings)
        return CheckedRuntime(self.find_backend().load(files, settings, lambda done: True))

    def _adapted(self, settings: RuntimeSettings) -> RuntimeSettings:
        sequences = max(settings.sequences, self.least_sequences)
        return replace(settings, kv_layout=self.kv_layout, sequences=sequences)


def _opened(files: ModelFiles) -> Path:
    """What a user would name to open these files."""
    return files.paths[0] if files.format == "gguf" else files.paths[0].parent


def _tiny_gguf(folder: Path) -> ModelFiles:
    from tests.fixtures_gguf import write_tiny_gguf

    path = folder / "tiny.gguf"
    if not path.exists():
        # Quantized weights: with F16 and F32 ones another matrix kernel runs for one row than for
        # several, and bits differ (1e-6 of F32, 3e-3 of F16 logits).
        write_tiny_gguf(path, weight_type="Q4_0")
    return ModelFiles(name="tiny", paths=(path,), format="gguf")


def _rotated_gguf(folder: Path) -> ModelFiles:
    """Heads of whole 64s: llama.cpp rotates quantized keys and values, and can shift them."""
    from tests.fixtures_gguf import write_tiny_gguf

    path = folder / "rotated.gguf"
    if not path.exists():
        write_tiny_gguf(path, weight_type="Q4_0", hidden=128, head_dim=64)
    return ModelFiles(name="rotated", paths=(path,), format="gguf")


def _llamacpp(name: str, layout: Literal["shared", "private"], kv_type: str) -> RuntimeFactory:
    sequences = 8 if layout == "private" else 1
    return RuntimeFactory(
        name, lambda: get_backend("llamacpp"), _rotated_gguf, layout, sequences, kv_type
    )


def _scripted(script: Script) -> RuntimeFactory:
    name = "scripted" if script.kv_layout == "shared" else f"scripted-{script.kv_layout}"
    return RuntimeFactory(name, lambda: ScriptedBackend(script), lambda folder: SCRIPTED_FILES)


def _tiny_folder(folder: Path, model_type: ModelType) -> ModelFiles:
    from tests.fixtures_hf import write_tiny_folder

    path = folder / f"tiny-{model_type}"
    if not path.exists():
        write_tiny_folder(path, model_type=model_type)
    return ModelFiles(name=path.name, paths=(path / "model.safetensors",), format="safetensors")


def _converted_gguf(folder: Path) -> ModelFiles:
    """Of a Hugging Face folder's tokenizer, which other programs than llama.cpp can read too."""
    from edgeinfer.quantize.conversion import convert, plan_conversion
    from edgeinfer_models.conversion.model import source_of_folder

    path = folder / "converted.gguf"
    if not path.exists():
        model = source_of_folder(_tiny_folder(folder, "llama").paths[0].parent)
        convert(plan_conversion(model, folder, "gguf", "f32", path, force=False))
    return ModelFiles(name="converted", paths=(path,), format="gguf")


def _mlx(model_type: ModelType) -> RuntimeFactory:
    return RuntimeFactory(
        f"mlx-{model_type}", lambda: get_backend("mlx"), lambda folder: _tiny_folder(folder, model_type)
    )


def _torch(model_type: ModelType, kv_type: str = "f16") -> RuntimeFactory:
    name = f"torch-{model_type}" if kv_type == "f16" else f"torch-{model_type}-{kv_type}"
    return RuntimeFactory(
        name,
        lambda: get_backend("torch"),
        lambda folder: _tiny_folder(folder, model_type),
        kv_type=kv_type,
        rounding=_F16_ROUNDING,
    )


def _cuda() -> Backend:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        raise BackendUnavailable("there is no CUDA device")
    return get_backend("torch")


RUNTIMES = (
    _scripted(Script()),
    _scripted(Script(kv_layout="private")),
    RuntimeFactory("llamacpp", lambda: get_backend("llamacpp"), _tiny_gguf, "shared"),
    RuntimeFactory("llamacpp-private", lambda: get_backend("llamacpp"), _tiny_gguf, "private", 8),
    _llamacpp("llamacpp-q4_0", "shared", "q4_0"),
    _llamacpp("llamacpp-private-q8_0", "private", "q8_0"),
    _mlx("llama"),
    _mlx("qwen3"),
    replace(_torch("llama"), name="torch-bf16", load_as="bf16", rounding=_BF16_ROUNDING),
    replace(_torch("qwen3", "int8"), heavy_hitters=True, rounding=_INT8_ROUNDING),
    RuntimeFactory(
        "torch-gguf",
        lambda: get_backend("torch"),
        _converted_gguf,
        kv_type="fp8",
        rounding=_FP8_ROUNDING,
    ),
    replace(_torch("llama"), name="torch-cuda", find_backend=_cuda, gpu_layers=-1),
)
