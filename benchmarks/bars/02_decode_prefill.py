"""Decode of 128 tokens and prefill of 512, against llama-bench's tg128 and pp512 on the same file.

Each turn runs each test several times and reports the median, on both sides: a neighbour's burst of a
second would otherwise be a turn's whole figure (turns of one run scattered from 0.7 to 1.4).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.alternate import Side, alternate
from benchmarks.conversation import GREEDY, random_tokens
from benchmarks.model_files import starter_q4_0
from benchmarks.peers import PeerError, peer
from benchmarks.verdict import Bar, run_bar
from edgeinfer.client import LocalClient, OpenOptions, Request, RunStats

LEAST_RATIO = 0.96
PREFILL, DECODE = 512, 128
MIN_ROUNDS = 10


def edgeinfer_side(model: Path, threads: int, repeats: int) -> Side:
    """Each turn in a process of its own, as the peer's; warmed up as llama-bench does."""
    seeds = itertools.count(1)

    def measure() -> dict[str, float]:
        options = OpenOptions(
            model=str(model),
            context=1024,
            threads=threads,
            threads_batch=threads,
            kv_type_k="f16",
            kv_type_v="f16",
            flash_attention=True,
            sequences=1,
            speculate="off",
        )
        with LocalClient(options) as client:
            info = client.load()

            def answer(prompt: int, new: int) -> RunStats:
                tokens = random_tokens(info.vocab_size, prompt, next(seeds))
                request = Request(tokens=tokens, ignore_eos=True, max_tokens=new, sampling=GREEDY)
                stats = client.start(request).result().stats
                if stats.usage.completion_tokens != new or stats.usage.cached_tokens:
                    raise AssertionError(f"not what was asked: {stats.usage}")
                return stats

            answer(PREFILL, 1)
            prefill = [answer(PREFILL, 1).timings.prefill_tok_s for _ in range(repeats)]
            answer(1, 2)
            # The first token comes with the prompt; the DECODE after it are timed.
            decode = [answer(1, DECODE + 1).timings.decode_tok_s for _ in range(repeats)]
        return {
            f"prefill {PREFILL}, tok/s": statistics.median(prefill),
            f"decode {DECODE}, tok/s": statistics.median(decode),
        }

    return Side("edgeinfer", measure)


def llama_bench_side(model: Path, threads: int, repeats: int) -> Side:
    command = [str(peer("llama-bench")), "-m", str(model), "-p", str(PREFILL), "-n", str(DECODE)]
    command += ["-t", str(threads), "-b", "2048", "-ub", "512", "-ctk", "f16", "-ctv", "f16"]
    command += ["-fa", "1", "-r", str(repeats), "-o", "json"]

    def measure() -> dict[str, float]:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
        if done.returncode != 0:
            raise PeerError(f"llama-bench ended with {done.returncode}")
        tests = json.loads(done.stdout)
        speeds = {(t["n_prompt"], t["n_gen"]): statistics.median(t["samples_ts"]) for t in tests}
        return {
            f"prefill {PREFILL}, tok/s": speeds[PREFILL, 0],
            f"decode {DECODE}, tok/s": speeds[0, DECODE],
        }

    return Side("llama-bench", measure)


def measure(bar: Bar) -> None:
    rounds: int = bar.options.rounds
    repeats: int = bar.options.repeats
    if rounds < MIN_ROUNDS:
        bar.say(f"  {rounds} rounds are for a look only; the bar asks for {MIN_ROUNDS}")
    model = bar.options.model or starter_q4_0()
    for threads in bar.options.threads:
        comparisons = alternate(
            edgeinfer_side(model, threads, repeats),
            llama_bench_side(model, threads, repeats),
            rounds,
            lambda number, a, b: print(f"  round {number}: {dict(a)} | {dict(b)}", file=sys.stderr),
        )
        title = f"{model.name}, {threads} threads, median of {rounds} alternations of {repeats} runs"
        bar.show(title, comparisons, LEAST_RATIO)
        for c in comparisons:
            ratio = c.ratio.median
            what = f"{c.metric}, {threads} threads: {ratio:.3f} of llama-bench's >= {LEAST_RATIO}"
            bar.require(what, ratio >= LEAST_RATIO and rounds >= MIN_ROUNDS)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=2 * MIN_ROUNDS)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each test in a turn")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--model", type=Path, help="a GGUF file instead of the starter's Q4_0")


if __name__ == "__main__":
    sys.exit(run_bar(__file__, "decode and prefill speed against llama-bench", measure, add_options))
