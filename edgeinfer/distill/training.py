"""From a model to exits that guess what it says: it writes, is read, and exits learn from it.

training = ExitTraining(trainer, plan, frame, library, told)
train, held_out = training.write(until, at_latest)    # time.monotonic(), as all moments here
figures = training.train(train, held_out, until)

It knows no framework: a backend's `ExitTrainer` computes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeinfer.distill.agreement import Agreement, agreements
from edgeinfer.distill.kept_vocabulary import coverage_of, kept_tokens
from edgeinfer.distill.learnt import Learnt
from edgeinfer.distill.openings import ChatFrame, Library, begun_texts
from edgeinfer.distill.texts import Texts, joined
from edgeinfer.errors import UsageError
from edgeinfer.exits import ExitPlace, ExitRecipe, ExitTrainer

if TYPE_CHECKING:
    from edgeinfer.exits import Tokens

_HELD_OUT_SEED, _SEED_STEP = 1_000_003, 7919
_MEASURED_AT = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9)  # shares of the training
_CAPTURED_AT_ONCE = 512  # texts between two looks at the clock
_LOSS_EVERY_S = 10.0
_LEAST_LENGTH = 64


@dataclass(frozen=True)
class TrainingPlan:
    """texts_at_once: that the model writes side by side. held_out: texts that nothing learns from.
    coverage, most_kept: of the head's vocabulary. most_rounds: how often a text is learnt from at
    most."""

    places: tuple[ExitPlace, ...]
    recipe: ExitRecipe = field(default_factory=ExitRecipe)
    length: int = 512
    texts_at_once: int = 48
    most_tokens: int = 10_000_000
    held_out: int = 64
    coverage: float = 0.99
    most_kept: int = 16384
    most_rounds: float = 24.0
    seed: int = 1


@dataclass(frozen=True)
class Point:
    """Of the curve. tokens: that were learnt from so far, each time counted."""

    done: float
    seconds: float
    tokens: int
    loss: Mapping[ExitPlace, float]
    agreements: Mapping[ExitPlace, Mapping[str, Agreement]]

    def as_json(self) -> dict[str, Any]:
        return {
            "done": round(self.done, 4),
            "seconds": round(self.seconds, 1),
            "tokens": self.tokens,
            "exits": {
                place.name: {
                    "loss": round(self.loss.get(place, float("nan")), 4) if self.loss else None,
                    **{kind: each.as_json() for kind, each in found.items()},
                }
                for place, found in self.agreements.items()
            },
        }

    def line(self) -> str:
        parts = []
        for place, found in self.agreements.items():
            rates = "/".join(
                f"{found[kind].first:.3f}" for kind in ("chat", "code", "prose") if kind in found
            )
            parts.append(f"{place.name}: {rates}")
        return f"{self.tokens / 1e6:.2f} M tokens, chat/code/prose  " + "  ".join(parts)


@dataclass
class ExitFigures:
    """Everything that is to be recorded beside an exit. seconds: by stage."""

    plan: TrainingPlan
    device: str
    kept: Tokens
    kept_coverage: float
    texts: int
    held_out_texts: int
    written_tokens: int
    learnt_tokens: int
    rounds: float
    seconds: dict[str, float]
    curve: list[Point]
    done: float = 0.0
    steps: int = 0

    def as_json(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "recipe": asdict(self.plan.recipe),
            "places": [place.name for place in self.plan.places],
            "length": self.plan.length,
            "texts": self.texts,
            "held_out_texts": self.held_out_texts,
            "written_tokens": self.written_tokens,
            "learnt_tokens": self.learnt_tokens,
            "steps": self.steps,
            "rounds": round(self.rounds, 2),
            "kept_tokens": len(self.kept),
            "kept_coverage": round(self.kept_coverage, 5),
            "seconds": {stage: round(each, 1) for stage, each in self.seconds.items()},
            "curve": [point.as_json() for point in self.curve],
        }


class ExitTraining:
    """told: is given a line for whoever waits. on_point: is given the figures whenever a point of the
    curve has been measured; what is to be kept of the exits can be taken then. on_batch: all the texts
    so far, whenever some more were written. on_progress: what is being done ("writing", "reading",
    "learning"), how far it is, from 0 to 1, and the loss (0: not known)."""

    def __init__(
        self,
        trainer: ExitTrainer,
        plan: TrainingPlan,
        frame: ChatFrame,
        library: Library,
        told: Callable[[str], None] = lambda _: None,
        on_point: Callable[[ExitFigures], None] = lambda _: None,
        on_batch: Callable[[Texts], None] = lambda _: None,
        on_progress: Callable[[str, float, float], None] = lambda what, done, loss: None,
    ) -> None:
        self._trainer = trainer
        self._plan = plan
        self._frame = frame
        self._library = library
        self._told = told
        self._on_point = on_point
        self._on_batch = on_batch
        self._on_progress = on_progress
        self._writes = (0.0, 0.0)  # from when until when, where it can be told
        self._seconds: dict[str, float] = {}

    # -- writing ---------------------------------------------------------------------------------

    def write(self, until: float, at_latest: float, begun: Texts | None = None) -> tuple[Texts, Texts]:
        """Texts to learn from and texts held out. Whole batches until there are enough or none more
        would be ready by `until`; the first is waited for until `at_latest`, and cut there if it must
        be. begun: what was written before, as `on_batch` was given it."""
        plan, begin = self._plan, time.monotonic()
        self._writes = (begin, until)
        held_out = min(plan.held_out, plan.texts_at_once // 2)
        self._trainer.prepare_writing(plan.texts_at_once, plan.length, self._frame.turns)
        self._told(f"ready to write {plan.texts_at_once} texts at once ({_since(begin)})")
        batches: list[Texts] = [] if begun is None else [begun]
        number = 0 if begun is None else max(1, len(begun) // plan.texts_at_once)
        while not batches or sum(each.tokens.size for each in batches) < plan.most_tokens:
            began = time.monotonic()
            batch = self._batch(number, held_out, until if batches else at_latest)
            if batches and batch.length < batches[0].length:
                break  # out of time
            batches.append(batch)
            number += 1
            self._on_batch(joined(batches))
            took = time.monotonic() - began
            size, which = batch.tokens.size, f"batch {number}"
            self._told(f"wrote {which}: {size:,} tokens in {took:.1f} s ({size / took:,.0f}/s)")
            if time.monotonic() + 0.9 * took > until:
                break
        self._trainer.end_writing()
        self._seconds["writing"] = time.monotonic() - begin
        first = batches[0]
        train = joined([first.part(held_out, len(first)), *batches[1:]])
        return train, first.part(0, held_out)

    def _batch(self, index: int, held_out: int, deadline: float) -> Texts:
        plan, tokenizer = self._plan, self._trainer.tokenizer
        held_out = held_out if index == 0 else 0
        seed = plan.seed + _SEED_STEP * index
        begun = [
            each
            for count, own_seed, is_held_out in (
                (held_out, plan.seed + _HELD_OUT_SEED, True),
                (plan.texts_at_once - held_out, seed, False),
            )
            for each in begun_texts(
                count,
                self._frame,
                self._library,
                tokenizer,
                seed=own_seed,
                held_out=is_held_out,
                longest=plan.length // 2,
            )
        ]

        def going_on(done: int) -> bool:
            begin, until = self._writes
            passed = (time.monotonic() - begin) / max(until - begin, 1e-3)
            self._on_progress("writing", min(passed, 1.0), 0.0)
            return done < _LEAST_LENGTH or time.monotonic() < deadline

        tokens, kinds = self._trainer.write([each.opening for each in begun], seed, going_on)
        groups = np.array([each.group for each in begun], dtype=np.uint8)
        temperatures = np.array([each.opening.temperature for each in begun], dtype=np.float32)
        return Texts(tokens, kinds, groups, temperatures)

    # -- learning --------------------------------------------------------------------------------

    def train(
        self, train: Texts, held_out: Texts, until: float, learnt: Learnt | None = None
    ) -> ExitFigures:
        """learnt: from where to go on, with the same texts. Raises UsageError; ValueError where `learnt`
        is of other exits."""
        plan, trainer = self._plan, self._trainer
        begin = time.monotonic()
        kept = self._kept(train) if learnt is None else learnt.kept
        room = trainer.texts_that_fit(plan.places, plan.recipe, train.length) - len(held_out)
        if room < 1:
            raise UsageError("there is no memory for the states of a single text; free some")
        if room < len(train):
            self._told(
                f"memory holds the states of {room:,} of {len(train):,} texts; the rest is left out"
            )
            train = train.part(0, room)
        trainer.begin(
            plan.places, kept, plan.recipe, texts=len(train), held_out=len(held_out), length=train.length
        )
        coverage = coverage_of(kept, held_out)
        self._told(
            f"the head keeps {len(kept):,} tokens: {coverage:.2%} of held-out ones ({_since(begin)})"
        )
        trainer.capture(held_out.tokens, held_out.kinds, held_out=True)
        train = self._captured(train, begin, until)
        self._seconds["reading"] = time.monotonic() - begin
        figures = ExitFigures(
            plan, trainer.device_name, kept, coverage, len(train), len(held_out),
            train.written_tokens, 0, 0.0, self._seconds, [],
        )  # fmt: skip
        if learnt is not None:
            trainer.restore(learnt.state)
        self._learn(figures, train, held_out, until, learnt)
        return figures

    def learnt(self, figures: ExitFigures) -> Learnt:
        """To be kept, so that training can go on from here."""
        return Learnt(figures.done, figures.steps, figures.kept, self._trainer.state())

    def _kept(self, train: Texts) -> Tokens:
        plan, tokenizer = self._plan, self._trainer.tokenizer
        vocab_size = tokenizer.vocab_size
        ends = [token for token in range(vocab_size) if tokenizer.is_end(token)]
        return kept_tokens(train, vocab_size, ends, coverage=plan.coverage, most=plan.most_kept)

    def _captured(self, train: Texts, begin: float, until: float) -> Texts:
        """Read what there is time for: a third of it, as learning is what it is for."""
        began = time.monotonic()
        deadline = began + (until - began) / 3
        done = 0
        while done < len(train) and (not done or time.monotonic() < deadline):
            part = train.part(done, done + _CAPTURED_AT_ONCE)
            self._trainer.capture(part.tokens, part.kinds, held_out=False)
            done += len(part)
            self._on_progress("reading", done / len(train), 0.0)
        self._trainer.predict()  # (waits for the device)
        rate = done * train.length / (time.monotonic() - began)
        self._told(f"read {done:,} of {len(train):,} texts, {rate:,.0f} tokens/s ({_since(begin)})")
        return train.part(0, done)

    def _learn(
        self,
        figures: ExitFigures,
        train: Texts,
        held_out: Texts,
        until: float,
        learnt: Learnt | None,
    ) -> None:
        plan, trainer = self._plan, self._trainer
        batch = min(plan.recipe.batch_texts, len(train))
        most = max(int(plan.most_rounds * len(train) / batch), 1)
        before, figures.steps = (0.0, 0) if learnt is None else (learnt.done, learnt.steps)
        figures.done = before
        begin = time.monotonic()
        self._measure(figures, begin, held_out)
        begin_steps = told = time.monotonic()
        points = [each for each in _MEASURED_AT if each > before]
        loss = 0.0
        while figures.done < 1.0:
            trainer.step(figures.done)
            figures.steps += 1
            figures.learnt_tokens = figures.steps * batch * train.length
            figures.rounds = figures.steps * batch / len(train)
            now = time.monotonic()
            passed = (now - begin_steps) / max(until - begin_steps, 1e-3)
            figures.done = min(max(figures.steps / most, before + (1.0 - before) * passed), 1.0)
            self._on_progress("learning", figures.done, loss)
            if now - told > _LOSS_EVERY_S:
                told = now
                loss = next(iter(trainer.losses().values()), 0.0)
                losses = "  ".join(f"{place.name}: {x:.3f}" for place, x in trainer.losses().items())
                at = f"step {figures.steps:,}, round {figures.rounds:.2f}, {figures.done:.0%}"
                self._told(f"{at}, loss {losses}")
            if points and points[0] <= figures.done < 1.0:
                points = [each for each in points if each > figures.done]
                self._measure(figures, begin, held_out)
        self._seconds["learning"] = time.monotonic() - begin
        self._measure(figures, begin, held_out)

    def _measure(self, figures: ExitFigures, begin: float, held_out: Texts) -> None:
        losses = self._trainer.losses()
        predicted = self._trainer.predict()
        found = {
            place: agreements(predicted.model, guessed, held_out)
            for place, guessed in predicted.exits.items()
        }
        seconds = time.monotonic() - begin
        point = Point(figures.done, seconds, figures.learnt_tokens, losses, found)
        figures.curve.append(point)
        self._told(point.line())
        self._on_point(figures)


def summary(figures: ExitFigures) -> Sequence[str]:
    """Lines of the last point, for people."""
    lines = []
    for place, found in figures.curve[-1].agreements.items():
        for kind, each in found.items():
            rates = " ".join(f"{rate:.3f}" for rate in each.by_position)
            lines.append(
                f"exit {place.name:>5}  {kind:14} agreement by position {rates}"
                f"  accepted of 4: {each.accepted:.2f}  ({each.positions[0]:,} positions)"
            )
    return lines


def _since(begin: float) -> str:
    return f"{time.monotonic() - begin:.1f} s"
