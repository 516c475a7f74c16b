"""A model's weights in another form, unquantized: what it takes, and the doing of it.

planned = prepare_conversion(source_of_folder(folder), "gguf", "F16", Path("out.gguf"))
convert(planned, progress)
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgeinfer_models.conversion.model import SourceModel
from edgeinfer_models.conversion.to_gguf import FILE_TYPES, GgufPlan, rule_bytes, write_gguf
from edgeinfer_models.conversion.to_safetensors import write_safetensors

Container = Literal["gguf", "safetensors"]
CONTAINERS: tuple[Container, ...] = ("gguf", "safetensors")
CONTAINER_NAMES: dict[Container, str] = {"gguf": "GGUF", "safetensors": "safetensors"}
SPARE_BYTES = 2**26  # of the disk, left to others
Progress = Callable[[float], None]  # given the share that is done; may raise, and nothing is left


@dataclass(frozen=True)
class Conversion:
    """dtype: F32, F16 or BF16. num_bytes: of the result's weights. notes: what the result does otherwise
    than the original, a line each."""

    model: SourceModel
    to: Container
    dtype: str
    out: Path
    force: bool
    num_bytes: int
    notes: tuple[str, ...]


def prepare_conversion(
    model: SourceModel, to: Container, dtype: str, out: Path, *, force: bool = False
) -> Conversion:
    """What can be found out of the model before a byte is written. to: not the form it has. Raises
    UnsupportedModel."""
    rules = model.family.rules(model.shape)
    if to == "gguf":
        model.family.shape_to_gguf(model.shape)  # says now what llama.cpp computes otherwise
    num_bytes = sum(rule_bytes(rule, dtype) for rule in rules)
    return Conversion(model, to, dtype, out, force, num_bytes, tuple(model.notes()))


def convert(planned: Conversion, progress: Progress = lambda _: None) -> None:
    """Raises ModelFileInvalid, UnsupportedModel, UsageError (the result is there), OSError. Then nothing
    is left of it."""
    model = planned.model
    if planned.to == "gguf":
        parts = GgufPlan(model.family, model.shape, planned.dtype, model.gguf_metadata())
        write_gguf(planned.out, model.source, parts, force=planned.force, progress=progress)
        return
    write_safetensors(
        planned.out,
        model.source,
        model.family.rules(model.shape),
        model.hf_files(),
        dtype=planned.dtype,
        progress=progress,
    )


def lacking_room(folder: Path, num_bytes: int) -> str:
    """What a disk lacks for a result of so many bytes, as the middle of a sentence; "" if nothing. May
    raise OSError."""
    free = shutil.disk_usage(folder).free
    if free >= num_bytes + SPARE_BYTES:
        return ""
    return f"needs {num_bytes / 1e9:.1f} GB where the disk has {free / 1e9:.1f} GB left"


def kept_dtype(weight_types: Iterable[tuple[str, int]]) -> str:
    """F32, F16 or BF16: the type in which a model's weights stay what they are.

    weight_types: (type of safetensors or ggml, bytes). Matrices that are plain floats stay bit for bit.
    Weights of fewer bits become F16: what they stand for is rounded there by at most 1 part in 2,048, a
    small part of what quantizing had lost; BF16 would round it eight times as much, and F32 take twice
    the memory for differences that no answer shows.
    """
    sizes: dict[str, int] = {}
    for kind, num_bytes in weight_types:
        sizes[kind] = sizes.get(kind, 0) + num_bytes
    most = max(sizes, key=lambda kind: sizes[kind], default="F16")
    if most == "F64":
        return "F32"
    has_fewer_bits = any(kind not in FILE_TYPES and kind != "F64" for kind in sizes)
    return most if most in FILE_TYPES and not (most == "BF16" and has_fewer_bits) else "F16"
