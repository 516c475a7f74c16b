"""Measure what steps cost while nobody waits: a few sizes for each thread count, most important first.

    measure = StepMeasurement(runtime, costs, candidates, budget_s)
    while measure.run_one(): ...        # between two of them anything else may happen

Each piece is one forward step of a scratch sequence that is freed again. `runtime.abort` from another
thread ends the piece that is running; it is taken again later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from edgeinfer.backend import Runtime, SequenceStep, Step
from edgeinfer.errors import OutOfCells, StepAborted, StepFailed
from edgeinfer.machine.step_cost import PREFILL_TOKENS, StepClass, StepCosts

SIZES = (1, 4, 8, 2, 16, 3)  # tokens of a step with all their logits
REPEATS = 3
PREFILL = 2 * PREFILL_TOKENS
TOKEN = 0


class StepMeasurement:
    def __init__(
        self,
        runtime: Runtime,
        costs: StepCosts,
        candidates: Sequence[int],
        budget_s: float,
        must_stop: Callable[[], bool] = lambda: False,
        free_cores: Callable[[], float | None] = lambda: None,
    ) -> None:
        """budget_s: seconds of steps in all; what does not fit is left to live steps. must_stop(): asked
        between steps, for the pause between two of them in which `abort` has nothing to abort.
        free_cores(): as a Tuner's; what was measured beside a busy neighbour is not kept."""
        self._must_stop = must_stop
        self._free_cores = free_cores
        self._runtime = runtime
        self._costs = costs
        self.left_s = budget_s
        self._pieces = self._missing(candidates)
        self._piece = next(self._pieces, None)

    @property
    def is_done(self) -> bool:
        return self._piece is None

    def _missing(self, candidates: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """(threads, tokens, repeats) of what the table does not have yet."""
        facts = self._runtime.facts
        most = min(facts.max_step_tokens, facts.max_logit_rows, facts.context)
        for tokens in (SIZES[0], PREFILL, *SIZES[1:]):
            if tokens > (facts.max_step_tokens if tokens == PREFILL else most):
                continue
            # All cores first: prefill has them until more is known.
            for threads in sorted(candidates, reverse=True):
                kind = StepClass.of(threads, tokens, tokens, 0)
                repeats = 1 if tokens == PREFILL else REPEATS
                if self._costs.count(kind) < repeats:
                    yield threads, tokens, repeats

    def run_one(self, limit_s: float = float("inf")) -> bool:
        """Measure one size; False when nothing is left that fits the budget. limit_s: no piece is begun
        that would take longer, as far as is known."""
        while self._piece is not None:
            threads, tokens, repeats = self._piece
            expected = self._expected(threads, tokens) * (repeats + 1)
            if expected > self.left_s:
                self._piece = next(self._pieces, None)  # a smaller one may still fit
                continue
            if expected > limit_s:
                return False
            begin = time.perf_counter()
            done = self._measure(threads, tokens, repeats)
            self.left_s -= time.perf_counter() - begin
            if self.left_s <= 0.0:
                self._piece = None
            elif done:
                self._piece = next(self._pieces, None)
            return done
        return False

    def _expected(self, threads: int, tokens: int) -> float:
        """Seconds of one step; a guess from one token's where no better is known, 0 at first."""
        kind = StepClass.of(threads, tokens, tokens, 0)
        known = self._costs.estimate(kind)
        if known is not None:
            return known * (tokens if kind.tokens == 0 else 1)
        one = self._costs.known(StepClass.of(threads, 1, 1, 0))
        return 0.0 if one is None else one * (1 + tokens / 8)

    def _measure(self, threads: int, tokens: int, repeats: int) -> bool:
        runtime, facts = self._runtime, self._runtime.facts
        if runtime.free_cells() < tokens:
            return False
        try:
            sequence = runtime.open()
        except OutOfCells:
            return False
        runtime.set_threads(threads, threads)
        part = SequenceStep(sequence, (TOKEN,) * tokens, "last" if tokens == PREFILL else "all")
        step = Step((part,))
        # Idle conversations in the cache lengthen what attention walks over.
        kind = StepClass.of(threads, tokens, tokens, facts.cells - runtime.free_cells())
        self._free_cores()
        took: list[float] = []
        try:
            # The first one with other threads wakes them, and is not counted; prefill is long enough.
            for repeat in range(repeats + (tokens != PREFILL)):
                if self._must_stop():
                    return False
                begin = time.perf_counter()
                runtime.forward(step)
                seconds = time.perf_counter() - begin
                runtime.rewind(sequence, 0)
                if repeat or tokens == PREFILL:
                    took.append(seconds / tokens if kind.tokens == 0 else seconds)
        except (StepAborted, StepFailed, OutOfCells):
            return False
        finally:
            runtime.free(sequence)
            runtime.set_threads(facts.threads, facts.threads_batch)
        free = self._free_cores()
        if free is None or free >= threads - 0.25:
            for _ in took:
                self._costs.observe(kind, min(took))
        return True
