"""A measured quantity: its samples, their median and quartiles."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Metric = Literal["prefill", "ttft", "decode", "total", "worst_ttft"]

UNITS: dict[Metric, str] = {
    "prefill": "tok/s",
    "ttft": "s",
    "decode": "tok/s",
    "total": "tok/s",
    "worst_ttft": "s",
}


@dataclass(frozen=True)
class Figure:
    """One metric at one size.

    prompt_tokens, new_tokens, streams: of each request, and how many ran at once. samples: in `unit`,
    in the order they were measured; at least one.
    """

    metric: Metric
    prompt_tokens: int
    new_tokens: int
    streams: int
    samples: tuple[float, ...]

    @property
    def unit(self) -> str:
        return UNITS[self.metric]

    @property
    def size(self) -> int:
        """What the figure is drawn over: the size that its suite varies."""
        if self.metric in ("total", "worst_ttft"):
            return self.streams
        return self.new_tokens if self.metric == "decode" else self.prompt_tokens

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """(low, high); the sample itself where there is one only."""
        return quartiles(self.samples)

    @property
    def label(self) -> str:
        if self.metric == "prefill":
            return f"prefill, {self.prompt_tokens} tokens"
        if self.metric == "ttft":
            return f"first token, prompt of {self.prompt_tokens}"
        if self.metric == "decode":
            return f"decode, {self.new_tokens} tokens"
        many = f"{self.streams} stream" + ("s" if self.streams != 1 else "")
        return f"{many}, together" if self.metric == "total" else f"{many}, slowest first token"

    def as_json(self) -> dict[str, Any]:
        low, high = self.quartiles
        return {
            "metric": self.metric,
            "unit": self.unit,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "streams": self.streams,
            "median": self.median,
            "low_quartile": low,
            "high_quartile": high,
            "samples": list(self.samples),
        }


def quartiles(samples: Sequence[float]) -> tuple[float, float]:
    if len(samples) == 1:
        return samples[0], samples[0]
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high
