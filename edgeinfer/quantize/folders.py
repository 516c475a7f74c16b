"""Folders of quantized weights, for mlx-lm and for torch: what becomes of a model, and the doing of it.

plan = plan_folder(model, path, "mlx-4bit", None, out=None, options=FolderOptions())
write(plan, progress)

Numbers are rounded to the nearest, or are what `pieces_of` is given in the place of that
(fitted_folder.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgeinfer.errors import UsageError
from edgeinfer_models.conversion.affine import nearest
from edgeinfer_models.conversion.compressed_folder import KINDS, compressed_pieces, write_compressed
from edgeinfer_models.conversion.conversion import lacking_room
from edgeinfer_models.conversion.floats import FLOATS
from edgeinfer_models.conversion.folder_files import Piece, require_free
from edgeinfer_models.conversion.mlx_folder import mlx_pieces, packing_for, write_mlx
from edgeinfer_models.conversion.model import SourceModel
from edgeinfer_models.conversion.own_files import kept_as, stored_types
from edgeinfer_models.conversion.packed_rows import MLX_GROUPS, MlxPacking

if TYPE_CHECKING:
    from edgeinfer_models.conversion.affine import AffineEncode
    from edgeinfer_models.conversion.symmetric import Kind, SymmetricEncode

MLX_TYPES = {"mlx-4bit": 4, "mlx-8bit": 8}
FLOAT_TYPES = ("f16", "bf16", "f32")
FOLDER_TYPES = (*MLX_TYPES, *KINDS)
MLX_GROUP, TORCH_GROUP = 64, 32
FolderContainer = Literal["mlx", "safetensors"]
Progress = Callable[[float], None]


@dataclass(frozen=True)
class FolderOptions:
    """group: weights that share a scale; None: 64 for MLX, 32 for int4. scale_type: f16, bf16 or f32 of
    the scales and of all that is not packed; None: what the model's floats are."""

    group: int | None = None
    scale_type: str | None = None


@dataclass(frozen=True)
class FolderPlan:
    model: SourceModel
    type_name: str
    to: FolderContainer
    out: Path
    dtype: str | None
    group: int
    packing: MlxPacking | None
    pieces: Sequence[Piece]
    notes: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        return sum(piece.num_bytes for piece in self.pieces)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.num_bytes / sum(piece.num_weights for piece in self.pieces)


def is_folder_type(type_name: str | None, to: str | None) -> bool:
    """Whether a result of that type is a folder that is planned here."""
    return to == "mlx" or type_name in FOLDER_TYPES


def plan_folder(
    model: SourceModel,
    beside: Path,
    type_name: str | None,
    to: str | None,
    out: Path | None,
    options: FolderOptions,
) -> FolderPlan:
    """Everything that can be found out before a byte is written. type_name, to: as the user gave them,
    one of them at least. beside: the model's own path. Raises UsageError, UnsupportedModel,
    ModelFileInvalid."""
    kind = type_name or "mlx-4bit"
    container: FolderContainer = "mlx" if kind in MLX_TYPES or to == "mlx" else "safetensors"
    _check(kind, container, to, options)
    target = out or beside.parent / f"{beside.name.removesuffix('.gguf')}-{_suffix(kind, container)}"
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent}: no such folder; make it, or give another -o")
    require_free(target)
    asked = kind if kind in FLOAT_TYPES else options.scale_type
    dtype = asked.upper() if asked else kept_as(model)
    group = options.group or (MLX_GROUP if container == "mlx" else TORCH_GROUP)
    packing = None
    if container == "mlx":
        own = packing_for(model, MLX_TYPES.get(kind, 8), group)
        packing = own if kind in MLX_TYPES else None
    else:
        dtype = dtype or _widest(model)
    plan = FolderPlan(model, kind, container, target, dtype, group, packing, (), ())
    plan = replace(plan, pieces=pieces_of(plan))
    lacking = lacking_room(target.parent, plan.num_bytes)
    if lacking:
        raise UsageError(f"{target}: {lacking}; free some, or give another -o")
    return replace(plan, notes=tuple(_notes(plan)))


def pieces_of(
    plan: FolderPlan,
    *,
    rounding: Callable[[int, int], AffineEncode] = nearest,
    encode: SymmetricEncode | None = None,
) -> Sequence[Piece]:
    """rounding: see `mlx_pieces`. encode: see `compressed_pieces`. Raises ModelFileInvalid."""
    if plan.to == "mlx":
        return mlx_pieces(plan.model, plan.packing, dtype=plan.dtype, rounding=rounding)
    assert plan.dtype is not None  # noqa: S101 (there is always one, of these)
    kind = kind_of(plan.type_name)
    return compressed_pieces(plan.model, kind, plan.dtype, group=plan.group, encode=encode)


def write(plan: FolderPlan, progress: Progress = lambda _: None) -> None:
    """Raises ModelFileInvalid, UnsupportedModel, UsageError (the folder is there and not empty),
    OSError. Then nothing is left of it."""
    if plan.to == "mlx":
        write_mlx(plan.out, plan.model, plan.packing, plan.pieces, dtype=plan.dtype, progress=progress)
        return
    assert plan.dtype is not None  # noqa: S101 (there is always one, of these)
    write_compressed(
        plan.out,
        plan.model,
        kind_of(plan.type_name),
        plan.pieces,
        plan.dtype,
        group=plan.group,
        progress=progress,
    )


def _check(kind: str, container: FolderContainer, to: str | None, options: FolderOptions) -> None:
    if kind not in (*FOLDER_TYPES, *FLOAT_TYPES) or (container == "mlx" and kind in KINDS):
        known = ", ".join((*MLX_TYPES, *FLOAT_TYPES) if container == "mlx" else KINDS)
        raise UsageError(f"--type {kind[:40]}: a folder for --to {container} is of {known}")
    if to is not None and to != container:
        raise UsageError(f"--type {kind} is a type of folders: --to {container}, or leave --to out")
    if options.group is not None:
        if kind not in MLX_TYPES and kind != "int4":
            raise UsageError(f"--group-size is for {', '.join(MLX_TYPES)} and int4, not for {kind}")
        if options.group not in MLX_GROUPS:
            raise UsageError(f"--group-size {options.group} is not one of 32, 64, 128")
    if options.scale_type is not None:
        if options.scale_type not in FLOAT_TYPES:
            known = ", ".join(FLOAT_TYPES)
            raise UsageError(f"--scale-type {options.scale_type[:40]!r} is not one of {known}")
        if kind in FLOAT_TYPES:
            raise UsageError(f"--scale-type is for packed weights, and {kind} packs none")


def _suffix(kind: str, container: FolderContainer) -> str:
    return f"mlx-{kind}" if container == "mlx" and kind in FLOAT_TYPES else kind


def kind_of(name: str) -> Kind:
    """Of compressed-tensors' forms."""
    return next(kind for kind in KINDS if kind == name)


def _widest(model: SourceModel) -> str:
    sizes: dict[str, int] = {}
    for kind, num_bytes in stored_types(model):
        sizes[kind] = sizes.get(kind, 0) + num_bytes
    return max(sizes, key=lambda kind: sizes[kind])


def _notes(plan: FolderPlan) -> list[str]:
    found = [] if plan.model.form == "safetensors" else list(plan.model.notes())
    kinds = {kind for kind, _ in stored_types(plan.model)}
    packed = sorted(kind for kind in kinds if kind not in FLOATS or kind.startswith("F8"))
    if packed and plan.type_name not in FLOAT_TYPES:
        found.append(
            f"its weights are quantized already ({', '.join(packed[:3])}): quantized again they lose"
            " more than the original's would"
        )
    odd = [
        piece.tensors[0].name
        for piece in plan.pieces
        if len(piece.tensors) == 1 and len(piece.tensors[0].shape) > 1
    ]
    if plan.packing is not None and odd:
        found.append(
            f"{len(odd)} matrices have rows that are no whole groups of {plan.group} and stay as they"
            " are, as mlx-lm does it"
        )
    if plan.packing is not None and plan.dtype != "F32":
        found.append(
            "scales are of 16 bits, as mlx-lm has them: right for Apple's GPUs, slow on MLX's build for"
            " the processor, where --scale-type f32 was many times faster"
        )
    if plan.to == "safetensors":
        found.append("embeddings, head and norms stay as they are; other programs want them so")
    return found
