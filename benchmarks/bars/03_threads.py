"""`--threads auto` against every fixed choice, idle and with one core kept busy from outside, and beside
that neighbour against llama-server as it comes.

All sides stay loaded and answer in turns, each request giving both figures: prefill as the worker counts
it, decode as the stream's reader sees it (edgeinfer.measure.streams), which can be said of llama-server
too. Beside the neighbour answers are shorter, on all sides alike: two threads, llama-server's as well,
come to one token a second there. On two cores ten rounds take two minutes idle and nine beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from benchmarks.alternate import Comparison, Spread, table
from benchmarks.conversation import random_tokens
from benchmarks.llama_server import LlamaServer
from benchmarks.shapes import shape_file
from benchmarks.verdict import Bar, run_bar
from edgeinfer.client import LocalClient, OpenOptions
from edgeinfer.errors import MeasureFailed
from edgeinfer.machine.probe import probe_machine
from edgeinfer.measure.streams import answer_all, total_tok_s

LEAST_RATIO = 0.95
LEAST_GAIN = 3.0  # in decode, over llama-server with its default threads beside a busy neighbour
MIN_ROUNDS = 10
CONTEXT = 2048
WARM_UP = 1_000_000  # a seed that no round has
MEASURED_S = 4.0  # idle after the first answer: costs are measured then
AUTO, SERVER = "auto", "llama-server"
NEIGHBOUR = "import os; owner = os.getppid()\nwhile os.getppid() == owner: pass"

Turn = Callable[
    [int, int, int], Mapping[str, float]
]  # prompt tokens, new tokens, seed -> tok/s by metric


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """One core kept busy by a process that has nothing to do with ours."""
    neighbour = subprocess.Popen([sys.executable, "-c", NEIGHBOUR], start_new_session=True)
    try:
        time.sleep(0.5)
        yield
    finally:
        neighbour.kill()
        neighbour.wait()


def our_turn(client: LocalClient) -> Turn:
    vocab_size = client.load().vocab_size

    def turn(prefill: int, decode: int, seed: int) -> Mapping[str, float]:
        answers = answer_all(client, [random_tokens(vocab_size, prefill, seed)], decode + 1)
        if answers is None:
            raise MeasureFailed("the answer was cancelled")
        (answer,) = answers
        rate = answer.stats.timings.prefill_tok_s
        return {"prefill": rate, "decode": total_tok_s([answer.stream])}

    return turn


def server_turn(server: LlamaServer, vocab_size: int) -> Turn:
    def turn(prefill: int, decode: int, seed: int) -> Mapping[str, float]:
        streams = server.answer_all([random_tokens(vocab_size, prefill, seed)], decode + 1)
        return {"decode": total_tok_s(streams)}

    return turn


def measure(bar: Bar) -> None:
    o = bar.options
    if o.rounds < MIN_ROUNDS:
        bar.say(f"  {o.rounds} rounds are for a look only; the bar asks for {MIN_ROUNDS}")
    model = o.model or shape_file("1b")
    names = [AUTO, *(str(n) for n in range(1, probe_machine().physical_cores + 1))]
    with contextlib.ExitStack() as stack:
        sides: dict[str, Turn] = {}
        for name in names:
            threads = None if name == AUTO else int(name)
            options = OpenOptions(
                model=str(model),
                kv_type_k="f16",
                kv_type_v="f16",
                context=CONTEXT,
                threads=threads,
                threads_batch=threads,
                cache_bytes=0,
                speculate="off",
            )
            client = stack.enter_context(LocalClient(options))
            sides[name] = our_turn(client)
            sides[name](o.prefill, o.decode, WARM_UP)
            time.sleep(MEASURED_S if name == AUTO else 0.0)
        if o.only != "busy":
            _compare(bar, "idle", sides, o.decode)
        if o.only != "idle":
            server = stack.enter_context(LlamaServer(model, threads=None, slots=1, context=CONTEXT))
            sides[SERVER] = server_turn(server, client.load().vocab_size)
            sides[SERVER](o.prefill, o.decode, WARM_UP)
            with busy_core():
                _compare(bar, "one core busy", sides, o.busy_decode)


def _compare(bar: Bar, where: str, sides: Mapping[str, Turn], decode: int) -> None:
    rounds, prefill = bar.options.rounds, bar.options.prefill
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in sides}
    names = list(sides)
    begin = time.perf_counter()
    # The first turn of a new situation is where auto finds out.
    sides[AUTO](prefill, bar.options.decode, 0)
    for number in range(1, rounds + 1):
        said = []
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            found = sides[name](prefill, decode, number)  # the same prompt for all
            said.append(f"{name} " + " / ".join(f"{value:.1f}" for value in found.values()))
            for metric, value in found.items():
                figures[name].setdefault(metric, []).append(value)
        spent = time.perf_counter() - begin
        print(f"  {where}, round {number} ({spent:.0f} s): {', '.join(said)}", file=sys.stderr)
    rows = [("tok/s", *names)]
    for metric in ("prefill", "decode"):
        shown = (figures[name].get(metric) for name in names)
        rows.append((metric, *(Spread.of(values).show(1) if values else "-" for values in shown)))
    bar.say(
        f"\n{where}, median (quartiles) of {rounds} rounds of {prefill} prompt tokens and {decode}"
        " after the first; columns are threads"
    )
    bar.say(table(rows))
    bar.details[f"{where}, tok/s"] = figures
    for metric in ("prefill", "decode"):
        fixed = [name for name in names if name not in (AUTO, SERVER)]
        best = max(fixed, key=lambda name: statistics.median(figures[name][metric]))
        _require(bar, where, metric, figures, best, "the best fixed choice's", LEAST_RATIO)
    if SERVER in figures:
        _require(bar, where, "decode", figures, SERVER, "its default threads'", LEAST_GAIN)


def _require(
    bar: Bar,
    where: str,
    metric: str,
    figures: Mapping[str, Mapping[str, list[float]]],
    other: str,
    whose: str,
    least: float,
) -> None:
    ours, theirs = figures[AUTO][metric], figures[other][metric]
    comparison = Comparison(metric, AUTO, other, tuple(ours), tuple(theirs))
    bar.show(f"{metric}, {where}: {AUTO} against {other}", [comparison], least)
    ratio = comparison.ratio.median
    bar.require(
        f"{metric}, {where}: {ratio:.3f} of {whose} ({other}) >= {least}",
        ratio >= least and bar.options.rounds >= MIN_ROUNDS,
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS)
    parser.add_argument("--only", choices=("idle", "busy"), help="one half")
    parser.add_argument("--prefill", type=int, default=256, help="prompt tokens")
    parser.add_argument("--decode", type=int, default=64, help="tokens after the first")
    parser.add_argument("--busy-decode", type=int, default=12, help="the same beside the neighbour")
    parser.add_argument("--model", type=Path, help="a GGUF file instead of the 1B shape")


if __name__ == "__main__":
    sys.exit(run_bar(__file__, "automatic threads against fixed ones", measure, add_options))
