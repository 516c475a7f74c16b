"""How many drafted tokens the next step is to check: those that bring most tokens a second, or none.

A step costs what was measured here (machine/step_cost.py), which is no line through its tokens. A
draft's i-th token is accepted if it and all before it are right, so it brings the product of their odds.
Several sequences share one step: their tokens are taken in the order of what they bring, which within
each sequence is the order of the draft, and the number taken is the best one.

Source for weighing expected tokens against a measured cost: Chen et al. 2024, Sequoia,
arXiv:2402.12374; Liu et al. 2024, arXiv:2406.14066.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

# A draft must promise this much more than none: costs and odds are estimates, and losing is worse than
# not winning.
LEAST_GAIN = 1.05


def share_out(
    odds: Sequence[Sequence[float]], seconds: Callable[[Sequence[int]], float | None], most: int
) -> tuple[list[int], float]:
    """odds: of each running sequence's draft, token by token; none for one without. seconds: of a step
    of so many tokens of each sequence, with logits for all; None: not known. most: tokens of a step.
    Returns each sequence's number of drafted tokens, and how many times faster the step is than one
    without, as far as is known (1 where nothing is drafted)."""
    lengths = [0] * len(odds)
    plain = seconds([1] * len(odds))
    if plain is None:
        return lengths, 1.0
    waiting = [(-own[0], which) for which, own in enumerate(odds) if own]
    heapq.heapify(waiting)
    brought = float(len(odds))
    best, best_rate, taken = list(lengths), LEAST_GAIN * brought / plain, len(odds)
    while waiting and taken < most:
        gain, which = heapq.heappop(waiting)
        lengths[which] += 1
        taken += 1
        brought -= gain
        own = odds[which]
        if lengths[which] < len(own):
            heapq.heappush(waiting, (gain * own[lengths[which]], which))
        cost = seconds([1 + length for length in lengths])
        if cost is not None and brought / cost > best_rate:
            best, best_rate = list(lengths), brought / cost
    if not any(best):
        return best, 1.0
    return best, best_rate * plain / len(odds)


def planned_length(
    odds: Sequence[float],
    drafting: int,
    sequences: int,
    seconds: Callable[[Sequence[int]], float | None],
    draft_s: float,
) -> tuple[int, float]:
    """How many tokens a model is to draft for each of `drafting` of the `sequences` that run, and the
    seconds that such a step saves; (0, 0.0) where no number promises LEAST_GAIN. odds: of each token of
    a draft, where all before it are right. draft_s: of one step of the model that drafts."""
    plain = seconds([1] * sequences)
    if plain is None:
        return 0, 0.0
    best, most = 0, 0.0
    whole, accepted = 1.0, 0.0
    for number, own in enumerate(odds, start=1):
        whole *= own
        accepted += whole
        checking = seconds([1 + number] * drafting + [1] * (sequences - drafting))
        if checking is None:
            continue
        cost = checking + number * draft_s
        brought = sequences + drafting * accepted
        saved = brought * plain / sequences - cost
        if saved > most and brought * plain > LEAST_GAIN * cost * sequences:
            best, most = number, saved
    return best, most
