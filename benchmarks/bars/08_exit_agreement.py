"""How often the starter's exit guesses the model's next token, on answers that nothing was trained on.

The starter (as it comes) answers questions of kinds that no training text was drawn from
(edgeinfer/measure/kinds_of_work.py), greedily and at temperature 0.8. At every token of each answer the
exit's likeliest token is compared with the model's. The curve of agreement against the tokens that were
learnt from is that of the training (benchmarks/results/08_exit_training/figures.json).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path

from benchmarks.alternate import RESULTS, table
from benchmarks.model_files import starter
from benchmarks.verdict import Bar, run_bar
from edgeinfer.backend import Runtime, RuntimeSettings, SequenceStep, Step
from edgeinfer.engine.engine import Engine
from edgeinfer.engine.request import Ended, Request
from edgeinfer.measure.kinds_of_work import Kind, question
from edgeinfer.registry import get_backend
from edgeinfer.sampling import SamplingParams
from edgeinfer_models.chat_template import TemplateRenderer, template_of
from edgeinfer_models.exit_file import SHIPPED_EXITS, read_exit_file
from edgeinfer_models.gguf_model import read_gguf_model
from edgeinfer_models.model_files import ModelFiles

LEAST, DEEPEST = 0.45, 10
KINDS: tuple[Kind, ...] = ("chat", "code")
FROM = 5000  # the first question's number
_ROWS = 60  # read at once, so that they are computed as decoding computes them


def measure(bar: Bar) -> None:
    path = SHIPPED_EXITS / "smollm2.exit.gguf"
    exit_file = read_exit_file(path)
    kept = exit_file.kept
    backend, files = get_backend("llamacpp"), ModelFiles("starter", (starter(),), "gguf")
    settings = RuntimeSettings(
        context=1024, threads=1, threads_batch=1, logit_rows=_ROWS, step_tokens=_ROWS
    )
    rows = [("work", "temperature", "tokens", "agreement")]
    total: dict[Kind, list[int]] = {kind: [0, 0] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        model = backend.load(files, settings, lambda _: True)
        exit_ = backend.load_exit(files, path, settings, Path(folder))
        stack.callback(exit_.close)
        stack.callback(model.close)
        for kind in KINDS:
            for temperature in (0.0, 0.8):
                right = count = 0
                for number in range(bar.options.questions):
                    prompt, answer = answered(bar, files, kind, FROM + number, temperature)
                    said = likeliest(model, [*prompt, *answer])[len(prompt) - 1 : -1]
                    guessed = likeliest(exit_, [*prompt, *answer])[len(prompt) - 1 : -1]
                    right += sum(a == int(kept[b]) for a, b in zip(said, guessed, strict=True))
                    count += len(said)
                rows.append((kind, f"{temperature}", str(count), f"{right / count:.3f}"))
                total[kind][0] += right
                total[kind][1] += count
    bar.say(table(rows))
    bar.say(curve(exit_file.layer))
    bar.details["agreement"] = rows
    bar.require(f"the exit lies after layer {exit_file.layer} <= {DEEPEST}", exit_file.layer <= DEEPEST)
    for kind, (right, count) in total.items():
        bar.require(f"{kind}: {right / count:.3f} >= {LEAST}", right / count >= LEAST)


def answered(
    bar: Bar, files: ModelFiles, kind: Kind, number: int, temperature: float
) -> tuple[list[int], list[int]]:
    """The tokens of a question and of the model's answer."""
    settings = RuntimeSettings(context=1024, threads=1, threads_batch=1)
    runtime = get_backend("llamacpp").load(files, settings, lambda _: True)
    engine = Engine(runtime, model="starter")
    template = template_of(read_gguf_model(starter()))
    with TemplateRenderer(template.text, template.bos, template.eos) as renderer:
        text = renderer.render([{"role": "user", "content": question(kind, number)}])
    prompt = runtime.tokenizer.encode(text, add_special=True, parse_special=True)
    request = Request(
        tokens=tuple(prompt),
        max_tokens=bar.options.tokens,
        sampling=SamplingParams(temperature=temperature, seed=number),
    )
    answer: list[int] = []
    with contextlib.closing(engine):
        engine.submit(0, request, prompt)
        while engine.has_work:
            for running in engine._running:
                answer = running.answered
            for _, event in engine.step():
                assert not isinstance(event, Ended) or event.outcome == "finished", event
    return prompt, answer


def likeliest(runtime: Runtime, tokens: list[int]) -> list[int]:
    """At each position, as an index of the runtime's logits."""
    handle, found = runtime.open(), []
    for start in range(0, len(tokens), _ROWS):
        part = tokens[start : start + _ROWS]
        step = runtime.forward(Step([SequenceStep(handle, part, "all")]))
        found += [int(runtime.logits(step.starts[0] + i).argmax()) for i in range(len(part))]
    runtime.free(handle)
    return found


def curve(layer: int) -> str:
    """Of the training, on texts that it held out."""
    figures = json.loads((RESULTS / "08_exit_training" / "figures.json").read_text())
    rows = [("tokens learnt from", "chat", "code")]
    for point in figures["curve"]:
        own = point["exits"][str(layer)]
        shares = [f"{own[kind]['by_position'][0]:.3f}" for kind in KINDS]
        rows.append((f"{point['tokens'] / 1e6:.1f} million", *shares))
    return table(rows)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--questions", type=int, default=12, help="of each kind")
    parser.add_argument("--tokens", type=int, default=200, help="of each answer")


if __name__ == "__main__":
    sys.exit(run_bar(__file__, str(__doc__), measure, add_options))
