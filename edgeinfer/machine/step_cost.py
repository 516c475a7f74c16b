"""What a forward step costs on this machine: a table that is measured, learnt from live steps, and kept.

A step's cost is no line through its tokens: kernels work in tiles (on a 1B shape 4 rows cost 1.6 times
one row, 3 rows 2.4 times), rows of logits cost a product with the whole vocabulary each, and with a
neighbour on one core two threads may be ten times slower than one. So nothing is assumed: the table
holds seconds by thread count, tokens, rows and context, and answers only from what was measured,
interpolating between sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

CONTEXT_BUCKET = 512  # a step's cost grows with the context; costs are kept by so many tokens of it
PREFILL_TOKENS = 64  # steps of at least so many tokens are prefill, and kept as seconds per token

_LEARN = 0.2  # weight of a new step in the mean
_TYPICAL = 1.3  # a step slower than this times the mean says something of the machine, not of the step
_REBASE = 64  # so many slow steps in a row do say something of the step: the mean starts anew
_MAX_SECONDS = 3600.0


@dataclass(frozen=True, order=True)
class StepClass:
    """Steps that should cost the same. `rows` of `tokens` have logits; a prefill step has tokens 0, and
    its cost is per token."""

    threads: int
    tokens: int
    rows: int
    context: int  # in buckets

    @classmethod
    def of(cls, threads: int, tokens: int, rows: int, context: int) -> StepClass:
        """context: the longest sequence's, in tokens."""
        bucket = context // CONTEXT_BUCKET
        if tokens >= PREFILL_TOKENS:
            return cls(threads, 0, 0, bucket)
        return cls(threads, tokens, rows, bucket)


@dataclass
class _Cost:
    mean: float
    count: int = 0
    slow: int = 0  # steps in a row that were much slower than the mean


class StepCosts:
    """Seconds by StepClass. Not thread-safe."""

    def __init__(self) -> None:
        self._costs: dict[StepClass, _Cost] = {}
        self.num_changes = 0  # since it was made or loaded

    def __len__(self) -> int:
        return len(self._costs)

    def observe(self, kind: StepClass, seconds: float) -> None:
        """Learn from one step (a prefill's seconds are per token). A burst of slow steps moves the mean
        only if it lasts; a faster one moves it at once."""
        if not 0.0 < seconds < _MAX_SECONDS:
            return
        self.num_changes += 1
        cost = self._costs.get(kind)
        if cost is None or seconds * _TYPICAL < cost.mean:
            # Nothing makes a step faster than it can be: what was known had been slowed by something.
            self._costs[kind] = _Cost(seconds, 1)
            return
        if seconds > _TYPICAL * cost.mean and cost.count > 2:
            cost.slow += 1
            if cost.slow >= _REBASE:
                cost.mean, cost.count, cost.slow = seconds, 1, 0
            return
        cost.slow = 0
        cost.count += 1
        cost.mean += max(_LEARN, 1.0 / cost.count) * (seconds - cost.mean)

    def count(self, kind: StepClass) -> int:
        cost = self._costs.get(kind)
        return 0 if cost is None else cost.count

    def known(self, kind: StepClass) -> float | None:
        """Seconds of exactly this class; of the nearest shorter context where this one has none."""
        found = self.known_at(kind)
        return None if found is None else found[0]

    def known_at(self, kind: StepClass) -> tuple[float, int] | None:
        """As `known`, with the context (in buckets) at which it was measured."""
        for bucket in range(kind.context, -1, -1):
            cost = self._costs.get(StepClass(kind.threads, kind.tokens, kind.rows, bucket))
            if cost is not None:
                return cost.mean, bucket
        return None

    def growth(self, kind: StepClass, start: int) -> float:
        """How much dearer steps of this class are than with a context of `start` buckets."""
        now, then = self.known_at(kind), self.known_at(replace(kind, context=start))
        return now[0] / then[0] if now is not None and then is not None else 1.0

    def estimate(self, kind: StepClass) -> float | None:
        """Seconds, interpolated between measured numbers of tokens with all their rows; None where
        nothing is known of this thread count. Above the largest size: in proportion to it."""
        seconds = self.known(kind)
        if seconds is not None or kind.tokens == 0:
            return seconds
        costs: dict[int, float] = {}
        for other in sorted(self._costs):
            whole = other.threads == kind.threads and other.tokens == other.rows > 0
            if whole and other.context <= kind.context:  # sorted: the longest of these contexts stays
                costs[other.tokens] = self._costs[other].mean
        if not costs:
            return None
        below = max((size for size in costs if size <= kind.tokens), default=None)
        above = min((size for size in costs if size >= kind.tokens), default=None)
        if below is None:
            return costs[min(costs)]
        if above is None:
            return costs[below] * kind.tokens / below if len(costs) > 1 else None
        if above == below:
            return costs[below]
        share = (kind.tokens - below) / (above - below)
        return costs[below] + share * (costs[above] - costs[below])

    def threads_known(self) -> set[int]:
        return {kind.threads for kind in self._costs}

    def as_json(self) -> list[list[float]]:
        return [
            [k.threads, k.tokens, k.rows, k.context, cost.mean, cost.count]
            for k, cost in sorted(self._costs.items())
        ]

    @classmethod
    def from_json(cls, rows: Any) -> StepCosts:
        """Raises ValueError where anything is not as `as_json` wrote it."""
        costs = cls()
        if not isinstance(rows, list):
            raise ValueError("step costs are not a list")
        for row in rows:
            if not (isinstance(row, list) and len(row) == 6):
                raise ValueError("a step cost is not six numbers")
            *key, mean, count = row
            if not all(type(n) is int and 0 <= n < 2**31 for n in (*key, count)):
                raise ValueError("a step cost has a key that is no count")
            if not (isinstance(mean, float) and math.isfinite(mean) and 0.0 < mean < _MAX_SECONDS):
                raise ValueError("a step cost is no time")
            costs._costs[StepClass(*key)] = _Cost(mean, max(1, count))
        return costs

    def sizes(self, threads: int) -> Mapping[int, float]:
        """tokens -> seconds of steps with all their rows at the shortest context, for showing."""
        return {
            k.tokens: cost.mean
            for k, cost in sorted(self._costs.items())
            if k.threads == threads and k.tokens == k.rows > 0 and k.context == 0
        }


def thread_candidates(cores: int) -> tuple[int, ...]:
    """Thread counts worth measuring: powers of two, and the last few up to all cores."""
    found: set[int] = {cores, max(1, cores - 1), max(1, cores * 3 // 4)}
    power = 1
    while power <= cores:
        found.add(power)
        power *= 2
    return tuple(sorted(found))


def padded_sizes(rows: int, tile: int, most: int) -> Iterable[int]:
    """`rows`, and the next multiple of `tile` if it is another number and not above `most`."""
    yield rows
    padded = -(-rows // tile) * tile
    if rows > 1 and padded != rows and padded <= most:
        yield padded
