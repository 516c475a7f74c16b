"""Random operations against a model of what every sequence should hold, checked after each.

A sequence's model is its *recipe*: which chunks were fed and how much of each was kept. A fresh sequence
made by the same recipe must predict the same bits. Chunks are single tokens or long enough to be stable,
and a chunk that was cut by a rewind is fed whole and cut again, so that both took the same kernels.
Eviction has no such twin; an evicted sequence is compared with a restored copy of itself.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from edgeinfer.backend import SequenceStep, Step
from edgeinfer.errors import OutOfCells, SharedCells
from tests.contract.checked_runtime import CheckedRuntime
from tests.contract.driving import is_alike, is_same, probe, restored, snapshots, some_tokens
from tests.contract.runtimes import RuntimeFactory


@dataclass(frozen=True)
class Chunk:
    tokens: tuple[int, ...]
    kept: int


@dataclass
class Walker:
    """A sequence and what it should hold. `recipe` is None once it was evicted from."""

    sequence: int
    length: int = 0
    recipe: list[Chunk] | None = field(default_factory=list)

    def grow(self, tokens: list[int]) -> None:
        self.length += len(tokens)
        if self.recipe is not None:
            self.recipe.append(Chunk(tuple(tokens), len(tokens)))

    def prefix(self, length: int) -> list[Chunk] | None:
        """The recipe of the first `length` positions."""
        if self.recipe is None:
            return None
        kept, left = [], length
        for chunk in self.recipe:
            if left:
                kept.append(replace(chunk, kept=min(chunk.kept, left)))
                left -= kept[-1].kept
        return kept


def make_walk(runtime: CheckedRuntime) -> type[RuleBasedStateMachine]:
    long_chunk = max(runtime.facts.stable_chunk_tokens, 20)

    class Walk(RuleBasedStateMachine):
        walkers = Bundle("walkers")
        alive: list[Walker]

        def __init__(self) -> None:
            super().__init__()
            self.alive = []

        def _add(self, walker: Walker) -> Walker:
            self.alive.append(walker)
            return walker

        def _fork(self, sequence: int, length: int) -> int | None:
            try:
                return runtime.fork(sequence, length)
            except OutOfCells:
                return None

        @rule(target=walkers, seed=st.integers(0, 5))
        def join(self, seed: int) -> Any:
            """A new sequence, with a prompt if there is room for one."""
            try:
                walker = Walker(runtime.open())
            except OutOfCells:
                return multiple()
            self._prefill(walker, seed)
            return self._add(walker)

        @rule(walker=walkers, seed=st.integers(0, 5))
        def prefill(self, walker: Walker, seed: int) -> None:
            self._prefill(walker, seed)

        def _prefill(self, walker: Walker, seed: int) -> None:
            tokens = some_tokens(runtime, long_chunk, seed=seed)
            if walker.length + long_chunk <= runtime.facts.context:
                self._forward([(walker, tokens)])

        @rule(chosen=st.lists(walkers, min_size=1, max_size=3), seed=st.integers(0, 5))
        def decode(self, chosen: list[Walker], seed: int) -> None:
            tokens = some_tokens(runtime, 3, seed=100 + seed)
            different = {walker.sequence: walker for walker in chosen}.values()
            if all(walker.length < runtime.facts.context for walker in different):
                self._forward([(w, [t]) for w, t in zip(different, tokens, strict=False)])

        def _forward(self, work: list[tuple[Walker, list[int]]]) -> None:
            step = Step([SequenceStep(w.sequence, tokens, "none") for w, tokens in work])
            free = runtime.free_cells()
            if step.num_tokens > free:
                try:
                    runtime.forward(step)
                except OutOfCells:
                    return
                raise AssertionError(f"{step.num_tokens} tokens went into {free} cells")
            runtime.forward(step)
            for walker, tokens in work:
                walker.grow(tokens)

        @rule(target=walkers, walker=walkers, part=st.floats(0, 1))
        def fork(self, walker: Walker, part: float) -> Any:
            length = round(part * walker.length)
            sequence = self._fork(walker.sequence, length)
            if sequence is None:
                return multiple()
            return self._add(Walker(sequence, length, walker.prefix(length)))

        @rule(walker=walkers, part=st.floats(0, 1))
        def rewind(self, walker: Walker, part: float) -> None:
            length = round(part * walker.length)
            runtime.rewind(walker.sequence, length)
            walker.recipe, walker.length = walker.prefix(length), length

        @rule(walker=consumes(walkers))
        def leave(self, walker: Walker) -> None:
            runtime.free(walker.sequence)
            self.alive.remove(walker)

        @rule(walker=walkers, start=st.integers(0, 8), count=st.integers(1, 60))
        def evict(self, walker: Walker, start: int, count: int) -> None:
            if not runtime.facts.can.evict or walker.length <= start + count:
                return
            try:
                runtime.evict(walker.sequence, start, start + count)
            except SharedCells:
                return
            walker.length -= count
            walker.recipe = None

        @rule(walker=walkers)
        def privatise(self, walker: Walker) -> None:
            if not runtime.facts.can.evict:
                return
            with suppress(OutOfCells):
                runtime.privatise(walker.sequence)

        @rule(target=walkers, walker=walkers)
        def save_and_restore(self, walker: Walker) -> Any:
            if not runtime.facts.can.snapshot or walker.length > runtime.free_cells():
                return multiple()
            try:
                sequence = restored(runtime, snapshots(runtime, walker.sequence))
            except OutOfCells:
                return multiple()
            return self._add(Walker(sequence, walker.length, walker.prefix(walker.length)))

        @rule(walker=walkers)
        def predict(self, walker: Walker) -> None:
            """As a fresh sequence made by the same recipe, or as a copy, predicts."""
            room = max(sum(len(c.tokens) for c in walker.recipe or []), walker.length) + 2
            if runtime.free_cells() < room or walker.length >= runtime.facts.context:
                return
            try:
                twin = self._twin(walker)
            except OutOfCells:
                return
            if twin is None:
                return
            assert runtime.length(twin) == walker.length
            if runtime.is_in_order(walker.sequence) and runtime.is_in_order(twin):
                is_expected = is_same if walker.recipe is None else is_alike  # a copy, or read anew
                left, right = probe(runtime, walker.sequence), probe(runtime, twin)
                assert is_expected(left, right), f"{np.abs(left - right).max()} apart"
            runtime.free(twin)

        def _twin(self, walker: Walker) -> int | None:
            if walker.recipe is None:
                can_copy = runtime.facts.can.snapshot
                return restored(runtime, snapshots(runtime, walker.sequence)) if can_copy else None
            twin = runtime.open()
            for chunk in walker.recipe:
                length = runtime.length(twin)
                runtime.forward(Step([SequenceStep(twin, chunk.tokens, "none")]))
                runtime.rewind(twin, length + chunk.kept)
            return twin

        @invariant()
        def lengths_are_right(self) -> None:
            for walker in self.alive:
                assert runtime.length(walker.sequence) == walker.length
            used = runtime.facts.cells - runtime.free_cells()
            assert used <= sum(walker.length for walker in self.alive)
            if not self.alive:
                assert used == 0

        def teardown(self) -> None:
            for walker in self.alive:
                runtime.free(walker.sequence)
            assert runtime.free_cells() == runtime.facts.cells

    return Walk


def test_a_random_walk_over_the_kv_cache_keeps_every_history(
    factory: RuntimeFactory, model_folder: Path
) -> None:
    walked = replace(factory.settings, context=512, sequences=2, step_tokens=256)
    runtime = factory.load(model_folder, walked)
    try:
        run_state_machine_as_test(
            make_walk(runtime),
            settings=settings(
                max_examples=30,
                stateful_step_count=30,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        runtime.close()
