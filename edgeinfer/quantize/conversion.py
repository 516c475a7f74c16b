"""A model's weights in another form, unquantized: safetensors to GGUF and back.

plan = plan_conversion("folder", to="gguf", dtype="f16")
convert(plan, progress)
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgeinfer.errors import UsageError
from edgeinfer_models.conversion.model import SourceModel
from edgeinfer_models.conversion.to_gguf import GgufPlan, rule_bytes, write_gguf
from edgeinfer_models.conversion.to_safetensors import write_safetensors

Container = Literal["gguf", "safetensors"]
CONTAINERS: tuple[Container, ...] = ("gguf", "safetensors")
DTYPES = ("f16", "bf16", "f32")
SPARE_BYTES = 2**26  # of the disk, left to others
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Conversion:
    """notes: what the result does otherwise than the original, a line each."""

    model: SourceModel
    to: Container
    dtype: str
    out: Path
    force: bool
    num_bytes: int
    notes: tuple[str, ...]


def plan_conversion(
    model: SourceModel, beside: Path, to: Container, dtype: str, out: Path | None, *, force: bool
) -> Conversion:
    """Everything that can be found out before a byte is written. beside: the model's own path, next to
    which the result lies unless `out` says where. Raises UsageError, UnsupportedModel,
    ModelFileInvalid."""
    if dtype not in DTYPES:
        raise UsageError(f"--type {dtype[:40]!r} is not one of {', '.join(DTYPES)} (others come later)")
    if to == "gguf" and model.form == "gguf":
        raise UsageError("the model is a GGUF file already; --to safetensors makes a folder of it")
    if to == "safetensors" and model.form == "safetensors":
        raise UsageError("the model is a folder of safetensors already; --to gguf makes a file of it")
    rules = model.family.rules(model.shape)
    num_bytes = sum(rule_bytes(rule, dtype.upper()) for rule in rules)
    if to == "gguf":
        model.family.shape_to_gguf(model.shape)  # says now what llama.cpp computes otherwise
    suffix = f"-{dtype}.gguf" if to == "gguf" else f"-{dtype}"
    target = out or beside.parent / f"{beside.name.removesuffix('.gguf')}{suffix}"
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent}: no such folder; make it, or give another -o")
    free = shutil.disk_usage(target.parent).free
    if free < num_bytes + SPARE_BYTES:
        raise UsageError(
            f"{target}: needs {num_bytes / 1e9:.1f} GB where the disk has {free / 1e9:.1f} GB left;"
            " free some, or give another -o"
        )
    return Conversion(model, to, dtype, target, force, num_bytes, tuple(model.notes()))


def convert(plan: Conversion, progress: Progress = lambda _: None) -> None:
    """Raises ModelFileInvalid, UnsupportedModel, UsageError (the result is there), OSError. Then nothing
    is left of it."""
    model = plan.model
    if plan.to == "gguf":
        parts = GgufPlan(model.family, model.shape, plan.dtype.upper(), model.gguf_metadata())
        write_gguf(plan.out, model.source, parts, force=plan.force, progress=progress)
        return
    write_safetensors(
        plan.out,
        model.source,
        model.family.rules(model.shape),
        model.hf_files(),
        dtype=plan.dtype.upper(),
        progress=progress,
    )
