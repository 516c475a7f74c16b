"""The line under the input: what goes on, how fast, how full."""

from __future__ import annotations

from dataclasses import replace

from textual.content import Content
from textual.reactive import reactive
from textual.widget import Widget

from edgeinfer.errors import one_line
from edgeinfer_tui.figures import Figures

_GAP = "   "
_MARKS = {
    "loading": ("○", "$text-muted"),
    "no model": ("✗", "$text-error"),
    "ready": ("●", "$text-success"),
    "reading": ("◐", "$text-accent"),
    "answering": ("◑", "$text-accent"),
    "stopping": ("◌", "$text-warning"),
    "stopped": ("■", "$text-warning"),
    "failed": ("✗", "$text-error"),
}


class StatusLine(Widget):
    """Shows `Figures`; on a narrow terminal the least needed of them go first."""

    DEFAULT_CSS = """
    StatusLine { height: 1; padding: 0 2; color: $text-muted; }
    """

    figures: reactive[Figures] = reactive(Figures)

    def show(self, figures: Figures) -> None:
        self.figures = replace(figures)  # a copy: the reactive compares, and repaints only on change
        self.tooltip = figures.no_drafts or None  # which is the first to go where there is no room

    def render(self) -> Content:
        return status_content(self.figures, self.size.width)


def status_content(figures: Figures, width: int) -> Content:
    """The figures in at most `width` cells: state and rates on the left, the model on the right."""
    mark, style = _MARKS[figures.state]
    state = Content.assemble((mark, style), " ", (_state_text(figures), "$text"))
    left = [state, *(Content(text) for text in _figure_texts(figures))]
    right = [Content(text) for text in (one_line(figures.model, 40), figures.backend) if text]
    # The model's name may be given up before any figure, its backend before that.
    while right and _width(left) + _width(right) + len(_GAP) > width:
        right.pop()
    while len(left) > 1 and _width(left) > width:
        left.pop()
    line = Content(_GAP).join(left)
    if right:
        tail = Content(" · ").join(right)
        line += Content(" " * max(1, width - line.cell_length - tail.cell_length)) + tail
    return line.truncate(width, ellipsis=True)


def _state_text(figures: Figures) -> str:
    if figures.state == "loading":
        return f"loading {figures.load_percent} %"
    if figures.state == "reading":
        return f"reading prompt {figures.prompt_percent} %"
    return figures.state


def _figure_texts(figures: Figures) -> list[str]:
    """Most needed first."""
    texts = []
    if figures.evicted_tokens:
        texts.append(f"{figures.evicted_tokens:,} evicted")
    if figures.tok_s is not None:
        texts.append(
            f"{figures.tok_s:.0f} tok/s" if figures.tok_s >= 10 else f"{figures.tok_s:.1f} tok/s"
        )
    if figures.drafts:
        texts.append(figures.drafts)
    if figures.context:
        texts.append(f"context {figures.used_tokens or 0:,}/{figures.context:,}")
    if figures.ttft_s is not None:
        texts.append(f"TTFT {_seconds(figures.ttft_s)}")
    if figures.cached_tokens:
        texts.append(f"{figures.cached_tokens:,} cached")
    if figures.no_drafts:
        texts.append(figures.no_drafts)
    return texts


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _width(parts: list[Content]) -> int:
    return sum(part.cell_length for part in parts) + len(_GAP) * max(0, len(parts) - 1)
