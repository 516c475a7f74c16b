"""The tuner on simulated machines: what a step takes is a function here, and so is the clock."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from edgeinfer.engine.tuner import Choice, Tuner
from edgeinfer.machine.step_cost import StepClass, StepCosts

Cost = Callable[[int, int, int], float]  # threads, tokens with padding, rows -> seconds


def two_cores(threads: int, tokens: int, rows: int) -> float:
    """Decode is as good on one thread, everything larger is not; four rows are cheaper than three."""
    if tokens >= 64:
        return tokens * (0.002 if threads == 1 else 0.00115)
    steps = {1: 1.0, 2: 1.7, 3: 2.4, 4: 1.6, 5: 2.4}.get(tokens, 0.45 * tokens)
    return 0.018 * steps * (1.0 if threads == 1 else 0.8)


class Bench:
    """Drives a tuner as the engine does, on a machine whose neighbour comes and goes."""

    def __init__(self, cost: Cost, candidates: tuple[int, ...] = (1, 2), seed: int = 0) -> None:
        self.cost = cost
        self.now = 0.0
        self.busy = False  # a neighbour holds one core
        self.cores = max(candidates)
        self.random = random.Random(seed)
        self.costs = StepCosts()
        self.tuner = Tuner(
            self.costs, candidates, (candidates[-1], candidates[-1]), self.free_cores, lambda: self.now
        )

    def free_cores(self) -> float:
        return self.cores - (1.0 if self.busy else 0.0)

    def seconds(self, choice: Choice, tokens: int, rows: int) -> float:
        stalled = self.busy and choice.threads == self.cores
        noise = self.random.uniform(0.97, 1.06)
        factor = (2.0 if tokens >= 64 else 8.0) if stalled else 1.0
        return self.cost(choice.threads, tokens + choice.padding, rows) * factor * noise

    def run(
        self, steps: int, tokens: int = 1, rows: int | None = None, context: int = 0
    ) -> list[Choice]:
        rows = tokens if rows is None else rows
        chosen = []
        for _ in range(steps):
            choice = self.tuner.choose(tokens, rows, context, 63)
            seconds = self.seconds(choice, tokens, rows)
            self.now += seconds
            self.tuner.observe(choice, tokens, rows, context, seconds)
            chosen.append(choice)
        return chosen

    def measure(self) -> None:
        for threads in self.tuner.candidates:
            for tokens in (1, 2, 4, 8, 16):
                for _ in range(3):
                    kind = StepClass.of(threads, tokens, tokens, 0)
                    self.costs.observe(kind, self.cost(threads, tokens, tokens))
            self.costs.observe(StepClass.of(threads, 128, 0, 0), self.cost(threads, 128, 1) / 128)


def mostly(chosen: list[Choice]) -> Choice:
    """What it came to; now and then another choice is looked at again."""
    return Counter(chosen[-30:]).most_common(1)[0][0]


def test_unmeasured_thread_counts_are_tried_and_the_best_one_stays() -> None:
    bench = Bench(lambda t, n, r: 0.01 * n / t, (1, 2, 4, 8))
    assert mostly(bench.run(60)) == Choice(8)
    bench = Bench(lambda t, n, r: 0.01 * n * t, (1, 2, 4, 8))
    assert mostly(bench.run(60)) == Choice(1)


def test_a_measured_machine_needs_no_trials() -> None:
    bench = Bench(two_cores)
    bench.measure()
    assert bench.run(200).count(Choice(2)) >= 194


def test_decode_and_prefill_have_threads_of_their_own() -> None:
    bench = Bench(lambda t, n, r: 0.005 * t if n == 1 else two_cores(t, n, r))
    bench.measure()
    assert mostly(bench.run(5, 1)) == Choice(1)
    assert mostly(bench.run(2, 256, 1)) == Choice(2)
    assert mostly(bench.run(5, 1)) == Choice(1)


def test_a_busy_neighbour_is_left_one_core_within_a_few_steps_and_taken_back_when_it_goes() -> None:
    bench = Bench(two_cores)
    bench.measure()
    bench.run(50)
    bench.busy = True
    chosen = bench.run(60)
    assert mostly(chosen) == Choice(1)
    assert chosen.count(Choice(2)) <= 4
    assert bench.tuner.is_slowed
    bench.busy = False
    chosen = bench.run(400)  # some seconds
    assert mostly(chosen) == Choice(2)
    assert not bench.tuner.is_slowed


def test_a_neighbour_that_stays_is_not_tried_again_and_again() -> None:
    bench = Bench(two_cores)
    bench.measure()
    bench.busy = True
    chosen = bench.run(4000)  # more than a minute
    assert chosen.count(Choice(2)) <= 6


def test_what_was_measured_beside_a_neighbour_is_put_right() -> None:
    bench = Bench(two_cores)
    bench.measure()
    for tokens in (1, 2, 4):
        kind = StepClass.of(2, tokens, tokens, 0)
        bench.costs._costs[kind].mean = 0.08 * tokens
    assert mostly(bench.run(200)) == Choice(2)
    assert bench.costs.known(StepClass.of(2, 1, 1, 0)) == pytest.approx(two_cores(2, 1, 1), rel=0.1)


def test_second_looks_become_rare() -> None:
    bench = Bench(lambda t, n, r: 0.01 / t)
    bench.measure()
    assert bench.run(20_000).count(Choice(1)) <= 40


def test_without_a_view_of_the_cores_retries_become_rare() -> None:
    bench = Bench(two_cores)
    bench.measure()
    bench.tuner._free_cores = lambda: None
    bench.busy = True
    first, last = bench.run(2000), bench.run(2000)
    assert first.count(Choice(2)) <= 30
    assert last.count(Choice(2)) <= 6


def test_one_slow_step_changes_nothing() -> None:
    bench = Bench(two_cores)
    bench.measure()
    bench.run(20)
    bench.busy = True
    bench.run(1)
    bench.busy = False
    assert bench.run(100).count(Choice(2)) >= 94


def test_prefill_moves_at_once_where_fewer_threads_are_faster() -> None:
    bench = Bench(lambda t, n, r: n * (0.0015 if t == 1 else 0.00115))
    bench.measure()
    bench.run(3, 512, 1)
    bench.busy = True
    assert bench.run(3, 512, 1)[1:] == [Choice(1), Choice(1)]


def test_the_rate_of_prefill_is_that_of_the_threads_it_would_have() -> None:
    bench = Bench(two_cores)
    assert bench.tuner.prefill_s_per_token(0) is None
    bench.measure()
    assert bench.tuner.prefill_s_per_token(0) == pytest.approx(0.00115)
    assert bench.tuner.prefill_s_per_token(3000) == pytest.approx(0.00115)  # a shorter context's
    bench.run(3, 512, 1)
    bench.busy = True
    bench.run(3, 512, 1)
    assert bench.tuner.prefill_s_per_token(0) == pytest.approx(0.002, rel=0.1)


@pytest.mark.parametrize(("rows", "padding"), [(3, 1), (4, 0), (5, 0), (1, 0)])
def test_padding_is_tried_and_kept_where_it_wins(rows: int, padding: int) -> None:
    bench = Bench(two_cores)
    bench.measure()
    assert mostly(bench.run(80, rows)) == Choice(2, padding)


def test_threads_that_were_asked_for_stay_and_padding_is_learnt() -> None:
    bench = Bench(two_cores)
    bench.tuner = Tuner.of_padding(2, 2)
    chosen = bench.run(80, 3)
    assert {choice.threads for choice in chosen} == {2}
    assert mostly(chosen) == Choice(2, 1)
    bench.busy = True
    assert {choice.threads for choice in bench.run(40, 3)} == {2}
    assert set(bench.run(10, 512, 1)) == {Choice(2)}


def test_prefill_threads_that_were_asked_for_are_its_own() -> None:
    bench = Bench(two_cores)
    bench.tuner = Tuner.of_padding(1, 2)
    assert not bench.tuner.leaves_decode_alone
    assert set(bench.run(10, 512, 1)) == {Choice(2)}
    assert set(bench.run(10)) == {Choice(1)}


def test_the_end_of_an_unmeasured_prompt_has_the_threads_of_prefill() -> None:
    tuner = Tuner(StepCosts(), (1, 2), (1, 2), lambda: None)
    assert tuner.choose(30, 1, 30, 63) == Choice(2)
    assert tuner.choose(2, 2, 30, 63) == Choice(1)


def test_a_hopeless_padding_is_tried_once() -> None:
    bench = Bench(lambda t, n, r: 0.01 * (10 if n == 8 else n))
    chosen = bench.run(120, 5)
    assert chosen.count(Choice(2, 3)) + chosen.count(Choice(1, 3)) <= 2


def test_steps_with_prompt_ends_are_not_padded() -> None:
    bench = Bench(two_cores)
    bench.measure()
    assert all(choice.padding == 0 for choice in bench.run(50, 23, 2))


def test_a_longer_context_is_not_taken_for_a_neighbour() -> None:
    bench = Bench(two_cores)
    bench.measure()
    bench.run(20)
    bench.cost = lambda t, n, r: 4 * two_cores(t, n, r)
    assert set(bench.run(60, context=6000)) == {Choice(2)}
    assert not bench.tuner.is_slowed


def test_a_machine_that_has_become_slower_for_good_is_learnt() -> None:
    bench = Bench(two_cores)
    bench.measure()
    bench.cost = lambda t, n, r: 2.5 * two_cores(t, n, r)
    bench.run(600)
    learnt = bench.costs.known(StepClass.of(2, 1, 1, 0))
    assert learnt == pytest.approx(2.5 * two_cores(2, 1, 1), rel=0.1)
    assert mostly(bench.run(50)) == Choice(2)
