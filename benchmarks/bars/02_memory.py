"""Peak memory of `edgeinfer run --ctx 2048`, all its processes added up, against llama-cli's."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.alternate import Side, Spread, alternate, comparison_table
from benchmarks.memory import MB, run_measured
from benchmarks.model_files import starter_q4_0
from benchmarks.peers import PeerError, peer
from benchmarks.verdict import Bar, run_bar

MOST_ABOVE_MB = 80
PROMPT = "Why is the sky blue?"
CONTEXT, TOKENS, THREADS = "2048", "64", "2"


def measure(bar: Bar) -> None:
    model = bar.options.model or starter_q4_0()
    edgeinfer = [str(Path(sys.executable).with_name("edgeinfer")), "run", str(model), PROMPT]
    edgeinfer += ["--ctx", CONTEXT, "--max-tokens", TOKENS, "--temp", "0", "--threads", THREADS]
    llama = [str(peer("llama-cli")), "-m", str(model), "-c", CONTEXT, "-p", PROMPT, "-n", TOKENS]
    llama += ["--temp", "0", "-t", THREADS, "-fa", "on", "--single-turn", "--simple-io"]
    processes: dict[str, float] = {}

    def side(name: str, command: list[str]) -> Side:
        def turn() -> dict[str, float]:
            run = run_measured(command)
            if run.exit_code != 0:
                raise PeerError(f"{name} ended with {run.exit_code}: {run.stderr.strip()[-200:]}")
            if name == "edgeinfer":
                processes.clear()
                processes.update({f"{run.peak.names[p]} {p}": b / MB for p, b in run.peak.peaks.items()})
            return {"VmHWM, MB": run.peak.total / MB, "PSS, MB (for information)": run.peak.pss / MB}

        return Side(name, turn)

    comparisons = alternate(side("edgeinfer", edgeinfer), side("llama-cli", llama), bar.options.rounds)
    bar.say(
        f"\n{model.name}, --ctx {CONTEXT}, {TOKENS} tokens, median of {bar.options.rounds} alternations"
    )
    bar.say(comparison_table(comparisons))
    bar.details["comparisons"] = [c.as_json() for c in comparisons]
    for name, megabytes in processes.items():
        bar.say(f"  edgeinfer's process {name}: {megabytes:.1f} MB")
    bar.details["edgeinfer_processes_mb"] = processes
    resident = comparisons[0]
    above = Spread.of(resident.a).median - Spread.of(resident.b).median
    bar.require(
        f"{above:+.1f} MB against llama-cli's peak <= +{MOST_ABOVE_MB} MB", above <= MOST_ABOVE_MB
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", type=Path, help="a GGUF file instead of the starter's Q4_0")


if __name__ == "__main__":
    sys.exit(run_bar(__file__, "peak memory against llama-cli", measure, add_options))
