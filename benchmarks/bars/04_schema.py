"""1,000 starter answers under 20 JSON schemas: what ends with `stop` is valid, hardly any is cut off.

Several at once through the worker, at the sampling settings of a user who changes none, each with
another seed; whether an answer is valid is for the `jsonschema` package to say, its formats included. A
model of 135 million parameters rambles: how many answers edgeinfer had to close within their limit is
shown, and is no failure. About half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import jsonschema

from benchmarks.alternate import table
from benchmarks.model_files import own_cache_folder, starter_q4_0
from benchmarks.schemas import CASES, Case
from benchmarks.verdict import Bar, run_bar
from edgeinfer.client import Client, LocalClient, Message, OpenOptions, Request
from edgeinfer.constraint import Constraint
from edgeinfer.engine.engine import CLOSED_EARLY
from edgeinfer.errors import EdgeInferError
from edgeinfer.sampling import SamplingParams

ANSWERS = 1000
MOST_CUT = 0.02
MAX_TOKENS = 256
AT_ONCE = 4
CONTEXT = 512
FORMATS = jsonschema.FormatChecker(("date", "email", "ipv4", "ipv6", "uuid"))


@dataclass
class Tally:
    """What came of the answers to one schema."""

    stop: int = 0
    length: int = 0
    failed: int = 0
    closed_early: int = 0
    invalid: int = 0
    tokens: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        for name in ("stop", "length", "failed", "closed_early", "invalid", "tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def row(self, name: str) -> tuple[str, ...]:
        answers = self.stop + self.length + self.failed
        counts = (self.stop, self.length, self.failed, self.closed_early, self.invalid)
        return (name, str(answers), *map(str, counts), f"{self.tokens / max(1, answers):.0f}")


def ask(client: Client, case: Case, seed: int, max_tokens: int) -> Tally:
    request = Request(
        messages=(Message("user", f"{case.question} Answer in JSON."),),
        sampling=SamplingParams(seed=seed),
        max_tokens=max_tokens,
        constraint=Constraint("json_schema", json.dumps(case.schema)),
    )
    tally = Tally()
    try:
        stats = client.start(request).result().stats
    except EdgeInferError as error:
        return Tally(failed=1, examples=[f"{case.name}, seed {seed}: {error}"])
    tally.tokens = stats.usage.completion_tokens
    if stats.finish_reason != "stop":
        tally.length = 1
        tally.examples.append(f"{case.name}, seed {seed}, {stats.finish_reason}: {stats.text[-100:]!r}")
        return tally
    tally.stop = 1
    tally.closed_early = int(CLOSED_EARLY in stats.warnings)
    fault = fault_of(stats.text, case)
    if fault:
        tally.invalid = 1
        tally.examples.append(f"{case.name}, seed {seed}, INVALID ({fault}): {stats.text!r}")
    return tally


def fault_of(text: str, case: Case) -> str:
    try:
        value = json.loads(text)
    except ValueError as error:
        return str(error)
    checker = jsonschema.Draft202012Validator(case.schema, format_checker=FORMATS)
    return next((error.message for error in checker.iter_errors(value)), "")


def measure(bar: Bar) -> None:
    o = bar.options
    tallies: dict[str, Tally] = {case.name: Tally() for case in CASES}
    jobs = [(CASES[number % len(CASES)], o.seed + number) for number in range(o.answers)]
    begin = time.perf_counter()
    model = o.model or starter_q4_0()
    examples: list[str] = []
    with own_cache_folder():
        options = OpenOptions(
            model=str(model),
            kv_type_k="f16",
            kv_type_v="f16",
            context=CONTEXT + o.max_tokens,
            sequences=AT_ONCE,
        )
        with LocalClient(options) as client, ThreadPoolExecutor(AT_ONCE) as asking:
            client.load()
            answered = asking.map(lambda job: (job[0], ask(client, job[0], job[1], o.max_tokens)), jobs)
            for number, (case, tally) in enumerate(answered, 1):
                tallies[case.name].add(tally)
                examples += tally.examples
                if number % 100 == 0:
                    print(f"  {number} answers, {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    _report(bar, tallies, examples, time.perf_counter() - begin)


def _report(bar: Bar, tallies: dict[str, Tally], examples: Sequence[str], seconds: float) -> None:
    total = Tally()
    for tally in tallies.values():
        total.add(tally)
    heading = ("schema", "answers", "stop", "length", "failed", "closed early", "invalid", "tokens")
    rows = [heading, *(tally.row(name) for name, tally in tallies.items()), total.row("all")]
    answers = total.stop + total.length + total.failed
    bar.say(
        f"\n{answers} answers of at most {bar.options.max_tokens} tokens under {len(tallies)} schemas"
        f" in {seconds:.0f} s ({total.tokens / seconds:.0f} tok/s, {AT_ONCE} at once),"
        f" seed {bar.options.seed}"
    )
    bar.say(table(rows))
    for example in examples[:20]:
        bar.say(f"  {example}")
    bar.details.update(rows=rows, examples=list(examples), seconds=seconds)
    share = total.length / max(1, answers)
    bar.require(f"{total.failed} answers failed (none may)", total.failed == 0)
    bar.require(f"{total.invalid} of {total.stop} answers that end with stop are invalid (none may)",
                total.invalid == 0 < total.stop)  # fmt: skip
    bar.require(f"{share:.1%} end with length (<= {MOST_CUT:.0%})", share <= MOST_CUT)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--answers", type=int, default=ANSWERS)
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS)
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--model", type=Path, help="a GGUF file instead of the starter in Q4_0")


if __name__ == "__main__":
    sys.exit(run_bar(__file__, "answers held to JSON schemas", measure, add_options))
