"""Run two things in turns and compare them round by round.

A machine's speed drifts (heat, neighbours), so figures from different minutes do not compare. Each round
runs both sides close together, and the order swaps from round to round; what counts is the median of the
rounds' ratios.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts.wheel_key import cpu_flags

RESULTS = Path(__file__).resolve().parent / "results"

Measure = Callable[[], Mapping[str, float]]  # one turn: metric -> figure
OnRound = Callable[[int, Mapping[str, float], Mapping[str, float]], None]


@dataclass(frozen=True)
class Side:
    name: str
    measure: Measure


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and extremes of some figures."""

    median: float
    low: float
    high: float
    least: float
    most: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> Spread:
        if not figures or not all(math.isfinite(figure) for figure in figures):
            raise ValueError(f"no spread of {list(figures)}")
        if len(figures) == 1:
            low = high = figures[0]
        else:
            low, _, high = statistics.quantiles(figures, n=4, method="inclusive")
        return cls(statistics.median(figures), low, high, min(figures), max(figures))

    def show(self, digits: int = 3) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


@dataclass(frozen=True)
class Comparison:
    """One metric of two sides, round by round. `ratio` is a / b."""

    metric: str
    a_name: str
    b_name: str
    a: tuple[float, ...]
    b: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        return tuple(x / y for x, y in zip(self.a, self.b, strict=True))

    @property
    def ratio(self) -> Spread:
        return Spread.of(self.ratios)

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "ratios": self.ratios,
            "ratio": asdict(self.ratio),
            "a_spread": asdict(Spread.of(self.a)),
            "b_spread": asdict(Spread.of(self.b)),
        }


def alternate(a: Side, b: Side, rounds: int, on_round: OnRound | None = None) -> list[Comparison]:
    """`rounds` times both sides, starting with a different one each time.

    Both must report the same metrics, each above zero; otherwise ValueError.
    """
    turns_a: list[Mapping[str, float]] = []
    turns_b: list[Mapping[str, float]] = []
    for number in range(rounds):
        order = [(a, turns_a), (b, turns_b)]
        for side, turns in order if number % 2 == 0 else reversed(order):
            turn = dict(side.measure())
            wrong = [f"{k} = {v}" for k, v in turn.items() if not (math.isfinite(v) and v > 0)]
            if wrong:
                raise ValueError(f"{side.name} reported {', '.join(wrong)}")
            turns.append(turn)
        if turns_a[-1].keys() != turns_b[-1].keys():
            raise ValueError(f"{a.name} reported {set(turns_a[-1])}, {b.name} {set(turns_b[-1])}")
        if on_round is not None:
            on_round(number + 1, turns_a[-1], turns_b[-1])
    metrics = list(turns_a[0]) if turns_a else []
    return [
        Comparison(
            metric, a.name, b.name, tuple(t[metric] for t in turns_a), tuple(t[metric] for t in turns_b)
        )
        for metric in metrics
    ]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned columns; the first row is the head, numbers stand to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)


def comparison_table(comparisons: Sequence[Comparison], digits: int = 1) -> str:
    first = comparisons[0]
    head = ("metric", first.a_name, first.b_name, "ratio (quartiles)", "least", "most")
    rows = [
        (
            c.metric,
            f"{Spread.of(c.a).median:.{digits}f}",
            f"{Spread.of(c.b).median:.{digits}f}",
            c.ratio.show(),
            f"{c.ratio.least:.3f}",
            f"{c.ratio.most:.3f}",
        )
        for c in comparisons
    ]
    return table([head, *rows])


def machine() -> dict[str, Any]:
    """What a reader of a saved result must know about where it was measured."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_flags().partition("model name: ")[2] or platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def save(name: str, result: Mapping[str, Any]) -> Path:
    """Write a result as JSON under results/ and return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
