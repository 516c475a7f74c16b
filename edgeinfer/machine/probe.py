"""Cores and memory, as far as this process may use them."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    system: str
    processor: str
    physical_cores: int
    logical_cores: int
    total_bytes: int
    available_bytes: int


def probe_machine() -> Machine:
    """Limits of a container (cgroup) and of the CPU affinity count: they are what there is."""
    import psutil

    memory = psutil.virtual_memory()
    total, available = int(memory.total), int(memory.available)
    limit, used = _cgroup_memory()
    if limit is not None:
        total = min(total, limit)
        available = min(available, max(0, limit - used))
    logical = _usable_cores()
    physical = min(psutil.cpu_count(logical=False) or logical, logical)
    return Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=_processor_name(),
        physical_cores=physical,
        logical_cores=logical,
        total_bytes=total,
        available_bytes=available,
    )


def default_threads() -> tuple[int, int]:
    """(decode, prefill) threads until they are measured.

    Decoding waits at a barrier several hundred times a token: one core that a neighbour holds stalls
    all of them (measured on 2 cores: 12 tok/s on two threads, 154 on one), so one core is left free.
    Prefill is bound by arithmetic and gains from every core.
    """
    cores = probe_machine().physical_cores
    return max(1, cores - 1), cores


def busy_share(span_s: float = 0.5) -> float:
    """The share of all processor time that others used during the next `span_s` seconds, 0 to 1, while
    this process waits."""
    import psutil

    return float(psutil.cpu_percent(interval=span_s)) / 100


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cgroup_memory() -> tuple[int | None, int]:
    """(limit, used) of a cgroup v2 or v1; (None, 0) without a limit."""
    root = Path("/sys/fs/cgroup")
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limit = int((root / limit_name).read_text())
            used = int((root / used_name).read_text())
        except (OSError, ValueError):  # no such hierarchy, or "max"
            continue
        if limit < 2**60:
            return limit, used
    return None, 0


def _processor_name() -> str:
    if sys.platform == "linux":
        try:
            for line in Path("/proc/cpuinfo").read_text().splitlines():
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
        except OSError:
            return platform.machine()
    return platform.processor() or platform.machine()
