"""A text of 50,000 tokens read through a window of 512, against reading afresh for every 64 tokens.

SmolLM2 in the starter's own Q4_1, the text of Python's documentation of its language. What the window
costs is the perplexity of the last 10,000 tokens over that of the recompute, each token scored with 448
to 512 tokens of fresh context. The same with a q8_0 cache, against the same recompute with f16; and
without sinks, which is the control. Memory is the cells in use, and the process's resident memory, from
the step at which the window is full for the first time. About 25 minutes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import psutil

from benchmarks.alternate import table
from benchmarks.model_files import starter
from benchmarks.verdict import Bar, run_bar
from edgeinfer.backend import Runtime, RuntimeSettings
from edgeinfer.engine.window import Window
from edgeinfer.measure.long_texts import Streamed, recomputed, slices, stream
from edgeinfer.measure.texts import measured_text
from edgeinfer.quality.predictions import perplexity
from edgeinfer.registry import get_backend
from edgeinfer_models.model_files import ModelFiles

SIZE, SINKS = 512, 4
TOKENS, LAST = 50_000, 10_000
SLICE = 5_000
MOST = {"f16": 1.03, "q8_0": 1.04}
LEAST_CONTROL = 1.5


@dataclass
class Run:
    streamed: Streamed
    resident: list[int]  # bytes, now and then

    def last(self, count: int) -> float:
        """Perplexity of the last `count` tokens."""
        return perplexity(self.streamed.nll[-count:])


def load(kv_type: str) -> Runtime:
    settings = RuntimeSettings(
        context=SIZE, logit_rows=64, kv_type_k=kv_type, kv_type_v=kv_type, threads=2, threads_batch=2
    )
    files = ModelFiles("starter", (starter(),), "gguf")
    return get_backend("llamacpp").load(files, settings, lambda _: True)


def read(bar: Bar, kv_type: str, sinks: int, tokens: list[int]) -> Run:
    process = psutil.Process()
    resident: list[int] = []
    runtime = load(kv_type)

    def progress(_: float) -> None:
        resident.append(process.memory_info().rss)

    try:
        run = Run(stream(runtime, tokens, Window(SIZE, sinks), progress), resident)
    finally:
        runtime.close()
    bar.say(f"  {kv_type}, {sinks} sinks: {run.streamed.evicted} tokens left")
    return run


def measure(bar: Bar) -> None:
    runtime = load("f16")
    text = measured_text(None)
    tokens = runtime.tokenizer.encode(text, add_special=False, parse_special=False)[: bar.options.tokens]
    last = min(LAST, len(tokens) // 2)
    fresh = perplexity(recomputed(runtime, tokens, len(tokens) - last, SIZE))
    runtime.close()
    bar.say(f"  recomputed: {fresh:.3f} over the last {last} of {len(tokens)} tokens")
    runs = {
        ("f16", SINKS): read(bar, "f16", SINKS, tokens),
        ("q8_0", SINKS): read(bar, "q8_0", SINKS, tokens),
        ("f16", 0): read(bar, "f16", 0, tokens),
    }
    curves = {
        f"{kv}, {sinks} sinks": dict(slices(run.streamed.nll, min(SLICE, last)))
        for (kv, sinks), run in runs.items()
    }
    starts = list(next(iter(curves.values())))
    bar.say("")
    heads = ["tokens from", *curves]
    bar.say(
        table(
            [heads, *([f"{start:,}", *(f"{c[start]:.2f}" for c in curves.values())] for start in starts)]
        )
    )
    bar.details["perplexity"] = {"recomputed": fresh, "slices": curves}
    for kv_type, most in MOST.items():
        ratio = runs[kv_type, SINKS].last(last) / fresh
        bar.require(
            f"{kv_type}: perplexity {ratio:.4f} x the recompute's (at most {most})", ratio <= most
        )
    control = runs["f16", 0].last(last) / fresh
    bar.require(f"without sinks: {control:.2f} x (at least {LEAST_CONTROL})", control >= LEAST_CONTROL)
    for (kv_type, sinks), run in runs.items():
        if not sinks:
            continue
        full = next(i for i, cells in enumerate(run.streamed.used_cells) if cells >= SIZE - 64)
        cells = run.streamed.used_cells[full:]
        grown = run.resident[-1] / run.resident[full + 1]
        bar.require(f"{kv_type}: at most {max(cells)} cells in use (of {SIZE})", max(cells) <= SIZE)
        bar.require(f"{kv_type}: resident memory {grown:.4f} x since the window was full", grown <= 1.01)


def add_options(parser: object) -> None:
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of the text")  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(run_bar(__file__, str(__doc__), measure, add_options))
