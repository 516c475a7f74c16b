"""After which layer an exit is to lie, before one is trained.

A later one guesses better and takes longer. How much better was measured on the starter
(benchmarks/results/08_exit_training: exits of one layer after 4 to 10 of its 30), and is taken to hold
by share of a model's layers. Weighed as on a machine on which checking a draft takes as long as a step
without one: a GPU, or a large model whose weights are what takes time. Where checking is dearer, fewer
drafts pay, and the earliest of good places is still the one that pays first.
"""

from __future__ import annotations

from edgeinfer.engine.draft_lengths import planned_length

_MEASURED = ((4 / 30, 0.531), (6 / 30, 0.533), (8 / 30, 0.547), (10 / 30, 0.562))  # layer, agreement
_HEAD = 1.0  # of a layer, for the head of kept tokens
_MOST_TOKENS = 8


def best_layer(num_layers: int) -> int:
    """Of a model of so many layers, which must be two or more."""
    first = max(1, round(_MEASURED[0][0] * num_layers))
    last = min(num_layers - 1, max(first, round(_MEASURED[-1][0] * num_layers)))
    return max(range(first, last + 1), key=lambda layer: (_gain(layer, num_layers), -layer))


def _gain(layer: int, num_layers: int) -> float:
    """Seconds saved in a step that takes one."""
    draft_s = (layer + 1 + _HEAD) / num_layers
    odds = (_agreement(layer / num_layers),) * _MOST_TOKENS
    return planned_length(odds, 1, 1, lambda _: 1.0, draft_s)[1]


def _agreement(share: float) -> float:
    """Between what was measured, on a line; beyond it, as at the nearest."""
    before = _MEASURED[0]
    for after in _MEASURED:
        if share <= after[0]:
            if after == before:
                return after[1]
            part = (share - before[0]) / (after[0] - before[0])
            return before[1] + part * (after[1] - before[1])
        before = after
    return before[1]
