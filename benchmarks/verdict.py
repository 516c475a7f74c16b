"""The frame of a bar: options, the lock, figures, and one PASS or FAIL at the end."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.alternate import RESULTS, Comparison, comparison_table, machine, save
from benchmarks.lock import one_at_a_time
from benchmarks.model_files import own_data_folder
from benchmarks.peers import PeerError
from benchmarks.picture import Drawn, draw_comparisons
from edgeinfer.errors import EdgeInferError
from edgeinfer.measure.picture import check_picture


@dataclass
class Bar:
    """One "Must hold" line. `require` records a figure and whether it is good enough."""

    name: str
    options: argparse.Namespace
    checks: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    drawn: list[Drawn] = field(default_factory=list)

    def say(self, text: str) -> None:
        print(text, flush=True)

    def show(
        self, title: str, comparisons: Sequence[Comparison], least_ratio: float | None = None
    ) -> None:
        """Print comparisons under a title; they also come into the JSON file and the picture.
        least_ratio: what their ratio has to reach, for the picture."""
        self.say(f"\n{title}")
        self.say(comparison_table(comparisons))
        self.details[title] = [comparison.as_json() for comparison in comparisons]
        self.drawn += [Drawn(title, comparison, least_ratio) for comparison in comparisons]

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
    parser.add_argument(
        "--plot",
        metavar="FILE",
        nargs="?",
        type=Path,
        const=RESULTS / f"{name}.svg",
        help="also draw the rounds (default benchmarks/results/NAME.svg)",
    )
    if add_options is not None:
        add_options(parser)
    bar = Bar(name, parser.parse_args())
    plot: Path | None = bar.options.plot
    try:
        if plot is not None:
            RESULTS.mkdir(exist_ok=True)
            check_picture(plot)
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
        if plot is not None and bar.drawn:
            draw_comparisons(plot, f"{name}: {about}", bar.drawn)
            print(f"drawn: {plot}", file=sys.stderr)
    print(f"{name}: {'PASS' if bar.passed else 'FAIL'}", flush=True)
    return 0 if bar.passed else 1
