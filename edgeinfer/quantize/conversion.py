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
from edgeinfer_models.conversion.new_file import require_place
from edgeinfer_models.conversion.presets import PRESETS

DTYPES = ("f16", "bf16", "f32")
TYPES = tuple(name.lower() for name in PRESETS)


def check_type(name: str) -> None:
    """Of `--type`. Raises UsageError."""
    known = ("auto", *DTYPES, *TYPES, *FOLDER_TYPES)
    if name not in known:
        raise UsageError(f"--type {name[:40]!r} is not one of {', '.join(known)}")


def plan_conversion(
    model: SourceModel, beside: Path, to: Container, dtype: str, out: Path | None, *, force: bool
) -> Conversion:
    """Everything that can be found out before a byte is written. beside: the model's own path, next to
    which the result lies unless `out` says where. Raises UsageError, UnsupportedModel,
    ModelFileInvalid."""
    check_type(dtype)
    if dtype not in DTYPES:
        raise UsageError(f"--type {dtype}: of --to {to} are {', '.join(DTYPES)}")
    if to == "gguf" and model.form == "gguf":
        raise UsageError(
            f"the model is a GGUF file already, and its floats are not changed there; --to safetensors"
            f" makes a folder of it, of which --type {dtype} makes a file again"
        )
    if to == "safetensors" and model.form == "safetensors":
        raise UsageError("the model is a folder of safetensors already; --to gguf makes a file of it")
    suffix = f"-{dtype}.gguf" if to == "gguf" else f"-{dtype}"
    target = out or beside.parent / f"{beside.name.removesuffix('.gguf')}{suffix}"
    if to == "gguf":
        require_place(target, beside, force=force)
    planned = prepare_conversion(model, to, dtype.upper(), target, force=force)
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent}: no such folder; make it, or give another -o")
    lacking = lacking_room(target.parent, planned.num_bytes)
    if lacking:
        raise UsageError(f"{target}: {lacking}; free some, or give another -o")
    return planned


__all__ = ["CONTAINERS", "DTYPES", "Container", "Conversion", "check_type", "convert", "plan_conversion"]
