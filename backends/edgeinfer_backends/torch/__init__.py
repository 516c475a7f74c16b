"""torch: one decoder for all families. The reference that other backends are held to, and CUDA."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edgeinfer.backend import (
    LOAD_AS,
    Backend,
    Device,
    LayeredModel,
    MemoryItem,
    Probe,
    Progress,
    Runtime,
    RuntimeSettings,
)
from edgeinfer.errors import BackendUnavailable, LoadFailed, ModelError, UnsupportedModel
from edgeinfer_models.model_files import ModelFiles

if TYPE_CHECKING:
    from edgeinfer.exits import ExitTrainer
    from edgeinfer_models.config import ModelConfig

INSTALL = "run `pip install edgeinfer[torch]`"


class TorchBackend(Backend):
    name = "torch"
    formats = ("safetensors", "gguf")
    own_kv_types = ("int8", "fp8")
    loads_as = LOAD_AS
    compiles = True
    counts_attention = True

    def probe(self) -> Probe:
        try:
            return _probe()
        except Exception as error:  # whatever a broken installation raises
            return Probe(False, f"torch is installed but does not work here ({error}); {INSTALL}")

    def lacks(self) -> str:
        return _missing()  # importing torch takes seconds, and 200 MB of a process that need not have it

    def predict_memory(
        self,
        files: ModelFiles,
        config: ModelConfig | None,
        settings: RuntimeSettings,
        devices: Sequence[Device] = (),
    ) -> list[MemoryItem]:
        from edgeinfer_backends.torch.prediction import predict_memory

        if config is None:
            raise ValueError("torch's memory is worked out from a model's configuration")
        return predict_memory(config, settings, devices)

    def load(self, files: ModelFiles, settings: RuntimeSettings, progress: Progress) -> Runtime:
        if settings.adapters:
            raise LoadFailed("adapters are not supported yet")
        with self._opening(files):
            from edgeinfer_backends.torch.loading import load_runtime

            return load_runtime(files, settings, progress)

    def open_layers(self, files: ModelFiles, context: int) -> LayeredModel:
        with self._opening(files):
            from edgeinfer_backends.torch.streamed_layers import open_streamed

            return open_streamed(files, context)

    @contextmanager
    def _opening(self, files: ModelFiles) -> Iterator[None]:
        if files.format not in self.formats:
            raise LoadFailed(f"{files.name} is a {files.format} model; torch reads safetensors and GGUF")
        found = self.probe()
        if not found.usable:
            raise BackendUnavailable(found.reason)
        try:
            yield
        except UnsupportedModel:
            raise
        except ModelError as error:  # damaged or incomplete
            said = str(error)
            prefix = "" if said.startswith(files.name) else f"{files.name}: "
            raise LoadFailed(f"{prefix}{said}") from error

    def exit_trainer(
        self, path: Path, device: str = "auto", told: Callable[[str], None] = lambda _: None
    ) -> ExitTrainer:
        found = self.probe()
        if not found.usable:
            raise BackendUnavailable(found.reason)
        from edgeinfer_backends.torch.exit_training import TorchExitTrainer

        return TorchExitTrainer(path, device, told=told)


def _missing() -> str:
    from importlib.util import find_spec

    for module in ("torch", "tokenizers"):
        if find_spec(module) is None:
            return f"{module} is not installed; {INSTALL}"
    return ""


def _probe() -> Probe:
    missing = _missing()
    if missing:
        return Probe(False, missing)
    import torch

    from edgeinfer_backends.torch.devices import describe_build, devices

    return Probe(True, version=torch.__version__, build=describe_build(), devices=tuple(devices()))
