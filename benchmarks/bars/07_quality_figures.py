"""`eval --reference` says of the starter in Q4_0 against F16 what llama-perplexity says.

The same text, in windows of 512 tokens read from an empty cache, of which the second half counts, as
llama-perplexity has it (a bos in place of the first token where a model adds one: this one does not).
What differs: it stores every log-probability in 16 bits and reads 512 tokens in one step; we store the
256 likeliest and 64 of the tail, and read 64 in a step.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks.alternate import table
from benchmarks.model_files import starter_f16, starter_q4_0
from benchmarks.peers import PeerError, peer
from benchmarks.verdict import Bar, run_bar
from edgeinfer.client import OpenOptions
from edgeinfer.measure.loss import plan_comparison
from edgeinfer.measure.texts import measured_text
from edgeinfer.quality.windows import SIZE

# Relative; top-1: of its share.
MOST = {
    "KL mean": 0.02,
    "KL median": 0.03,
    "KL p99": 0.05,
    "top-1": 0.01,
    "perplexity": 0.005,
    "reference's": 0.005,
}
_PEERS_WORDS = {
    "KL mean": r"Mean\s+KLD:\s+([0-9.]+)",
    "KL median": r"Median\s+KLD:\s+([0-9.]+)",
    "KL p99": r"99\.0%\s+KLD:\s+([0-9.]+)",
    "top-1": r"Same top p:\s+([0-9.]+)",
    "perplexity": r"Mean PPL\(Q\)\s+:\s+([0-9.]+)",
    "reference's": r"Mean PPL\(base\)\s+:\s+([0-9.]+)",
}


def measure(bar: Bar) -> None:
    text = measured_text(None)
    windows: int = bar.options.windows
    reference, model = starter_f16(), starter_q4_0()
    ours = our_figures(reference, model, text, windows)
    theirs = peers_figures(reference, model, text, windows)
    rows = [("figure", "edgeinfer", "llama-perplexity", "difference")]
    for name, most in MOST.items():
        difference = ours[name] / theirs[name] - 1
        rows.append((name, f"{ours[name]:.5f}", f"{theirs[name]:.5f}", f"{difference:+.2%}"))
        bar.require(f"{name}: differs by {difference:+.2%}, at most {most:.1%}", abs(difference) <= most)
    bar.say(table(rows))
    bar.details["figures"] = rows


def our_figures(reference: Path, model: Path, text: str, windows: int) -> Mapping[str, float]:
    options = OpenOptions(model=str(model), threads=1, threads_batch=1, gpu_layers=0)
    comparison = plan_comparison(options, str(reference))
    loss = comparison.measure(text, windows * SIZE, lambda *_: None, first=SIZE // 2)
    return {
        "KL mean": loss.divergence.mean,
        "KL median": loss.divergence.median,
        "KL p99": loss.divergence.p99,
        "top-1": loss.divergence.top1,
        "perplexity": loss.perplexity,
        "reference's": loss.reference_perplexity,
    }


def peers_figures(reference: Path, model: Path, text: str, windows: int) -> Mapping[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "text").write_text(text[: 16 * windows * SIZE])
        base = Path(folder) / "base"  # 25 MB for each window
        common = ("-f", f"{folder}/text", "-c", str(SIZE), "-b", str(SIZE), "--chunks", str(windows))
        run_peer("-m", str(reference), *common, "--kl-divergence-base", str(base))
        told = run_peer("-m", str(model), *common, "--kl-divergence-base", str(base), "--kl-divergence")
    found = {}
    for name, words in _PEERS_WORDS.items():
        match = re.search(words, told)
        if match is None:
            raise PeerError(f"llama-perplexity does not tell {name}")
        found[name] = float(match[1])
    return {**found, "top-1": found["top-1"] / 100}


def run_peer(*arguments: str) -> str:
    command = [str(peer("llama-perplexity")), *arguments, "-t", "1", "-ngl", "0"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode != 0:
        raise PeerError(f"llama-perplexity ended with {done.returncode}")
    return (done.stdout + done.stderr).decode(errors="replace")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--windows", type=int, default=16)


if __name__ == "__main__":
    sys.exit(run_bar(__file__, str(__doc__), measure, add_options))
