"""`--kv-type auto` never takes a type that costs more speed than it may, whatever the model's shape.

What is faster over q8_0 depends on the size of the heads and on how many share a key, so auto estimates
it before a first load. Here that is done for the starter and for models of random weights in which
attention takes a large part of a step; then the models themselves run with both types, taking turns.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from benchmarks.alternate import Spread, table
from benchmarks.kv_types import CONTEXT, LEAST_DECODE, LEAST_PREFILL, THREADS, loaded
from benchmarks.model_files import starter, starter_q4_0
from benchmarks.shapes import Shape, write_shape
from benchmarks.verdict import Bar, run_bar
from edgeinfer.backend import KvSpeed, Runtime, RuntimeSettings, SequenceStep, Step
from edgeinfer.engine.kv_choice import estimate, in_order
from edgeinfer.measure.streams import Prompts
from edgeinfer.registry import get_backend
from edgeinfer_models.resolve import resolve_model

PIECE, TURN = 500, 4  # tokens of a prompt, and steps of decoding, until it is the other's turn


def shape(head_dim: int, heads: int, kv_heads: int, layers: int, feed_forward: int) -> Shape:
    name = f"heads of {head_dim}, {heads // kv_heads} to a key"
    hidden = heads * head_dim
    return Shape(name, hidden, layers, heads, kv_heads, feed_forward, 49_408, 8192, tied=True)


SHAPES = (
    shape(64, 8, 8, 12, 1536),
    shape(64, 16, 8, 10, 3072),
    shape(64, 16, 2, 12, 3072),
    shape(128, 8, 8, 10, 3072),
    shape(128, 16, 8, 6, 4096),
    shape(128, 16, 4, 8, 4096),
    shape(128, 14, 2, 8, 4864),
    shape(192, 8, 4, 8, 4096),
    shape(256, 4, 4, 10, 3072),
    shape(256, 8, 4, 6, 6144),
    shape(256, 4, 1, 12, 4096),
)


def models(folder: Path) -> Iterator[tuple[str, Path]]:
    yield "SmolLM2 Q4_0", starter_q4_0()
    for number, each in enumerate(SHAPES):
        path = folder / f"{number}.gguf"
        write_shape(path, each, starter())
        yield each.name, path
        path.unlink()


def estimated(path: Path) -> KvSpeed | None:
    settings = RuntimeSettings(context=2304, threads=THREADS, threads_batch=THREADS, gpu_layers=0)
    return estimate(get_backend("llamacpp"), resolve_model(str(path)).config, settings, "q8_0")


def measured(path: Path, rounds: int) -> tuple[Spread, Spread]:
    """(decode, prefill): of f16's speed, for each round of both."""
    decodes, prefills = [], []
    with loaded(path, "q8_0") as quantized, loaded(path, "f16") as whole:
        pair = [quantized, whole]
        _round(pair, PIECE)  # pays for page faults
        for _ in range(rounds):
            (decode, decode_f16), (prefill, prefill_f16) = _round(pair, CONTEXT)
            decodes.append(decode_f16 / decode)
            prefills.append(prefill_f16 / prefill)
    return Spread.of(decodes), Spread.of(prefills)


def _round(pair: list[Runtime], length: int) -> tuple[list[float], list[float]]:
    """Seconds of each: (of a step of decoding, median; of the prompt)."""
    prompts = Prompts(pair[0].facts.vocab_size)
    tokens = prompts.draw(length)
    sequences = [runtime.open() for runtime in pair]
    order = [0, 1]
    reading = [0.0, 0.0]
    for start in range(0, length, PIECE):
        for which in order:
            reading[which] += _seconds(pair[which], sequences[which], tokens[start : start + PIECE])
        order.reverse()
    steps: list[list[float]] = [[], []]
    for _ in range(8):
        for which in order:
            steps[which] += (_seconds(pair[which], sequences[which], [t]) for t in prompts.draw(TURN))
        order.reverse()
    for runtime, sequence in zip(pair, sequences, strict=True):
        runtime.free(sequence)
    return [Spread.of(each).median for each in steps], reading


def _seconds(runtime: Runtime, sequence: int, tokens: list[int]) -> float:
    begin = time.perf_counter()
    runtime.forward(Step([SequenceStep(sequence, tokens)]))
    return time.perf_counter() - begin


def measure(bar: Bar) -> None:
    rows = [
        ("q8_0 against f16", "auto", "decode, estimated", "measured", "prefill, estimated", "measured")
    ]
    verdicts = []
    with tempfile.TemporaryDirectory() as folder:
        for name, path in models(Path(folder)):
            guess = estimated(path)
            order = in_order({"q8_0": guess})
            decode, prefill = measured(path, bar.options.rounds)
            words = order[0] if order[0] == "q8_0" or len(order) == 1 else "f16, else q8_0"
            said = (f"{guess.decode:.2f}", f"{guess.prefill:.2f}") if guess else ("none", "none")
            rows.append((name, words, said[0], decode.show(2), said[1], prefill.show(2)))
            bar.details[name] = {
                "auto": order,
                "estimate": asdict(guess) if guess else None,
                "decode": asdict(decode),
                "prefill": asdict(prefill),
            }
            is_within = decode.median >= LEAST_DECODE and prefill.median >= LEAST_PREFILL
            verdicts.append((name, words, "q8_0" not in order or is_within))
    bar.say(f"\n{CONTEXT} tokens of context, {THREADS} threads, {bar.options.rounds} rounds")
    bar.say(f"{table(rows)}\n")
    for name, words, holds in verdicts:
        bar.require(f"{name}: auto takes {words}", holds)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=3)


if __name__ == "__main__":
    sys.exit(run_bar(__file__, "what --kv-type auto takes, and what that costs", measure, add_options))
