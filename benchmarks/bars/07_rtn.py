"""`quantize` without calibration writes what llama-quantize writes, in no more than its time.

Every preset that needs no importance matrix, from the starter in F16 (rows of 576: the types of blocks
of 256 fall back), compared tensor by tensor: types and bytes. The two alternate.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.alternate import table
from benchmarks.model_files import starter_f16
from benchmarks.peers import PeerError, peer
from benchmarks.verdict import Bar, run_bar
from edgeinfer.quantize.quantization import TYPES, opened, plan_quantization, quantize
from edgeinfer_models.gguf_header import read_gguf_header

NEED_IMPORTANCE = ("q2_k_s", "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m")
MOST_TIME = 1.1


def measure(bar: Bar) -> None:
    source = starter_f16()
    wanted = bar.options.types.split(",") if bar.options.types else TYPES
    rows = [("type", "bits per weight", "ours, s", "llama-quantize, s", "tensors that differ")]
    total = {"ours": 0.0, "peer": 0.0}
    differing = 0
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "ours.gguf", Path(folder) / "theirs.gguf"
        for name in wanted:
            if name in NEED_IMPORTANCE:
                continue
            best = {"ours": float("inf"), "peer": float("inf")}
            for _ in range(bar.options.rounds):
                plan = plan_quantization(opened(source), source, name, ours, force=True)
                begin = time.perf_counter()
                quantize(plan)
                middle = time.perf_counter()
                run_peer(source, theirs, name)
                best["ours"] = min(best["ours"], middle - begin)
                best["peer"] = min(best["peer"], time.perf_counter() - middle)
            found = differences(ours, theirs)
            differing += found
            for side, seconds in best.items():
                total[side] += seconds
            figures = (f"{plan.bits_per_weight:.2f}", f"{best['ours']:.2f}", f"{best['peer']:.2f}")
            rows.append((name, *figures, str(found)))
    bar.say(table(rows))
    bar.details["types"] = rows
    bar.require(f"{differing} tensors differ in {len(rows) - 1} types", differing == 0)
    share = total["ours"] / total["peer"]
    bar.require(f"time {share:.3f} of llama-quantize's <= {MOST_TIME}", share <= MOST_TIME)


def run_peer(source: Path, out: Path, name: str) -> None:
    command = [str(peer("llama-quantize")), str(source), str(out), name]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode != 0:
        raise PeerError(f"llama-quantize to {name} ended with {done.returncode}")


def differences(one: Path, other: Path) -> int:
    """Tensors of another type or with other bytes, and those that only one file has."""
    import numpy as np

    ours, theirs = read_gguf_header(one), read_gguf_header(other)
    data = np.memmap(one, np.uint8, "r"), np.memmap(other, np.uint8, "r")
    count = abs(len(ours.tensors) - len(theirs.tensors))
    for tensor in ours.tensors:
        twin = theirs.tensor(tensor.name)
        if twin is None or twin.type_name != tensor.type_name:
            count += 1
            continue
        begin, end = ours.data_offset + tensor.offset, theirs.data_offset + twin.offset
        same = np.array_equal(
            data[0][begin : begin + tensor.num_bytes], data[1][end : end + twin.num_bytes]
        )
        count += not same
    return count


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--types", default="", help="like q4_0,q4_k_m; default: all")
    parser.add_argument("--rounds", type=int, default=1)


if __name__ == "__main__":
    sys.exit(run_bar(__file__, str(__doc__), measure, add_options))
