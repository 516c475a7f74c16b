"""Comparisons as a picture: both sides round by round, and their ratio. Needs the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.alternate import Comparison, Spread
from edgeinfer.measure.picture import save_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_A, _B, _RATIO, _BOUND = "#14508c", "#d07a1e", "#3c7a3c", "#b02a2a"


@dataclass(frozen=True)
class Drawn:
    """A comparison with a title, and the ratio it has to reach, if any."""

    title: str
    comparison: Comparison
    least_ratio: float | None = None


def draw_comparisons(path: Path, title: str, drawn: Sequence[Drawn]) -> None:
    """A row for each: the sides' figures on the left, the ratio on the right, with its median (line),
    its quartiles (band) and its bound (dashed).

    path: .svg or .png. Raises ValueError if there is nothing to draw, OSError.
    """
    from matplotlib.figure import Figure

    if not drawn:
        raise ValueError("there is nothing to draw")
    canvas = Figure(figsize=(11, 0.6 + 2.6 * len(drawn)), layout="constrained")
    canvas.suptitle(title, fontsize=12)
    rows = canvas.subplots(len(drawn), 2, squeeze=False, width_ratios=(3, 2))
    for (left, right), one in zip(rows, drawn, strict=True):
        _sides(left, one)
        _ratio(right, one)
    for axes in rows[-1]:
        axes.set_xlabel("round")
    save_picture(canvas, path)


def _sides(axes: Axes, one: Drawn) -> None:
    comparison = one.comparison
    rounds = range(1, len(comparison.a) + 1)
    for name, figures, color, marker in (
        (comparison.a_name, comparison.a, _A, "o"),
        (comparison.b_name, comparison.b, _B, "s"),
    ):
        spread = Spread.of(figures)
        label = f"{name}: {spread.median:.4g}"
        axes.plot(rounds, figures, marker, color=color, markersize=5, label=label)
        axes.axhline(spread.median, color=color, linewidth=1, alpha=0.7)
    axes.set_title(one.title, fontsize=10, loc="left")
    axes.set_ylabel(comparison.metric, fontsize=9)
    highest = max(*comparison.a, *comparison.b)
    axes.set_ylim(0, 1.3 * highest)  # from zero, with room for the legend above the points
    axes.legend(fontsize=8, loc="upper right", ncols=2, frameon=False)
    _plain(axes, len(comparison.a))


def _ratio(axes: Axes, one: Drawn) -> None:
    comparison = one.comparison
    ratio = comparison.ratio
    axes.axhspan(ratio.low, ratio.high, color=_RATIO, alpha=0.15, linewidth=0)
    axes.axhline(ratio.median, color=_RATIO, linewidth=1.5)
    axes.plot(range(1, len(comparison.a) + 1), comparison.ratios, "o", color=_RATIO, markersize=5)
    said = f"{comparison.a_name} / {comparison.b_name}: {ratio.show()}"
    lowest, highest = ratio.least, ratio.most
    if one.least_ratio is not None:
        axes.axhline(one.least_ratio, color=_BOUND, linewidth=1.2, linestyle="--")
        said += f"\nto reach: {one.least_ratio:g}"
        lowest, highest = min(lowest, one.least_ratio), max(highest, one.least_ratio)
    axes.set_title(said, fontsize=9, loc="left")
    room = max(0.1 * (highest - lowest), 0.02)
    axes.set_ylim(lowest - room, highest + room)
    axes.set_ylabel("ratio", fontsize=9)
    _plain(axes, len(comparison.a))


def _plain(axes: Axes, rounds: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0.4, rounds + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
