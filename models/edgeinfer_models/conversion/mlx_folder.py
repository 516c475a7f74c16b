"""A model as a folder that mlx-lm loads, its matrices packed as `mlx_lm.convert -q` has them; made
without MLX.

packing = packing_for(model, bits=4, group=64)
pieces = mlx_pieces(model, packing, dtype="F16")
write_mlx(folder, model, packing, pieces, dtype="F16")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeinfer.errors import UnsupportedModel
from edgeinfer_models.conversion.affine import nearest
from edgeinfer_models.conversion.bit_packing import WORD_BITS, pack_codes
from edgeinfer_models.conversion.floats import from_float32, to_float32
from edgeinfer_models.conversion.folder_files import Piece, Progress, StoredTensor, write_folder
from edgeinfer_models.conversion.model import SourceModel
from edgeinfer_models.conversion.own_files import TORCH_NAMES, config_and_files, config_text
from edgeinfer_models.conversion.packed_rows import MIXTRAL_NAMES, STACKED, MlxPacking
from edgeinfer_models.conversion.sources import TensorSource
from edgeinfer_models.conversion.to_gguf import check_tensors
from edgeinfer_models.conversion.to_safetensors import float_rows, plain_piece
from edgeinfer_models.families.tensors import TensorRule

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgeinfer_models.conversion.affine import AffineEncode

    Array = npt.NDArray[Any]

# Types of config.json that mlx-lm 0.32 has a class for, of the families that are known here.
MLX_LM_TYPES = frozenset((
    "gemma2", "gemma3_text", "granite", "llama", "mistral", "mixtral", "olmo2", "phi3", "qwen2",
    "qwen2_moe", "qwen3", "qwen3_moe",
))  # fmt: skip
# Layers that mlx-lm's classes want in 8 bits and groups of 64, whatever the rest has.
_FINER = {
    "granite": ("self_attn.o_proj", "mlp.down_proj", "lm_head"),
    "qwen3_moe": ("mlp.gate",),
}
_FINER_PACKING = (8, 64)
_PART_WEIGHTS = 2**20  # rounded at a time
_HUGGING_FACE_NAMES = {name: known for known, name in MIXTRAL_NAMES.items()}


def packing_for(model: SourceModel, bits: int, group: int) -> MlxPacking:
    """bits: of MLX_BITS; group: of MLX_GROUPS. Raises UnsupportedModel."""
    kind = model.model_type
    if kind not in MLX_LM_TYPES:
        raise UnsupportedModel(
            f"mlx-lm has no class for a {kind}; it has {', '.join(sorted(MLX_LM_TYPES))}"
        )
    own = {
        stem: _FINER_PACKING
        for rule in model.family.rules(model.shape)
        for stem, _ in _modules(rule)
        if _is_packed(rule, group) and stem.endswith(_FINER.get(kind, ()))
    }
    return MlxPacking(bits, group, own)


def mlx_pieces(
    model: SourceModel,
    packing: MlxPacking | None,
    *,
    dtype: str | None = None,
    rounding: Callable[[int, int], AffineEncode] = nearest,
) -> list[Piece]:
    """packing: None for plain numbers. dtype: F32, F16 or BF16 of everything that is not packed, scales
    among it; None: as the source has each. rounding: from bits and group to what makes rows into codes.
    Raises ModelFileInvalid."""
    rules = model.family.rules(model.shape)
    check_tensors(model.source, rules)
    pieces: list[Piece] = []
    for rule in rules:
        for stem, names in _modules(rule):
            stored = f"{stem}.weight" if rule.is_stack else ""
            packed = None if packing is None else packed_as(rule, packing)
            if packed is None:
                pieces.append(plain_piece(model.source, rule, names, dtype, stored))
                continue
            encode = rounding(*packed)
            pieces.append(_packed_piece(model.source, rule, stem, names, *packed, dtype, encode))
    return pieces


def write_mlx(
    folder: Path,
    model: SourceModel,
    packing: MlxPacking | None,
    pieces: Sequence[Piece],
    *,
    dtype: str | None = None,
    progress: Progress = lambda _: None,
) -> None:
    """Raises ModelFileInvalid, UnsupportedModel, UsageError (the folder is there and not empty),
    OSError. Then nothing is left of it."""
    config, files = config_and_files(model)
    if packing is not None:
        found: dict[str, Any] = {"group_size": packing.group, "bits": packing.bits, "mode": "affine"}
        found |= {
            stem: {"group_size": group, "bits": bits} for stem, (bits, group) in packing.own.items()
        }
        config |= {"quantization": found, "quantization_config": found}
    if dtype is not None:
        config.pop("dtype", None)
        config["torch_dtype"] = TORCH_NAMES[dtype]
    everything = {**files, "config.json": config_text(config)}
    write_folder(folder, pieces, everything, made_for="mlx", has_index=True, progress=progress)


def _modules(rule: TensorRule) -> Iterator[tuple[str, tuple[str, ...]]]:
    """mlx-lm's name of each module, and the tensors that it is made of; a bias and a norm count."""
    if not rule.is_stack:
        for name in rule.hf:
            yield name.removesuffix(".weight"), (name,)
        return
    room, _, rest = rule.hf[0].partition(".experts.0.")
    which = rest.removesuffix(".weight")
    yield f"{room}.{STACKED}.{_HUGGING_FACE_NAMES.get(which, which)}", rule.hf


def packed_as(rule: TensorRule, packing: MlxPacking) -> tuple[int, int] | None:
    """Bits and group of its matrices; None: they stay plain."""
    if not _is_packed(rule, packing.group):
        return None
    stem, _ = next(_modules(rule))  # a rule is one module
    bits, group = packing.own.get(stem, (packing.bits, packing.group))
    return None if rule.shape[-1] % group else (bits, group)


def _is_packed(rule: TensorRule, group: int) -> bool:
    """mlx-lm leaves rows that are no whole groups as they are."""
    return len(rule.shape) == 2 and rule.shape[1] % group == 0


def _packed_piece(
    source: TensorSource,
    rule: TensorRule,
    stem: str,
    names: tuple[str, ...],
    bits: int,
    group: int,
    dtype: str | None,
    encode: AffineEncode,
) -> Piece:
    wanted = dtype or source.info(names[0]).dtype
    rows, width = rule.shape
    outer = (len(names), rows) if rule.is_stack else (rows,)
    tensors = (
        StoredTensor(f"{stem}.weight", "U32", (*outer, width * bits // WORD_BITS)),
        StoredTensor(f"{stem}.scales", wanted, (*outer, width // group)),
        StoredTensor(f"{stem}.biases", wanted, (*outer, width // group)),
    )

    def parts() -> Iterator[tuple[Array, ...]]:
        step = max(_PART_WEIGHTS // width, 1)
        for name in names:
            for first, found in float_rows(source, rule, name, wanted):
                for start in range(0, found.shape[0], step):
                    some = to_float32(found[start : start + step], wanted)
                    codes, scales, biases = encode(name, some, first + start)
                    stored = (from_float32(scales, wanted), from_float32(biases, wanted))
                    yield (pack_codes(codes, bits), *stored)

    return Piece(tensors, parts, len(names) * rows * width)
