"""What is lost at the same size, against llama-quantize with an importance matrix.

From a full-precision model off the grids (benchmarks/off_grid.py), with the same calibration text on
both sides, files are made by ours (gptq, awq+gptq, a budget) and by the peer (Q4_0, IQ4_NL, Q4_K_M), and
their divergence from the original is measured with llama.cpp over unseen text, in windows of 512 tokens.

Rows of 576 make no blocks of 256, so K types are only among the matrices with rows of 1,536 here.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.alternate import table
from benchmarks.off_grid import off_grid
from benchmarks.peers import PeerError, peer
from benchmarks.quality_texts import CALIBRATION, UNSEEN, quality_text
from benchmarks.verdict import Bar, run_bar
from edgeinfer.backend import Runtime, RuntimeSettings
from edgeinfer.quality.reference import Reference, agreement_with, write_reference
from edgeinfer.quality.windows import windows_of
from edgeinfer.registry import get_backend
from edgeinfer_models.model_files import ModelFiles

TOKENS = 20_480
WINDOW = 512
MOST_MINUTES = 20.0
THEIR_TYPES = ("q4_0", "iq4_nl", "q4_k_m")


def measure(bar: Bar) -> None:
    original = off_grid()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(bar.options.folder or temporary)
        folder.mkdir(exist_ok=True)
        text = folder / "calibration.txt"
        text.write_text(quality_text(CALIBRATION))
        files = their_files(original, folder, text)
        minutes = our_files(original, folder, text, files, bar.options.qat)
        found = divergences(original, files, folder, bar.options.tokens)
        sizes = {name: path.stat().st_size for name, path in files.items()}
    rows = [("file", "bytes", "KL mean", "median", "p99", "same token", "minutes")]
    for name, own in found.items():
        figures = (
            f"{own['mean']:.4f}",
            f"{own['median']:.4f}",
            f"{own['p99']:.3f}",
            f"{own['top1']:.1%}",
        )
        took = f"{minutes[name]:.1f}" if name in minutes else ""
        rows.append((name, f"{sizes[name]:,}", *figures, took))
    bar.say(table(rows))
    bar.details.update(found)

    def mean(name: str) -> float:
        return float(found[name]["mean"])

    best = min((mean(name), name) for name in ("our q4_0 gptq", "our q4_0 awq+gptq"))
    share = best[0] / mean("their q4_0")
    bar.require(f"Q4_0 ({best[1]}) {share:.3f} of theirs with imatrix <= 0.75", share <= 0.75)
    same_size = [
        (mean(name), name)
        for name in found
        if name.startswith("our ") and sizes[name] <= sizes["their q4_0"] + 4096
    ]
    share = min(same_size)[0] / mean("their iq4_nl")
    told = f"at Q4_0's bytes ({min(same_size)[1]}) {share:.3f} of their IQ4_NL with imatrix <= 0.8"
    bar.require(told, share <= 0.8)
    share = mean("our budget") / mean("their q4_k_m")
    is_small = sizes["our budget"] <= sizes["their q4_k_m"]
    bar.require(f"budget of their Q4_K_M's bytes: {share:.3f} of its KL <= 0.9", share <= 0.9)
    bar.require("and it is no larger", is_small)
    if "our q4_0 gptq" in minutes:
        took = minutes["our q4_0 gptq"]
        bar.require(f"gptq of the whole model took {took:.1f} <= {MOST_MINUTES} minutes", took <= 20)
    if "our q4_0 qat" in found:
        share = mean("our q4_0 qat") / mean("our q4_0 gptq")
        bar.require(f"qat {share:.3f} of gptq's KL at Q4_0 < 1", share < 1)


def their_files(original: Path, folder: Path, text: Path) -> dict[str, Path]:
    imatrix = folder / "theirs.imatrix.gguf"
    if not imatrix.exists():
        run([str(peer("llama-imatrix")), "-m", original, "-f", text, "-o", imatrix, "-c", WINDOW])
    found = {}
    for name in THEIR_TYPES:
        path = found[f"their {name}"] = folder / f"theirs-{name}.gguf"
        if not path.exists():
            run([str(peer("llama-quantize")), "--imatrix", imatrix, original, path, name])
    return found


def our_files(
    original: Path, folder: Path, text: Path, files: dict[str, Path], qat: float
) -> dict[str, float]:
    """Adds them to `files`; minutes of those that were made now."""
    budget = files["their q4_k_m"].stat().st_size
    wanted: dict[str, list[Any]] = {
        "our q4_0 gptq": ["--type", "q4_0", "--method", "gptq"],
        "our q4_0 awq+gptq": ["--type", "q4_0", "--method", "awq+gptq"],
        "our iq4_nl gptq": ["--type", "iq4_nl", "--method", "gptq"],
        "our iq4_nl awq+gptq": ["--type", "iq4_nl", "--method", "awq+gptq"],
        "our budget": ["--budget", budget, "--method", "awq+gptq"],
    }
    if qat:
        wanted["our q4_0 qat"] = ["--type", "q4_0", "--method", "qat", "--minutes", qat]
    minutes = {}
    for name, options in wanted.items():
        path = files[name] = folder / f"{name.replace(' ', '-')}.gguf"
        if path.exists():
            continue
        begin = time.perf_counter()
        edgeinfer = Path(sys.executable).with_name("edgeinfer")
        command = [edgeinfer, "quantize", original, "-o", path, *options]
        run([*command, "--calibration", text, "--no-report"])
        minutes[name] = (time.perf_counter() - begin) / 60
    return minutes


def run(command: list[Any]) -> None:
    done = subprocess.run([str(each) for each in command], stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise PeerError(f"{command[0]} ended with {done.returncode}: {said[-1] if said else ''}")


def divergences(
    original: Path, files: dict[str, Path], folder: Path, tokens: int
) -> dict[str, dict[str, float]]:
    runtime = loaded(original)
    windows = windows_of(runtime, quality_text(UNSEEN), tokens, WINDOW)
    try:
        kept = folder / f"predictions-{tokens}"
        with kept.open("w+b") as file:
            write_reference(file, runtime, windows)
    finally:
        runtime.close()
    found = {}
    for name, path in files.items():
        runtime = loaded(path)
        try:
            with kept.open("rb") as file:
                own = agreement_with(Reference.read(file), runtime, windows)
        finally:
            runtime.close()
        found[name] = {
            "mean": own.mean_kl, "median": own.median_kl, "p99": own.p99_kl, "top1": own.top1,
            "tokens": len(own.kl),
        }  # fmt: skip
        print(f"  {name}: KL {own.mean_kl:.4f}", file=sys.stderr, flush=True)
    return found


def loaded(path: Path) -> Runtime:
    settings = RuntimeSettings(context=WINDOW, logit_rows=64, step_tokens=WINDOW)
    return get_backend("llamacpp").load(ModelFiles(path.name, (path,), "gguf"), settings, lambda _: True)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", help="where files are made, and taken from if they are there")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument(
        "--qat", type=float, default=0.0, metavar="MINUTES", help="also qat, for so long"
    )


if __name__ == "__main__":
    sys.exit(run_bar(__file__, str(__doc__), measure, add_options))
