"""Room in a full context: the oldest tokens after the head leave, and the rest moves down.

What leaves depends on committed tokens only, never on a draft. A cache that cannot be shifted is read
again instead, from its head and its most recent turns.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from edgeinfer.backend import Runtime
from edgeinfer.engine.history import ROOT, gap_of_cut, gap_of_shift
from edgeinfer.engine.sequence import RunningRequest
from edgeinfer.engine.window import Window, turn_starts
from edgeinfer.errors import OutOfCells, SharedCells

log = logging.getLogger("edgeinfer.engine")

READ_AGAIN = (
    "this model's KV cache cannot be shifted: where its context was full, the most recent turns were"
    " read again"
)


def let_go(runtime: Runtime, sequence: int, window: Window, head: int, count: int) -> bytes:
    """`count` positions behind the head leave, and the rest moves down. Returns which, if the numbers do
    not say it. Raises SharedCells.

    Source of "h2o": Zhang et al. 2023, arXiv:2306.14048; half of the budget is for the most recent
    tokens, as there.
    """
    if window.eviction == "streaming":
        runtime.evict(sequence, head, head + count)
        return b""
    recent = (window.size - head) // 2
    stop = max(head + count, runtime.length(sequence) - recent)
    return runtime.evict_lightest(sequence, head, stop, stop - head - count)


class Evictor:
    def __init__(self, runtime: Runtime, window: Window) -> None:
        self._runtime = runtime
        self._window = window

    def head(self, running: RunningRequest) -> int:
        """Positions at the beginning of its sequence that stay: those that stayed so far, or the system
        prompt, or the sinks."""
        if running.gap is not None:
            return running.gap.head
        starts = turn_starts(running.prompt[: running.kept + 1], self._runtime.tokenizer)
        # Up to the end of a turn, if one ends before what follows the system prompt.
        return self._window.head(starts[-1] if starts else running.kept)

    def make_room(self, running: RunningRequest, free_cells: Callable[[], bool]) -> None:
        """Let tokens go until all of `running.tokens` fit into the window. Their text must have been
        worked out. free_cells(): called where a copy finds no cells; False if it cannot free any.
        Raises StepFailed, OutOfCells."""
        head = self.head(running)
        length = running.num_computed
        more = len(running.tokens) - length
        fits = length >= head and head + more <= self._window.size
        if not (fits and self._runtime.facts.can.evict) or not self._shift(
            running, head, more, free_cells
        ):
            self._read_again(running)

    def _shift(
        self, running: RunningRequest, head: int, more: int, free_cells: Callable[[], bool]
    ) -> bool:
        """False where cells are shared and there are none for a copy."""
        length = running.num_computed
        # With "h2o" no turn leaves as a whole.
        is_stream = self._window.eviction == "streaming"
        turns = turn_starts(running.tokens[:length], self._runtime.tokenizer) if is_stream else []
        count = self._window.num_leaving(length, more, head, turns)
        assert running.handle is not None
        try:
            choice = let_go(self._runtime, running.handle, self._window, head, count)
        except SharedCells:
            if not self._privatise(running.handle, free_cells):
                return False
            choice = let_go(self._runtime, running.handle, self._window, head, count)
        gap = gap_of_shift(running.gap, running.computed_history, head, count, choice)
        running.drop(gap, count)
        return True

    def _privatise(self, handle: int, free_cells: Callable[[], bool]) -> bool:
        while True:
            try:
                self._runtime.privatise(handle)
            except OutOfCells:
                if not free_cells():
                    return False
            else:
                return True

    def _read_again(self, running: RunningRequest) -> None:
        """Begin anew with the head and what was said last."""
        runtime = self._runtime
        history, head = running.history, self.head(running)
        turns = turn_starts(history, runtime.tokenizer)
        limit = running.request.max_tokens
        left = None if limit is None else limit - running.num_answered
        cut = self._window.cut(len(history), head, left, turns)
        gap = gap_of_cut(history, head, cut)
        assert running.handle is not None
        was_cut = running.gap is None or running.gap.root == ROOT
        stays = min(head, running.num_computed) if was_cut and runtime.facts.can.rewind else 0
        if stays:
            runtime.rewind(running.handle, stays)
        else:
            runtime.free(running.handle)
            running.handle = None
            running.handle = runtime.open()
        running.newly_evicted += max(gap.count - running.evicted, 0)
        running.begin(gap.cells(history), gap)
        running.num_computed = stays
        if READ_AGAIN not in running.warnings:
            running.warnings.append(READ_AGAIN)
