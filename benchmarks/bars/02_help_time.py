"""`edgeinfer --help` answers at once."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.alternate import Spread
from benchmarks.verdict import Bar, run_bar

MOST_S = 0.4


def measure(bar: Bar) -> None:
    command = [str(Path(sys.executable).with_name("edgeinfer")), "--help"]
    subprocess.run(command, capture_output=True, check=True)  # bytecode and pages are there from now on
    times = []
    for _ in range(bar.options.times):
        begin = time.perf_counter()
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True)
        times.append(time.perf_counter() - begin)
    spread = Spread.of(times)
    bar.details["seconds"] = times
    bar.say(f"  {spread.show()} s, {spread.least:.3f} to {spread.most:.3f}")
    bar.require(f"median of {len(times)}: {spread.median:.3f} s < {MOST_S} s", spread.median < MOST_S)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--times", type=int, default=10)


if __name__ == "__main__":
    sys.exit(run_bar(__file__, "time of edgeinfer --help", measure, add_options))
