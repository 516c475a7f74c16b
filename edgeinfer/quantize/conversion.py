"""A model's weights in another form, unquantized: safetensors to GGUF and back, where a user asked for
it.

plan = plan_conversion(source_of_folder(folder), folder, to="gguf", dtype="f16", out=None, force=False)
convert(plan, progress)
"""

from __future__ import annotations

from pathlib import Path

from edgeinfer.errors import UsageError
from edgeinfer.quantize.folders import FOLDER_TYPES
from edgeinfer_models.conversion.conversion import (
    CONTAINERS,
    Container,
    Conversion,
    convert,
    lacking_room,
    prepare_conversion,
)
from edgeinfer_models.conversion.model import SourceModel
from edgeinfer_models.conversion.presets import PRESETS

DTYPES = ("f16", "bf16", "f32")
TYPES = tuple(name.lower() for name in PRESETS)


def plan_conversion(
    model: SourceModel, beside: Path, to: Container, dtype: str, out: Path | None, *, force: bool
) -> Conversion:
    """Everything that can be found out before a byte is written. beside: the model's own path, next to
    which the result lies unless `out` says where. Raises UsageError, UnsupportedModel,
    ModelFileInvalid."""
    if dtype not in DTYPES:
        known = ", ".join(("auto", *DTYPES, *TYPES, *FOLDER_TYPES))
        raise UsageError(f"--type {dtype[:40]!r} is not one of {known}")
    if to == "gguf" and model.form == "gguf":
        raise UsageError("the model is a GGUF file already; --to safetensors makes a folder of it")
    if to == "safetensors" and model.form == "safetensors":
        raise UsageError("the model is a folder of safetensors already; --to gguf makes a file of it")
    suffix = f"-{dtype}.gguf" if to == "gguf" else f"-{dtype}"
    target = out or beside.parent / f"{beside.name.removesuffix('.gguf')}{suffix}"
    planned = prepare_conversion(model, to, dtype.upper(), target, force=force)
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent}: no such folder; make it, or give another -o")
    lacking = lacking_room(target.parent, planned.num_bytes)
    if lacking:
        raise UsageError(f"{target}: {lacking}; free some, or give another -o")
    return planned


__all__ = ["CONTAINERS", "DTYPES", "Container", "Conversion", "convert", "plan_conversion"]
