"""What a model lost against another: the figures, and how they are come by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgeinfer.errors import BackendUnavailable, MeasureFailed, UnsupportedModel, UsageError
from edgeinfer.measure.evaluation import EvalPlan, Evaluation
from edgeinfer.open import OpenOptions, OpenPlan, plan_open
from edgeinfer.opened_form import Converting
from edgeinfer.quality.windows import SIZE

Progress = Callable[[str, float], None]  # what is being done, and the share that is done


@dataclass(frozen=True)
class Divergence:
    """From the reference's predictions, in nats a token; top1: how often the likeliest token is the
    same."""

    mean: float
    median: float
    p99: float
    top1: float

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Divergence:
        return cls(row["mean_kl"], row["median_kl"], row["p99_kl"], row["top1"])

    def as_json(self) -> dict[str, Any]:
        return {
            "kl": {"mean": self.mean, "median": self.median, "p99": self.p99},
            "top1": self.top1,
        }


@dataclass(frozen=True)
class Loss:
    """model, reference: their names. tokens: predictions that were compared. noise_floor: the reference
    against itself in other steps, on the first eighth of the text."""

    model: str
    reference: str
    tokens: int
    divergence: Divergence
    noise_floor: Divergence
    perplexity: float
    reference_perplexity: float

    @classmethod
    def of_rows(cls, model: str, reference: str, rows: Sequence[Mapping[str, Any]]) -> Loss:
        noise, row = rows
        return cls(
            model,
            reference,
            row["tokens"],
            Divergence.of_row(row),
            Divergence.of_row(noise),
            row["perplexity"],
            row["reference_perplexity"],
        )

    def as_json(self) -> dict[str, Any]:
        """Keys are not renamed or taken away; there may be more in later versions.

        model, reference; tokens; kl {mean, median, p99} in nats a token; top1 (0 to 1); perplexity,
        reference_perplexity; noise_floor {kl {mean, median, p99}, top1}.
        """
        return {
            "model": self.model,
            "reference": self.reference,
            "tokens": self.tokens,
            **self.divergence.as_json(),
            "perplexity": self.perplexity,
            "reference_perplexity": self.reference_perplexity,
            "noise_floor": self.noise_floor.as_json(),
        }


@dataclass(frozen=True)
class Comparison:
    """Two models, ready to be opened one after the other."""

    model: OpenPlan
    reference: OpenPlan

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.reference.warnings, *self.model.warnings)))

    def evaluation(self, text: str, tokens: int, progress: Progress, first: int = 0) -> Evaluation:
        """Its rows: the noise floor's, then the model's. first: of a window's positions, the first
        whose prediction counts."""
        plan = EvalPlan("reference", (), tokens, text, first=first)
        return Evaluation(self.model.command, plan, progress, self.reference.command)

    def loss(self, rows: Sequence[Mapping[str, Any]]) -> Loss:
        """Of rows that are all there."""
        return Loss.of_rows(self.model.name, self.reference.name, rows)

    def measure(self, text: str, tokens: int, progress: Progress, first: int = 0) -> Loss:
        """Raises LoadFailed, MeasureFailed and what else the models' process met; KeyboardInterrupt
        leaves no process behind."""
        rows = list(self.evaluation(text, tokens, progress, first).rows())
        if len(rows) != 2:
            raise MeasureFailed("the models' process ended before it was done")
        return self.loss(rows)


def plan_comparison(
    options: OpenOptions,
    reference: str,
    pull_missing: Callable[[str], None] | None = None,
    converting: Converting | None = None,
) -> Comparison:
    """options: how to open the model. The reference is opened by the same backend where that can, so
    that the backends' differences do not count as the model's; else by one that is chosen. Its weights
    are held as they are, whatever `load_as` says of the model's. Raises
    ModelError, BackendUnavailable, UsageError."""
    wanted = replace(
        options,
        context=SIZE,
        kv_type_k="f16",
        kv_type_v="f16",
        sequences=1,
        cache_bytes=0,
        remember=False,
    )
    model = plan_open(wanted, pull_missing, converting)
    other = replace(wanted, model=reference, backend=model.command.backend, load_as="auto")
    try:
        return Comparison(model, plan_open(other, pull_missing, converting))
    except (UsageError, UnsupportedModel, BackendUnavailable):
        if model.command.backend == "scripted":
            raise
        return Comparison(model, plan_open(replace(other, backend="auto"), pull_missing, converting))
