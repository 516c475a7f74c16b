"""Converting an 8B shape to GGUF takes less than 2 GB of memory, and a killed conversion leaves nothing.

Sixteen gigabytes of BF16 weights in four shards, which are holes in files (all zeros; what is read and
written is as much as with others). Counted is each process's own peak (VmHWM), the command's tree.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.holes import SHAPE_8B, write_holes
from benchmarks.memory import run_measured
from benchmarks.verdict import Bar, run_bar

MOST_BYTES = 2_000_000_000


def measure(bar: Bar) -> None:
    with tempfile.TemporaryDirectory(dir=bar.options.folder) as temporary:
        folder = Path(temporary) / "eight"
        num_bytes = write_holes(folder, SHAPE_8B)
        out = Path(temporary) / "out.gguf"
        command = [str(Path(sys.executable).with_name("edgeinfer")), "quantize", str(folder)]
        command += ["--type", "f16", "-o", str(out)]
        begin = time.perf_counter()
        done = run_measured(command, timeout_s=1800.0, interval_s=0.05)
        seconds = time.perf_counter() - begin
        bar.details["seconds"], bar.details["peak_bytes"] = seconds, done.peak.total
        bar.say(f"  {num_bytes / 1e9:.1f} GB of weights in {seconds:.0f} s; {done.stderr.strip()}")
        size = out.stat().st_size if out.exists() else 0
        bar.require(f"a file of {size / 1e9:.1f} GB was written", size >= num_bytes)
        peak = done.peak.total
        bar.require(f"{peak / 1e9:.3f} GB of memory <= {MOST_BYTES / 1e9}", peak <= MOST_BYTES)
        out.unlink(missing_ok=True)
        left: list[str] = []
        moments = random.Random(6)
        for _ in range(bar.options.kills):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(moments.uniform(0.5, max(1.0, 0.9 * seconds)))
            is_running = process.poll() is None
            process.kill()
            process.wait()
            found = [path.name for path in Path(temporary).iterdir() if path != folder]
            left += found if is_running else []
            out.unlink(missing_ok=True)
        bar.require(f"{bar.options.kills} kills left {len(left)} files {left[:3]}", not left)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--folder", help="where 16 GB can be written; default: the system's")


if __name__ == "__main__":
    sys.exit(run_bar(__file__, str(__doc__), measure, add_options))
