"""Where an answer copies, `--speculate auto` wins.

On SmolLM2 (Q4_0) at two threads: edits of code and text that were given, 200 tokens each, alternated
with the same answers without drafts. On the 1B shape (random weights, which say nothing): SmolLM2's
answers to the same questions are said, token by token, at the cost of the 1B model's steps, so that
drafts are right where they were for SmolLM2.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from benchmarks.alternate import table
from benchmarks.model_files import starter_q4_0
from benchmarks.shapes import shape_file
from benchmarks.verdict import Bar, run_bar
from edgeinfer.client import LocalClient, OpenOptions
from edgeinfer.measure.drafts_bench import AUTO, PLAIN, DraftsBench, DraftsPlan, recorder
from edgeinfer.measure.figures import quartiles

LEAST_SMOLLM2, LEAST_1B = 1.3, 1.5
CONTEXT = 1024


def measure(bar: Bar) -> None:
    options = bar.options
    plan = DraftsPlan(options.tokens, options.rounds, 4, ("edit",))
    rows = [("model", "of plain", "quartiles", "plain, tok/s", "drafted", "accepted")]
    with _client(starter_q4_0(), options.threads) as small:
        small.load()
        _judge(bar, rows, "SmolLM2 Q4_0", DraftsBench(small, plan), LEAST_SMOLLM2)
        with _client(shape_file("1b"), options.threads) as large:
            large.load()
            plan = DraftsPlan(options.tokens, options.rounds, 1, ("edit",))
            bench = DraftsBench(large, plan, recorded=recorder(small, options.tokens))
            _judge(bar, rows, "1B shape, replayed", bench, LEAST_1B)
    bar.say(table(rows))


def _judge(bar: Bar, rows: list[tuple[str, ...]], name: str, bench: DraftsBench, least: float) -> None:
    bench.run()
    by_mode = bench.outcomes["edit"]
    ratios = by_mode[AUTO].ratios(by_mode[PLAIN])
    median, (low, high) = statistics.median(ratios), quartiles(ratios)
    auto = by_mode[AUTO]
    plain = statistics.median(by_mode[PLAIN].tok_s)
    rows.append(
        (
            name,
            f"{median:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{plain:.1f}",
            str(auto.drafted),
            str(auto.accepted),
        )
    )
    bar.details[name] = {"ratios": ratios, "drafted": auto.drafted, "accepted": auto.accepted}
    bar.require(f"{name}: {median:.3f} of plain >= {least}", median >= least)


def _client(path: Path, threads: int) -> LocalClient:
    return LocalClient(
        OpenOptions(
            model=str(path),
            context=CONTEXT,
            threads=threads,
            kv_type_k="f16",
            kv_type_v="f16",
            cache_bytes=0,
        )
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=200, help="of each answer")
    parser.add_argument("--threads", type=int, default=2)


if __name__ == "__main__":
    sys.exit(run_bar(__file__, str(__doc__), measure, add_options))
