"""Whether the machine is short of memory right now, as its system says."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Level = Literal["normal", "warning", "critical"]

# kern.memorystatus_vm_pressure_level (XNU, sys/event.h: NOTE_MEMORYSTATUS_PRESSURE_*)
_LEVELS: dict[int, Level] = {1: "normal", 2: "warning", 4: "critical"}

_MUCH = 0.10  # of the time somebody waited for memory


@dataclass(frozen=True)
class MemoryPressure:
    """None where the system does not tell."""

    stalled_share: float | None = None  # of the last 10 s in which some task waited for memory (Linux)
    level: Level | None = None  # macOS
    swap_used_bytes: int | None = None

    @property
    def is_high(self) -> bool:
        return (self.stalled_share or 0.0) >= _MUCH or self.level in ("warning", "critical")

    def __str__(self) -> str:
        parts = []
        if self.stalled_share is not None:
            parts.append(f"waited for {self.stalled_share:.0%} of the last 10 s")
        if self.level is not None:
            parts.append(f"pressure {self.level}")
        if self.swap_used_bytes:
            parts.append(f"{self.swap_used_bytes / 2**30:.1f} GiB swapped out")
        return ", ".join(parts)


def read_pressure(root: Path = Path("/")) -> MemoryPressure:
    """root: of another machine, for tests. Never raises."""
    import psutil

    try:
        swap: int | None = int(psutil.swap_memory().used)
    except (OSError, RuntimeError):
        swap = None
    if sys.platform == "darwin":
        return MemoryPressure(level=_darwin_level(), swap_used_bytes=swap)
    return MemoryPressure(_stalled_share(root), swap_used_bytes=swap)


def _stalled_share(root: Path) -> float | None:
    """The worse of the machine's and this process's group's (a container's, a systemd slice's)."""
    paths = [root / "proc/pressure/memory", root / "sys/fs/cgroup/memory.pressure"]
    try:
        group = (root / "proc/self/cgroup").read_text().rpartition("::")[2].strip()
        paths.append(root / "sys/fs/cgroup" / group.lstrip("/") / "memory.pressure")
    except OSError:
        pass
    shares = [share for path in paths if (share := _some_avg10(path)) is not None]
    return max(shares, default=None)


def _some_avg10(path: Path) -> float | None:
    """Out of "some avg10=1.25 avg60=0.40 avg300=0.10 total=123" (Documentation/accounting/psi.rst)."""
    try:
        for line in path.read_text().splitlines():
            kind, _, rest = line.partition(" ")
            if kind == "some":
                values = dict(pair.split("=", 1) for pair in rest.split())
                return float(values["avg10"]) / 100
    except (OSError, ValueError, KeyError):
        pass
    return None


def _darwin_level() -> Level | None:
    # int sysctlbyname(const char *name, void *oldp, size_t *oldlenp, void *newp, size_t newlen)
    value, size = ctypes.c_int(0), ctypes.c_size_t(4)
    try:
        failed = ctypes.CDLL(None).sysctlbyname(
            b"kern.memorystatus_vm_pressure_level", ctypes.byref(value), ctypes.byref(size), None, 0
        )
    except (AttributeError, OSError):
        return None
    return None if failed else _LEVELS.get(value.value)
