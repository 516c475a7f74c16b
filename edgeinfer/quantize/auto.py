"""`--type auto`: the table of types for one model on this machine, and the choice from it.

found = choose_automatically(source, path, None, folder, measure_kl, max_kl=0.05)

`edgeinfer tune` reads the same table (`type_table`): what was measured is kept by machine and shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgeinfer.backend import RuntimeSettings
from edgeinfer.errors import EdgeInferError
from edgeinfer.machine.ledger import MARGIN
from edgeinfer.machine.probe import probe_machine
from edgeinfer.quantize.candidates import Candidate, candidates
from edgeinfer.quantize.choice import MeasureKl, TypeChoice, TypeRow, choose_type
from edgeinfer.quantize.importance import NamedImatrix
from edgeinfer.quantize.quantization import Source
from edgeinfer.quantize.type_speeds import BACKEND, Progress, measure_type_speeds
from edgeinfer.registry import get_backend
from edgeinfer_models.config import ModelConfig, config_from_gguf, config_from_hf
from edgeinfer_models.gguf_header import GgufHeader
from edgeinfer_models.model_files import ModelFiles

_CONTEXT = 4096  # that a model is to have room for, or its own if that is less


@dataclass(frozen=True)
class TypeTable:
    """notes: what was left out, a line each."""

    rows: tuple[TypeRow, ...]
    notes: tuple[str, ...]


def type_table(
    source: Source,
    path: Path,
    out: Path | None,
    folder: Path,
    *,
    imatrix: NamedImatrix | None = None,
    refresh: bool = False,
    progress: Progress = lambda *_: None,
) -> TypeTable:
    """Every type with its speed here, size and memory, without its error. path: the model's own; out:
    where a result is to go. folder: of what was measured of this machine. imatrix: what the result is
    weighed by: mixtures differ with one. Raises as candidates and
    measure_type_speeds do."""
    found, notes = candidates(source, path, out, imatrix)
    speeds, left_out = measure_type_speeds(source, found, folder, refresh=refresh, progress=progress)
    config = _config(source, path)
    rows = [
        TypeRow(
            candidate.type_name,
            candidate.num_bytes,
            candidate.bits_per_weight,
            speed.prefill_tok_s,
            speed.decode_tok_s,
            speed.spread,
            _memory_bytes(candidate, config),
            kl=0.0 if candidate.is_original else None,
            is_original=candidate.is_original,
        )
        for candidate in found
        if (speed := speeds.get(candidate.type_name)) is not None
    ]
    return TypeTable(tuple(rows), (*notes, *left_out))


def choose_automatically(table: TypeTable, measure_kl: MeasureKl, max_kl: float | None) -> TypeChoice:
    """measure_kl: of a type of the table, from the model as it is. Raises NoTypeFits."""
    return choose_type(table.rows, max_kl, probe_machine().available_bytes, measure_kl)


def shown_table(rows: Sequence[TypeRow]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and cells, for eyes."""
    heads = ("type", "MB", "bits", "prefill tok/s", "decode tok/s", "± %", "answer s", "KL", "")
    return heads, [
        (
            row.type_name + (" (as it is)" if row.is_original else ""),
            f"{row.num_bytes / 1e6:.0f}",
            f"{row.bits_per_weight:.2f}",
            f"{row.prefill_tok_s:.1f}",
            f"{row.decode_tok_s:.1f}",
            f"{50 * row.spread:.1f}",
            f"{row.answer_s:.2f}",
            "" if row.kl is None else f"{row.kl:.4f}",
            row.verdict,
        )
        for row in rows
    ]


def _config(source: Source, path: Path) -> ModelConfig | None:
    try:
        return config_from_gguf(source) if isinstance(source, GgufHeader) else config_from_hf(path)
    except EdgeInferError:  # it can be measured and written all the same
        return None


def _memory_bytes(candidate: Candidate, config: ModelConfig | None) -> int:
    """Of running it, with what a prediction may be wrong by."""
    if config is None:
        return candidate.num_bytes
    backend = get_backend(BACKEND)
    files = ModelFiles("", (), "gguf", weight_types=candidate.weight_types)
    own = replace(
        config,
        weights=(),
        weights_bytes=candidate.num_bytes,
        quantization=candidate.type_name.upper(),
    )
    context = min(_CONTEXT, config.context_trained or _CONTEXT)
    items = backend.predict_memory(files, own, RuntimeSettings(context=context))
    return int(sum(item.num_bytes for item in items) * (1 + MARGIN))
