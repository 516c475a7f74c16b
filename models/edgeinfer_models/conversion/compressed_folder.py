"""A model as a Hugging Face folder in compressed-tensors' forms, for transformers, vLLM and our torch
backend: the layers' matrices in int8 or fp8 with a scale for each row, or in int4 with one for each
group. Embeddings, head, norms and routers stay as they are.

Source: compressed-tensors 0.20, its forms "pack-quantized" and "float-quantized", and the schemes that
it knows as W8A16 (here with a scale for each row), W4A16 and FP8_DYNAMIC. Not its W8A8: programs then
round inputs to int8 too, and a small model's outliers do not survive that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeinfer_models.conversion.bit_packing import WORD_BITS, pack_codes
from edgeinfer_models.conversion.floats import from_float32, to_float32
from edgeinfer_models.conversion.folder_files import Piece, Progress, StoredTensor, write_folder
from edgeinfer_models.conversion.model import SourceModel
from edgeinfer_models.conversion.own_files import TORCH_NAMES, config_and_files, config_text
from edgeinfer_models.conversion.sources import TensorSource
from edgeinfer_models.conversion.symmetric import Kind, nearest
from edgeinfer_models.conversion.to_gguf import check_tensors
from edgeinfer_models.conversion.to_safetensors import float_rows, plain_piece
from edgeinfer_models.families.tensors import TensorRule

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgeinfer_models.conversion.symmetric import SymmetricEncode

    Array = npt.NDArray[Any]

KINDS: tuple[Kind, ...] = ("int8", "int4", "fp8")
GROUPS = (32, 64, 128)  # of int4
BITS = {"int8": 8, "int4": 4, "fp8": 8}
ROUTERS = (".mlp.gate.weight", ".block_sparse_moe.gate.weight", ".shared_expert_gate.weight")
_PART_WEIGHTS = 2**20  # rounded at a time


def compressed_pieces(
    model: SourceModel,
    kind: Kind,
    dtype: str,
    *,
    group: int = 32,
    encode: SymmetricEncode | None = None,
) -> list[Piece]:
    """dtype: F32, F16 or BF16 of scales and of what is not packed. group: of int4's weights that share a
    scale. encode: what makes rows into codes; None: to nearest. Raises ModelFileInvalid."""
    rules = model.family.rules(model.shape)
    check_tensors(model.source, rules)
    pieces: list[Piece] = []
    for rule in rules:
        for name in rule.hf:
            if not is_packed(rule, kind, group):
                pieces.append(plain_piece(model.source, rule, (name,), dtype))
                continue
            shared = group_of(rule, kind, group)
            rounds = encode or nearest(kind, shared, dtype)
            pieces.append(_packed_piece(model.source, rule, name, kind, shared, dtype, rounds))
    return pieces


def write_compressed(
    folder: Path,
    model: SourceModel,
    kind: Kind,
    pieces: Sequence[Piece],
    dtype: str,
    *,
    group: int = 32,
    progress: Progress = lambda _: None,
) -> None:
    """Raises ModelFileInvalid, UnsupportedModel, UsageError (the folder is there and not empty),
    OSError. Then nothing is left of it."""
    config, files = config_and_files(model)
    config.pop("dtype", None)
    config["torch_dtype"] = TORCH_NAMES[dtype]
    plain = sorted(
        name.removesuffix(".weight")
        for rule in model.family.rules(model.shape)
        for name in rule.hf
        if len(rule.shape) == 2 and not is_packed(rule, kind, group) and "embed_tokens" not in name
    )
    # A tied head is a module of its own there.
    config["quantization_config"] = _quantization(kind, group, sorted({*plain, "lm_head"}))
    everything = {**files, "config.json": config_text(config)}
    write_folder(folder, pieces, everything, progress=progress)


def is_packed(rule: TensorRule, kind: Kind, group: int) -> bool:
    if len(rule.shape) != 2 or rule.layer < 0 or rule.hf[0].endswith(ROUTERS):
        return False
    unit = {"int4": group, "int8": WORD_BITS // 8, "fp8": 1}[kind]
    return rule.shape[1] % unit == 0


def group_of(rule: TensorRule, kind: Kind, group: int) -> int:
    """Entries of a row of that matrix that share a scale."""
    return group if kind == "int4" else rule.shape[1]


def _quantization(kind: Kind, group: int, ignored: list[str]) -> dict[str, Any]:
    of_floats = kind == "fp8"
    weights: dict[str, Any] = {
        "num_bits": BITS[kind],
        "type": "float" if of_floats else "int",
        "symmetric": True,
        "strategy": "group" if kind == "int4" else "channel",
        "group_size": group if kind == "int4" else None,
        "dynamic": False,
    }
    inputs = None
    if of_floats:  # programs with products of such numbers round the inputs row by row
        inputs = {**weights, "strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if of_floats else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": inputs,
                "output_activations": None,
            }
        },
        "ignore": ignored,
        "kv_cache_scheme": None,
    }


def _packed_piece(
    source: TensorSource,
    rule: TensorRule,
    name: str,
    kind: Kind,
    group: int,
    dtype: str,
    encode: SymmetricEncode,
) -> Piece:
    rows, width = rule.shape
    tensors: tuple[StoredTensor, ...]
    scales = StoredTensor(f"{name}_scale", dtype, (rows, width // group))
    bits = BITS[kind]
    if kind != "fp8":
        tensors = (
            StoredTensor(f"{name}_packed", "I32", (rows, width * bits // WORD_BITS)),
            scales,
            StoredTensor(f"{name}_shape", "I64", (2,)),
        )
    else:
        tensors = (StoredTensor(name, "F8_E4M3", rule.shape), scales)

    def parts() -> Iterator[tuple[Array, ...]]:
        import numpy as np

        step = max(_PART_WEIGHTS // width, 1)
        nothing = np.empty(0, "<i8")
        shape = np.asarray(rule.shape, "<i8")
        for first, found in float_rows(source, rule, name, dtype):
            for start in range(0, found.shape[0], step):
                some = to_float32(found[start : start + step], dtype)
                codes, factors = encode(name, some, first + start)
                stored = from_float32(factors, dtype)
                if kind == "fp8":
                    yield codes, stored
                    continue
                unsigned = codes.view(np.uint8) + np.uint8(1 << bits - 1)  # they wrap around
                yield pack_codes(unsigned, bits), stored, shape if first + start == 0 else nothing

    return Piece(tensors, parts, rows * width)
