"""A q8_0 KV cache against f16 at 2,000 tokens of context: memory, quality, decode and prefill.

Quality on F16 weights, where the cache's rounding is what differs; on Q4_0 weights it is shown beside
the noise floor (the same f16 cache, read in steps of another kernel), which those have without it. Speed
on Q4_0 weights, whose products are cheapest, so that attention weighs most; alternating, and beside it
what plain llama.cpp makes of the same types.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.alternate import Side, alternate, table
from benchmarks.kv_types import CONTEXT, LEAST_DECODE, LEAST_PREFILL, THREADS, loaded, side
from benchmarks.model_files import starter_f16, starter_q4_0
from benchmarks.peers import PeerError, peer
from benchmarks.verdict import Bar, run_bar
from edgeinfer.measure.texts import measured_text
from edgeinfer.quality.agreement import agreement
from edgeinfer.quality.predictions import CHUNK

MOST_MEMORY, MOST_KL = 0.535, 0.002
OTHERS = ("bf16", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")


def quality(bar: Bar, path: Path, kinds: tuple[str, ...]) -> dict[str, float]:
    """Mean KL from f16 by type, and of the noise floor under "f16"."""
    rows = [("KV type", "bytes/token", "of f16", "mean KL", "p99 KL", "top-1")]
    found: dict[str, float] = {}
    with loaded(path, "f16") as reference:
        tokens = reference.tokenizer.encode(measured_text(None), add_special=False, parse_special=False)
        whole = reference.facts.kv_bytes_per_token
        for kind in ("f16", *kinds):
            with loaded(path, kind, CHUNK // 2 if kind == "f16" else CHUNK) as runtime:
                price = agreement(runtime, reference, tokens[:CONTEXT])
                size = runtime.facts.kv_bytes_per_token
            found[kind] = price.mean_kl
            name = "f16 (noise floor)" if kind == "f16" else kind
            figures = (f"{size:,}", f"{size / whole:.3f}", f"{price.mean_kl:.5f}")
            rows.append((name, *figures, f"{price.p99_kl:.4f}", f"{price.top1:.1%}"))
    bar.say(f"\n{path.stem}, {CONTEXT} tokens of text\n{table(rows)}")
    bar.details[f"quality, {path.stem}"] = rows
    return found


def plain(path: Path, kv_type: str) -> dict[str, float]:
    command = [str(peer("llama-bench")), "-m", str(path), "-t", str(THREADS), "-r", "1", "-o", "json"]
    command += ["-ctk", kv_type, "-ctv", kv_type, "-fa", "1", "-p", str(CONTEXT), "-n", "0"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode != 0:
        raise PeerError(f"llama-bench ended with {done.returncode}")
    (test,) = json.loads(done.stdout)
    return {f"prefill {CONTEXT}, tok/s": float(test["samples_ts"][0])}


def measure(bar: Bar) -> None:
    full, small = starter_f16(), starter_q4_0()
    price = quality(bar, full, ("q8_0", *OTHERS))
    quality(bar, small, ("q8_0",))
    with loaded(small, "q8_0") as quantized, loaded(small, "f16") as whole:
        share = quantized.facts.kv_bytes_per_token / whole.facts.kv_bytes_per_token
        sides = side("q8_0", quantized), side("f16", whole)
        for each in sides:
            each.measure()  # the first one pays for page faults
        speeds = alternate(*sides, bar.options.rounds)
    bar.show(f"{small.stem}, {THREADS} threads, edgeinfer", speeds)
    peers = alternate(
        Side("q8_0", lambda: plain(small, "q8_0")), Side("f16", lambda: plain(small, "f16")), 2
    )
    bar.show(f"{small.stem}, {THREADS} threads, llama-bench", peers)
    bar.say("")
    bar.require(f"memory per token {share:.3f} of f16's <= {MOST_MEMORY}", share <= MOST_MEMORY)
    kl = price["q8_0"]
    bar.require(f"mean KL on F16 weights {kl:.5f} <= {MOST_KL}", kl <= MOST_KL)
    for comparison, least in zip(speeds, (LEAST_PREFILL, LEAST_DECODE), strict=True):
        ratio = comparison.ratio.median
        bar.require(f"{comparison.metric}: {ratio:.3f} of f16's >= {least}", ratio >= least)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=6)


if __name__ == "__main__":
    sys.exit(run_bar(__file__, "a q8_0 KV cache against f16 at 2,000 tokens", measure, add_options))
