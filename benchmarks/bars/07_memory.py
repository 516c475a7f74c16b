"""Quantizing an 8B shape takes at most a quarter of the input's bytes and 300 MB of memory.

Sixteen gigabytes of BF16 weights, as a folder and as a GGUF file, which are holes in files (all zeros;
what is read and written is as much as with others). Counted is each process's own peak of resident
memory (VmHWM), the command's tree: no less than what of it is anonymous.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.alternate import table
from benchmarks.holes import SHAPE_1B, SHAPE_8B, write_holes, write_holes_gguf
from benchmarks.memory import run_measured
from benchmarks.verdict import Bar, run_bar

MOST_SHARE, MOST_BESIDE = 0.25, 300_000_000
SHAPES = {"1b": SHAPE_1B, "8b": SHAPE_8B}


def measure(bar: Bar) -> None:
    rows = [("form", "type", "written, GB", "seconds", "peak, MB")]
    with tempfile.TemporaryDirectory(dir=bar.options.folder) as temporary:
        folder, file = Path(temporary) / "model", Path(temporary) / "model.gguf"
        num_bytes = write_holes(folder, SHAPES[bar.options.shape])
        write_holes_gguf(file, folder)
        most = MOST_SHARE * num_bytes + MOST_BESIDE
        out = Path(temporary) / "out.gguf"
        for form in bar.options.forms.split(","):
            for name in bar.options.types.split(","):
                command = [str(Path(sys.executable).with_name("edgeinfer")), "quantize"]
                command += [str(folder if form == "folder" else file), "--type", name, "-o", str(out)]
                command += ["--method", "rtn", "--no-report"]  # the report opens the original whole
                begin = time.perf_counter()
                done = run_measured(command, timeout_s=3600.0, interval_s=0.05)
                seconds = time.perf_counter() - begin
                size = out.stat().st_size if out.exists() else 0
                out.unlink(missing_ok=True)
                peak = done.peak.total
                rows.append((form, name, f"{size / 1e9:.2f}", f"{seconds:.0f}", f"{peak / 1e6:.0f}"))
                bar.require(
                    f"{form} to {name}: {peak / 1e9:.3f} GB <= {most / 1e9:.3f} of {num_bytes / 1e9:.1f}"
                    f" GB, {size / 1e9:.1f} written",
                    done.exit_code == 0 and peak <= most,
                )
    bar.say(table(rows))
    bar.details["runs"] = rows


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--types", default="q4_0,q4_k_m", help="like q4_0,q4_k_m")
    parser.add_argument("--forms", default="folder,gguf")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--folder", help="where 5 GB can be written; default: the system's")


if __name__ == "__main__":
    sys.exit(run_bar(__file__, str(__doc__), measure, add_options))
