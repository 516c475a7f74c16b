"""`quantize --imatrix FILE` writes what llama-quantize writes with the same file, old form and GGUF.

From the starter in F16 and from random experts whose rows are whole blocks of 256, one of which saw
nothing. llama-imatrix makes the files; what we read and write of them again is compared byte for byte.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.alternate import table
from benchmarks.model_files import starter_f16
from benchmarks.peers import PeerError, peer
from benchmarks.verdict import Bar, run_bar
from edgeinfer.measure.texts import measured_text
from edgeinfer.quantize.importance import named_imatrix
from edgeinfer.quantize.quantization import opened, plan_quantization, quantize
from edgeinfer_models.conversion.imatrix import Columns, Imatrix, read_imatrix, write_imatrix

TYPES = ("q4_0", "iq4_nl", "q4_k_m", "q6_k", "iq2_xs", "q3_k_m", "iq1_s", "q2_k_s")
TEXT_LETTERS = 20_000
CONTEXT = 128


def measure(bar: Bar) -> None:
    rows = [("model", "form", "type", "tensors", "that differ")]
    differing, unlike = 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text = folder / "text.txt"
        text.write_text(measured_text(None)[:TEXT_LETTERS])
        for model, name in ((starter_f16(), "starter"), (experts(folder), "experts")):
            made = folder / f"{name}.gguf.imatrix"
            collect(model, text, made, bar.options.chunks)
            if name == "experts":
                write_imatrix(made, one_unseen(read_imatrix(made)), force=True)
            old = folder / f"{name}.dat"
            run("llama-imatrix", "--in-file", made, "-o", old, "--output-format", "dat", "-m", model,
                "-c", CONTEXT)  # fmt: skip
            unlike += count_unlike(made, old, folder)
            for path, form in ((made, "GGUF"), (old, "older")):
                for kind in bar.options.types.split(","):
                    found, count = differing_tensors(model, path, kind, folder)
                    rows.append((name, form, kind, str(count), str(found)))
                    differing += found
    bar.say(table(rows))
    bar.details["types"] = rows
    bar.require(f"{differing} tensors differ in {len(rows) - 1} files", differing == 0)
    bar.require(f"{unlike} of our importance matrices differ from llama-imatrix's", unlike == 0)


def experts(folder: Path) -> Path:
    """A model of random weights."""
    from tests.fixtures_families import CONFIGS, converted, full, write_folder

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    config = full({**CONFIGS["mixtral"], **sizes, "num_key_value_heads": 2, "head_dim": 64})
    return converted(write_folder(folder / "experts", config), config, "F16")


def one_unseen(imatrix: Imatrix) -> Imatrix:
    """As if no token had gone to one of the experts."""
    tensors = dict(imatrix.tensors)
    for name, columns in imatrix.tensors.items():
        if len(columns.counts) > 1:
            counts, sums = columns.counts.copy(), columns.in_sum2.copy()
            counts[1], sums[1] = 0, 0.0
            tensors[name] = Columns(sums, counts)
    return replace(imatrix, tensors=tensors)


def collect(model: Path, text: Path, out: Path, chunks: int) -> None:
    run("llama-imatrix", "-m", model, "-f", text, "-o", out, "--output-format", "gguf",
        "-c", CONTEXT, "-b", CONTEXT, "--chunks", chunks, "--no-ppl", "-t", 2)  # fmt: skip


def count_unlike(made: Path, old: Path, folder: Path) -> int:
    """What we write of what we read, against llama-imatrix's own two files."""
    again, older, oldest = folder / "again.gguf", folder / "again.dat", folder / "twice.dat"
    imatrix = read_imatrix(made)
    write_imatrix(again, imatrix, force=True)
    write_imatrix(older, imatrix, "dat", force=True)
    write_imatrix(oldest, read_imatrix(old), "dat", force=True)
    pairs = ((made, again), (old, older), (old, oldest))
    return sum(one.read_bytes() != other.read_bytes() for one, other in pairs)


def differing_tensors(model: Path, imatrix: Path, kind: str, folder: Path) -> tuple[int, int]:
    """How many differ, of how many."""
    differences = importlib.import_module("benchmarks.bars.07_rtn").differences
    ours, theirs = folder / "ours.gguf", folder / "theirs.gguf"
    plan = plan_quantization(
        opened(model), model, kind, ours, force=True, imatrix=named_imatrix(imatrix)
    )
    quantize(plan)
    run("llama-quantize", "--imatrix", imatrix, model, theirs, kind)
    return differences(ours, theirs), len(plan.types)


def run(program: str, *arguments: object) -> None:
    command: Sequence[str] = [str(peer(program)), *map(str, arguments)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode != 0:
        last = done.stderr.decode(errors="replace").strip().splitlines() or [""]
        raise PeerError(f"{program} ended with {done.returncode}: {last[-1]}")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--types", default=",".join(TYPES), help="like q4_0,q4_k_m")
    parser.add_argument("--chunks", type=int, default=4)


if __name__ == "__main__":
    sys.exit(run_bar(__file__, str(__doc__), measure, add_options))
