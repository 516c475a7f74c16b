"""What a model is predicted to take, before anything is loaded, against its process's peak memory.

A worker loads the model, reads a prompt of 600 tokens and answers 8: the most it ever had resident
(Linux's VmHWM, mapped weights included) is compared with the sum of the predicted items.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.memory import PROC, TreePeak
from benchmarks.model_files import gemma, starter, starter_q4_0
from benchmarks.shapes import shape_file
from benchmarks.verdict import Bar, run_bar
from edgeinfer.client import LocalClient, OpenOptions, Request
from edgeinfer.machine.ledger import MemoryLedger
from edgeinfer.open import predict_open
from edgeinfer.sampling import SamplingParams
from edgeinfer_models.resolve import resolve_model

TOLERANCE = 0.05
PROMPT_TOKENS, ANSWER_TOKENS = 600, 8
MIB = 2**20
ITEMS = ("weights", "kv cache", "compute", "logits", "work", "unpacked", "tables", "process")
HEADS = (*ITEMS, "predicted", "peak")


@dataclass(frozen=True)
class Case:
    what: str
    find: Callable[[], Path]
    options: OpenOptions = OpenOptions(gpu_layers=0, kv_type_k="f16", kv_type_v="f16")  # noqa: RUF009 (frozen)

    @property
    def name(self) -> str:
        options = self.options
        name = f"{self.what}, {options.kv_type_k}"
        if options.context is not None:
            name += f", {options.context} tokens"
        return name + (f", {options.sequences} sequences" if options.sequences > 1 else "")


def cases(more: bool) -> Iterator[Case]:
    models: dict[str, Callable[[], Path]] = {
        "SmolLM2 Q4_0": starter_q4_0,
        "SmolLM2 Q4_1 (mapped)": starter,
        "Gemma 3 270M": gemma,
        "1B shape": lambda: shape_file("1b"),
        "8B shape": lambda: shape_file("8b"),
    }
    for what, find in models.items():
        for kind in ("f16", "q8_0"):
            case = Case(what, find)
            yield replace(case, options=replace(case.options, kv_type_k=kind, kv_type_v=kind))
        if more:  # settings that no constant was measured with
            case = Case(what, find)
            yield replace(case, options=replace(case.options, context=1024))
            yield replace(case, options=replace(case.options, context=8192))
            yield replace(case, options=replace(case.options, sequences=4))


def measure(bar: Bar) -> None:
    bar.say(f"\nMiB; a prompt of {PROMPT_TOKENS} tokens, {ANSWER_TOKENS} answered\n")
    bar.say(f"{'':40}" + "".join(f"{head:>10}" for head in HEADS) + "     off")
    rows = []
    for case in cases(bar.options.more):
        if bar.options.only and bar.options.only not in case.name:
            continue
        ledger, peak = run(case)
        total = ledger.total("cpu") - ledger.of("copies")  # of a whole conversation; here is a short one
        off = total / peak - 1
        sizes = [*(ledger.of(name) for name in ITEMS), total, peak]
        bar.say(f"{case.name:40}" + "".join(f"{size / MIB:10.1f}" for size in sizes) + f"  {off:+6.1%}")
        rows.append((case.name, off))
        bar.details[case.name] = {**dict(zip(HEADS, sizes, strict=True)), "off": off}
    for name, off in rows:
        bar.require(f"{name}: {off:+.1%} within {TOLERANCE:.0%}", abs(off) <= TOLERANCE)


def run(case: Case) -> tuple[MemoryLedger, int]:
    """The prediction, and the most the worker had resident, in bytes."""
    path = case.find()
    options = replace(case.options, model=str(path))
    ledger = MemoryLedger(tuple(predict_open(resolve_model(str(path)), options)))
    with LocalClient(options) as client:
        info = client.load()
        words = min(1000, info.vocab_size // 2)
        request = Request(
            tokens=tuple(words + 7 * n % words for n in range(PROMPT_TOKENS)),
            max_tokens=ANSWER_TOKENS,
            ignore_eos=True,
            sampling=SamplingParams(temperature=0.0),
        )
        client.start(request).result()
        assert client.worker_pid is not None
        peak = TreePeak(client.worker_pid)
        peak.sample(PROC)
    return ledger, peak.peaks[peak.root]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", help="cases whose name holds this")
    parser.add_argument(
        "--more", action="store_true", help="also other contexts and several sequences at once"
    )


if __name__ == "__main__":
    sys.exit(run_bar(__file__, "predicted memory against the process's", measure, add_options))
