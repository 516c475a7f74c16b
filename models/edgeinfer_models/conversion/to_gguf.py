"""A Hugging Face model as one GGUF file, a few rows at a time: memory is a few megabytes whatever its
size."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeinfer.errors import ModelFileInvalid
from edgeinfer_models.conversion.floats import HELD_AS, MOST_F16, recast, to_float32
from edgeinfer_models.conversion.new_file import NewFile
from edgeinfer_models.conversion.sources import TensorSource
from edgeinfer_models.conversion.tensor_data import (
    PART_BYTES,
    Encode,
    Part,
    TensorData,
    stored_data,
    write_tensors,
)
from edgeinfer_models.families.changes import to_gguf
from edgeinfer_models.families.family import Family
from edgeinfer_models.families.shape import DecoderShape
from edgeinfer_models.families.tensors import TensorRule
from edgeinfer_models.ggml_types import GGML_TYPES_BY_NAME, row_bytes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[Any]

ALIGNMENT = 32
CHUNK_BYTES = 2**24  # of F32 numbers at a time, where nothing asks for fewer
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}  # llama_ftype
Progress = Callable[[float], None]


@dataclass(frozen=True)
class GgufPlan:
    """What is to be written. dtype: of the matrices, F32, F16 or BF16; vectors are F32, as llama.cpp has
    them. metadata: beside the architecture's, with their whole keys; an int becomes u32, a float f32.
    types: of tensors that are to be quantized, by their GGUF names, with what makes rows into their
    blocks."""

    family: Family
    shape: DecoderShape
    dtype: str
    metadata: Mapping[str, Any]
    types: Mapping[str, str | None] = field(default_factory=dict)
    encode: Encode | None = None

    def type_of(self, rule: TensorRule) -> str:
        return self.types.get(rule.gguf) or dtype_of(rule, self.dtype)


def write_gguf(
    path: Path,
    source: TensorSource,
    plan: GgufPlan,
    *,
    stored: Mapping[str, Array] | None = None,
    threads: int = 0,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> None:
    """stored: the data of tensors that are known already, by their GGUF names. threads: 0: one for each
    core. Raises ModelFileInvalid (a tensor that is missing, of another shape, or not finite),
    UnsupportedModel, UsageError (the file is there), OSError."""
    rules = plan.family.rules(plan.shape)
    check_tensors(source, rules)
    head = model_head(plan)
    tensors = factor_tensors(plan)
    known = stored or {}
    of_rules = [
        stored_data(known[rule.gguf])
        if rule.gguf in known
        else TensorData(
            tensor_bytes(rule, plan.type_of(rule)),
            tensor_parts(source, rule, plan.type_of(rule), plan.encode),
        )
        for rule in rules
    ]
    assert all(
        each.num_bytes == tensor_bytes(rule, plan.type_of(rule))
        for each, rule in zip(of_rules, rules, strict=True)
    )
    tensors += of_rules
    with NewFile(path, force=force) as new:
        new.file.write(head)
        write_tensors(new.file, tensors, ALIGNMENT, threads=threads, progress=progress)


def dtype_of(rule: TensorRule, dtype: str) -> str:
    return "F32" if len(rule.gguf_shape) == 1 or _is_router(rule) else dtype


def rule_bytes(rule: TensorRule, dtype: str) -> int:
    return tensor_bytes(rule, dtype_of(rule, dtype))


def tensor_bytes(rule: TensorRule, type_name: str) -> int:
    rows = 1
    for size in rule.gguf_shape[:-1]:
        rows *= size
    return rows * row_bytes(type_name, rule.gguf_shape[-1])


def check_tensors(source: TensorSource, rules: Sequence[TensorRule]) -> None:
    """Before anything is written: every tensor is there, with its shape, and none is left over."""
    wanted = set()
    for rule in rules:
        for name in rule.hf:
            wanted.add(name)
            found = source.info(name).shape
            if found != rule.shape:
                raise ModelFileInvalid(
                    f"tensor '{name}' has the shape {list(found)} where config.json says"
                    f" {list(rule.shape)}; the files do not belong together"
                )
    left = [name for name in source.names if name not in wanted and not _is_known_extra(name)]
    if left:
        some = ", ".join(f"'{name}'" for name in left[:3]) + (", …" if len(left) > 3 else "")
        raise ModelFileInvalid(
            f"{len(left)} tensors are not part of such a model as config.json describes: {some}"
        )


def factor_tensors(plan: GgufPlan) -> list[TensorData]:
    """What GGUF has as tensors, and a folder in its config.json; in front of all others."""
    _, factors = plan.family.shape_to_gguf(plan.shape)
    return [TensorData(4 * len(values), [partial(_factors, values)]) for values in factors.values()]


def _factors(values: Sequence[float]) -> Array:
    import numpy as np

    return np.asarray(values, dtype=np.float32)


def _is_router(rule: TensorRule) -> bool:
    """What chooses experts is kept exact: llama.cpp does too."""
    return rule.gguf.endswith("ffn_gate_inp.weight")


def _is_known_extra(name: str) -> bool:
    """Tables that some old checkpoints carry, and the head of a model that says it is tied."""
    return name.endswith((".rotary_emb.inv_freq", ".attn.masked_bias")) or name == "lm_head.weight"


def model_head(plan: GgufPlan) -> bytes:
    """Everything in front of the tensors' data. Raises UnsupportedModel."""
    import gguf
    import numpy as np

    architecture, factors = plan.family.shape_to_gguf(plan.shape)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "head"
        writer = gguf.GGUFWriter(path, plan.family.arch)
        for key, value in {
            "general.type": "model",
            "general.file_type": FILE_TYPES[plan.dtype],
            **{f"{plan.family.arch}.{key}": value for key, value in architecture.items()},
            **plan.metadata,
        }.items():
            _add(writer, key, value)
        for name, values in factors.items():
            writer.add_tensor_info(
                name, (len(values),), np.dtype(np.float32), 4 * len(values), _kind("F32")
            )
        for rule in plan.family.rules(plan.shape):
            type_name = plan.type_of(rule)
            is_float = type_name in HELD_AS
            # The library takes the shape of blocks in bytes.
            shape = rule.gguf_shape
            if not is_float:
                shape = (*shape[:-1], row_bytes(type_name, shape[-1]))
            held_as = np.dtype(HELD_AS[type_name]) if is_float else np.dtype(np.uint8)
            size = tensor_bytes(rule, type_name)
            writer.add_tensor_info(rule.gguf, shape, held_as, size, _kind(type_name))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        head = path.read_bytes()
    return head + bytes(-len(head) % ALIGNMENT)


def _kind(type_name: str) -> Any:
    import gguf

    return gguf.GGMLQuantizationType(GGML_TYPES_BY_NAME[type_name].id)


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:  # bytes are an array of u8
        writer.add_array(key, value if isinstance(value, bytes) else list(value))


def tensor_parts(
    source: TensorSource, rule: TensorRule, wanted: str, encode: Encode | None
) -> Iterator[Part]:
    """A tensor's data in GGUF's order, a few rows at a time."""

    def part(index: int, start: int, stop: int) -> Array:
        name = rule.hf[index]
        dtype = source.info(name).dtype
        found = source.rows(name, start, stop)
        if rule.change == "add_one":
            found, dtype = to_float32(found, dtype), "F32"
        heads = rule.heads * (stop - start) // rule.shape[0] if rule.heads else 0
        changed = to_gguf(found, rule.change, heads)
        if wanted not in HELD_AS:
            assert encode is not None
            return encode(rule.gguf, wanted, to_float32(changed, dtype), index * rule.shape[0] + start)
        if wanted == "F16" and dtype != "F16":
            require_f16(to_float32(changed, dtype), name)
        return recast(changed, dtype, wanted)

    for index, name in enumerate(rule.hf):
        num_bytes = CHUNK_BYTES if source.info(name).is_packed else PART_BYTES
        for start, stop in row_chunks(rule, num_bytes):
            yield partial(part, index, start, stop)


def row_chunks(rule: TensorRule, num_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, int]]:
    """Of whole heads where rows are paired within them. num_bytes: of their numbers in F32, about."""
    rows = rule.shape[0]
    width = rule.shape[1] if len(rule.shape) > 1 else 1
    unit = rows // rule.heads if rule.heads else 1
    step = max(num_bytes // (4 * width) // unit, 1) * unit
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def require_f16(values: npt.NDArray[np.float32], name: str) -> None:
    largest = float(abs(values).max(initial=0.0))
    if largest > MOST_F16:
        raise ModelFileInvalid(
            f"tensor '{name}' holds {largest:g}, which F16 cannot; convert it to bf16"
        )
