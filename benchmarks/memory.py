"""Peak memory of a process and everything it starts (Linux).

Resident memory has no peak of a tree, so each process's own peak (VmHWM) is added up: an upper bound,
and the same rule for both sides. PSS, where shared pages count once, is sampled for information.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PROC = Path("/proc")
MB = 1_000_000


@dataclass
class TreePeak:
    """peaks: pid -> the most bytes it ever had resident. pss: the most the tree had at one sample."""

    root: int
    peaks: dict[int, int] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    pss: int = 0
    _births: dict[int, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.peaks.values())

    def sample(self, proc: Path = PROC, *, with_pss: bool = False) -> None:
        """Look once. A process stays part of the tree when its parent dies before it."""
        members = self._members(proc)
        for pid in members:
            status = _status(proc, pid)
            high = _kilobytes(status.get("VmHWM", ""))
            if high:
                self.peaks[pid] = max(self.peaks.get(pid, 0), high)
                self.names[pid] = status.get("Name", "?")
        if with_pss:
            self.pss = max(self.pss, sum(_pss(proc, pid) for pid in members))

    def _members(self, proc: Path) -> set[int]:
        parents: dict[int, int] = {}
        births: dict[int, str] = {}
        for entry in proc.iterdir():
            if entry.name.isdigit():
                stat = _stat(entry)
                if stat is not None:
                    parents[int(entry.name)], births[int(entry.name)] = stat
        known = {pid for pid, birth in self._births.items() if births.get(pid) == birth}
        if not self._births and self.root in parents:
            known.add(self.root)
        members: set[int] = set()
        pending = list(known)
        children: dict[int, list[int]] = {}
        for pid, parent in parents.items():
            children.setdefault(parent, []).append(pid)
        while pending:
            pid = pending.pop()
            if pid not in members:
                members.add(pid)
                pending.extend(children.get(pid, []))
        self._births.update({pid: births[pid] for pid in members})
        return members


@dataclass(frozen=True)
class MeasuredRun:
    peak: TreePeak
    exit_code: int
    stdout: str
    stderr: str


def run_measured(
    command: Sequence[str],
    environ: Mapping[str, str] | None = None,
    timeout_s: float = 600.0,
    interval_s: float = 0.01,
) -> MeasuredRun:
    """Run `command` to its end, watching the memory of its process tree. Raises TimeoutExpired."""
    # Files, not pipes: nobody reads while the process runs, and a full pipe would stop it.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=None if environ is None else dict(environ),
        )
        peak = TreePeak(process.pid)
        deadline = time.monotonic() + timeout_s
        samples = 0
        while process.poll() is None:
            # PSS walks page tables and takes the process's lock, so it is asked for rarely.
            peak.sample(with_pss=samples % 20 == 0)
            samples += 1
            if time.monotonic() > deadline:
                process.kill()
                process.wait()
                raise subprocess.TimeoutExpired(list(command), timeout_s)
            time.sleep(interval_s)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    return MeasuredRun(peak, process.returncode, *texts)


def _stat(entry: Path) -> tuple[int, str] | None:
    """(parent, time of birth); the latter tells a process from a later one with its number."""
    try:
        text = (entry / "stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # a name may hold spaces and brackets
    return (int(fields[1]), fields[19]) if len(fields) > 19 else None


def _status(proc: Path, pid: int) -> dict[str, str]:
    try:
        text = (proc / str(pid) / "status").read_text(errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines())
    return {name: value.strip() for name, _, value in pairs}


def _pss(proc: Path, pid: int) -> int:
    try:
        text = (proc / str(pid) / "smaps_rollup").read_text(errors="replace")
    except OSError:
        return 0
    return next(
        (_kilobytes(line.split(":")[1]) for line in text.splitlines() if line.startswith("Pss:")), 0
    )


def _kilobytes(text: str) -> int:
    """Bytes of "123 kB" (the kernel's kB is 1,024 bytes)."""
    number = text.split()
    return int(number[0]) * 1024 if number and number[0].isdigit() else 0
