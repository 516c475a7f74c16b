"""The torch backend and llama.cpp predict the same from the same GGUF file: KL divergence and top-1.

The starter and Gemma 3 270M with F16 weights, over texts of 2,000 tokens. The bound is for torch in f32;
bf16, which is what a processor that is fast at it takes, is shown beside it, and so are weights of 8 and
4 bits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.alternate import table
from benchmarks.model_files import gemma_f16, starter_f16
from benchmarks.verdict import Bar, run_bar
from edgeinfer.backend import Runtime, RuntimeSettings
from edgeinfer.measure.texts import measured_text
from edgeinfer.quality.agreement import agreement
from edgeinfer.quality.predictions import CHUNK
from edgeinfer.registry import get_backend
from edgeinfer_models.model_files import ModelFiles

# One thread: two runtimes of OpenMP in one process would wait for each other's spinning threads.
CONTEXT, THREADS = 2000, 1
MOST_KL, LEAST_TOP1 = 0.005, 0.97
HELD_TO_IT = "f32"


@contextmanager
def loaded(backend: str, path: Path, load_as: str = "auto") -> Iterator[Runtime]:
    settings = RuntimeSettings(
        context=2048,
        logit_rows=CHUNK,
        threads=THREADS,
        threads_batch=THREADS,
        gpu_layers=0,
        load_as=load_as,
    )
    runtime = get_backend(backend).load(ModelFiles(path.stem, (path,), "gguf"), settings, lambda _: True)
    try:
        yield runtime
    finally:
        runtime.close()


def measure(bar: Bar) -> None:
    paths = [starter_f16()]
    if not bar.options.without_gemma:
        paths.append(gemma_f16())
    for path in paths:
        rows = [("torch in", "mean KL", "p99 KL", "top-1")]
        for load_as in (HELD_TO_IT, "bf16", "int8", "int4"):
            with (
                loaded("llamacpp", path) as reference,
                loaded("torch", path, load_as) as runtime,
            ):
                text = measured_text(None)
                tokens = reference.tokenizer.encode(text, add_special=True, parse_special=False)
                if runtime.tokenizer.encode(text, add_special=True, parse_special=False) != tokens:
                    bar.require(f"{path.stem}: both cut the text into the same tokens", False)
                found = agreement(runtime, reference, tokens[:CONTEXT])
            rows.append((load_as, f"{found.mean_kl:.5f}", f"{found.p99_kl:.4f}", f"{found.top1:.1%}"))
            if load_as == HELD_TO_IT:
                held = found
        bar.say(f"\n{path.stem}, {CONTEXT} tokens, against llama.cpp\n{table(rows)}")
        bar.details[path.stem] = rows
        bar.require(f"{path.stem}: mean KL {held.mean_kl:.5f} <= {MOST_KL}", held.mean_kl <= MOST_KL)
        bar.require(f"{path.stem}: top-1 {held.top1:.1%} >= {LEAST_TOP1:.0%}", held.top1 >= LEAST_TOP1)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--without-gemma", action="store_true", help="its terms are not everybody's")


if __name__ == "__main__":
    sys.exit(run_bar(__file__, str(__doc__), measure, add_options))
