"""What quantizing a model cost, told: in the terminal, as JSON, Markdown and a picture, and in a few
entries that fit into the model's own metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeinfer import __version__
from edgeinfer.errors import UsageError, one_line
from edgeinfer.measure.loss import Loss
from edgeinfer.measure.picture import SUFFIXES, check_picture, check_place, save_picture, save_whole
from edgeinfer.quality.tensor_error import TensorError, errors_by_layer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KEY = "edgeinfer.quantize"
TEXT_SUFFIXES = (".md", ".json")
_WORST = 10  # tensors that Markdown names; JSON has all
_BLOCKS = " ▁▂▃▄▅▆▇█"
_CHART_ROWS = 4


@dataclass(frozen=True)
class Size:
    """num_bytes: of the weights."""

    num_bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class Speed:
    """Tokens a second: of a prompt that is read, and of an answer after its first token."""

    prefill: float
    decode: float


@dataclass(frozen=True)
class Sample:
    """What both answered, as likely as they could."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class LossReport:
    """before: of the original; after: of what was made of it. None, or empty: was not measured."""

    loss: Loss
    size_before: Size
    size_after: Size
    speed_before: Speed | None = None
    speed_after: Speed | None = None
    samples: tuple[Sample, ...] = ()
    errors: tuple[TensorError, ...] = ()
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Keys are not renamed or taken away; there may be more in later versions.

        What `Loss.as_json` has; bytes {before, after}, bits_per_weight {before, after}; speed (null:
        not measured) {prefill {before, after}, decode {before, after}} in tok/s; samples[] {prompt,
        before, after}; errors[] {name, type, relative_error}; notes[]; version.
        """
        before, after = self.speed_before, self.speed_after
        return {
            **self.loss.as_json(),
            "bytes": _pair(self.size_before.num_bytes, self.size_after.num_bytes),
            "bits_per_weight": _pair(self.size_before.bits_per_weight, self.size_after.bits_per_weight),
            "speed": None
            if before is None or after is None
            else {
                "prefill": _pair(before.prefill, after.prefill),
                "decode": _pair(before.decode, after.decode),
            },
            "samples": [asdict(sample) for sample in self.samples],
            "errors": [error.as_json() for error in self.errors],
            "notes": list(self.notes),
            "version": __version__,
        }

    def essentials(self) -> dict[str, str | float]:
        """For the metadata of the file: a few entries, by full key."""
        loss = self.loss
        return {
            f"{KEY}.reference": one_line(loss.reference, 60),
            f"{KEY}.tokens": loss.tokens,
            f"{KEY}.kl_mean": _short(loss.divergence.mean),
            f"{KEY}.kl_median": _short(loss.divergence.median),
            f"{KEY}.kl_p99": _short(loss.divergence.p99),
            f"{KEY}.top1": _short(loss.divergence.top1),
            f"{KEY}.perplexity": _short(loss.perplexity),
            f"{KEY}.reference_perplexity": _short(loss.reference_perplexity),
            f"{KEY}.noise_kl_mean": _short(loss.noise_floor.mean),
        }

    def essentials_text(self) -> str:
        """The same as one short string of JSON, for a value that was reserved: the keys without what
        they all begin with. Fewer than 400 bytes."""
        short = {key.removeprefix(f"{KEY}."): value for key, value in self.essentials().items()}
        return json.dumps(short, separators=(",", ":"))

    def lines(self, width: int = 80) -> list[str]:
        """For a terminal. Answers in it are a model's: control characters are gone."""
        found = _aligned(self._figures())
        found += [f"note: {one_line(note)}" for note in self.notes]
        by_layer = errors_by_layer(self.errors)
        if by_layer:
            found += ["", "error by layer, relative (the mean of its tensors)", *_chart(by_layer, width)]
        for sample in self.samples:
            found += ["", sample.prompt]
            found += ["  before:", *(f"    {line}" for line in _answer_lines(sample.before))]
            found += ["  after:", *(f"    {line}" for line in _answer_lines(sample.after))]
        return found

    def as_markdown(self) -> str:
        figures = self._figures()
        parts = [f"# {_escaped(self.loss.model)} against {_escaped(self.loss.reference)}", ""]
        parts += ["| | before | after | |", "|---|---|---|---|"]
        parts += ["| " + " | ".join(map(_escaped, row)) + " |" for row in figures]
        parts += ["", *(f"- {_escaped(one_line(note))}" for note in self.notes)]
        by_layer = errors_by_layer(self.errors)
        if by_layer:
            parts += ["", "## Error by layer", ""]
            parts += ["Relative, the mean of the layer's tensors.", ""]
            parts += ["| layer | error |", "|---|---|"]
            parts += [f"| {layer} | {error:.3e} |" for layer, error in by_layer.items()]
        if self.errors:
            worst = sorted(self.errors, key=lambda error: -error.relative_error)[:_WORST]
            parts += ["", "## Tensors with the largest error", ""]
            parts += ["| tensor | type | error |", "|---|---|---|"]
            parts += [
                f"| {_escaped(one_line(error.name))} | {error.type_name} | {error.relative_error:.3e} |"
                for error in worst
            ]
        if self.samples:
            parts += ["", "## Answers"]
        for sample in self.samples:
            parts += ["", f"### {sample.prompt}"]
            for title, answer in (("before", sample.before), ("after", sample.after)):
                # Indented, line by line: nothing in an answer can end the block.
                parts += ["", f"{title}:", "", *(f"    {line}" for line in _answer_lines(answer))]
        return "\n".join(parts) + f"\n\nMeasured by edgeinfer {__version__}.\n"

    def save(self, path: Path) -> None:
        """As its name ends: .md, .json, .png or .svg. Raises OSError. See `check_report`."""
        suffix = path.suffix.lower()
        if suffix == ".md":
            save_whole(path, self.as_markdown().encode())
        elif suffix == ".json":
            save_whole(path, json.dumps(self.as_json(), indent=1).encode() + b"\n")
        else:
            _draw(path, self)

    def _figures(self) -> list[tuple[str, str, str, str]]:
        """(what, before, after, what follows from it)"""
        loss, before, after = self.loss, self.size_before, self.size_after
        noise, found = loss.noise_floor, loss.divergence
        rows = [
            (
                "weights",
                f"{before.num_bytes / 1e6:,.1f} MB",
                f"{after.num_bytes / 1e6:,.1f} MB",
                _times(after.num_bytes, before.num_bytes),
            ),
            ("bits per weight", f"{before.bits_per_weight:.2f}", f"{after.bits_per_weight:.2f}", ""),
            (
                "perplexity",
                f"{loss.reference_perplexity:.3f}",
                f"{loss.perplexity:.3f}",
                _times(loss.perplexity, loss.reference_perplexity, 4),
            ),
            ("KL mean, nats a token", "", f"{found.mean:.5f}", f"noise floor {noise.mean:.2g}"),
            ("KL median", "", f"{found.median:.5f}", f"noise floor {noise.median:.2g}"),
            ("KL p99", "", f"{found.p99:.5f}", f"noise floor {noise.p99:.2g}"),
            (
                "same likeliest token",
                "",
                f"{found.top1:.2%}",
                f"noise floor {noise.top1:.2%}; of {loss.tokens:,} tokens",
            ),
        ]
        if self.speed_before is not None and self.speed_after is not None:
            for what, one, two in (
                ("prefill, tok/s", self.speed_before.prefill, self.speed_after.prefill),
                ("decode, tok/s", self.speed_before.decode, self.speed_after.decode),
            ):
                rows.append((what, f"{one:.1f}", f"{two:.1f}", _times(two, one)))
        return rows


def check_report(path: Path) -> None:
    """Whether a report can be written there, before anything is measured. Raises UsageError,
    ExtraMissing."""
    if path.suffix.lower() in SUFFIXES:
        check_picture(path, "--report")
        return
    if path.suffix.lower() not in TEXT_SUFFIXES:
        known = ", ".join((*TEXT_SUFFIXES, *SUFFIXES))
        raise UsageError(f"--report {path.name[:60]!r} must end in one of {known}")
    check_place(path, "--report")


def _answer_lines(answer: str) -> list[str]:
    """As a model gave it, but for control characters: what is code keeps how far it is indented."""
    found = []
    for line in answer.strip("\r\n").splitlines():
        line = line.expandtabs(4)
        found.append(" " * (len(line) - len(line.lstrip(" "))) + one_line(line))
    return found


def _chart(by_layer: Mapping[int, float], width: int) -> list[str]:
    """Columns from zero, one for each layer or for a few (the largest of them then)."""
    values = list(by_layer.values())
    most = max(values)
    head = len(f"{most:.2g}") + 1
    room = max(10, width - head - 2)
    wide = 2 if 2 * len(values) <= room else 1
    group = -(-len(values) // (room // wide))
    columns = [max(values[at : at + group]) for at in range(0, len(values), group)]
    heights = [round(8 * _CHART_ROWS * value / most) if most > 0 else 0 for value in columns]
    found = []
    for row in reversed(range(_CHART_ROWS)):
        label = f"{most:.2g}" if row == _CHART_ROWS - 1 else "0" if row == 0 else ""
        blocks = "".join(wide * _BLOCKS[min(8, max(0, height - 8 * row))] for height in heights)
        found.append(f"{label:>{head}} │{blocks}".rstrip())
    last = str(max(by_layer))
    first = str(min(by_layer))
    gap = max(1, wide * len(columns) - len(first) - len(last))
    found.append(f"{'':>{head}}  {first}{' ' * gap}{last}")
    return found


def _draw(path: Path, report: LossReport) -> None:
    from matplotlib.figure import Figure as Canvas

    loss = report.loss
    canvas = Canvas(figsize=(8, 4.2), layout="constrained")
    canvas.suptitle(
        f"{loss.model} against {loss.reference}: mean KL {loss.divergence.mean:.4f},"
        f" same likeliest token {loss.divergence.top1:.1%}",
        fontsize=10,
        parse_math=False,
    )
    _draw_layers(canvas.subplots(), report.errors)
    save_picture(canvas, path)


def _draw_layers(axes: Axes, errors: tuple[TensorError, ...]) -> None:
    """Every tensor, and the mean of each layer's."""
    by_layer = errors_by_layer(errors)
    inside = [error for error in errors if error.layer is not None]
    axes.plot(
        [error.layer for error in inside if error.layer is not None],
        [error.relative_error for error in inside],
        "o",
        color="#8fb3d9",
        markersize=4,
        label="a tensor",
        zorder=2,
    )
    axes.bar(list(by_layer), list(by_layer.values()), color="#d7e3f1", label="mean of a layer", zorder=1)
    axes.set_xlabel("layer")
    axes.set_ylabel("relative error")
    axes.set_ylim(bottom=0)
    if errors:
        axes.legend(frameon=False)
    else:
        axes.set_title("no errors of tensors are known", fontsize=9)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def _aligned(rows: list[tuple[str, str, str, str]]) -> list[str]:
    rows = [("", "before", "after", ""), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        f"{what:<{widths[0]}}  {one:>{widths[1]}}  {two:>{widths[2]}}  {rest}".rstrip()
        for what, one, two, rest in rows
    ]


def _pair(before: float, after: float) -> dict[str, float]:
    return {"before": before, "after": after}


def _times(after: float, before: float, digits: int = 2) -> str:
    return f"{after / before:.{digits}f} x" if before > 0 else ""


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _escaped(text: str) -> str:
    """In a cell or line of Markdown: nothing of it is markup."""
    return "".join("\\" + c if c in "\\`*_[]<>|#" else c for c in text)
