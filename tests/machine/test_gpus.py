from __future__ import annotations

from pathlib import Path

import pytest

from edgeinfer.machine.gpus import Gpu, find_gpus, gpu_finding, missing_gpus


def card(root: Path, address: str, vendor: str, kind: str = "0x030000", vram: int | None = None) -> None:
    folder = root / "sys/bus/pci/devices" / address
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(vendor + "\n")
    (folder / "class").write_text(kind + "\n")
    if vram is not None:
        (folder / "mem_info_vram_total").write_text(f"{vram}\n")


def test_an_nvidia_card_is_named_by_its_driver(tmp_path: Path) -> None:
    card(tmp_path, "0000:01:00.0", "0x10de", "0x030200")
    information = tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0/information"
    information.parent.mkdir(parents=True)
    information.write_text("Model: \t NVIDIA H200\nIRQ: 5\n")
    assert find_gpus(tmp_path, "Linux") == (Gpu("NVIDIA H200", "cuda", True),)


def test_a_card_without_a_driver_is_still_found(tmp_path: Path) -> None:
    card(tmp_path, "0000:01:00.0", "0x10de")
    assert find_gpus(tmp_path, "Linux") == (Gpu("NVIDIA GPU", "cuda", True),)


@pytest.mark.parametrize(
    ("vendor", "vram", "found"),
    [
        ("0x1002", 16 << 30, Gpu("AMD GPU", "vulkan", True)),
        ("0x1002", 512 << 20, Gpu("AMD GPU", "vulkan", False)),
        ("0x8086", None, Gpu("Intel GPU", "vulkan", False)),
    ],
)
def test_graphics_inside_a_processor_is_told_from_a_card(
    tmp_path: Path, vendor: str, vram: int | None, found: Gpu
) -> None:
    card(tmp_path, "0000:03:00.0", vendor, vram=vram)
    assert find_gpus(tmp_path, "Linux") == (found,)


def test_virtual_displays_and_other_devices_are_no_gpus(tmp_path: Path) -> None:
    card(tmp_path, "0000:00:01.0", "0x1af4")
    card(tmp_path, "0000:00:02.0", "0x10de", "0x040300")  # a card's sound
    card(tmp_path, "0000:00:03.0", "", "")
    assert find_gpus(tmp_path, "Linux") == ()


def test_a_system_that_tells_nothing_has_none(tmp_path: Path) -> None:
    assert find_gpus(tmp_path, "Linux") == ()
    assert find_gpus(tmp_path, "FreeBSD") == ()


def test_linux_inside_windows_has_the_card_of_windows(tmp_path: Path) -> None:
    tool = tmp_path / "usr/lib/wsl/lib/nvidia-smi"
    tool.parent.mkdir(parents=True)
    tool.write_text("")
    assert find_gpus(tmp_path, "Linux") == (Gpu("NVIDIA GPU", "cuda", True),)


def test_apple_silicon_has_metal(tmp_path: Path) -> None:
    assert find_gpus(tmp_path, "Darwin", "arm64") == (Gpu("Apple GPU", "metal", True),)
    assert find_gpus(tmp_path, "Darwin", "x86_64") == ()


def test_a_build_that_uses_a_gpu_misses_none() -> None:
    gpus = (Gpu("NVIDIA GPU", "cuda", True),)
    assert missing_gpus(gpus, ("NVIDIA H200",)) == ()
    assert missing_gpus(gpus, ()) == gpus


def test_the_finding_names_the_card_and_the_command() -> None:
    finding = gpu_finding(Gpu("NVIDIA H200", "cuda", True))
    assert "NVIDIA H200" in finding
    assert "make setup ACCEL=cuda" in finding
