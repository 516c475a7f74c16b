"""Answers with `--speculate auto` against those without, on four kinds of work, alternated in one run.

Both sides are processes of their own that hold the model throughout, and are asked the same questions in
turns (edgeinfer/measure/kinds_of_work.py; another one each round, greedily, 200 tokens). Compared are
the tokens after the first a second, and the time to the first token. On edits (what is given is repeated
with a change) the drafts must win; they must lose nowhere.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from contextlib import ExitStack
from pathlib import Path

from benchmarks.alternate import Comparison, Side, alternate, comparison_table
from benchmarks.model_files import gemma, starter_q4_0
from benchmarks.shapes import shape_file
from benchmarks.verdict import Bar, run_bar
from edgeinfer.client import LocalClient, Message, OpenOptions, Request, RunStats
from edgeinfer.engine.speculation import Speculate
from edgeinfer.measure.kinds_of_work import KINDS, Kind, question
from edgeinfer.measure.streams import GREEDY

MODELS = {"smollm2": starter_q4_0, "gemma": gemma, "1b": lambda: shape_file("1b")}
LEAST, MOST_TTFT, LEAST_OF_EDITS = 0.98, 1.02, 1.3
TOKENS, CONTEXT = 200, 1024
WARM_UPS = 4  # answers, in which costs of steps are learnt


def measure(bar: Bar) -> None:
    for name in bar.options.models.split(","):
        for threads in map(int, bar.options.threads.split(",")):
            _measure_model(bar, name, MODELS[name](), threads)


def _measure_model(bar: Bar, name: str, path: Path, threads: int) -> None:
    tokens = bar.options.tokens
    with ExitStack() as stack:
        clients = {mode: stack.enter_context(_client(path, threads, mode)) for mode in ("auto", "off")}
        for client in clients.values():
            client.load()
            for number in range(WARM_UPS):
                _answer(client, KINDS[number % len(KINDS)], 1000 + number, tokens)
        for kind in KINDS:
            stats: list[RunStats] = []
            sides = [_side(mode, client, kind, tokens, stats) for mode, client in clients.items()]
            found = alternate(sides[0], sides[1], bar.options.rounds)
            bar.say(f"{name}, {threads} threads, {kind}")
            bar.say(comparison_table(found))
            _judge(bar, f"{name}, {threads} threads, {kind}", kind, name, threads, found, stats)


def _side(mode: str, client: LocalClient, kind: Kind, tokens: int, stats: list[RunStats]) -> Side:
    """stats: gets those of the answers with drafts."""
    numbers = itertools.count(1)

    def turn() -> dict[str, float]:
        done = _answer(client, kind, next(numbers), tokens)
        if mode == "auto":
            stats.append(done)
        return {"decode": done.timings.decode_tok_s, "TTFT": 1.0 / done.timings.ttft_s}

    return Side(mode, turn)


def _judge(
    bar: Bar,
    label: str,
    kind: Kind,
    name: str,
    threads: int,
    found: list[Comparison],
    stats: list[RunStats],
) -> None:
    drafted = sum(each.speculation.drafted for each in stats)
    accepted = sum(each.speculation.accepted for each in stats)
    decode, ttft = found[0].ratio, found[1].ratio
    bar.details[label] = {
        "comparisons": [each.as_json() for each in found],
        "drafted": drafted,
        "accepted": accepted,
    }
    bar.require(
        f"{label}: {decode.show()} of plain >= {LEAST}; {accepted} of {drafted} drafted accepted",
        decode.median >= LEAST,
    )
    bar.require(f"{label}: TTFT {1 / ttft.median:.3f} <= {MOST_TTFT}", 1 / ttft.median <= MOST_TTFT)
    if kind == "edit" and name == "smollm2" and threads == 2:
        bar.require(f"{label}: {decode.median:.3f} >= {LEAST_OF_EDITS}", decode.median >= LEAST_OF_EDITS)


def _client(path: Path, threads: int, mode: Speculate) -> LocalClient:
    return LocalClient(
        OpenOptions(
            model=str(path),
            context=CONTEXT,
            threads=threads,
            threads_batch=threads,
            kv_type_k="f16",
            kv_type_v="f16",
            cache_bytes=0,
            speculate=mode,
        )
    )


def _answer(client: LocalClient, kind: Kind, number: int, tokens: int) -> RunStats:
    info = client.info
    text = question(kind, number)
    if info is not None and info.has_template:
        request = Request(
            messages=(Message("user", text),), max_tokens=tokens, sampling=GREEDY, ignore_eos=True
        )
    else:
        request = Request(prompt=text, max_tokens=tokens, sampling=GREEDY, ignore_eos=True)
    return client.start(request).result().stats


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", default="smollm2,gemma,1b")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each answer")


if __name__ == "__main__":
    sys.exit(run_bar(__file__, str(__doc__), measure, add_options))
