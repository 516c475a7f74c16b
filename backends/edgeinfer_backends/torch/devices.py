"""Where torch computes."""

from __future__ import annotations

import platform

import torch

from edgeinfer.backend import Device, RuntimeSettings
from edgeinfer.machine.probe import probe_machine
from edgeinfer_backends.torch.number_types import processor_is_fast_at_bf16


def devices() -> list[Device]:
    """GPUs first."""
    found = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            found.append(Device(torch.cuda.get_device_name(index), "gpu", total, free))
    elif _has_mps():
        found.append(Device("Apple GPU", "gpu", int(torch.mps.recommended_max_memory())))
    machine = probe_machine()
    return [*found, Device("cpu", "cpu", machine.total_bytes, machine.available_bytes)]


def chosen_device(settings: RuntimeSettings) -> torch.device:
    """The first GPU, unless none of the layers are to be there. (torch's room divides no layers.)"""
    if settings.gpu_layers == 0:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    return torch.device("mps") if _has_mps() else torch.device("cpu")


def kind_of(device: torch.device) -> str:
    """ "cpu" or "gpu", as `MemoryItem.device` has it."""
    return "cpu" if device.type == "cpu" else "gpu"


def is_fast_at_bf16(device: torch.device) -> bool:
    """Whether it multiplies matrices of bf16 in instructions of its own."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "mps" or processor_is_fast_at_bf16()


def describe_build() -> str:
    parts = [f"torch {torch.__version__}", f"{platform.system()} {platform.machine()}"]
    parts.append(torch.backends.cpu.get_cpu_capability())
    if torch.cuda.is_available():
        parts.append(f"CUDA {torch.version.cuda}, {torch.cuda.get_device_name(0)}")
    return ", ".join(parts)


def switches() -> str:
    """Settings of the process that change what is computed."""
    return f"float32 products: {torch.get_float32_matmul_precision()}"


def _has_mps() -> bool:
    return bool(torch.backends.mps.is_available())
