"""Disks that fill up or cannot be written, and ends that nobody waits for: one clear line, nothing lost.

The real command on the full-precision model off the grids, in file systems of their own (mounted, which
needs root): one that is too small from the start, one that something else fills while the result is
being written, one that is read-only. Then kill -9 in the middle, and the same command again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.off_grid import off_grid
from benchmarks.verdict import Bar, run_bar

Q4_0 = ("--type", "q4_0", "--no-report", "--method", "rtn")
FITTED = ("--type", "q4_0", "--no-report", "--method", "gptq", "--calibration-tokens", "4096")
FORMS = {
    "rtn": Q4_0,
    "gptq": FITTED,
    "a report": ("--type", "q8_0", "--method", "rtn", "--report-tokens", "512"),
    "an MLX folder": ("--type", "mlx-4bit", "--method", "rtn"),
    "an INT4 folder": ("--type", "int4", "--method", "rtn"),
    "a fitted folder": ("--type", "int4", "--method", "gptq", "--calibration-tokens", "4096"),
    "safetensors": ("--to", "safetensors", "--type", "f16"),
}
MEGABYTES = 2**20


def measure(bar: Bar) -> None:
    original = off_grid()
    with tempfile.TemporaryDirectory() as temporary:
        at = Path(temporary)
        with mounted(at / "small", 40) as small:
            for name, options in FORMS.items():
                told(bar, f"too small a disk, {name}", original, small, options, "GB left")
        for name in ("rtn", "an MLX folder", "an INT4 folder"):
            with mounted(at / "filled", 300) as filled:
                told(
                    bar, f"a disk that fills up, {name}", original, filled, FORMS[name],
                    "No space left", fill,
                )  # fmt: skip
        with mounted(at / "fitted", 600) as fitted:
            told(
                bar, "a disk that fills up, gptq", original, fitted, FITTED, "No space left", fill,
                stays=".unfinished",
            )  # fmt: skip
            (fitted / "filler").unlink()
            done = run(original, fitted / "out", FITTED)
            bar.require("gptq goes on once there is room", done.returncode == 0)
            left = {path.name for path in fitted.iterdir()}
            bar.require(f"and leaves its result alone: {left}", left == {"out"})
        with mounted(at / "fixed", 600) as fixed:
            subprocess.run(["mount", "-o", "remount,ro", str(fixed)], check=True)
            for name, options in FORMS.items():
                told(bar, f"a read-only disk, {name}", original, fixed, options, "Read-only file system")
        killed(bar, original, at)


def told(
    bar: Bar,
    what: str,
    original: Path,
    folder: Path,
    options: tuple[str, ...],
    said: str,
    meanwhile: Callable[[Path], None] | None = None,
    stays: str = "",
) -> None:
    done = run(original, folder / "out", options, meanwhile)
    lines = [line for line in done.stderr.decode().splitlines() if line]
    left = {path.name for path in folder.iterdir()} - {"filler"}
    kept = {name for name in left if stays and name.endswith(stays)}
    is_one = len([line for line in lines if "rror" in line or said in line]) == 1
    last = lines[-1] if lines else ""
    bar.say(f"       {last.replace(str(folder), '…')[:150]}")
    holds = done.returncode in (1, 2) and said in last and str(folder) in last and is_one
    bar.require(f"{what}: exit {done.returncode}, said so, left {sorted(left)}", holds and left == kept)


def run(
    original: Path,
    out: Path,
    options: tuple[str, ...],
    meanwhile: Callable[[Path], None] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    process = started(original, out, options)
    if meanwhile is not None:
        wait_for_begin(process, out.parent)
        meanwhile(out.parent)
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def started(original: Path, out: Path, options: tuple[str, ...]) -> subprocess.Popen[bytes]:
    edgeinfer = Path(sys.executable).with_name("edgeinfer")
    command = [str(edgeinfer), "quantize", str(original), "-o", str(out), *options]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def wait_for_begin(process: subprocess.Popen[bytes], disk: Path) -> None:
    """Until something of the result is on a disk that was empty, in a file with a name or without."""
    while process.poll() is None:
        room = os.statvfs(disk)
        if (room.f_blocks - room.f_bfree) * room.f_frsize > MEGABYTES:
            return
        time.sleep(0.001)


def fill(folder: Path) -> None:
    """All but some megabytes, at once."""
    room = os.statvfs(folder)
    with (folder / "filler").open("wb") as file, suppress(OSError):
        os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - 8 * MEGABYTES)


@contextmanager
def mounted(folder: Path, megabytes: int) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True
    )
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def killed(bar: Bar, original: Path, at: Path) -> None:
    for name in ("rtn", "gptq", "an MLX folder"):
        with mounted(at / "killed", 600) as disk:
            out = disk / "out"
            process = started(original, out, FORMS[name])
            wait_for_begin(process, disk)
            process.kill()
            process.communicate()
            is_there = out.exists()
            done = run(original, out, FORMS[name])
            left = {path.name for path in disk.iterdir()}
        holds = process.returncode == -signal.SIGKILL and not is_there and done.returncode == 0
        what = f"kill -9 in {name}: no half result, again exit {done.returncode}, left {sorted(left)}"
        bar.require(what, holds and left == {"out"})
        if done.returncode != 0:
            bar.say(f"       {done.stderr.decode().strip()}")


if __name__ == "__main__":
    sys.exit(run_bar(__file__, str(__doc__), measure))
