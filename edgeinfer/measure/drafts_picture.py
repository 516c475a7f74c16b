"""What drafts brought, as a picture: speed beside plain decoding, and how often drafts were right."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgeinfer.measure.drafts_bench import PLAIN, Costs, Outcome
from edgeinfer.measure.figures import quartiles
from edgeinfer.measure.picture import save_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from edgeinfer.measure.kinds_of_work import Kind

_COLOURS = ("#14508c", "#c06000", "#3a7d44", "#7a4a8c")
_MOST_POSITIONS = 8


def draw_drafts(
    path: Path, title: str, outcomes: Mapping[Kind, Mapping[str, Outcome]], costs: Costs
) -> None:
    """Raises OSError. outcomes: at least one kind."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(15, 4.4), layout="constrained")
    canvas.suptitle(title, fontsize=11)
    left, middle, right = canvas.subplots(1, 3)
    modes = [mode for mode in next(iter(outcomes.values())) if mode != PLAIN]
    colour = {mode: _COLOURS[index % len(_COLOURS)] for index, mode in enumerate(modes)}
    _speeds(left, outcomes, modes, colour)
    _shares(middle, outcomes, modes, colour, costs)
    _curve(right, costs)
    save_picture(canvas, path)


def _speeds(
    axes: Axes, outcomes: Mapping[Kind, Mapping[str, Outcome]], modes: list[str], colour: dict[str, str]
) -> None:
    width = 0.8 / max(len(modes), 1)
    for index, mode in enumerate(modes):
        for place, by_mode in enumerate(outcomes.values()):
            ratios = by_mode[mode].ratios(by_mode[PLAIN])
            at = place - 0.4 + width * (index + 0.5)
            axes.bar(
                at,
                statistics.median(ratios),
                0.9 * width,
                color=colour[mode],
                label=mode if place == 0 else None,
                zorder=2,
            )
            low, high = quartiles(ratios)
            axes.vlines(at, low, high, color="#222222", linewidth=1.5, zorder=3)
    axes.axhline(1.0, color="#222222", linewidth=1, linestyle="--", zorder=1)
    axes.set_title("Tokens a second, as many times as without drafts", fontsize=10)
    axes.set_xticks(range(len(outcomes)), list(outcomes))
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def _shares(
    axes: Axes,
    outcomes: Mapping[Kind, Mapping[str, Outcome]],
    modes: list[str],
    colour: dict[str, str],
    costs: Costs,
) -> None:
    for mode in modes:
        for style, (kind, by_mode) in zip(("-", "--", "-.", ":"), outcomes.items(), strict=False):
            shares = by_mode[mode].shares[:_MOST_POSITIONS]
            if shares:
                axes.plot(
                    range(1, len(shares) + 1),
                    shares,
                    style,
                    marker="o",
                    markersize=3,
                    color=colour[mode],
                    label=f"{mode}, {kind}",
                )
    for needed, name in ((costs.lookup_needed, "lookup"), (costs.needed, costs.draft_mode)):
        if needed is not None and name in modes:
            axes.axhline(needed, color=colour[name], linewidth=1, linestyle=(0, (1, 3)))
            axes.annotate(
                f"{name} pays from here", (1, needed), va="bottom", color=colour[name], fontsize=8
            )
    axes.set_title("Share of drafted tokens that were right, by position", fontsize=10)
    axes.set_xlabel("position in the draft, all before it right")
    axes.set_xticks(range(1, _MOST_POSITIONS + 1))
    axes.set_xlim(0.8, _MOST_POSITIONS + 0.2)
    axes.set_ylim(0, 1.03)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7, ncols=2)


def _curve(axes: Axes, costs: Costs) -> None:
    """What a step that checks takes, beside as many steps of one token."""
    one = costs.step_s.get(1)
    sizes = sorted(costs.step_s)
    axes.set_title("Time of a step by its tokens, in steps of one", fontsize=10)
    axes.set_xlabel("tokens of the step: the newest and those drafted")
    if one and sizes:
        times = [costs.step_s[size] / one for size in sizes]
        axes.plot(sizes, times, "-o", color=_COLOURS[0], markersize=3, label="as measured")
        if costs.draft_s:
            with_draft = [
                time + (size - 1) * costs.draft_s / one for size, time in zip(sizes, times, strict=True)
            ]
            label = f"with what the {costs.draft_mode} takes"
            axes.plot(sizes, with_draft, "--o", color=_COLOURS[1], markersize=3, label=label)
        axes.plot(sizes, sizes, ":", color="#222222", linewidth=1, label="no better than one by one")
        axes.legend(frameon=False, fontsize=8)
        axes.set_xticks(sizes)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
