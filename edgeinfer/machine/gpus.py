"""Graphics cards of this machine, found without asking any framework: so that one which the installed
build cannot use is named, and not silently left out."""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Accel = Literal["cuda", "vulkan", "metal"]

# PCI vendor -> (name, what builds for it)
_VENDORS: dict[str, tuple[str, Accel]] = {
    "0x10de": ("NVIDIA", "cuda"),
    "0x1002": ("AMD", "vulkan"),
    "0x8086": ("Intel", "vulkan"),
}
_DISPLAY_CLASSES = ("0x0300", "0x0302", "0x0380")  # VGA, 3D and other display controllers
_OWN_MEMORY = 2 << 30  # a card with so much memory of its own is no part of the processor


@dataclass(frozen=True)
class Gpu:
    """worth_warning: a card of its own; graphics inside a processor may be no faster than its cores."""

    name: str
    accel: Accel
    worth_warning: bool

    @property
    def command(self) -> str:
        return f"make setup ACCEL={self.accel}"


def find_gpus(
    root: Path = Path("/"), system: str | None = None, processor: str | None = None
) -> tuple[Gpu, ...]:
    """root, system, processor: of another machine, for tests. Never raises."""
    system = system or platform.system()
    if system == "Darwin":
        if (processor or platform.machine()) != "arm64":
            return ()
        return (Gpu("Apple GPU", "metal", True),)
    found = _on_pci(root)
    if not any(gpu.accel == "cuda" for gpu in found) and _has_nvidia_tool(root, system):
        found = (*found, Gpu("NVIDIA GPU", "cuda", True))
    return found


def missing_gpus(gpus: tuple[Gpu, ...], gpu_names: tuple[str, ...]) -> tuple[Gpu, ...]:
    """Those that a build with the GPUs `gpu_names` does not use. One usable GPU is enough: llama.cpp
    names a card in its own way, and a second, weaker one may be left out on purpose."""
    return () if gpu_names else gpus


def gpu_finding(gpu: Gpu) -> str:
    return f"the {gpu.name} is not used: this build has no {gpu.accel} support; `{gpu.command}` adds it"


def _on_pci(root: Path) -> tuple[Gpu, ...]:
    found = []
    try:
        devices = sorted((root / "sys/bus/pci/devices").iterdir())
    except OSError:
        return ()
    for device in devices:
        vendor = _VENDORS.get(_word(device / "vendor"))
        if vendor is None or not _word(device / "class").startswith(_DISPLAY_CLASSES):
            continue
        brand, accel = vendor
        name = _nvidia_model(root, device.name) if accel == "cuda" else ""
        own = accel == "cuda" or _number(device / "mem_info_vram_total") >= _OWN_MEMORY
        found.append(Gpu(name or f"{brand} GPU", accel, own))
    return tuple(found)


def _nvidia_model(root: Path, address: str) -> str:
    try:
        text = (root / "proc/driver/nvidia/gpus" / address / "information").read_text("utf-8", "replace")
    except OSError:
        return ""
    for line in text.splitlines():
        if line.startswith("Model:"):
            return line.removeprefix("Model:").strip()[:80]
    return ""


def _has_nvidia_tool(root: Path, system: str) -> bool:
    """Windows, and Linux inside it, whose cards are not on a PCI bus that can be read."""
    if system == "Linux":
        return (root / "usr/lib/wsl/lib/nvidia-smi").exists()
    return system == "Windows" and shutil.which("nvidia-smi") is not None


def _word(path: Path) -> str:
    try:
        return path.read_text("ascii", "replace").strip()[:64]
    except OSError:
        return ""


def _number(path: Path) -> int:
    text = _word(path)
    return int(text) if text.isascii() and text.isdigit() else 0
