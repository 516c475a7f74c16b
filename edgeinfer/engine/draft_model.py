"""Drafts by running another model: a smaller one with the same tokenizer, or the model's own early exit.

It has a cache of its own, in which a sequence for each request follows the target's: what was drafted
and not accepted is taken back, what left the target's context leaves here, and nothing of a prompt is
read before a draft is wanted. Requests that want one at once are run side by side.

Sources: Leviathan et al. 2022, arXiv:2211.17192; of exits that draft, and stop where they are not sure,
Elhoushi et al. 2024, arXiv:2404.16710, and Liu et al. 2024, arXiv:2404.18911.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from edgeinfer.backend import Runtime, SequenceStep, Step
from edgeinfer.engine.draft import NO_DRAFT, Draft
from edgeinfer.errors import EdgeInferError, OutOfCells

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgeinfer.engine.history import Gap
    from edgeinfer.engine.sequence import RunningRequest

    Kept = npt.NDArray[np.int32]

log = logging.getLogger("edgeinfer.drafts")

DraftMode = Literal["exit", "draft"]

# A guess is of a kind by the probability that the drafting model gives it; and how often guesses of each
# kind are right before anything shows (a model trained on the target's own texts means what it says).
CONFIDENCES = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
TYPICAL_BY_CONFIDENCE = (0.15, 0.28, 0.43, 0.58, 0.72, 0.85, 0.93, 0.98)
_MEASURED_STEPS = 4
_AT_ONCE = 16  # tokens that are read with the step that drafts
_WORTH_KEEPING = 16  # tokens
_NEWEST = 0.2  # weight of the newest time of a step


@dataclass
class _Followed:
    """cells: the tokens in a sequence's cells; the first `agreed` are known to be the target's. gap: of
    the request, as far as it was followed here."""

    handle: int
    cells: list[int] = field(default_factory=list)
    agreed: int = 0
    gap: Gap | None = None


@dataclass(frozen=True)
class Wanted:
    """going_on(odds): whether another token is worth its step, by the kinds of those there are."""

    running: RunningRequest
    most: int
    going_on: Callable[[Sequence[int]], bool]


class DraftModel:
    def __init__(
        self, runtime: Runtime, mode: DraftMode, kept: Kept | None = None, vocab_size: int | None = None
    ) -> None:
        """kept: the target's tokens that its logits are of; None: all, in their order. vocab_size: of
        the target, where it may be another."""
        self.runtime = runtime
        self.mode = mode
        self._kept = kept
        self._vocab_size = runtime.facts.vocab_size if vocab_size is None else vocab_size
        self._followed: dict[int, _Followed] = {}
        self._resting: list[_Followed] = []  # of requests that ended, the newest last
        self._step_s: dict[int, float] = {}  # by how many sequences it has, a token each
        self._read_s = 0.0  # a token of a prompt
        self.num_read = 0  # tokens of prompts
        self.failure = ""  # why it drafts no more

    # -- what it costs ---------------------------------------------------------------------------

    def measure(self) -> None:
        """Of a step of one token, and of some of a prompt, so that something is known before the first
        draft."""
        handle = self.runtime.open()
        try:
            for _ in range(_MEASURED_STEPS):
                begin = time.perf_counter()
                self.runtime.forward(Step([SequenceStep(handle, [0])]))
                seconds = time.perf_counter() - begin
                self._step_s[1] = min(self._step_s.get(1, seconds), seconds)
            count = min(_AT_ONCE, self.runtime.facts.max_step_tokens)
            for _ in range(2):
                begin = time.perf_counter()
                self.runtime.forward(Step([SequenceStep(handle, [0] * count, "none")]))
                self._read_s = (time.perf_counter() - begin) / count
        finally:
            self.runtime.free(handle)

    def step_seconds(self, sequences: int) -> float:
        """Of a draft's step of a token of each. Unknown ones as the nearest smaller one, for a token."""
        known = [count for count in self._step_s if count <= sequences]
        if not known:
            return max(self._step_s.values(), default=0.0)
        nearest = max(known)
        return self._step_s[nearest] * sequences / nearest

    def reading_seconds(self, tokens: int) -> float:
        return tokens * (self._read_s or self._step_s.get(1, 0.0))

    def _learn_step(self, sequences: int, seconds: float) -> None:
        known = self._step_s.get(sequences, seconds)
        self._step_s[sequences] = known + _NEWEST * (seconds - known)

    # -- drafting --------------------------------------------------------------------------------

    def unread(self, running: RunningRequest) -> int:
        """Tokens before its newest one that have to be read before it can be drafted for."""
        try:
            return max(0, len(running.tokens) - 1 - self._follow(running).agreed)
        except (EdgeInferError, ValueError) as error:
            if not isinstance(error, OutOfCells):
                self._fail(error)
            return len(running.tokens) - 1

    def set_threads(self, threads: int) -> None:
        if threads != self.runtime.facts.threads and not self.failure:
            try:
                self.runtime.set_threads(threads, threads)
            except (EdgeInferError, ValueError) as error:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        """It drafts no more, and its memory is given back."""
        self.failure = f"the {self.mode} failed: {error}"
        log.warning("%s", self.failure)
        self._followed.clear()
        self._resting.clear()
        self.runtime.close()

    def propose(self, wanted: Sequence[Wanted]) -> list[Draft]:
        """A draft for each; none where it has no room. Raises nothing: where it fails it says so in
        `failure`, and is not to be asked again."""
        try:
            return self._propose(wanted)
        except OutOfCells:
            if self._resting:
                self.runtime.free(self._resting.pop(0).handle)
            return [NO_DRAFT] * len(wanted)
        except (EdgeInferError, ValueError, OSError) as error:
            self._fail(error)
            return [NO_DRAFT] * len(wanted)

    def _propose(self, wanted: Sequence[Wanted]) -> list[Draft]:
        tokens: list[list[int]] = [[] for _ in wanted]
        kinds: list[list[int]] = [[] for _ in wanted]
        newest: dict[int, list[int]] = {}
        for index, each in enumerate(wanted):
            if each.most > 0 and (unread := self._catch_up(each.running)):
                newest[index] = unread
        while newest:
            going_on: dict[int, list[int]] = {}
            for places in self._in_steps(newest):
                followed = [self._followed[wanted[index].running.key] for index in places]
                parts = [
                    SequenceStep(each.handle, newest[index])
                    for each, index in zip(followed, places, strict=True)
                ]
                begin = time.perf_counter()
                result = self.runtime.forward(Step(parts))
                guesses = [self._guess(start) for start in result.starts]
                if all(len(part.tokens) == 1 for part in parts):
                    self._learn_step(len(parts), time.perf_counter() - begin)
                for index, own, (token, kind) in zip(places, followed, guesses, strict=True):
                    own.cells += newest[index]
                    tokens[index].append(token)
                    kinds[index].append(kind)
                    asked = wanted[index]
                    if len(tokens[index]) < asked.most and asked.going_on(kinds[index]):
                        going_on[index] = [token]
            newest = going_on
        return [Draft(tuple(a), tuple(b)) for a, b in zip(tokens, kinds, strict=True)]

    def _in_steps(self, newest: Mapping[int, list[int]]) -> list[list[int]]:
        """Which requests' tokens are run together, as far as a step has room for them."""
        facts = self.runtime.facts
        steps: list[list[int]] = [[]]
        count = 0
        for index, tokens in newest.items():
            is_full = count + len(tokens) > facts.max_step_tokens
            if steps[-1] and (is_full or len(steps[-1]) == facts.max_logit_rows):
                steps.append([])
                count = 0
            steps[-1].append(index)
            count += len(tokens)
        return steps

    def _catch_up(self, running: RunningRequest) -> list[int]:
        """Read all but the last few tokens, which it returns: none where there is no room for it."""
        facts, own = self.runtime.facts, self._follow(running)
        if own.agreed < len(own.cells):
            self.runtime.rewind(own.handle, own.agreed)
            del own.cells[own.agreed :]
        left = running.tokens[own.agreed :]
        if len(running.tokens) > facts.context:
            return []
        if self._kept is None and left and max(left) >= facts.vocab_size:
            return []  # of the target's tokens this one lacks
        while len(left) > min(_AT_ONCE, facts.max_step_tokens):
            count = min(facts.max_step_tokens, len(left) - 1)
            piece, left = left[:count], left[count:]
            begin = time.perf_counter()
            self.runtime.forward(Step([SequenceStep(own.handle, piece, "none")]))
            if len(piece) >= _AT_ONCE:
                self._read_s = (time.perf_counter() - begin) / len(piece)
            own.cells += piece
            own.agreed = len(own.cells)
            self.num_read += len(piece)
        return left

    def _guess(self, row: int) -> tuple[int, int]:
        """The likeliest token and its kind."""
        import numpy as np

        logits = self.runtime.logits(row)[: self._vocab_size]
        best = int(logits.argmax())
        confidence = 1.0 / float(np.exp(logits - logits[best]).sum())
        token = best if self._kept is None else int(self._kept[best])
        return token, bisect_right(CONFIDENCES, confidence)

    def _follow(self, running: RunningRequest) -> _Followed:
        """Its sequence, and how much of that is what the target's cells hold, after what left those has
        left here."""
        own = self._followed.get(running.key)
        if own is None:
            own = self._followed[running.key] = self._begun(running)
        elif running.gap is not own.gap:
            self._evict(own, running)
        said, cells = running.tokens, own.cells
        if own.agreed >= len(said):
            own.agreed = 0
        most = min(len(cells), len(said) - 1)
        own.agreed += _num_equal(cells[own.agreed : most], said[own.agreed : most])
        return own

    def _evict(self, own: _Followed, running: RunningRequest) -> None:
        gone = running.evicted - (own.gap.count if own.gap is not None else 0)
        head = running.gap.head if running.gap is not None else 0
        if gone > 0 and head + gone <= own.agreed and self.runtime.facts.can.evict:
            self.runtime.evict(own.handle, head, head + gone)
            del own.cells[head : head + gone]
        own.agreed = 0  # looked at again, all of it
        own.gap = running.gap

    def _begun(self, running: RunningRequest) -> _Followed:
        """A sequence that is at rest, if a good part of it is of use; else a new one."""
        shared = [(_num_equal(each.cells, running.tokens), each) for each in self._resting]
        length, best = max(shared, key=lambda found: found[0], default=(0, None))
        if best is None or length < _WORTH_KEEPING:
            try:
                return _Followed(self.runtime.open(), gap=running.gap)
            except OutOfCells:
                if not self._resting:
                    raise
                best = self._resting[0]
        self._resting.remove(best)
        return _Followed(best.handle, best.cells, 0, running.gap)

    # -- the end ---------------------------------------------------------------------------------

    def end(self, key: int) -> None:
        """Its sequence stays for who goes on with what was said."""
        own = self._followed.pop(key, None)
        if own is not None:
            self._resting.append(own)

    def close(self) -> None:
        self.runtime.close()


def _num_equal(some: Sequence[int], others: Sequence[int]) -> int:
    """How many of the first tokens are the same."""
    if some == others:
        return len(some)
    pairs = zip(some, others, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(some), len(others)))
