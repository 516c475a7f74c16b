"""H2O against streaming eviction at a quarter of the cache: perplexity, and what is still known.

The starter in the torch backend, texts of 2,048 tokens through windows of 512 (Zhang et al. 2023,
arXiv:2306.14048, against Xiao et al. 2024, arXiv:2309.17453). Beside them the whole cache. There is no
bound on the figures: they are what the choice between the two is to be made from.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.alternate import table
from benchmarks.model_files import starter
from benchmarks.verdict import Bar, run_bar
from edgeinfer.backend import Runtime, RuntimeSettings
from edgeinfer.engine.window import Eviction, Window
from edgeinfer.measure.long_texts import stream
from edgeinfer.measure.recall import PLACES, recall
from edgeinfer.measure.texts import measured_text
from edgeinfer.quality.predictions import CHUNK, perplexity
from edgeinfer.registry import get_backend
from edgeinfer_models.model_files import ModelFiles

TOKENS, SIZE, SINKS = 2048, 512, 4
WHOLE = "whole cache"


@contextmanager
def loaded(load_as: str, threads: int, *, counts: bool) -> Iterator[Runtime]:
    settings = RuntimeSettings(
        context=4096,
        logit_rows=CHUNK,
        threads=threads,
        threads_batch=threads,
        gpu_layers=0,
        load_as=load_as,  # type: ignore[arg-type]
        heavy_hitters=counts,
    )
    files = ModelFiles("starter", (starter(),), "gguf")
    runtime = get_backend("torch").load(files, settings, lambda _: True)
    try:
        yield runtime
    finally:
        runtime.close()


def measure(bar: Bar) -> None:
    options = bar.options
    ways: tuple[tuple[str, Window, Eviction], ...] = (
        (WHOLE, Window(4096, SINKS), "streaming"),
        ("streaming", Window(SIZE, SINKS), "streaming"),
        ("h2o", Window(SIZE, SINKS, "h2o"), "h2o"),
    )
    rows = [("eviction", "cells", "perplexity", *(f"gain, {place}" for place in PLACES), "recalled")]
    for name, window, eviction in ways:
        with loaded(options.load_as, options.threads, counts=eviction == "h2o") as runtime:
            text = measured_text(None)
            tokens = runtime.tokenizer.encode(text, add_special=False, parse_special=False)
            values, cells = [], 0
            for start in range(options.texts):
                part = tokens[start * TOKENS : (start + 1) * TOKENS]
                found = stream(runtime, part, window)
                values.append(perplexity(found.nll))
                cells = max(cells, *found.used_cells)
            # Facts stand where a window of SIZE would have them in all three.
            places = Window(SIZE, SINKS) if name == WHOLE else window
            known = recall(runtime, tokens, places, options.facts, within=window)
        mean = math.exp(sum(map(math.log, values)) / len(values))
        shares = "/".join(f"{each.share:.0%}" for each in known)
        rows.append((name, str(cells), f"{mean:.2f}", *(f"{each.gain:+.2f}" for each in known), shares))
        bar.say(f"  {name}: {', '.join(f'{value:.2f}' for value in values)}")
        if name != WHOLE:
            bar.require(f"{name}: {cells} cells of {SIZE}", cells <= SIZE)
        bar.require(f"{name}: perplexity {mean:.2f} is a number", math.isfinite(mean))
    bar.say(f"\ntexts of {TOKENS} tokens; gain in nats a token of the code, over never having been told")
    bar.say(table(rows))
    bar.details["table"] = rows


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--facts", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--load-as", default="auto")


if __name__ == "__main__":
    sys.exit(run_bar(__file__, str(__doc__), measure, add_options))
