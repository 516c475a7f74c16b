"""Memory pressure as Linux and macOS tell it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edgeinfer.machine.pressure import MemoryPressure, read_pressure

PSI = "some avg10={} avg60=0.10 avg300=0.00 total=1\nfull avg10=9.00 avg60=0.00 avg300=0.00 total=1\n"

linux = pytest.mark.skipif(sys.platform != "linux", reason="pressure stall information is Linux's")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@linux
def test_the_worse_of_the_machine_and_the_group_counts(tmp_path: Path) -> None:
    write(tmp_path / "proc/pressure/memory", PSI.format("1.50"))
    assert read_pressure(tmp_path).stalled_share == pytest.approx(0.015)
    write(tmp_path / "proc/self/cgroup", "0::/user.slice/chat.scope\n")
    write(tmp_path / "sys/fs/cgroup/user.slice/chat.scope/memory.pressure", PSI.format("42.00"))
    found = read_pressure(tmp_path)
    assert found.stalled_share == pytest.approx(0.42)
    assert found.is_high
    assert "waited for 42% of the last 10 s" in str(found)


@linux
@pytest.mark.parametrize("text", ["", "some\n", "some avg10=much\n", "\0\0"])
def test_what_cannot_be_read_is_unknown(tmp_path: Path, text: str) -> None:
    assert read_pressure(tmp_path).stalled_share is None
    write(tmp_path / "proc/pressure/memory", text)
    assert read_pressure(tmp_path).stalled_share is None


def test_this_machine_is_read_without_an_error() -> None:
    found = read_pressure()
    assert found.stalled_share is None or 0 <= found.stalled_share <= 1
    assert found.level in (None, "normal", "warning", "critical")


def test_apples_levels_and_swap_are_told() -> None:
    assert MemoryPressure(level="critical").is_high
    assert not MemoryPressure(level="normal").is_high
    assert str(MemoryPressure(level="warning", swap_used_bytes=3 * 2**30)) == (
        "pressure warning, 3.0 GiB swapped out"
    )
    assert str(MemoryPressure()) == ""
