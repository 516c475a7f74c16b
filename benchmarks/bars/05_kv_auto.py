"""`--kv-type auto` never takes a type that costs more speed than it may, whatever the model's shape.

What is faster over q8_0 depends on the size of the heads, so auto measures before a first load. Here
its estimate is made for models of random weights with heads of 64, 128 and 256, and for the starter, and
then the models themselves are run with both types, alternating.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from benchmarks.alternate import alternate, table
from benchmarks.kv_types import CONTEXT, LEAST_DECODE, LEAST_PREFILL, THREADS, loaded, side
from benchmarks.model_files import starter, starter_q4_0
from benchmarks.shapes import Shape, write_shape
from benchmarks.verdict import Bar, run_bar
from edgeinfer.backend import KvSpeed, RuntimeSettings
from edgeinfer.engine.kv_choice import in_order
from edgeinfer.registry import get_backend
from edgeinfer_models.resolve import resolve_model

SHAPES = (
    Shape("heads of 64", 1024, 12, 16, 4, 4096, 49_408, 8192, tied=True),
    Shape("heads of 128", 2048, 8, 16, 8, 8192, 49_408, 8192, tied=True),
    Shape("heads of 256", 1024, 12, 4, 1, 2048, 49_408, 8192, tied=True),
)


def models(folder: Path) -> Iterator[tuple[str, Path]]:
    yield "SmolLM2 Q4_0", starter_q4_0()
    for shape in SHAPES:
        path = folder / f"{shape.name.replace(' ', '-')}.gguf"
        write_shape(path, shape, starter())
        yield f"{shape.name}, {shape.layers} layers", path


def estimated(path: Path) -> KvSpeed | None:
    settings = RuntimeSettings(context=2304, threads=THREADS, threads_batch=THREADS, gpu_layers=0)
    return get_backend("llamacpp").measure_kv_speed(resolve_model(str(path)).config, settings, "q8_0")


def measure(bar: Bar) -> None:
    rows = [
        ("q8_0 against f16", "auto", "decode, estimated", "measured", "prefill, estimated", "measured")
    ]
    verdicts = []
    with tempfile.TemporaryDirectory() as folder:
        for name, path in models(Path(folder)):
            guess = estimated(path)
            order = in_order({"q8_0": guess})
            with loaded(path, "q8_0") as quantized, loaded(path, "f16") as whole:
                sides = side("q8_0", quantized), side("f16", whole)
                for each in sides:
                    each.measure()  # the first one pays for page faults
                speeds = alternate(*sides, bar.options.rounds)
            bar.show(f"{name}, {THREADS} threads", speeds)
            prefill, decode = (each.ratio for each in speeds)
            words = order[0] if order[0] == "q8_0" or len(order) == 1 else "f16, else q8_0"
            said = (f"{guess.decode:.2f}", f"{guess.prefill:.2f}") if guess else ("none", "none")
            rows.append((name, words, said[0], f"{decode.median:.2f}", said[1], f"{prefill.median:.2f}"))
            bar.details[name] = {
                "auto": order,
                "estimate": asdict(guess) if guess else None,
                "decode": decode.median,
                "prefill": prefill.median,
            }
            is_within = decode.median >= LEAST_DECODE and prefill.median >= LEAST_PREFILL
            verdicts.append((name, words, "q8_0" not in order or is_within))
    bar.say(f"\n{CONTEXT} tokens of context\n{table(rows)}\n")
    for name, words, holds in verdicts:
        bar.require(f"{name}: auto takes {words}", holds)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=4)


if __name__ == "__main__":
    sys.exit(run_bar(__file__, "what --kv-type auto takes, and what that costs", measure, add_options))
