"""`edgeinfer bench --suite speculation`: what drafts bring on four kinds of work, and by what they are
weighed.

Every round asks one question of each kind, of each way to draft in turn: without, by lookup, by the
model that drafts (always three tokens, whatever that costs: what it would be worth shows), and as
`--speculate auto` chooses. The order turns from round to round, so a machine's drift falls on all of
them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any

from edgeinfer.client import Generation, LocalClient, Message, Request, RunStats
from edgeinfer.engine.model_drafting import odds_needed
from edgeinfer.engine.request import DraftOptions
from edgeinfer.errors import MeasureFailed, error_from_wire
from edgeinfer.measure.figures import quartiles
from edgeinfer.measure.kinds_of_work import KINDS, Kind, question
from edgeinfer.measure.streams import GREEDY

PLAIN, LOOKUP, AUTO = "plain", "lookup", "auto"
DRAFTED_AT_ONCE = 3  # where it is not chosen: with the newest token, a step of four
_WARM_UP = 1000  # questions from here on are not measured


@dataclass(frozen=True)
class DraftsPlan:
    """new_tokens: of each answer. repeat: rounds; warmup: rounds before them that do not count."""

    new_tokens: int = 200
    repeat: int = 3
    warmup: int = 1
    kinds: tuple[Kind, ...] = KINDS


@dataclass(frozen=True)
class Recorded:
    """An answer of another model, to be said by one that says nothing of its own (random weights):
    tokens of the question and of the answer."""

    prompt: tuple[int, ...]
    says: tuple[int, ...]


@dataclass
class Outcome:
    """Of one way to draft on one kind of work. tok_s: of each round. by_position: see
    SpeculationStats."""

    tok_s: list[float] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    by_position: list[list[int]] = field(default_factory=list)

    def add(self, stats: RunStats) -> None:
        self.tok_s.append(stats.timings.decode_tok_s)
        own = stats.speculation
        self.drafted += own.drafted
        self.accepted += own.accepted
        for position, (checked, right) in enumerate(own.by_position):
            if position == len(self.by_position):
                self.by_position.append([0, 0])
            self.by_position[position][0] += checked
            self.by_position[position][1] += right

    @property
    def shares(self) -> list[float]:
        """How often a draft's first token was right, its second after a right first, and so on."""
        return [right / checked for checked, right in self.by_position if checked]

    def ratios(self, plain: Outcome) -> list[float]:
        """To the answers without drafts, round by round."""
        return [own / other for own, other in zip(self.tok_s, plain.tok_s, strict=False)]


@dataclass(frozen=True)
class Costs:
    """At about the context of the answers. step_s: of a step of so many tokens. draft_s: of a step of
    the model that drafts; 0: there is none. needed: how often each of its guesses has to be right so
    that some length pays; None: not even all right would."""

    step_s: Mapping[int, float]
    draft_mode: str
    draft_s: float
    needed: float | None
    lookup_needed: float | None
    reason: str


@dataclass
class DraftsBench:
    """Runs a plan on a loaded client. `stop` may be called from a signal handler: `run` then returns,
    and what was measured stays. recorded: answers to be said, by kind and number of the question."""

    client: LocalClient
    plan: DraftsPlan
    on_trial: Callable[[str, int, int], None] = lambda *_: None
    recorded: Callable[[Kind, int], Recorded] | None = None
    outcomes: dict[Kind, dict[str, Outcome]] = field(default_factory=dict)
    rounds: int = 0
    _running: Generation | None = None
    _stopped: Event = field(default_factory=Event)

    def run(self) -> None:
        """Raises EdgeInferError of a request that failed, MeasureFailed."""
        plan, modes = self.plan, self.modes()
        total = (plan.warmup + plan.repeat) * len(plan.kinds) * len(modes)
        done = 0
        for turn in range(-plan.warmup, plan.repeat):
            for kind in plan.kinds:
                shift = turn % len(modes)
                found: dict[str, RunStats] = {}
                for mode in modes[shift:] + modes[:shift]:
                    if self._stopped.is_set():
                        return
                    done += 1
                    self.on_trial(f"{kind}, {mode}", done, total)
                    stats = self._answer(kind, turn, mode)
                    if stats is None:
                        return
                    found[mode] = stats
                if turn >= 0:
                    own = self.outcomes.setdefault(kind, {mode: Outcome() for mode in modes})
                    for mode in modes:
                        own[mode].add(found[mode])
            self.rounds = turn + 1

    def stop(self) -> None:
        self._stopped.set()
        if self._running is not None:
            self._running.cancel()

    @property
    def is_complete(self) -> bool:
        return self.rounds == self.plan.repeat

    def modes(self) -> list[str]:
        """Those that can be measured with what was loaded."""
        found = self.client.drafts(0)["model"].get("mode", "none")
        return [PLAIN, LOOKUP, *([found] if found != "none" else []), AUTO]

    def costs(self) -> Costs:
        context = self.plan.new_tokens
        found = self.client.drafts(context)
        known = {int(size): float(seconds) for size, seconds in found["costs"]}
        model = found["model"]

        def seconds(tokens: Sequence[int]) -> float | None:
            return known.get(sum(tokens))

        return Costs(
            known,
            str(model.get("mode", "none")),
            float(model.get("step_s") or 0.0),
            model.get("needed"),
            odds_needed(seconds, 0.0),
            str(found["reason"] or model.get("reason") or ""),
        )

    def _answer(self, kind: Kind, turn: int, mode: str) -> RunStats | None:
        number = turn if turn >= 0 else _WARM_UP + turn
        who = {PLAIN: "off", LOOKUP: "lookup", AUTO: "auto"}.get(mode, mode)
        length = DRAFTED_AT_ONCE if mode not in (PLAIN, LOOKUP, AUTO) else 0
        if self.recorded is not None:
            known = self.recorded(kind, number)
            request = Request(
                tokens=known.prompt,
                max_tokens=len(known.says),
                sampling=GREEDY,
                ignore_eos=True,
                drafts=DraftOptions(who, length, known.says),
            )
        else:
            request = _asked(self.client, kind, number, self.plan.new_tokens, who, length)
        self._running = self.client.start(request)
        if self._stopped.is_set():  # it came while this was being started
            self._running.cancel()
        ended = self._running.result()
        self._running = None
        if ended.outcome == "failed":
            raise error_from_wire(ended.error_type, ended.error)
        return None if ended.outcome == "cancelled" else ended.stats


def recorder(client: LocalClient, new_tokens: int) -> Callable[[Kind, int], Recorded]:
    """Lets a model answer each question once, for others to say."""
    known: dict[tuple[Kind, int], Recorded] = {}

    def recorded(kind: Kind, number: int) -> Recorded:
        if (kind, number) not in known:
            ended = client.start(_asked(client, kind, number, new_tokens, "off", 0)).result()
            if ended.outcome != "finished":
                raise MeasureFailed(f"the answer to be replayed did not come: {ended.error}")
            tokens = [
                tuple(token.id for token in client.tokenize(text))
                for text in (question(kind, number), ended.stats.text)
            ]
            if len(tokens[1]) < 2:
                raise MeasureFailed("the answer to be replayed has no tokens")
            known[kind, number] = Recorded(tokens[0], tokens[1][:new_tokens])
        return known[kind, number]

    return recorded


def _asked(
    client: LocalClient, kind: Kind, number: int, new_tokens: int, who: str, length: int
) -> Request:
    text = question(kind, number)
    drafts = DraftOptions(who, length)
    if client.load().has_template:
        return Request(
            messages=(Message("user", text),),
            max_tokens=new_tokens,
            sampling=GREEDY,
            ignore_eos=True,
            drafts=drafts,
        )
    return Request(prompt=text, max_tokens=new_tokens, sampling=GREEDY, ignore_eos=True, drafts=drafts)


# -- what is told ----------------------------------------------------------------------------------


def figures_json(outcomes: Mapping[Kind, Mapping[str, Outcome]]) -> list[dict[str, Any]]:
    found = []
    for kind, by_mode in outcomes.items():
        for mode, own in by_mode.items():
            ratios = own.ratios(by_mode[PLAIN])
            found.append(
                {
                    "work": kind,
                    "mode": mode,
                    "tok_s": statistics.median(own.tok_s),
                    "samples": own.tok_s,
                    "of_plain": statistics.median(ratios),
                    "of_plain_quartiles": list(quartiles(ratios)),
                    "drafted": own.drafted,
                    "accepted": own.accepted,
                    "by_position": own.by_position,
                }
            )
    return found


def costs_json(costs: Costs) -> dict[str, Any]:
    return {
        "step_s": {str(size): seconds for size, seconds in costs.step_s.items()},
        "draft": costs.draft_mode,
        "draft_step_s": costs.draft_s,
        "break_even": costs.needed,
        "break_even_lookup": costs.lookup_needed,
        "reason": costs.reason,
    }


def cost_lines(costs: Costs) -> list[str]:
    """For people: the cost curve, and how often a draft must be right."""
    lines = []
    one = costs.step_s.get(1)
    if one:
        curve = ", ".join(f"{size}: {seconds / one:.2f}" for size, seconds in costs.step_s.items())
        lines.append(f"a step of one token takes {1e3 * one:.1f} ms; of so many, as many times: {curve}")
        lines.append(f"a draft that costs nothing pays from {_share(costs.lookup_needed)}")
    else:
        lines.append("what steps take is not measured yet: run it again")
    if costs.draft_s and one:
        lines.append(
            f"the {_name(costs.draft_mode)} takes {1e3 * costs.draft_s:.1f} ms a token"
            f" ({costs.draft_s / one:.2f} of a step); it pays from {_share(costs.needed)}"
        )
    elif costs.reason:
        lines.append(f"no model drafts: {costs.reason}")
    return lines


def _share(needed: float | None) -> str:
    if needed is None:
        return "no share of right guesses on: it cannot pay here"
    return f"{needed:.0%} right guesses on"


def _name(mode: str) -> str:
    return "draft model" if mode == "draft" else mode
