"""How many threads and how much padding the next step gets: chosen from measured costs, and changed when
reality leaves them.

Threads meet at a barrier several hundred times a token, so one core that a neighbour holds stalls them
all (measured on 2 cores: 12 tok/s on two threads, 154 on one). No fixed choice is right on a machine
that is used for other things, so every step's time is compared with what it should cost: a thread count
that has become slow is left for another one, and taken up again once there are free cores for it.

No result depends on it but in the last bits (RuntimeFacts says where). A runtime opened with a fixed
number of threads keeps them; only padding, which changes no bit, is chosen there.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgeinfer.machine.step_cost import (
    CONTEXT_BUCKET,
    PREFILL_TOKENS,
    StepClass,
    StepCosts,
    padded_sizes,
)

TILE = 4  # rows the repacked kernels work on at once (ggml-cpu/repack.cpp, 0.3.36)
SLOW = 1.5  # a step that takes this much longer than it should
FINE = 1.2
BETTER = 0.96  # another choice must cost less than this much of the present one
TRIES = 3  # steps of a kind before its cost is believed
RECONSIDER = 32  # steps
RECHECK, MAX_RECHECK = 64, 8192  # steps until the second best choice is looked at again
RETRY_S, MAX_RETRY_S = 1.0, 60.0  # until a slow thread count may be tried again
HOPELESS = 2.0  # an unknown choice that begins so much worse is not tried to the end


@dataclass(frozen=True)
class Choice:
    threads: int
    padding: int = 0


class _Pace:
    """How much slower than it should be each thread count was lately; 1 where nothing is known."""

    def __init__(self, steps: int) -> None:
        self._last: dict[int, deque[float]] = {}
        self._steps = steps
        self.slow: dict[int, float] = {}

    def add(self, threads: int, ratio: float) -> bool:
        """Whether a thread count became slow or stopped being so."""
        last = self._last.setdefault(threads, deque(maxlen=self._steps))
        last.append(ratio)
        if len(last) < self._steps:
            return False
        now = sorted(last)[len(last) // 2]
        if now > SLOW:
            known = self.slow.get(threads)
            self.slow[threads] = now
            return known is None or abs(now / known - 1.0) > 0.25
        if threads in self.slow and now < FINE:
            del self.slow[threads]
            return True
        return False

    def forgive(self, threads: int) -> None:
        self.slow.pop(threads, None)
        self._last.pop(threads, None)


class Tuner:
    """candidates: thread counts to choose among. default: (decode, prefill) while nothing is measured,
    and, if it is_fixed, always.
    free_cores(): cores that nobody else used since it was last called; None if that cannot be told."""

    def __init__(
        self,
        costs: StepCosts,
        candidates: Sequence[int],
        default: tuple[int, int],
        free_cores: Callable[[], float | None],
        clock: Callable[[], float] = time.perf_counter,
        *,
        is_fixed: bool = False,
    ) -> None:
        self.costs = costs
        self.candidates = tuple(candidates)
        self._default = default
        self._free_cores = free_cores
        self._clock = clock
        self._is_fixed = is_fixed
        self._paces = {False: _Pace(3), True: _Pace(1)}  # prefill steps are long: one says enough
        self._key: tuple[int, int, int] | None = None
        self._choice = self._settled = Choice(default[0])
        self._age = 0
        self._stale = True
        self._retry_at = 0.0
        self._retry_s = RETRY_S
        self._forgiven: set[int] = set()
        self._steps = 0  # small ones
        self._recheck_at, self._recheck_after = RECHECK, RECHECK
        self._recheck: Choice | None = None
        self._recheck_left = 0

    @classmethod
    def of_padding(cls, threads: int, threads_batch: int) -> Tuner:
        """For threads that were asked for: padding alone is chosen, and learnt from live steps."""
        default = (threads, threads_batch)
        return cls(StepCosts(), (threads,), default, lambda: None, is_fixed=True)

    @property
    def leaves_decode_alone(self) -> bool:
        """Whether a lone token to decode has nothing to choose."""
        return self.candidates == self._default[:1] == self._default[1:]

    @property
    def is_slowed(self) -> bool:
        """Whether a neighbour keeps decoding from the threads it would have."""
        return bool(self._paces[False].slow)

    # -- before a step ---------------------------------------------------------------------------

    def choose(self, tokens: int, rows: int, context: int, most: int) -> Choice:
        """For a step of `tokens`, `rows` of them with logits. most: tokens that fit with padding."""
        key = (tokens, rows, context // CONTEXT_BUCKET)
        self._steps += 1
        if key == self._key and not self._stale and self._age < RECONSIDER:
            self._age += 1
            return self._choice
        self._reconsider_slow()
        if tokens >= PREFILL_TOKENS:
            choice = self._choose_prefill(context)
        else:
            choice = self._choose_small(tokens, rows, context, most)
        if key != self._key or self._stale or choice != self._choice:
            self._key, self._choice = key, choice
        self._age, self._stale = 0, False
        return self._choice

    def _choose_prefill(self, context: int) -> Choice:
        if self._is_fixed:
            return Choice(self._default[1])
        slow = self._paces[True].slow
        costs: dict[int, float] = {}
        for threads in self.candidates:
            seconds = self.costs.known(StepClass.of(threads, PREFILL_TOKENS, 0, context))
            if seconds is not None:
                costs[threads] = seconds * slow.get(threads, 1.0)
        default = self._default[1]
        if not costs or (default not in costs and default not in slow):
            return Choice(default)
        best = min(costs, key=lambda t: (costs[t], t))
        if best in slow:  # nothing known is good now: fewer threads may be
            fewer = [t for t in self.candidates if t < best and t not in costs]
            return Choice(max(fewer, default=best))
        return Choice(best)

    def prefill_s_per_token(self, context: int) -> float | None:
        """With the threads that prefill would have now; None where nothing was measured."""
        threads = self._choose_prefill(context).threads
        seconds = self.costs.known(StepClass.of(threads, PREFILL_TOKENS, 0, context))
        return None if seconds is None else seconds * self._paces[True].slow.get(threads, 1.0)

    def step_seconds(self, tokens: int, context: int, *, is_padded: bool = True) -> float | None:
        """Of a step of fewer than PREFILL_TOKENS tokens with logits for all, with the threads and, where
        it may have any, the padding it would have; None where no such step was measured."""
        if tokens >= PREFILL_TOKENS:
            return None
        sizes = padded_sizes(tokens, TILE, PREFILL_TOKENS - 1) if is_padded else (tokens,)
        slow = self._paces[False].slow
        found: list[float] = []
        for threads in self.candidates:
            now = StepClass.of(threads, 1, 1, context)
            for size in sizes:
                known = self.costs.known_at(StepClass.of(threads, size, size, context))
                if known is None and size != tokens:
                    known = self.costs.known_at(StepClass.of(threads, size, tokens, context))
                if known is not None:
                    grown = self.costs.growth(now, known[1]) if known[1] < now.context else 1.0
                    found.append(known[0] * grown * slow.get(threads, 1.0))
        return min(found, default=None)

    def _choose_small(self, tokens: int, rows: int, context: int, most: int) -> Choice:
        slow = self._paces[False].slow
        # A choice that was last measured with a shorter context is compared as if its cost had grown
        # like the present one's since.
        present_kind = StepClass.of(self._choice.threads, tokens, rows, context)
        costs: dict[Choice, float] = {}
        unknown: list[Choice] = []
        for threads in self.candidates:
            for size in padded_sizes(tokens, TILE, most) if tokens == rows else (tokens,):
                choice = Choice(threads, size - tokens)
                kind = StepClass.of(threads, size, rows, context)
                found = self.costs.known_at(kind)
                seconds: float | None
                if found is not None:
                    seconds = found[0]
                    if found[1] < kind.context and threads != self._choice.threads:
                        seconds *= self.costs.growth(present_kind, found[1])
                else:
                    seconds = None if choice.padding else self.costs.estimate(kind)
                if seconds is None:
                    unknown.append(choice)
                else:
                    costs[choice] = seconds * slow.get(threads, 1.0)
                    if 0 < self.costs.count(kind) < TRIES:
                        unknown.append(choice)
        if not costs:  # the end of a prompt is no decoding, however short
            return Choice(self._default[0] if tokens == rows else self._default[1])
        best = min(costs, key=lambda c: (costs[c], c.threads, c.padding))
        trial = self._trial(unknown, costs, best)
        if trial is not None:
            return trial
        again = self._second_look(costs, best)
        if again is not None:
            return again
        present = costs.get(self._settled)
        if present is None or costs[best] <= BETTER * present:
            self._settled = best  # else it is not worth a change
        return self._settled

    def _second_look(self, costs: dict[Choice, float], best: Choice) -> Choice | None:
        """Now and then the best choice with other threads, for a few steps: its cost may have been
        measured while something disturbed it. Ever more rarely, as long as that changes nothing."""
        if self._recheck_left:
            self._recheck_left -= 1
            if self._recheck in costs:
                return self._recheck
        if self._steps < self._recheck_at or self._paces[False].slow:
            return None
        others = [choice for choice in costs if choice.threads != best.threads]
        self._recheck_at = self._steps + self._recheck_after
        self._recheck_after = min(2 * self._recheck_after, MAX_RECHECK)
        free = self._free_cores()
        if free is not None:
            others = [choice for choice in others if free >= choice.threads - 0.25]
        if not others:
            return None
        self._recheck = min(others, key=lambda c: (costs[c], c.threads))
        self._recheck_left = TRIES - 1
        return self._recheck

    def _trial(self, unknown: list[Choice], costs: dict[Choice, float], best: Choice) -> Choice | None:
        """A choice to try, since nothing tells what it costs: another padding with the best threads, or
        threads that were never measured. Not where the first try was far off."""
        slow = self._paces[False].slow
        for choice in unknown:
            if choice.threads in slow:
                continue
            if choice in costs and costs[choice] > HOPELESS * costs[best]:
                continue
            if (
                choice in costs
                or choice.threads == best.threads
                or not any(c.threads == choice.threads for c in costs)
            ):
                return choice
        return None

    # -- after a step ----------------------------------------------------------------------------

    def observe(self, choice: Choice, tokens: int, rows: int, context: int, seconds: float) -> None:
        """Learn what a step took."""
        prefill = tokens >= PREFILL_TOKENS
        if prefill:
            seconds /= tokens
        kind = StepClass.of(choice.threads, tokens + choice.padding, rows, context)
        known = self.costs.count(kind)
        expected = self.costs.known(kind) if known >= TRIES or prefill else self.costs.estimate(kind)
        self.costs.observe(kind, seconds)
        if known <= TRIES or choice != self._settled:
            self._stale = True  # something is being tried, or was just learnt
        if expected is None:
            return
        # Where this context was never measured a shorter one's cost was taken: allow for more of it.
        ratio = seconds / expected if known else min(seconds / expected, SLOW)
        if self._paces[prefill].add(choice.threads, ratio):
            self._stale = True
            slow = self._paces[prefill].slow
            if choice.threads in slow:
                if choice.threads in self._forgiven:
                    self._retry_s = min(2 * self._retry_s, MAX_RETRY_S)
                    self._forgiven.discard(choice.threads)
                self._free_cores()  # what counts is what is free from now on
                self._retry_at = self._clock() + self._retry_s
        elif choice.threads in self._forgiven and ratio < FINE:
            self._forgiven.discard(choice.threads)
            self._retry_s = RETRY_S

    def _reconsider_slow(self) -> None:
        """Take thread counts up again that there are cores for now."""
        slow = {*self._paces[False].slow, *self._paces[True].slow}
        if not slow or self._clock() < self._retry_at:
            return
        free = self._free_cores()
        self._retry_at = self._clock() + self._retry_s
        for threads in slow:
            if free is None or free >= threads - 0.25:
                self._forgiven.add(threads)
                self._stale = True
                for pace in self._paces.values():
                    pace.forgive(threads)
