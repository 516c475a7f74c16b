"""An exit that is always right makes answers as much faster as the measured costs say.

The model is the 1B shape whose last layers change nothing (the matrices that write to its states are
zero there), so an exit after the first ones says what the whole says. Each draft is of three tokens.
Compared are the measured speed-up and what the costs of both models' steps, as the worker measured
them, predict:
four tokens in the time of a step of four and three of the exit's.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np

from benchmarks.alternate import table
from benchmarks.shapes import shape_file
from benchmarks.verdict import Bar, run_bar
from edgeinfer.client import LocalClient, OpenOptions
from edgeinfer.measure.drafts_bench import DRAFTED_AT_ONCE, PLAIN, DraftsBench, DraftsPlan
from edgeinfer.measure.figures import quartiles
from edgeinfer_models.conversion.sources import places_of, stored_bytes
from edgeinfer_models.exit_file import ExitTensor, fingerprint, write_exit_file
from edgeinfer_models.gguf_header import GgufHeader, read_gguf_header

LEAST = 0.9
LAYER = 2  # of 16
_WRITING = ("attn_output.weight", "ffn_down.weight")


def measure(bar: Bar) -> None:
    options = bar.options
    model, exit_path = made()
    opened = OpenOptions(
        model=str(model),
        draft=str(exit_path),
        measures_drafts=True,
        context=1024,
        threads=options.threads,
        kv_type_k="f16",
        kv_type_v="f16",
        cache_bytes=0,
    )
    with LocalClient(opened) as client:
        client.load()
        bench = DraftsBench(client, DraftsPlan(options.tokens, options.rounds, 2, ("chat",)))
        bench.run()
        costs = bench.costs()
    by_mode = bench.outcomes["chat"]
    ratios = by_mode["exit"].ratios(by_mode[PLAIN])
    found, (low, high) = statistics.median(ratios), quartiles(ratios)
    size = 1 + DRAFTED_AT_ONCE
    one, four = costs.step_s[1], costs.step_s[size]
    predicted = size * one / (four + DRAFTED_AT_ONCE * costs.draft_s)
    own = by_mode["exit"]
    bar.say(
        table(
            [
                ("one token", f"a step of {size}", "the exit's", "predicted", "measured", "quartiles"),
                (
                    f"{1e3 * one:.1f} ms",
                    f"{1e3 * four:.1f} ms",
                    f"{1e3 * costs.draft_s:.1f} ms",
                    f"{predicted:.3f}",
                    f"{found:.3f}",
                    f"{low:.3f} to {high:.3f}",
                ),
            ]
        )
    )
    bar.details["ratios"] = ratios
    bar.require(
        f"{own.accepted} of {own.drafted} drafted tokens were accepted", own.accepted == own.drafted > 0
    )
    bar.require(
        f"{found:.3f} is {found / predicted:.3f} of {predicted:.3f} >= {LEAST}",
        found >= LEAST * predicted,
    )


def made() -> tuple[Path, Path]:
    """The model and its exit, made once."""
    shape = shape_file("1b")
    model = shape.with_name(f"{shape.stem}-early-{LAYER}.gguf")
    exit_path = model.with_name(f"{model.stem}.exit.gguf")
    if not model.exists():
        partial = model.with_suffix(".part")
        shutil.copyfile(shape, partial)
        header = read_gguf_header(shape)
        places = places_of(header)
        with partial.open("r+b") as file:
            for tensor in header.tensors:
                if is_late(tensor.name) and tensor.name.endswith(_WRITING):
                    file.seek(places[tensor.name][1])
                    file.write(bytes(tensor.num_bytes))  # blocks whose scale is 0
        partial.replace(model)
    if not exit_path.exists():
        write_own_exit(read_gguf_header(model), exit_path)
    return model, exit_path


def is_late(name: str) -> bool:
    parts = name.split(".")
    return parts[0] == "blk" and int(parts[1]) >= LAYER


def write_own_exit(header: GgufHeader, path: Path) -> None:
    """The first of the layers that change nothing, and a head of every token that answers are of."""
    places, first = places_of(header), f"blk.{LAYER}."
    tensors = {}
    for tensor in header.tensors:
        if tensor.name.startswith(first) or tensor.name == "output_norm.weight":
            data = stored_bytes(*places[tensor.name], tensor.num_bytes).tobytes()
            name = tensor.name.replace(first, "blk.0.")
            tensors[name] = ExitTensor(tensor.type_name, tensor.shape, data)
    vocab = header.get_length("tokenizer.ggml.tokens") or 0
    write_exit_file(
        path,
        fingerprint=fingerprint(header),
        model_name=header.path.stem,
        layer=LAYER,
        new_layers=1,
        kept=np.arange(vocab, dtype=np.int32),
        tensors=tensors,
        told={"agreement": [0.95]},
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=100, help="of each answer")
    parser.add_argument("--threads", type=int, default=2)


if __name__ == "__main__":
    sys.exit(run_bar(__file__, str(__doc__), measure, add_options))
