"""What an exit learnt, as a file: its layers under their names in GGUF, in few bits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeinfer.backend import RowQuantizer
from edgeinfer.exits import ExitPlace
from edgeinfer_models.conversion.model import source_of_gguf
from edgeinfer_models.exit_file import ExitTensor, fingerprint, write_exit_file
from edgeinfer_models.families.changes import to_gguf
from edgeinfer_models.gguf_header import GgufHeader

if TYPE_CHECKING:
    from edgeinfer.exits import Floats, Tokens

_NORM = "norm.weight"
_WHOLE = 32  # numbers in a block of Q8_0


def write_exit(
    path: Path,
    model: GgufHeader,
    place: ExitPlace,
    weights: Mapping[str, Floats],
    kept: Tokens,
    told: Mapping[str, Any],
    rows: RowQuantizer,
    *,
    force: bool = False,
) -> None:
    """weights: as `ExitTrainer.weights` gives them. Raises UsageError where a file is there, OSError."""
    write_exit_file(
        path,
        fingerprint=fingerprint(model),
        model_name=model.get_str("general.name") or model.path.stem,
        layer=place.layer,
        new_layers=place.new_layers,
        kept=kept,
        tensors=exit_tensors(model, place, weights, rows),
        told=told,
        force=force,
    )


def exit_tensors(
    model: GgufHeader, place: ExitPlace, weights: Mapping[str, Floats], rows: RowQuantizer
) -> dict[str, ExitTensor]:
    """Matrices in Q8_0 (F16 where their rows are no whole blocks), the rest in F32."""
    source = source_of_gguf(model.path)
    found: dict[str, ExitTensor] = {}
    for number in range(place.new_layers):
        for rule in source.family.rules(source.shape):
            if rule.layer != 0:
                continue
            parts = [weights[name.replace("model.layers.0.", f"layers.{number}.")] for name in rule.hf]
            values = to_gguf(parts[0], rule.change, rule.heads)
            name = rule.gguf.replace("blk.0.", f"blk.{number}.")
            found[name] = _tensor(values, rows)
    found["output_norm.weight"] = _tensor(weights[_NORM], rows)
    return found


def _tensor(values: Floats, rows: RowQuantizer) -> ExitTensor:
    shape = tuple(reversed(values.shape))
    values = np.ascontiguousarray(values, dtype=np.float32)
    if values.ndim == 1:
        return ExitTensor("F32", shape, values.astype("<f4").tobytes())
    if shape[0] % _WHOLE:
        return ExitTensor("F16", shape, values.astype("<f2").tobytes())
    return ExitTensor("Q8_0", shape, rows.quantize("Q8_0", values).tobytes())
