"""Runtimes that differ in the KV type alone, and what their steps at 2,000 tokens of context take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.alternate import Side
from edgeinfer.backend import Runtime, RuntimeSettings, SequenceStep, Step
from edgeinfer.measure.streams import Prompts
from edgeinfer.quality.predictions import CHUNK
from edgeinfer.registry import get_backend
from edgeinfer_models.model_files import ModelFiles

CONTEXT, DECODE, THREADS = 2000, 64, 2
LEAST_DECODE, LEAST_PREFILL = 0.9, 0.8  # of f16's speed


@contextmanager
def loaded(path: Path, kv_type: str, logit_rows: int = CHUNK) -> Iterator[Runtime]:
    settings = RuntimeSettings(
        context=2304,
        sequences=1,
        logit_rows=logit_rows,
        kv_type_k=kv_type,
        kv_type_v=kv_type,
        threads=THREADS,
        threads_batch=THREADS,
        gpu_layers=0,
    )
    files = ModelFiles(path.stem, (path,), "gguf")
    runtime = get_backend("llamacpp").load(files, settings, lambda _: True)
    try:
        yield runtime
    finally:
        runtime.close()


def side(name: str, runtime: Runtime) -> Side:
    prompts = Prompts(runtime.facts.vocab_size)

    def measure() -> dict[str, float]:
        tokens = prompts.draw(CONTEXT + DECODE)
        sequence = runtime.open()
        begin = time.perf_counter()
        for start in range(0, CONTEXT, 500):
            runtime.forward(Step([SequenceStep(sequence, tokens[start : start + 500])]))
        middle = time.perf_counter()
        for token in tokens[CONTEXT:]:
            runtime.forward(Step([SequenceStep(sequence, [token])]))
        end = time.perf_counter()
        runtime.free(sequence)
        return {
            f"prefill {CONTEXT}, tok/s": CONTEXT / (middle - begin),
            f"decode {DECODE} at {CONTEXT}, tok/s": DECODE / (end - middle),
        }

    return Side(name, measure)
