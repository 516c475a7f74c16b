"""Every kind of folder that `quantize` writes is what it says, opens where it should, and answers.

From the starter, in F16 (or from its own packed file, with --packed): the numbers read back lie within
half a step of the original's, the grid is the one that the scales span, mlx-lm or the torch backend
opens the folder and answers a question, and its tokens' probabilities are near the original's.

Of 4 bits also what text is worth: from a full-precision model off the grids (benchmarks/off_grid.py),
the divergence from it of folders rounded to nearest, by gptq and by awq+gptq, on unseen text of two
kinds (half of it of the calibration text's), in windows of 512 tokens, and what each answers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.alternate import table
from benchmarks.model_files import starter, starter_f16
from benchmarks.off_grid import off_grid
from benchmarks.quality_texts import MEASURED, quality_text
from benchmarks.verdict import Bar, run_bar
from edgeinfer.backend import Runtime, RuntimeSettings
from edgeinfer.measure.texts import measured_text
from edgeinfer.quality.agreement import agreement
from edgeinfer.quality.predictions import CHUNK
from edgeinfer.quality.reference import Reference, agreement_with, write_reference
from edgeinfer.quality.windows import windows_of
from edgeinfer.quantize.fitted_folder import fit_folder
from edgeinfer.quantize.folders import FolderOptions, FolderPlan, plan_folder, write
from edgeinfer.registry import get_backend
from edgeinfer_models.conversion.floats import to_float32
from edgeinfer_models.conversion.model import source_of_folder, source_of_gguf
from edgeinfer_models.conversion.sources import SafetensorsSource
from edgeinfer_models.model_files import ModelFiles

QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
# The largest mean KL to the original's probabilities; wide: what is sane, not what is good.
MOST_KL = {"mlx-4bit": 0.9, "mlx-8bit": 0.01, "int8": 0.01, "int4": 0.9, "fp8": 0.05}
# Half a step, of the largest weight of a row or group; affine groups reach from end to end.
MOST_OFF = {"mlx-4bit": 0.14, "mlx-8bit": 0.01, "int8": 0.006, "int4": 0.075, "fp8": 0.04}
TOKENS = 384
FITTED = ("mlx-4bit", "int4")
METHODS = ("rtn", "gptq", "awq+gptq")
UNSEEN_TOKENS = 5_000
CALIBRATION_TOKENS = 8_192
WINDOW = 512
SETTINGS = RuntimeSettings(
    context=512, logit_rows=CHUNK, threads=1, threads_batch=1, gpu_layers=0, load_as="f32"
)


def measure(bar: Bar) -> None:
    if not bar.options.only_fitted:
        every_kind(bar)
    what_text_is_worth(bar)


def every_kind(bar: Bar) -> None:
    path = starter() if bar.options.packed else starter_f16()
    reference = opened(path)
    text = measured_text(None)
    tokens = reference.tokenizer.encode(text, add_special=False, parse_special=False)[:TOKENS]
    rows = [("type", "MB", "bits each", "s", "furthest off", "mean KL", "answer")]
    with tempfile.TemporaryDirectory() as folder:
        for name, most in MOST_KL.items():
            plan = planned(path, name, Path(folder) / name)
            begin = time.perf_counter()
            write(plan)
            seconds = time.perf_counter() - begin
            off, levels = grid(plan)
            runtime = opened(plan.out)
            kl = agreement(runtime, reference, tokens).mean_kl
            runtime.close()
            said = answer(name, plan.out)
            size = sum(file.stat().st_size for file in plan.out.iterdir())
            figures = (f"{size / 1e6:.1f}", f"{plan.bits_per_weight:.2f}", f"{seconds:.1f}")
            rows.append((name, *figures, f"{off:.4f}", f"{kl:.4f}", said[:40].replace("\n", " ")))
            bar.require(f"{name}: furthest off {off:.4f} <= {MOST_OFF[name]}", off <= MOST_OFF[name])
            bar.require(
                f"{name}: {levels} levels a group <= {1 << bits(name)}", levels <= 1 << bits(name)
            )
            bar.require(f"{name}: mean KL {kl:.4f} <= {most}", kl <= most)
            bar.require(f"{name}: answers in words: {said[:40]!r}", is_sane(said))
    reference.close()
    bar.say(table(rows))
    bar.details["folders"] = rows


def what_text_is_worth(bar: Bar) -> None:
    original = off_grid()
    rows = [("folder", "MB", "KL mean", "median", "p99", "same token", "minutes", "answer")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(bar.options.folder or temporary)
        folder.mkdir(exist_ok=True)
        runtime = opened(original)
        windows = windows_of(runtime, quality_text(MEASURED), bar.options.tokens, WINDOW)
        kept = folder / f"predictions-{bar.options.tokens}"
        with kept.open("w+b") as file:
            write_reference(file, runtime, windows)
        runtime.close()
        for name in FITTED:
            means = {}
            for method in METHODS:
                out = folder / f"{name}-{method}"
                took = "" if out.exists() else f"{made(planned(original, name, out), method):.1f}"
                runtime = opened(out)
                with kept.open("rb") as file:
                    own = agreement_with(Reference.read(file), runtime, windows)
                runtime.close()
                means[method] = own.mean_kl
                kl = (f"{own.mean_kl:.4f}", f"{own.median_kl:.4f}", f"{own.p99_kl:.3f}")
                said = answer(name, out)[:60].replace("\n", " ")
                size = sum(file.stat().st_size for file in out.iterdir())
                told = (f"{own.top1:.1%}", took, said)
                rows.append((f"{name} {method}", f"{size / 1e6:.1f}", *kl, *told))
                print(rows[-1], file=sys.stderr, flush=True)
            for method in METHODS[1:]:
                share = means[method] / means["rtn"]
                bar.require(f"{name}: {method} {share:.3f} of rtn's KL < 1", share < 1)
    bar.say(table(rows))
    bar.details["fitted"] = rows


def planned(path: Path, name: str, out: Path) -> FolderPlan:
    # MLX's products on the processor are 45 times slower with scales of 16 bits.
    options = FolderOptions(scale_type="f32" if name.startswith("mlx") else None)
    return plan_folder(source_of_gguf(path), path, name, None, out, options)


def made(plan: FolderPlan, method: str) -> float:
    """How many minutes it took."""
    begin = time.perf_counter()
    if method == "rtn":
        write(plan)
    else:
        fitted = fit_folder(plan, method, None, CALIBRATION_TOKENS)
        write(fitted.plan)
        fitted.finished.remove()
    return (time.perf_counter() - begin) / 60


def opened(path: Path) -> Runtime:
    """A GGUF file or a folder."""
    if path.is_dir():
        files = ModelFiles(path.name, (path / "model.safetensors",), "safetensors")
    else:
        files = ModelFiles("reference", (path,), "gguf")
    return get_backend("torch").load(files, SETTINGS, lambda _: True)


def answer(name: str, folder: Path) -> str:
    return answer_of_mlx(folder) if name.startswith("mlx") else answer_of_torch(folder)


def bits(name: str) -> int:
    return 4 if name in ("mlx-4bit", "int4") else 8


def grid(plan: FolderPlan) -> tuple[float, int]:
    """How far the furthest number read back is off, as a share of the largest of its row or group, and
    the most levels that one group has."""
    import numpy as np

    original, packed = plan.model.source, source_of_folder(plan.out).source
    assert isinstance(packed, SafetensorsSource)
    furthest, levels = 0.0, 0
    for layer in (0, plan.model.shape.num_layers - 1):
        for which in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"):
            name = f"model.layers.{layer}.{which}.weight"
            count, width = packed.info(name).shape
            matrix = packed.packed(name)
            group = matrix.group if matrix is not None else width
            before = to_float32(original.rows(name, 0, count), original.info(name).dtype)
            before = before.reshape(-1, group)
            after = to_float32(packed.rows(name, 0, count), "F32").reshape(-1, group)
            largest = np.abs(before).max(axis=1, keepdims=True)
            furthest = max(furthest, float((np.abs(after - before) / largest).max()))
            levels = max(levels, *(np.unique(row).size for row in after[::97]))
    return furthest, levels


def answer_of_mlx(folder: Path) -> str:
    import mlx.core as mx
    import mlx_lm

    mx.set_default_device(mx.cpu)
    model, tokenizer = mlx_lm.load(str(folder))[:2]
    return str(mlx_lm.generate(model, tokenizer, QUESTION, max_tokens=24))


def answer_of_torch(folder: Path) -> str:
    from edgeinfer.backend import SequenceStep, Step

    files = ModelFiles(folder.name, (folder / "model.safetensors",), "safetensors")
    runtime: Any = get_backend("torch").load(files, replace(SETTINGS, load_as="auto"), lambda _: True)
    sequence = runtime.open()
    given = runtime.tokenizer.encode(QUESTION, add_special=False, parse_special=True)
    found: list[int] = []
    while len(found) < 24:
        result = runtime.forward(Step([SequenceStep(sequence, list(given), "last")]))
        token = int(runtime.logits(result.starts[0]).argmax())
        if runtime.tokenizer.is_end(token):
            break
        found.append(token)
        given = [token]
    text = str(runtime.tokenizer.decode(found))
    runtime.close()
    return text


def is_sane(text: str) -> bool:
    """Several words, and not one of them again and again."""
    words = text.split()
    return len(words) >= 3 and len(set(words)) > len(words) // 3 and "\ufffd" not in text


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--packed", action="store_true", help="begin with the starter as it is")
    parser.add_argument("--only-fitted", action="store_true", help="only what text is worth")
    parser.add_argument("--folder", help="where those are made, and taken from if they are there")
    parser.add_argument("--tokens", type=int, default=UNSEEN_TOKENS)


if __name__ == "__main__":
    sys.exit(run_bar(__file__, str(__doc__), measure, add_options))
