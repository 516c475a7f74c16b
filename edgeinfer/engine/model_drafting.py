"""When a model that drafts is asked, for whom, and for how much.

Its drafts cost time of their own, so it is asked only where what it promises is worth that: by the
measured costs of both models' steps, and by how often its guesses were right here, by position. Where
they promise nothing it is tried again now and then, out of a small share of the time that goes by: what
it can lose is that share. Where not even drafts that are always right would be worth it, it isn't.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from edgeinfer.engine.draft import NO_DRAFT, Acceptance, Draft, Outcome
from edgeinfer.engine.draft_lengths import planned_length
from edgeinfer.engine.draft_model import TYPICAL_BY_CONFIDENCE, DraftMode, DraftModel, Wanted
from edgeinfer.engine.sequence import RunningRequest

MOST_DRAFTED = 15  # tokens of one request: with its newest one, the largest step that is measured
TYPICAL_BY_POSITION = 0.6  # of a model of which nothing is known
SHARE = 0.005  # of the time that answers take, for tries
LOAN_TOKENS = 16  # whose time drafts that are expected to pay may lose in a row; tries get no loan
MOST_SPARE_TOKENS = 64  # whose time is kept for tries
USUAL_TOKENS = 128  # of an answer still to come, over which reading its prompt has to pay
PERFECT = 0.97
RESTS, RESTS_HOPELESS = 4, 32  # steps
FEW_UNREAD = 16  # tokens, which are read along with the first step
_WEIGHT, _MEMORY = 6.0, 256.0


def odds_needed(seconds: Callable[[Sequence[int]], float | None], draft_s: float) -> float | None:
    """How often each guess of a lone draft has to be right so that some length pays; None where no
    share is enough. seconds, draft_s: as in `planned_length`."""
    for percent in range(1, int(100 * PERFECT) + 1):
        if planned_length((percent / 100,) * MOST_DRAFTED, 1, 1, seconds, draft_s)[0]:
            return percent / 100
    return None


@dataclass
class _Guesses:
    """Of one request. at: tokens of its answer when the draft was made."""

    by_confidence: Acceptance
    by_position: Acceptance
    draft: Draft = NO_DRAFT
    at: int = 0


class ModelDrafting:
    def __init__(
        self,
        model: DraftModel,
        seconds: Callable[[Sequence[int]], float | None],
        typical: Sequence[float] = (),
        threads: Callable[[], int] | None = None,
    ) -> None:
        """seconds: of the target's step of so many tokens of each sequence. typical: how often the
        tokens of a draft are right, by position, as far as it is known. threads: those that the target
        computes with now."""
        self._model = model
        self._seconds = seconds
        self._threads = threads
        last = typical[-1] if typical else TYPICAL_BY_POSITION
        self._prior = tuple(min(max(each, 0.02), 0.98) for each in typical[:MOST_DRAFTED])
        self._prior += (min(max(last, 0.02), 0.98),) * (MOST_DRAFTED - len(self._prior))
        self._by_confidence = Acceptance(TYPICAL_BY_CONFIDENCE, _WEIGHT, _MEMORY)
        self._by_position = Acceptance(self._prior, _WEIGHT, _MEMORY)
        self._guesses: dict[int, _Guesses] = {}
        self._spare_s = self._most_spare_s = 0.0
        self._owed_s = 0.0  # for reading prompts
        self._is_hopeless = False
        self._resting = 0  # steps until it is worked out again whether drafts would pay
        self.num_tries = 0

    @property
    def mode(self) -> DraftMode:
        return self._model.mode

    @property
    def step_seconds(self) -> float:
        """Of a step of one token of the model that drafts."""
        return self._model.step_seconds(1)

    def acceptance(self, running: RunningRequest) -> Acceptance:
        """By its drafts' kinds."""
        return self._of(running.key).by_confidence

    def drafts(
        self, running: Sequence[RunningRequest], most: Mapping[int, int]
    ) -> tuple[dict[int, Draft], float]:
        """most: the indices of those that would take a draft, and of how many tokens. Returns what there
        is, by index, and the seconds that it took."""
        for each in running:
            self._learn(each)
        plain = self._seconds([1] * len(running))
        if plain is None or not most or self._model.failure:
            return {}, 0.0
        per_token = plain / len(running)
        self._most_spare_s = MOST_SPARE_TOKENS * per_token
        self.earned(SHARE * plain)
        lengths = {index: running[index].request.drafts.length for index in most}
        asked = {index: min(length, most[index]) for index, length in lengths.items() if length}
        if self._resting and not asked:
            self._resting -= 1
            return {}, 0.0
        is_forced = bool(asked)
        asked = asked or self._planned(running, most, per_token)
        if not asked:
            self._resting = RESTS_HOPELESS if self._is_hopeless else RESTS
            return {}, 0.0
        begin, read = time.perf_counter(), self._model.num_read
        if self._threads is not None:
            self._model.set_threads(self._threads())
        step_s = self._model.step_seconds(len(asked)) / len(asked)
        wanted = []
        for index, length in asked.items():
            guesses = self._of(running[index].key)
            going_on = self._going_on(guesses, 0.0 if is_forced else step_s / per_token)
            wanted.append(Wanted(running[index], length, going_on))
        found: dict[int, Draft] = {}
        for index, draft in zip(asked, self._model.propose(wanted), strict=True):
            guesses = self._of(running[index].key)
            guesses.draft, guesses.at = draft, running[index].num_answered
            if draft:
                found[index] = draft
        seconds = time.perf_counter() - begin
        # Reading is paid back by what it makes possible, so it does not stop that at once.
        reading = min(self._model.reading_seconds(self._model.num_read - read), seconds)
        self._owed_s += reading
        self._spare_s -= seconds - reading
        return found, seconds

    def earned(self, seconds: float) -> None:
        """What a step with its drafts saved, without what drafting took."""
        paid = min(max(seconds, 0.0), self._owed_s)
        self._owed_s -= paid
        self._spare_s = min(self._spare_s + seconds - paid, self._most_spare_s)

    def close(self) -> None:
        self._model.close()

    def end(self, running: RunningRequest) -> None:
        self._learn(running)
        self._guesses.pop(running.key, None)
        self._model.end(running.key)

    def reason(self) -> str:
        """Why nothing was drafted."""
        name = "the exit" if self.mode == "exit" else "the draft model"
        if self._model.failure:
            return self._model.failure
        if self._seconds([1]) is None:
            return "what a step takes here is not measured yet"
        if self._is_hopeless:
            return f"running {name} takes longer here than it could save, were it always right"
        share = self._by_position.odds(0)
        return f"{name} is right {share:.0%} of the time, too seldom for what it takes here"

    # -- parts -----------------------------------------------------------------------------------

    def _planned(
        self, running: Sequence[RunningRequest], most: Mapping[int, int], per_token: float
    ) -> dict[int, int]:
        """The lengths of drafts to ask for, by index."""
        draft_s = self._model.step_seconds(len(most))
        longest = max(most.values())

        def planned(odds: Sequence[float]) -> tuple[int, float]:
            return planned_length(odds[:longest], len(most), len(running), self._seconds, draft_s)

        self._is_hopeless = planned((PERFECT,) * MOST_DRAFTED)[0] == 0
        if self._is_hopeless:
            return {}
        own = [self._of(running[index].key).by_position for index in most]
        odds = [sum(each.odds(at) for each in own) / len(own) for at in range(MOST_DRAFTED)]
        length, saved = planned(odds)
        if length == 0:
            return self._tried(running, most, draft_s, planned)
        if self._spare_s < -LOAN_TOKENS * per_token:
            return {}
        asked = {}
        saved_by_token = saved / (len(most) * (1.0 + length))
        for index, limit in most.items():
            unread = self._model.unread(running[index])
            cost = self._model.reading_seconds(unread)
            most_left = running[index].request.max_tokens
            left = USUAL_TOKENS
            if most_left is not None:
                left = min(left, most_left - running[index].num_answered)
            may_owe = self._owed_s <= self._most_spare_s and cost <= saved_by_token * left
            if unread <= FEW_UNREAD or may_owe or cost <= self._spare_s - self._owed_s:
                asked[index] = min(length, limit)
        return asked

    def _tried(
        self,
        running: Sequence[RunningRequest],
        most: Mapping[int, int],
        draft_s: float,
        planned: Callable[[Sequence[float]], tuple[int, float]],
    ) -> dict[int, int]:
        """One short draft, for the request whose prompt is read soonest, if there is time to spare."""
        length = min(planned((PERFECT,) * MOST_DRAFTED)[0], 3)
        spare = self._spare_s - self._owed_s
        if length == 0 or spare <= length * draft_s:
            return {}
        unread, index = min((self._model.unread(running[index]), index) for index in most)
        plain = self._seconds([1] * len(running)) or 0.0
        checking = self._seconds([1 + length] + [1] * (len(running) - 1)) or plain
        cost = self._model.reading_seconds(unread) + length * draft_s + checking - plain
        if spare <= cost:
            return {}
        self.num_tries += 1
        return {index: min(length, most[index])}

    def _going_on(self, guesses: _Guesses, cost: float) -> Callable[[Sequence[int]], bool]:
        """cost: of another token of the draft, in tokens decoded without drafts."""

        def is_worth(kinds: Sequence[int]) -> bool:
            odds = 1.0
            for kind in kinds:
                odds *= guesses.by_confidence.odds(kind)
            return odds * guesses.by_position.odds(len(kinds)) > cost

        return is_worth

    def _of(self, key: int) -> _Guesses:
        own = self._guesses.get(key)
        if own is None:
            kinds, positions = range(len(TYPICAL_BY_CONFIDENCE)), range(MOST_DRAFTED)
            own = self._guesses[key] = _Guesses(
                Acceptance([self._by_confidence.odds(kind) for kind in kinds], _WEIGHT),
                Acceptance([self._by_position.odds(at) for at in positions], _WEIGHT),
            )
        return own

    def _learn(self, running: RunningRequest) -> None:
        """What became of its last draft, whether it was checked or not."""
        guesses = self._guesses.get(running.key)
        if guesses is None or not guesses.draft:
            return
        said = running.answered[guesses.at :]
        draft, guesses.draft = guesses.draft, NO_DRAFT
        for position, (token, kind, true) in enumerate(
            zip(draft.tokens, draft.kinds, said, strict=False)
        ):
            is_hit = token == true
            for by_confidence, by_position in (
                (guesses.by_confidence, guesses.by_position),
                (self._by_confidence, self._by_position),
            ):
                by_confidence.learn(Outcome(kind, is_hit))
                by_position.learn(Outcome(position, is_hit))
            if not is_hit:
                return
