"""The rows of `edgeinfer eval` as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeinfer.measure.picture import check_picture, save_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]


def table_of(suite: str, rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads, and a line of cells for each row."""
    heads: tuple[str, ...]
    if suite == "kv":
        heads = ("KV type", "bytes/token", "KL mean", "median", "p99", "top-1", "perplexity", "of f16")
        return heads, [
            (
                row["setting"],
                f"{row['bytes_per_token']:,}",
                f"{row['mean_kl']:.5f}",
                f"{row['median_kl']:.5f}",
                f"{row['p99_kl']:.5f}",
                f"{row['top1']:.2%}",
                f"{row['perplexity']:.3f}",
                f"{row['perplexity'] / row['reference_perplexity']:.4f} x",
            )
            for row in rows
        ]
    if suite == "reference":
        heads = (
            "model",
            "tokens",
            "KL mean",
            "median",
            "p99",
            "top-1",
            "perplexity",
            "of the reference",
        )
        return heads, [
            (
                row["setting"],
                f"{row['tokens']:,}",
                *_small(row["mean_kl"], row["median_kl"], row["p99_kl"]),
                f"{row['top1']:.2%}",
                f"{row['perplexity']:.3f}",
                f"{row['perplexity'] / row['reference_perplexity']:.4f} x",
            )
            for row in rows
        ]
    if suite == "stream":
        heads = ("KV:window:sinks", "tokens", "evicted", "cells", "perplexity", "read afresh", "ratio")
        return heads, [
            (
                row["setting"],
                f"{row['tokens']:,}",
                f"{row['evicted']:,}",
                str(row["cells"]),
                f"{row['perplexity']:.3f}",
                f"{row['recomputed_perplexity']:.3f}",
                f"{row['ratio']:.4f} x",
            )
            for row in rows
        ]
    heads = ("KV:window:sinks", "fact is", "facts", "recalled", "gain, nats a token")
    return heads, [
        (
            row["setting"],
            place["place"],
            str(place["facts"]),
            f"{place['share']:.0%}",
            f"{place['gain']:+.2f}",
        )
        for row in rows
        for place in row["places"]
    ]


def _small(*values: float) -> list[str]:
    """A noise floor is a hundred-thousandth, a loss half a nat."""
    return [f"{value:.5f}" if value >= 0.001 or not value else f"{value:.1e}" for value in values]


def check_eval_picture(path: Path) -> None:
    """Raises UsageError, ExtraMissing."""
    check_picture(path)


def draw_eval(path: Path, title: str, suite: str, rows: Sequence[Row]) -> None:
    """Raises OSError. rows: at least one."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(7.5, 4.2), layout="constrained")
    canvas.suptitle(title, fontsize=11)
    axes = canvas.subplots()
    draw = {
        "kv": _draw_kv,
        "stream": _draw_stream,
        "recall": _draw_recall,
        "reference": _draw_reference,
    }
    draw[suite](axes, rows)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    save_picture(canvas, path)


def _draw_kv(axes: Axes, rows: Sequence[Row]) -> None:
    _draw_divergences(axes, rows, "KL divergence from f16, nats")


def _draw_reference(axes: Axes, rows: Sequence[Row]) -> None:
    _draw_divergences(axes, rows, "KL divergence from the reference, nats")


def _draw_divergences(axes: Axes, rows: Sequence[Row], label: str) -> None:
    places = range(len(rows))
    for name, marker in (("mean_kl", "o"), ("median_kl", "_"), ("p99_kl", "^")):
        values = [max(row[name], 1e-9) for row in rows]
        axes.plot(places, values, marker, markersize=8, label=name.replace("_kl", ""))
    axes.set_yscale("log")
    axes.set_ylabel(label)
    axes.set_xticks(list(places), [row["setting"] for row in rows])
    axes.legend(frameon=False)


def _draw_stream(axes: Axes, rows: Sequence[Row]) -> None:
    for row in rows:
        at, values = zip(*row["slices"], strict=True)
        axes.plot(at, values, label=row["setting"])
    axes.set_yscale("log")
    axes.set_xlabel("tokens read")
    axes.set_ylabel("perplexity of a slice")
    axes.set_ylim(bottom=1)
    axes.legend(frameon=False, title="KV:window:sinks")


def _draw_recall(axes: Axes, rows: Sequence[Row]) -> None:
    width = 0.8 / len(rows)
    for number, row in enumerate(rows):
        places = [place["place"] for place in row["places"]]
        at = [index + number * width for index in range(len(places))]
        gains = [place["gain"] for place in row["places"]]
        axes.bar(at, gains, width * 0.9, label=row["setting"], zorder=2)
        axes.set_xticks([i + 0.4 - width / 2 for i in range(len(places))], places)
    axes.set_ylabel("likelier by having been told, nats a token")
    axes.axhline(0, color="#444444", linewidth=0.8)
    axes.legend(frameon=False, title="KV:window:sinks")
