"""Decoding on an NVIDIA GPU: eager, as CUDA graphs, and compiled; as a share of what its memory can do.

The 1B and 8B shapes with weights of zeros in bf16, one conversation at 512 tokens of context. A token
reads all weights once, so tokens per second times the weights' bytes is the bandwidth that is used. What
can be had is measured beside it, by copying.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.alternate import table
from benchmarks.holes import SHAPE_1B, SHAPE_8B, write_holes
from benchmarks.verdict import Bar, run_bar
from edgeinfer.backend import RuntimeSettings, SequenceStep, Step
from edgeinfer.registry import get_backend
from edgeinfer_models.model_files import ModelFiles

CONTEXT, PROMPT, TOKENS = 2048, 512, 128
COPIED_BYTES = 2**31


def measure(bar: Bar) -> None:
    import torch

    if not torch.cuda.is_available():
        bar.require("there is a CUDA device", False)
        return
    most = bandwidth()
    bar.say(
        f"  {torch.cuda.get_device_name(0)}, torch {torch.__version__}: copies {most / 1e9:.0f} GB/s"
    )
    rows = [("shape", "decoding", "tok/s", "of the bandwidth")]
    for name, shape in (("1B", SHAPE_1B), ("8B", SHAPE_8B)):
        with tempfile.TemporaryDirectory(dir=bar.options.folder) as temporary:
            folder = Path(temporary) / name
            num_bytes = write_holes(folder, shape)
            for how in ("eager", "graphs", "compiled graphs"):
                speed = decoded(folder, how)
                share = speed * num_bytes / most
                rows.append((name, how, f"{speed:.1f}", f"{share:.0%}"))
                bar.details[f"{name}, {how}"] = {"tok/s": speed, "share": share}
    bar.say(table(rows))
    for name in ("1B", "8B"):
        eager, graphs = (bar.details[f"{name}, {how}"]["tok/s"] for how in ("eager", "graphs"))
        bar.require(f"{name}: graphs {graphs / eager:.2f} x eager >= 1", graphs >= eager)


def decoded(folder: Path, how: str) -> float:
    """Tokens per second."""
    paths = tuple(sorted(folder.glob("*.safetensors")))
    settings = RuntimeSettings(
        context=CONTEXT, kv_type_k="bf16", kv_type_v="bf16", compiled=how == "compiled graphs"
    )
    files = ModelFiles(folder.name, paths, "safetensors")
    runtime: Any = get_backend("torch").load(files, settings, lambda _: True)
    if how == "eager":
        runtime._static = None
    try:
        sequence = runtime.open()
        runtime.forward(Step([SequenceStep(sequence, [5] * PROMPT)]))
        for _ in range(8):  # records, compiles
            runtime.forward(Step([SequenceStep(sequence, [5])]))
        begin = time.perf_counter()
        for _ in range(TOKENS):  # each ends with its logits on the processor
            runtime.forward(Step([SequenceStep(sequence, [5])]))
        return TOKENS / (time.perf_counter() - begin)
    finally:
        runtime.close()


def bandwidth() -> float:
    """Bytes per second that are read and written in copying."""
    import torch

    one = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(one)
    other.copy_(one)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(10):
        other.copy_(one)
    torch.cuda.synchronize()
    return 10 * 2 * COPIED_BYTES / (time.perf_counter() - begin)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", help="where the files of zeros lie; default: the system's")


if __name__ == "__main__":
    sys.exit(run_bar(__file__, str(__doc__), measure, add_options))
