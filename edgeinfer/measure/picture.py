"""A bench report as a picture. Needs matplotlib, which comes with the extra `plot`."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeinfer.errors import ExtraMissing, UsageError
from edgeinfer.measure.figures import Figure, Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".svg", ".png")

_TITLES: Mapping[Metric, tuple[str, str]] = {
    "prefill": ("Prefill", "prompt tokens"),
    "ttft": ("Time to the first token", "prompt tokens"),
    "decode": ("Decode, after the first token", "new tokens"),
    "total": ("All streams together", "streams"),
    "worst_ttft": ("Slowest first token", "streams"),
}
_SAMPLES, _MEDIAN = "#8fb3d9", "#14508c"


def check_picture(path: Path, option: str = "--plot") -> None:
    """Whether a picture can be made and written there, before anything is measured.

    Raises UsageError (a name or folder that cannot be), ExtraMissing.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{option} {path.name[:60]!r} must end in {' or '.join(SUFFIXES)}")
    check_place(path, option)
    if importlib.util.find_spec("matplotlib") is None:
        raise ExtraMissing(f"{option} needs matplotlib; install it: pip install 'edgeinfer[plot]'")


def check_place(path: Path, option: str) -> None:
    """Raises UsageError where no file can be written."""
    folder = path.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or path.is_dir():
        raise UsageError(
            f"{option} {str(path)[:200]!r} cannot be written; name a file in a folder of yours"
        )


def draw_report(path: Path, title: str, figures: Sequence[Figure]) -> None:
    """One panel for each metric: every sample, the median, and a bar between the quartiles.

    Raises OSError. figures: at least one.
    """
    from matplotlib.figure import Figure as Canvas

    metrics = list(dict.fromkeys(figure.metric for figure in figures))
    canvas = Canvas(figsize=(1 + 4 * len(metrics), 4.2), layout="constrained")
    canvas.suptitle(title, fontsize=11)
    for axes, metric in zip(canvas.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        _panel(axes, metric, [figure for figure in figures if figure.metric == metric])
    save_picture(canvas, path)


def save_picture(canvas: Any, path: Path) -> None:
    """Write a matplotlib Figure, whole or not at all. Raises OSError."""
    data = io.BytesIO()
    canvas.savefig(data, format=path.suffix.lower().lstrip("."), dpi=150)
    save_whole(path, data.getvalue())


def save_whole(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all. Raises OSError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _panel(axes: Axes, metric: Metric, figures: Sequence[Figure]) -> None:
    name, over = _TITLES[metric]
    for place, figure in enumerate(figures):
        axes.plot(
            [place + shift for shift in _spread(len(figure.samples))],
            figure.samples,
            "o",
            color=_SAMPLES,
            markersize=5,
            zorder=2,
        )
        low, high = figure.quartiles
        axes.vlines(place, low, high, color=_MEDIAN, linewidth=3, zorder=3)
        axes.hlines(figure.median, place - 0.22, place + 0.22, color=_MEDIAN, linewidth=2, zorder=3)
        axes.annotate(
            f"{figure.median:.4g}",
            (place + 0.24, figure.median),
            va="center",
            color=_MEDIAN,
            fontsize=9,
        )
    axes.set_title(name, fontsize=10)
    axes.set_ylabel(figures[0].unit)
    axes.set_xlabel(over)
    axes.set_xticks(range(len(figures)), [str(figure.size) for figure in figures])
    axes.set_xlim(-0.6, len(figures) - 0.4 + 0.2)
    # From zero: half as high is half as fast.
    axes.set_ylim(0, 1.12 * max(max(figure.samples) for figure in figures))
    axes.grid(axis="y", color="#dddddd", linewidth=0.6, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def _spread(count: int) -> list[float]:
    """Places side by side, so that equal samples do not hide each other."""
    return [0.14 * (2 * i / (count - 1) - 1) for i in range(count)] if count > 1 else [0.0]
