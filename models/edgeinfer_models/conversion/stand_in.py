"""A model of another's shape whose quantized weights are made up: as fast as that one would be.

write_stand_in(path, read_gguf_model(model), layers=4, types=types, file_type=2, blocks=blocks)

Speed depends on shapes and types, not on what the weights say, and rounding real ones would take as long
as quantizing the model. What is not quantized (norms, routers) is the model's own, so that numbers keep
an ordinary size; so are its metadata. It may have fewer layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from edgeinfer_models.conversion.model import SourceModel
from edgeinfer_models.conversion.new_file import NewFile
from edgeinfer_models.conversion.rewritten import copied, gguf_head, written_bytes
from edgeinfer_models.conversion.sources import places_of
from edgeinfer_models.conversion.to_gguf import (
    ALIGNMENT,
    GgufPlan,
    converted_rows,
    model_head,
    recast_factors,
    tensor_bytes,
)
from edgeinfer_models.gguf_format import GgufArray, integer_value, numbers_value
from edgeinfer_models.gguf_header import GgufHeader

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

# A type's rows, some at a time: (type, rows, width) -> their bytes.
Blocks = Callable[[str, int, int], Iterator[bytes]]
_LAYER = re.compile(r"blk\.(\d+)\.")


def layer_of(tensor: str) -> int:
    """The layer of a tensor by its GGUF name; -1: it is of none."""
    found = _LAYER.match(tensor)
    return int(found[1]) if found else -1


def write_stand_in(
    path: Path,
    source: SourceModel | GgufHeader,
    layers: int,
    types: Mapping[str, str | None],
    file_type: int | None,
    blocks: Blocks,
) -> None:
    """layers: how many; the first ones. types: of the tensors of these layers and of those outside of
    any, by GGUF name; None: as it is. Raises ModelFileInvalid, UnsupportedModel, OSError."""
    if isinstance(source, GgufHeader):
        _of_gguf(path, source, layers, types, file_type, blocks)
    else:
        _of_folder(path, source, layers, types, file_type, blocks)


def _of_gguf(
    path: Path,
    header: GgufHeader,
    layers: int,
    types: Mapping[str, str | None],
    file_type: int | None,
    blocks: Blocks,
) -> None:
    places = places_of(header)
    kept = replace(header, tensors=tuple(t for t in header.tensors if layer_of(t.name) < layers))
    number = header.get_int("general.file_type") if file_type is None else file_type
    with NewFile(path, force=True, is_lasting=False) as new:
        new.file.write(gguf_head(kept, types, number, _with_layers(header, layers)))
        for tensor in kept.tensors:
            kind, width = types[tensor.name], tensor.shape[0]
            if kind is None:
                where, offset = places[tensor.name]
                for part in copied(where, offset, tensor.num_bytes):
                    new.file.write(part.tobytes())
            else:
                _write(new.file, blocks(kind, tensor.elements // width, width))
            new.file.write(bytes(-written_bytes(tensor, kind) % header.alignment))


def _with_layers(header: GgufHeader, layers: int) -> dict[str, bytes]:
    """The metadata that says something of each layer, for fewer of them: type and value."""
    count = header.get_int("{arch}.block_count")
    if layers == count:
        return {}
    key = f"{header.architecture}.block_count"
    found = {key: integer_value(header.types[key], layers)}
    for key, value in header.metadata.items():
        if not key.startswith(f"{header.architecture}.") or not isinstance(value, list | GgufArray):
            continue
        kind, values = header.types[key].strip("[]"), header.get_list(key)
        if values is not None and len(values) == count and kind != "str":
            found[key] = numbers_value(kind, values[:layers])
    return found


def _of_folder(
    path: Path,
    source: SourceModel,
    layers: int,
    types: Mapping[str, str | None],
    file_type: int | None,
    blocks: Blocks,
) -> None:
    shape = replace(source.shape, num_layers=layers, sliding=source.shape.sliding[:layers])
    plan = GgufPlan(
        source.family,
        shape,
        "F32",
        source.gguf_metadata(),
        types=types,
        file_type=file_type,
    )
    rules = source.family.rules(shape)
    architecture, factors = source.family.shape_to_gguf(shape)
    with NewFile(path, force=True, is_lasting=False) as new:
        new.file.write(model_head(plan, architecture, rules, factors))
        for values in factors.values():
            data = recast_factors(values).tobytes()
            new.file.write(data + bytes(-len(data) % ALIGNMENT))
        for rule in rules:
            kind = types[rule.gguf]
            if kind is None:
                for part in converted_rows(source.source, rule, plan.type_of(rule), None):
                    new.file.write(part.tobytes())
            else:
                width = rule.gguf_shape[-1]
                rows = tensor_bytes(rule, "F32") // (4 * width)
                _write(new.file, blocks(kind, rows, width))
            new.file.write(bytes(-tensor_bytes(rule, plan.type_of(rule)) % ALIGNMENT))


def _write(file: IO[bytes], parts: Iterator[bytes]) -> None:
    for part in parts:
        file.write(part)
