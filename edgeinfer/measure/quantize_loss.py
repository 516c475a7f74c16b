"""Measures what a quantized model lost against its original: predictions, speed, and a few answers.

Each model is opened in processes of their own, one at a time, so that no two have to fit into memory.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgeinfer.client import LocalClient, Message, OpenOptions, Request
from edgeinfer.measure.bench import Bench, BenchPlan
from edgeinfer.measure.evaluation import DEFAULT_TOKENS
from edgeinfer.measure.loss import Comparison, Progress, plan_comparison
from edgeinfer.measure.loss_report import LossReport, Sample, Size, Speed
from edgeinfer.measure.streams import GREEDY
from edgeinfer.open import OpenPlan
from edgeinfer.quality.tensor_error import TensorError

PROMPTS = (
    "Why is the sky blue?",
    "Write a Python function that reverses a string.",
    "Tell me about a lighthouse keeper in three sentences.",
)
SAMPLE_TOKENS = 48
ROUNDS = 3
SPEED = BenchPlan("speed", (256,), (32,), repeat=1, warmup=1)


def measure_loss(
    original: Path,
    result: Path,
    text: str,
    tokens: int = DEFAULT_TOKENS["reference"],
    progress: Progress = lambda *_: None,
    *,
    name: str = "",
    options: OpenOptions | None = None,
    errors: Sequence[TensorError] = (),
    notes: Sequence[str] = (),
    speed: bool = True,
    samples: bool = True,
) -> LossReport:
    """original, result: GGUF files or folders of safetensors. An original that the result's backend
    opens in another form only is converted, once for all (its note says so). tokens: of the text that
    are read; fewer, without speed and samples, is the quick way. name: of the result, where its path is
    not yet what it will be. options: how to open them (threads, backend, layers on the GPU). errors,
    notes: what the one who made it knows; they become part of the report.

    Raises ModelError, BackendError, MeasureFailed; KeyboardInterrupt at any time. No process is left.
    """
    wanted = replace(options or OpenOptions(), model=str(result), remember=False)
    comparison = plan_comparison(wanted, str(original), converting=progress)
    loss = comparison.measure(text, tokens, progress)
    loss = replace(loss, model=name or loss.model)
    before, after = _Side(comparison.reference, str(original)), _Side(comparison.model, str(result))
    for number in range(ROUNDS if speed else int(samples)):
        for side, which in ((before, "before"), (after, "after")):
            asks = samples and number == 0
            what = f"speed and answers, {which}" if asks else f"speed {which}"
            progress(what, number / ROUNDS)
            side.measure(wanted, speed=speed, asks=asks)
    answers = zip(PROMPTS, before.answers, after.answers, strict=False)
    return LossReport(
        loss,
        before.size,
        after.size,
        before.speed,
        after.speed,
        tuple(Sample(prompt, one, two) for prompt, one, two in answers),
        tuple(errors),
        (*notes, *_told(comparison)),
    )


@dataclass
class _Side:
    """One of the two models, and what was found of it."""

    plan: OpenPlan
    spec: str
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)

    @property
    def size(self) -> Size:
        config = self.plan.command.config
        return Size(config.weights_bytes, config.bits_per_weight) if config else Size(0, 0.0)

    @property
    def speed(self) -> Speed | None:
        if not self.prefill or not self.decode:
            return None
        return Speed(statistics.median(self.prefill), statistics.median(self.decode))

    def measure(self, options: OpenOptions, *, speed: bool, asks: bool) -> None:
        context = max(512, SPEED.cells_per_sequence)
        command = self.plan.command
        opened = replace(
            options,
            model=self.spec,
            backend=command.backend,
            load_as=command.settings.load_as,
            context=context,
            cache_bytes=0,
            speculate="off",  # each token is one step
        )
        with LocalClient(opened) as client:
            info = client.load()
            if speed:
                bench = Bench(client, SPEED, info.vocab_size)
                bench.run()
                for figure in bench.figures:
                    kept = {"prefill": self.prefill, "decode": self.decode}.get(figure.metric)
                    if kept is not None:
                        kept += figure.samples
            if asks:
                for prompt in PROMPTS:
                    stats = client.start(_request(prompt, info.has_template)).result().stats
                    is_cut = stats.finish_reason == "length"
                    self.answers.append(f"{stats.text.rstrip()} …" if is_cut else stats.text)


def _request(prompt: str, has_template: bool) -> Request:
    if has_template:
        message = Message("user", prompt)
        return Request(messages=(message,), sampling=GREEDY, max_tokens=SAMPLE_TOKENS)
    return Request(prompt=prompt, sampling=GREEDY, max_tokens=SAMPLE_TOKENS)


def _told(comparison: Comparison) -> tuple[str, ...]:
    """What opening them had to say, but for what has nothing to do with their loss."""
    return tuple(line for line in comparison.warnings if "no chat template" not in line)
