"""The frame of a bar: options, the lock, figures, and one PASS or FAIL at the end."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.alternate import machine, save
from benchmarks.lock import one_at_a_time
from benchmarks.model_files import own_data_folder
from benchmarks.peers import PeerError
from edgeinfer.errors import EdgeInferError


@dataclass
class Bar:
    """One "Must hold" line. `require` records a figure and whether it is good enough."""

    name: str
    options: argparse.Namespace
    checks: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def say(self, text: str) -> None:
        print(text, flush=True)

    def require(self, what: str, holds: bool) -> None:
        self.checks.append({"what": what, "holds": holds})
        self.say(f"  {'ok  ' if holds else 'MISS'} {what}")

    @property
    def passed(self) -> bool:
        """A bar that checked nothing has not been met."""
        return bool(self.checks) and all(check["holds"] for check in self.checks)


def run_bar(
    script: str,
    about: str,
    measure: Callable[[Bar], None],
    add_options: Callable[[argparse.ArgumentParser], None] | None = None,
) -> int:
    """Parse options, wait for the machine, measure, print the verdict. Returns the exit code."""
    name = Path(script).stem
    parser = argparse.ArgumentParser(prog=name, description=about)
    parser.add_argument("--json", action="store_true", help="also write benchmarks/results/NAME.json")
    if add_options is not None:
        add_options(parser)
    bar = Bar(name, parser.parse_args())
    try:
        with one_at_a_time(), own_data_folder():
            bar.details["machine"] = machine()
            bar.say(f"{name}: {about}")
            load, cores = os.getloadavg()[0], os.cpu_count() or 1
            if load > 0.3:
                print(
                    f"other programs are busy (load {load:.1f} on {cores} cores): figures will scatter",
                    file=sys.stderr,
                )
            measure(bar)
    except (PeerError, EdgeInferError) as error:
        bar.require(f"measured to the end ({type(error).__name__})", False)
        print(f"{name}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    finally:
        if bar.options.json and bar.checks:
            options = {key: str(value) for key, value in vars(bar.options).items()}
            result = {"bar": name, "about": about, "options": options, "passed": bar.passed}
            path = save(name, {**result, "checks": bar.checks, **bar.details})
            print(f"written: {path}", file=sys.stderr)
    print(f"{name}: {'PASS' if bar.passed else 'FAIL'}", flush=True)
    return 0 if bar.passed else 1
