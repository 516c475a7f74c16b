"""MLX through mlx-lm's model classes: Apple Silicon's GPU, and MLX's CPU build on Linux."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgeinfer.backend import (
    Backend,
    Device,
    MemoryItem,
    Probe,
    Progress,
    Runtime,
    RuntimeSettings,
)
from edgeinfer.errors import BackendUnavailable, LoadFailed, ModelError, UnsupportedModel
from edgeinfer_models.architectures import MLX_MODEL_TYPES
from edgeinfer_models.model_files import ModelFiles

if TYPE_CHECKING:
    from edgeinfer_models.config import ModelConfig

INSTALL = "run `pip install edgeinfer[mlx]`"
MLX_LM_SERIES = "0.32"  # its classes and functions change between minor versions


class MlxBackend(Backend):
    name = "mlx"
    formats = ("safetensors",)
    model_types = MLX_MODEL_TYPES
    packings = frozenset[str]()  # its own quantization is none of them

    def probe(self) -> Probe:
        try:
            return _probe()
        except Exception as error:  # whatever a broken installation raises
            return Probe(False, f"mlx is installed but does not work here ({error}); {INSTALL}")

    def predict_memory(
        self,
        files: ModelFiles,
        config: ModelConfig | None,
        settings: RuntimeSettings,
        devices: Sequence[Device] = (),
    ) -> list[MemoryItem]:
        from edgeinfer_backends.mlx.prediction import predict_memory

        if config is None:
            raise ValueError("MLX's memory is worked out from a model's configuration")
        return predict_memory(config, settings, devices)

    def load(self, files: ModelFiles, settings: RuntimeSettings, progress: Progress) -> Runtime:
        if files.format not in self.formats:
            raise LoadFailed(f"{files.name} is a {files.format} model; MLX reads safetensors folders")
        if settings.adapters:
            raise LoadFailed("adapters are not supported yet")
        found = self.probe()
        if not found.usable:
            raise BackendUnavailable(found.reason)
        from edgeinfer_backends.mlx.checked_folder import check_folder
        from edgeinfer_backends.mlx.loading import load_runtime

        try:
            return load_runtime(check_folder(files), settings, progress)
        except UnsupportedModel:
            raise
        except ModelError as error:  # damaged or incomplete
            raise LoadFailed(f"{files.name}: {error}") from error


def _probe() -> Probe:
    from importlib.metadata import PackageNotFoundError, version
    from importlib.util import find_spec

    for module, package in (("mlx", "mlx"), ("mlx_lm", "mlx-lm"), ("tokenizers", "tokenizers")):
        if find_spec(module) is None:
            return Probe(False, f"{package} is not installed; {INSTALL}")
    try:
        mlx, mlx_lm = version("mlx"), version("mlx-lm")
    except PackageNotFoundError as error:
        return Probe(False, f"{error.name} is not installed properly; {INSTALL}")
    if not mlx_lm.startswith(f"{MLX_LM_SERIES}."):
        return Probe(
            False, f"mlx-lm {mlx_lm} is installed and edgeinfer knows {MLX_LM_SERIES}; {INSTALL}", mlx
        )
    from edgeinfer_backends.mlx.devices import default_device, describe_build

    device: Device = default_device()
    return Probe(True, version=mlx, build=describe_build(mlx, mlx_lm), devices=(device,))
