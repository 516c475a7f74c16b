"""The suites of `edgeinfer bench`: what is run, in which order, and what is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Literal

from edgeinfer.client import Client, Generation
from edgeinfer.measure.figures import Figure, Metric
from edgeinfer.measure.streams import Prompts, answer_all, total_tok_s

Suite = Literal["speed", "concurrency"]


@dataclass(frozen=True)
class BenchPlan:
    """What to measure.

    speed: each of `prompt_tokens` (prefill, time to the first token) and of `new_tokens` (decode after a
    prompt of one token). concurrency: each of `streams`, all with the first of `prompt_tokens` and of
    `new_tokens`. repeat: samples of each; warmup: runs before them that do not count.
    """

    suite: Suite = "speed"
    prompt_tokens: tuple[int, ...] = (512,)
    new_tokens: tuple[int, ...] = (128,)
    streams: tuple[int, ...] = (1,)
    repeat: int = 5
    warmup: int = 1

    @property
    def trials(self) -> list[Trial]:
        if self.suite == "concurrency":
            prompt, new = self.prompt_tokens[0], self.new_tokens[0]
            return [Trial("concurrency", prompt, new, number) for number in self.streams]
        return [
            *(Trial("prefill", number, 1, 1) for number in self.prompt_tokens),
            # The first token comes with the prompt; those after it are timed.
            *(Trial("decode", 1, number + 1, 1) for number in self.new_tokens),
        ]

    @property
    def cells_per_sequence(self) -> int:
        """Tokens of context that the largest request takes."""
        return max(trial.prompt_tokens + trial.new_tokens for trial in self.trials)

    @property
    def sequences(self) -> int:
        return max(trial.streams for trial in self.trials)


@dataclass(frozen=True)
class Trial:
    """One kind of run. prompt_tokens, new_tokens: of each of `streams` requests at once."""

    kind: Literal["prefill", "decode", "concurrency"]
    prompt_tokens: int
    new_tokens: int
    streams: int

    def __str__(self) -> str:
        if self.kind == "prefill":
            return f"prefill of {self.prompt_tokens}"
        if self.kind == "decode":
            return f"decode of {self.new_tokens - 1}"
        return f"{self.streams} streams" if self.streams > 1 else "1 stream"


OnTrial = Callable[[Trial, int, int], None]  # about to run: what, which of how many runs


@dataclass
class Bench:
    """Runs a plan on a loaded client. `stop` may be called from a signal handler: `run` then returns,
    and what was measured stays in `figures`."""

    client: Client
    plan: BenchPlan
    vocab_size: int
    on_trial: OnTrial = lambda *_: None
    _samples: dict[Trial, dict[Metric, list[float]]] = field(default_factory=dict)
    _running: Sequence[Generation] = ()
    _stopped: Event = field(default_factory=Event)

    def run(self) -> None:
        """Raises EdgeInferError of a request that failed, MeasureFailed."""
        prompts = Prompts(self.vocab_size)
        runs = list(self._runs())
        for number, (trial, counts) in enumerate(runs, 1):
            if self._stopped.is_set():
                return
            self.on_trial(trial, number, len(runs))
            figures = self._measure(
                trial, [prompts.draw(trial.prompt_tokens) for _ in range(trial.streams)]
            )
            if figures is None:
                return
            if counts:
                kept = self._samples.setdefault(trial, {})
                for metric, figure in figures.items():
                    kept.setdefault(metric, []).append(figure)

    def stop(self) -> None:
        self._stopped.set()
        for generation in self._running:
            generation.cancel()

    @property
    def is_complete(self) -> bool:
        done = [len(s) for metrics in self._samples.values() for s in metrics.values()]
        return len(self._samples) == len(self.plan.trials) and set(done) == {self.plan.repeat}

    @property
    def figures(self) -> list[Figure]:
        """What was measured so far, in the order of the plan."""
        found = []
        for trial in self.plan.trials:
            # The tokens that were timed: without the one that comes with the prompt.
            new = trial.new_tokens - 1 if trial.kind == "decode" else trial.new_tokens
            for metric, samples in self._samples.get(trial, {}).items():
                found.append(Figure(metric, trial.prompt_tokens, new, trial.streams, tuple(samples)))
        return found

    def _runs(self) -> Iterator[tuple[Trial, bool]]:
        """(trial, whether it counts). They take turns: a machine's drift then falls on all of them, and
        who stops early has something of each."""
        for _ in range(self.plan.warmup):
            yield from ((trial, False) for trial in self.plan.trials)
        for _ in range(self.plan.repeat):
            yield from ((trial, True) for trial in self.plan.trials)

    def _measure(self, trial: Trial, prompts: Sequence[tuple[int, ...]]) -> dict[Metric, float] | None:
        answers = answer_all(self.client, prompts, trial.new_tokens, self._on_started)
        self._running = ()
        if answers is None:
            return None
        if trial.kind == "concurrency":
            streams = [answer.stream for answer in answers]
            worst = max(stream.ttft_s for stream in streams)
            return {"total": total_tok_s(streams), "worst_ttft": worst}
        timings = answers[0].stats.timings
        if trial.kind == "decode":
            return {"decode": timings.decode_tok_s}
        return {"prefill": timings.prefill_tok_s, "ttft": timings.ttft_s}

    def _on_started(self, generations: Sequence[Generation]) -> None:
        self._running = generations
        if self._stopped.is_set():  # it came while they were being started
            for generation in generations:
                generation.cancel()
