"""Where MLX computes: the one device of its build, or the processor if that was asked for."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from edgeinfer.backend import Device, RuntimeSettings
from edgeinfer.machine.probe import probe_machine


def default_device() -> Device:
    import mlx.core as mx

    if _default_is_gpu():
        info = mx.device_info()
        total = info.get("memory_size", 0)
        return Device(str(info.get("device_name", "gpu")), "gpu", int(total))
    machine = probe_machine()
    return Device("cpu", "cpu", machine.total_bytes, machine.available_bytes)


def describe_build(mlx: str, mlx_lm: str) -> str:
    return f"mlx {mlx}, mlx-lm {mlx_lm}, {platform.system()} {platform.machine()}"


def chosen_kind(settings: RuntimeSettings) -> str:
    """ "cpu" or "gpu". MLX does not divide a model's layers: any but none of them means all."""
    return "gpu" if settings.gpu_layers != 0 and _default_is_gpu() else "cpu"


@contextmanager
def on_device(kind: str) -> Iterator[None]:
    """Streams belong to threads (since mlx 0.31.2), so each call says where it computes."""
    import mlx.core as mx

    device: Any = mx.gpu if kind == "gpu" else mx.cpu
    with mx.stream(device):
        yield


def prepare_cpu() -> None:
    """On the CPU `mx.compile` runs g++ and loads the result from a folder in /tmp that every user of the
    machine can write to and whose name can be foretold. Fused kernels are not worth that."""
    import mlx.core as mx

    mx.disable_compile()


def switches() -> str:
    """Variables of the environment that change what is computed."""
    return os.environ.get("MLX_ENABLE_TF32", "")


def _default_is_gpu() -> bool:
    import mlx.core as mx

    return bool(mx.default_device() == mx.gpu)
