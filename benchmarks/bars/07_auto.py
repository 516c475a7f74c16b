"""`quantize --type auto` picks a type within 5 % of the fastest that meets --max-kl, measured after.

The starter in F16: the table is measured as a user's is, a type is chosen, then every type's file is
really written and answers: a prompt of 500 tokens, and a step at that context, times 200. The types take
turns, with each number of threads that the tuner chooses among; the best of these counts, by the first
quartile of the rounds (other programs only add to a time).

--shape 1b: random weights of that shape in place of the starter. Its errors are given (--losses), its
speeds come from a few layers, and are compared with those of the whole.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path

from benchmarks.alternate import table
from benchmarks.model_files import own_cache_folder, starter_f16
from benchmarks.shapes import SHAPES, shape_file
from benchmarks.verdict import Bar, run_bar
from edgeinfer.backend import Runtime, RuntimeSettings, SequenceStep, Step
from edgeinfer.machine.cost_store import costs_folder
from edgeinfer.machine.probe import probe_machine
from edgeinfer.machine.step_cost import thread_candidates
from edgeinfer.measure.texts import measured_text
from edgeinfer.measure.type_loss import TypeLoss
from edgeinfer.quantize.auto import choose_automatically, shown_table, type_table
from edgeinfer.quantize.candidates import candidates
from edgeinfer.quantize.choice import ANSWER_TOKENS, PROMPT_TOKENS
from edgeinfer.quantize.made_up_rows import MadeUpRows
from edgeinfer.quantize.quantization import opened, plan_quantization, quantize
from edgeinfer.registry import get_backend
from edgeinfer_models.conversion.stand_in import write_stand_in
from edgeinfer_models.resolve import resolve_model

MOST = 1.05
STEPS = 12
# What publishers report of models of this size, roughly: they decide nothing but who takes part.
LOSSES = {"q4_0": 0.08, "iq4_nl": 0.05, "q4_k_m": 0.04, "q5_k_m": 0.012, "q6_k": 0.004, "q8_0": 0.001}


def measure(bar: Bar) -> None:
    options = bar.options
    path = shape_file(options.shape) if options.shape else starter_f16()
    source = opened(path)

    def quiet(_: str, __: float) -> None:
        pass

    with own_cache_folder(), TypeLoss(source, path, measured_text(None), quiet) as measured_loss:
        losses = dict(LOSSES) if options.shape else {}

        def loss(name: str) -> float:
            if name not in losses:
                losses[name] = 0.0 if name == source_type else measured_loss(name)
            return losses[name]

        begin = time.perf_counter()
        found = type_table(source, path, None, costs_folder())
        bar.say(f"speeds: {time.perf_counter() - begin:.0f} s")
        for note in found.notes:
            bar.say(f"  {note}")
        source_type = next((row.type_name for row in found.rows if row.is_original), "")
        begin = time.perf_counter()
        choice = choose_automatically(found, loss, options.max_kl)
        bar.say(f"errors of {len(losses)} types: {time.perf_counter() - begin:.0f} s")
        heads, cells = shown_table(choice.table)
        bar.say(table([heads, *cells]))
        bar.say(choice.reason)
        predicted = {row.type_name: row.answer_s for row in choice.table}
        real = really(bar, path, options.shape, list(predicted))
        rows = [("type", "answer foretold, s", "measured, s", "ratio", "loss")]
        for name in sorted(real, key=lambda name: real[name]):
            share = predicted[name] / real[name]
            lost = f"{losses[name]:.4f}" if name in losses else ""
            rows.append((name, f"{predicted[name]:.2f}", f"{real[name]:.2f}", f"{share:.3f}", lost))
        bar.say(table(rows))
        bar.details["types"] = rows
        taken = choice.chosen.type_name
        limit = options.max_kl
        # Only what was faster than the one taken can have been the better choice.
        rivals = [name for name in real if real[name] < real[taken] and loss(name) <= limit]
        best = min([taken, *rivals], key=lambda name: real[name])
    share = real[taken] / real[best]
    bar.require(
        f"{taken} loses {losses[taken]:.4f} <= {limit:g} and takes {share:.3f} of the time of {best},"
        f" the fastest of those, <= {MOST}",
        share <= MOST and losses[taken] <= limit,
    )


def really(bar: Bar, path: Path, shape: str, names: list[str]) -> Mapping[str, float]:
    """Seconds of a typical answer by type, from whole files."""
    backend = get_backend("llamacpp")
    source = opened(path)
    times: dict[str, dict[int, list[float]]] = {name: {} for name in names}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        runtimes: dict[str, Runtime] = {}
        for candidate in candidates(source, path, None)[0]:
            name = candidate.type_name
            out = Path(folder) / f"{name}.gguf"
            if name not in names:
                continue
            if candidate.is_original:
                out = path
            elif shape:
                with closing(backend.row_quantizer()) as rows:
                    types = candidate.made_up
                    layers = SHAPES[shape].layers
                    write_stand_in(out, source, layers, types, candidate.file_type, MadeUpRows(rows))
            else:
                quantize(plan_quantization(source, path, name, out, force=True))
            settings = RuntimeSettings(context=PROMPT_TOKENS + 2 * STEPS, logit_rows=1)
            files = resolve_model(str(out)).files
            runtimes[name] = stack.enter_context(closing(backend.load(files, settings, lambda _: True)))
        for number in range(bar.options.rounds):
            order = list(runtimes) if number % 2 == 0 else list(reversed(runtimes))
            for name in order:
                for threads in thread_candidates(probe_machine().physical_cores):
                    seconds = answer(runtimes[name], threads)
                    times[name].setdefault(threads, []).append(seconds)
    return {
        name: min(statistics.quantiles(each, n=4, method="inclusive")[0] for each in by.values())
        for name, by in times.items()
        if by
    }


def answer(runtime: Runtime, threads: int) -> float:
    """Seconds: its prompt read, and as many steps as it has tokens, from some."""
    runtime.set_threads(threads, threads)
    sequence = runtime.open()
    tokens = [(1 + 7919 * index) % runtime.facts.vocab_size for index in range(PROMPT_TOKENS)]
    try:
        begin = time.perf_counter()
        runtime.forward(Step([SequenceStep(sequence, tokens)]))
        read = time.perf_counter() - begin
        steps = []
        for token in tokens[:STEPS]:
            begin = time.perf_counter()
            runtime.forward(Step([SequenceStep(sequence, [token])]))
            steps.append(time.perf_counter() - begin)
    finally:
        runtime.free(sequence)
    return read + ANSWER_TOKENS * statistics.median(steps)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-kl", type=float, default=0.05)
    parser.add_argument("--shape", default="", choices=["", *SHAPES], help="random weights")
    parser.add_argument("--rounds", type=int, default=7)


if __name__ == "__main__":
    sys.exit(run_bar(__file__, str(__doc__).partition("\n")[0], measure, add_options))
