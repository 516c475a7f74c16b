"""How far a model's predictions lie from a reference's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeinfer.backend import Runtime
from edgeinfer.errors import MeasureFailed
from edgeinfer.quality.predictions import (
    Progress,
    chunk_of,
    log_softmax,
    nll_of,
    nothing,
    perplexity,
    rows,
)

if TYPE_CHECKING:
    from edgeinfer.quality.predictions import Floats


@dataclass(frozen=True)
class Agreement:
    """kl: divergence from the reference at each position, in nats; shape (positions,). top1: share of
    positions whose likeliest token is the same. nll, reference_nll: of the tokens that were there.
    """

    kl: Floats
    top1: float
    nll: Floats
    reference_nll: Floats

    @property
    def mean_kl(self) -> float:
        return float(self.kl.mean())

    @property
    def median_kl(self) -> float:
        return percentile(self.kl, 50)

    @property
    def p99_kl(self) -> float:
        return percentile(self.kl, 99)

    @property
    def perplexity(self) -> float:
        return perplexity(self.nll)

    @property
    def reference_perplexity(self) -> float:
        return perplexity(self.reference_nll)


def percentile(values: Floats, percent: float) -> float:
    import numpy as np

    return float(np.percentile(values, percent))


def agreement(
    runtime: Runtime, reference: Runtime, tokens: Sequence[int], progress: Progress = nothing
) -> Agreement:
    """Both read the same text, each chunk of it in turn, so that nothing has to be stored. Raises
    MeasureFailed where it does not fit, or the vocabularies differ."""
    import numpy as np

    if runtime.facts.vocab_size != reference.facts.vocab_size:
        raise MeasureFailed("the two models have different vocabularies")
    most = min(runtime.facts.context, reference.facts.context)
    if len(tokens) > most:
        raise MeasureFailed(f"{len(tokens)} tokens do not fit into a context of {most}")
    kl: list[Floats] = []
    nll: list[Floats] = []
    reference_nll: list[Floats] = []
    same = 0
    chunk = min(chunk_of(runtime), chunk_of(reference))
    one, other = runtime.open(), reference.open()
    try:
        for start in range(0, len(tokens), chunk):
            part = tokens[start : start + chunk]
            following = tokens[start + 1 : start + 1 + len(part)]
            found, wanted = rows(runtime, one, part), rows(reference, other, part)
            q, p = log_softmax(found), log_softmax(wanted)
            kl.append((np.exp(p) * (p - q)).sum(axis=-1))
            same += int((found.argmax(axis=-1) == wanted.argmax(axis=-1)).sum())
            nll.append(nll_of(found, following))
            reference_nll.append(nll_of(wanted, following))
            progress((start + len(part)) / len(tokens))
    finally:
        runtime.free(one)
        reference.free(other)
    return Agreement(
        np.concatenate(kl), same / len(tokens), np.concatenate(nll), np.concatenate(reference_nll)
    )
