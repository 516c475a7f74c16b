"""Cores and memory, as far as this process may use them."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import time
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


def machine_fingerprint() -> str:
    """What makes measured speeds those of this machine: processor, its features, cores, memory size."""
    machine = probe_machine()
    features = hashlib.blake2b(" ".join(sorted(_features())).encode(), digest_size=6).hexdigest()
    gib = round(machine.total_bytes / 2**30)
    cores = f"{machine.physical_cores} of {machine.logical_cores} cores"
    return f"{platform.node()}, {machine.processor} ({features}), {cores}, {gib} GiB"


class CoreUse:
    """How many cores other programs leave to this process, from one call to the next."""

    def __init__(self) -> None:
        self._last = self._read()

    def free_cores(self) -> float | None:
        """Cores that nobody else used since the last call (time stolen from a virtual machine counts as
        used); None where too little time passed, or the system does not tell."""
        now, before = self._read(), self._last
        if now is None or before is None:
            return None
        total, busy, own = (a - b for a, b in zip(now, before, strict=True))
        if total <= 0.1:
            return None
        self._last = now
        cores = os.cpu_count() or 1
        others = max(0.0, busy - own) / total * cores
        return max(0.0, min(float(_usable_cores()), cores - others))

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Seconds of all cores: in all, busy, and of this process."""
        import psutil

        try:
            times = psutil.cpu_times()
        except (OSError, RuntimeError):
            return None
        fields = times._asdict()
        # Linux counts a guest's time into user as well
        total = sum(v for k, v in fields.items() if not k.startswith("guest"))
        idle = fields["idle"] + fields.get("iowait", 0.0)
        return total, total - idle, time.process_time()


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


def _features() -> list[str]:
    """The processor's instruction set extensions, as the system names them; empty if it does not."""
    if sys.platform == "linux":
        try:
            for line in Path("/proc/cpuinfo").read_text().splitlines():
                if line.startswith(("flags", "Features")):
                    return line.split(":", 1)[1].split()
        except OSError:
            pass
    return []


def _processor_name() -> str:
    if sys.platform == "linux":
        try:
            for line in Path("/proc/cpuinfo").read_text().splitlines():
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
        except OSError:
            return platform.machine()
    return platform.processor() or platform.machine()
