"""Who drafts for which request, and how much of it the next step is to check.

A draft is checked by running it: the model is sampled at each of its positions in turn, and what it says
stands. So an answer is what it would have been (Leviathan et al. 2022, arXiv:2211.17192, with drafts
that are one guess and not a distribution), whatever the sampler, as long as steps of several tokens
compute what steps of one do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from edgeinfer.engine.draft import NO_DRAFT, Acceptance, Draft, Drafter, Outcome
from edgeinfer.engine.draft_lengths import LEAST_GAIN, share_out
from edgeinfer.engine.lookup import Lookup
from edgeinfer.engine.model_drafting import MOST_DRAFTED, ModelDrafting, odds_needed
from edgeinfer.engine.request import SpeculationStats
from edgeinfer.machine.step_cost import CONTEXT_BUCKET, PREFILL_TOKENS

if TYPE_CHECKING:
    from edgeinfer.backend import Runtime, RuntimeFacts
    from edgeinfer.engine.draft_model import DraftModel
    from edgeinfer.engine.sequence import RunningRequest
    from edgeinfer.engine.tuner import Tuner
    from edgeinfer.engine.window import Window

Speculate = Literal["auto", "off", "lookup", "exit", "draft"]
SPECULATE: tuple[Speculate, ...] = ("auto", "off", "lookup", "exit", "draft")
# Seconds of a step of so many tokens, with logits for all, at a context of so many; None: not known.
StepSeconds = Callable[[int, int], float | None]

LEAST_ODDS = 0.01  # of a draft so far; what comes after it is not looked at
# How often a match's next token is right, by its length (lookup.KINDS), before a request shows.
TYPICAL = (0.25, 0.35, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9)
TRIED = (4, 8, 16)  # sizes of steps: whole tiles, whose cost says most
WORTH_A_TRY = 0.2  # odds of a whole draft
MOST_TRIES = 3  # of a size at a length of context, which may have been disturbed
_FRESH_STEPS = 32  # that a curve of costs is taken as it was


@dataclass
class _Drafting:
    """Of one request."""

    drafter: Drafter
    acceptance: Acceptance
    num_seen: int = 0  # tokens of the answer that the drafter was told
    stats: SpeculationStats = field(default_factory=SpeculationStats)
    had_proposal: bool = False
    mode: str = "lookup"  # of what the next step checks
    drafting_s: float = 0.0  # that it took, where that was not nothing
    saved_s: float = 0.0  # by drafts, as far as it is known what steps without them take


def impossible(speculate: Speculate, facts: RuntimeFacts, window: Window, tuner: Tuner | None) -> str:
    """Why nothing can be drafted; "" where it can."""
    if speculate == "off":
        return "--speculate off"
    if not facts.can.rewind:
        return f"{facts.backend} cannot take tokens back"
    if window.eviction == "h2o":
        return "--eviction h2o would count the attention of tokens that are taken back"
    if not facts.exact:
        return f"with {facts.backend}, results differ in the last bits with how many tokens a step has"
    if tuner is None:
        return f"what a step of several tokens costs is not measured with {facts.backend}"
    return ""


class _Nobody:
    """Drafts nothing."""

    def append(self, token: int) -> Outcome | None:
        return None

    def propose(self, most: int) -> Draft:
        return NO_DRAFT


def _no_drafter(_prompt: Sequence[int]) -> Drafter:
    return _Nobody()


class Speculation:
    def __init__(
        self,
        seconds: StepSeconds,
        most_step_tokens: int,
        most_positions: int,
        drafter: Callable[[Sequence[int]], Drafter] | None = Lookup,
        *,
        has_passes: bool = False,
    ) -> None:
        """most_step_tokens: of a step, so that its results are those of one token at a time.
        most_positions: of a sequence. drafter: made for a request, from its prompt; None: none.
        has_passes: a step whose sequences have different numbers of tokens goes through the weights
        several times, each time with as many tokens of each that has any left."""
        self._drafter = drafter
        self._model: ModelDrafting | None = None
        self.no_model = ""  # why there is none, where one was thought of
        self._seconds = seconds
        self._most_step_tokens = most_step_tokens
        self._most_positions = most_positions
        self._requests: dict[int, _Drafting] = {}
        self._has_passes = has_passes
        self._curve: dict[int, float | None] = {}
        self._least: float | None = None  # see `_least_odds`
        self._context = 0
        self._curve_age = _FRESH_STEPS
        self._tries: dict[tuple[int, int], int] = {}  # by bucket of context and size of step
        self._held = 0
        self._model_asked: list[int] = []  # keys of those for whom it drafted last

    @classmethod
    def of(
        cls, runtime: Runtime, window: Window, tuner: Tuner, *, has_lookup: bool = True
    ) -> Speculation:
        facts = runtime.facts
        # Larger ones are counted as prefill.
        most = min(facts.max_step_tokens, facts.max_logit_rows, PREFILL_TOKENS - 1)
        if facts.stable_chunk_tokens > 1:
            most = min(most, facts.stable_chunk_tokens - 1)
        is_private = facts.kv_layout == "private"  # llama.cpp's streams, whose drafts are not padded

        def seconds(tokens: int, context: int) -> float | None:
            return tuner.step_seconds(tokens, context, is_padded=not is_private)

        drafter = Lookup if has_lookup else None
        return cls(seconds, most, window.size, drafter, has_passes=is_private)

    def use_model(
        self,
        model: DraftModel,
        typical: Sequence[float] = (),
        threads: Callable[[], int] | None = None,
    ) -> None:
        """Let it draft where the drafter has nothing. typical, threads: see ModelDrafting."""
        self._model = ModelDrafting(model, self.seconds_of, typical, threads)

    def close(self) -> None:
        if self._model is not None:
            self._model.close()
            self._model = None

    def choose(self, running: Sequence[RunningRequest]) -> None:
        """Set the `draft` of each, all of which decode."""
        self._refresh(max(each.num_computed for each in running))
        least = self._least_odds() if len(running) == 1 else 0.0
        drafts = [self._proposal(each, least) for each in running]
        if self._held:
            self._held -= 1
            drafts = [NO_DRAFT] * len(running)
        elif self._model is not None:
            self._ask_model(self._model, running, drafts)
        if not any(drafts):
            for each in running:
                each.draft = ()
            return
        odds = [
            self._acceptance(each).of(draft, LEAST_ODDS)
            for each, draft in zip(running, drafts, strict=True)
        ]
        forced = [each.request.drafts.length for each in running]
        if any(forced):
            lengths = [min(length, len(draft)) for length, draft in zip(forced, drafts, strict=True)]
        else:
            lengths, _ = share_out(odds, self.seconds_of, self._most_step_tokens)
            if not any(lengths):
                lengths = self._tried(odds)
        for each, draft, length in zip(running, drafts, lengths, strict=True):
            each.draft = draft.tokens[:length]

    def hold(self, steps: int) -> None:
        """There is no room for drafts now."""
        self._held = steps

    def checks(self, running: RunningRequest, drafted: int) -> None:
        stats = self._requests[running.key].stats
        mode = self._requests[running.key].mode
        if mode not in stats.mode.split("+"):
            stats.mode = mode if stats.mode == "none" else f"{stats.mode}+{mode}"
        stats.steps += 1
        stats.drafted += drafted

    def checked(self, running: RunningRequest, position: int, *, is_hit: bool) -> None:
        """A drafted token, all before which were right."""
        stats = self._requests[running.key].stats
        while len(stats.by_position) <= position:
            stats.by_position.append([0, 0])
        stats.by_position[position][0] += 1
        stats.by_position[position][1] += is_hit
        stats.accepted += is_hit

    def took(self, brought: Mapping[int, int], seconds: float) -> None:
        """A step that checked drafts. brought: tokens that each request of it got, by key."""
        plain = self._step_seconds(len(brought))
        if plain is None:
            return
        if self._model is not None and self._model_asked:
            asked = sum(brought.get(key, 1) - 1 for key in self._model_asked)
            self._model.earned(plain - seconds + asked * plain / len(brought))
        for key, tokens in brought.items():
            own = self._requests.get(key)
            if own is not None:  # else it ended with this step
                own.saved_s += tokens * plain - seconds

    def end(self, running: RunningRequest) -> SpeculationStats:
        """What drafts did for a request."""
        own = self._requests.pop(running.key, None)
        if self._model is not None:
            self._model.end(running)
        if own is None:
            return SpeculationStats(reason="the answer was too short for a draft")
        if own.stats.steps:
            took_s = running.last_token - running.first_token
            saved_s = own.saved_s - own.drafting_s
            own.stats.speedup = max(0.0, (took_s + saved_s) / took_s) if took_s > 0 else 1.0
            return own.stats
        self._say_why(own)
        return own.stats

    # -- parts -----------------------------------------------------------------------------------

    def costs(self, context: int) -> dict[int, float]:
        """Of steps of so many tokens with logits for all, in seconds, as far as they are known."""
        sizes = range(1, min(MOST_DRAFTED + 1, self._most_step_tokens) + 1)
        found = {size: self._seconds(size, context) for size in sizes}
        return {size: seconds for size, seconds in found.items() if seconds is not None}

    def about_model(self, context: int) -> dict[str, float | str | None]:
        """Of the model that drafts, if there is one: what it is, what a step of it takes, and how often
        it has to be right so that a draft pays."""
        if self._model is None:
            return {"mode": "none", "reason": self.no_model}
        known = self.costs(context)
        seconds = self._model.step_seconds
        needed = odds_needed(lambda tokens: known.get(sum(tokens)), seconds)
        return {"mode": self._model.mode, "step_s": seconds, "needed": needed}

    def _say_why(self, own: _Drafting) -> None:
        """Nothing was drafted for a request."""
        about_model = self._model.reason() if self._model is not None else self.no_model
        if self._drafter is None:
            own.stats.reason = about_model
            return
        if own.had_proposal and None in (self._step_seconds(1), self._step_seconds(TRIED[0])):
            own.stats.reason = "what steps of several tokens cost here is not measured yet"
        elif own.had_proposal:
            own.stats.reason = "checking what could be copied would have taken longer than it saves"
        else:
            own.stats.reason = "the answer repeats nothing"
        if about_model:
            own.stats.reason += f"; {about_model}"

    def _tried(self, odds: Sequence[Sequence[float]]) -> list[int]:
        """Lengths that make a step whose cost is not known, where the likeliest of the drafts is worth
        the try."""
        lengths = [0] * len(odds)
        best = max(range(len(odds)), key=lambda which: odds[which][0] if odds[which] else 0.0)
        for size in TRIED:
            length = size - len(odds)
            if not 0 < length <= len(odds[best]) or size > self._most_step_tokens:
                continue
            wanted = [1 + length if which == best else 1 for which in range(len(odds))]
            if self.seconds_of(wanted) is not None:
                continue
            if math.prod(odds[best][:length]) < WORTH_A_TRY:
                break
            place = self._place(size)
            if self._tries.get(place, 0) >= MOST_TRIES:
                continue
            self._tries[place] = self._tries.get(place, 0) + 1
            self._forget_costs()  # something is known after this step
            lengths[best] = length
            break
        return lengths

    def seconds_of(self, tokens: Sequence[int]) -> float | None:
        """Of a step of so many tokens of each sequence; None: not known."""
        if not self._has_passes or len(tokens) == 1:
            return self._step_seconds(sum(tokens))
        total, done = 0.0, 0
        for index, count in enumerate(sorted(tokens)):
            if count > done:
                seconds = self._step_seconds((count - done) * (len(tokens) - index))
                if seconds is None:
                    return None
                total, done = total + seconds, count
        return total

    def _least_odds(self) -> float:
        """Of the first token of a lone draft: below them no length is worth its step, however sure the
        rest were. (Most tokens of most answers end here.)"""
        if self._least is None:
            self._least = self._found_least_odds()
        return self._least

    def _found_least_odds(self) -> float:
        plain, found = self._step_seconds(1), 1.0
        if plain is None:
            return 0.0
        for size in range(2, min(MOST_DRAFTED + 1, self._most_step_tokens) + 1):
            seconds = self._step_seconds(size)
            if seconds is not None:
                found = min(found, (LEAST_GAIN * seconds / plain - 1.0) / (size - 1))
            elif size in TRIED and self._tries.get(self._place(size), 0) < MOST_TRIES:
                return 0.0
        return found

    def _place(self, size: int) -> tuple[int, int]:
        return self._context // CONTEXT_BUCKET, size

    def _acceptance(self, running: RunningRequest) -> Acceptance:
        """Of what drafts for it now."""
        own = self._requests[running.key]
        if self._model is not None and own.mode == self._model.mode:
            return self._model.acceptance(running)
        return own.acceptance

    def _ask_model(
        self, model: ModelDrafting, running: Sequence[RunningRequest], drafts: list[Draft]
    ) -> None:
        """Put drafts where there are none."""
        most = {}
        for index, each in enumerate(running):
            self._requests[each.key].mode = "lookup"
            wants = each.request.drafts.who in ("auto", model.mode)
            room = min(self._most(each), self._most_step_tokens - len(running))
            if wants and not drafts[index] and room > 0:
                most[index] = room
        found, seconds = model.drafts(running, most)
        self._model_asked = [running[index].key for index in found]
        for index, draft in found.items():
            own = self._requests[running[index].key]
            drafts[index], own.mode = draft, model.mode
            own.drafting_s += seconds / len(found)

    def _most(self, running: RunningRequest) -> int:
        """Tokens of a draft that it has room for."""
        positions = self._most_positions
        left = running.tokens_left(positions) - 1
        return min(MOST_DRAFTED, left, positions - running.num_computed - 1)

    def _proposal(self, running: RunningRequest, least: float) -> Draft:
        """least: odds that its first token must have."""
        own = self._requests.get(running.key)
        if own is None:
            looks_up = running.request.drafts.who in ("auto", "lookup")
            drafter = (self._drafter if looks_up else None) or _no_drafter
            own = _Drafting(drafter(running.prompt), Acceptance(TYPICAL))
            self._requests[running.key] = own
        for token in running.answered[own.num_seen :]:
            outcome = own.drafter.append(token)
            if outcome is not None:
                own.acceptance.learn(outcome)
        own.num_seen = running.num_answered
        most = self._most(running)
        first = own.drafter.propose(min(most, 1))
        if not first:
            return NO_DRAFT
        own.had_proposal = True
        if own.acceptance.odds(first.kinds[0]) < least and not running.request.drafts.length:
            return NO_DRAFT
        return own.drafter.propose(most)

    def _refresh(self, context: int) -> None:
        self._curve_age += 1
        is_elsewhere = context // CONTEXT_BUCKET != self._context // CONTEXT_BUCKET
        if self._curve_age > _FRESH_STEPS or is_elsewhere:
            self._curve_age, self._context = 0, context
            self._forget_costs()

    def _forget_costs(self) -> None:
        self._curve.clear()
        self._least = None

    def _step_seconds(self, tokens: int) -> float | None:
        if tokens not in self._curve:
            self._curve[tokens] = self._seconds(tokens, self._context)
        return self._curve[tokens]
