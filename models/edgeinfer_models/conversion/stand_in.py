"""A model of another's shape whose quantized weights are made up: as fast as that one would be.

write_stand_in(path, read_gguf_model(model), layers=4, types=types, file_type=2, made_up=rows)

Speed depends on shapes and types, not on what the weights say, and rounding real ones would take as long
as quantizing the model. What is not quantized (norms, routers) is the model's own, so that numbers keep
an ordinary size; so are its metadata. It may have fewer layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from edgeinfer_models.conversion.gguf_head import entry, number_entry, numbers_entry
from edgeinfer_models.conversion.model import SourceModel
from edgeinfer_models.conversion.new_file import NewFile
from edgeinfer_models.conversion.rewritten import rewritten_head, stored_parts, written_bytes
from edgeinfer_models.conversion.sources import places_of
from edgeinfer_models.conversion.tensor_data import Part, TensorData, write_tensors
from edgeinfer_models.conversion.to_gguf import (
    ALIGNMENT,
    GgufPlan,
    factor_tensors,
    model_head,
    tensor_bytes,
    tensor_parts,
)
from edgeinfer_models.gguf_format import GgufArray
from edgeinfer_models.gguf_header import GgufHeader

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# Some rows of a type's, the same each time: (type, width) -> (rows, bytes of a row).
MadeUp = Callable[[str, int], "npt.NDArray[np.uint8]"]
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
    made_up: MadeUp,
) -> None:
    """layers: how many; the first ones. types: of the tensors of these layers and of those outside of
    any, by GGUF name; None: as it is. file_type: llama_ftype; None: what the model says. Raises
    ModelFileInvalid, UnsupportedModel, OSError."""
    if isinstance(source, GgufHeader):
        _of_gguf(path, source, layers, types, file_type, made_up)
    else:
        _of_folder(path, source, layers, types, file_type, made_up)


def _of_gguf(
    path: Path,
    header: GgufHeader,
    layers: int,
    types: Mapping[str, str | None],
    file_type: int | None,
    made_up: MadeUp,
) -> None:
    places = places_of(header)
    kept = replace(header, tensors=tuple(t for t in header.tensors if layer_of(t.name) < layers))
    entries = _of_layers(header, layers)
    if file_type is not None:
        entries["general.file_type"] = entry("general.file_type", file_type)
    tensors = []
    for tensor in kept.tensors:
        kind = types[tensor.name]
        size = written_bytes(tensor, kind)
        if kind is None:
            tensors.append(TensorData(size, stored_parts(tensor, places[tensor.name])))
        else:
            tensors.append(TensorData(size, _made_up_parts(size, made_up, kind, tensor.shape[0])))
    _write(path, rewritten_head(kept, types, entries), tensors, header.alignment)


def _of_layers(header: GgufHeader, layers: int) -> dict[str, bytes]:
    """The metadata that say something of each layer, for fewer of them: entries by key."""
    count = header.get_int("{arch}.block_count")
    if layers == count:
        return {}
    key = f"{header.architecture}.block_count"
    found = {key: number_entry(key, header.types[key], layers)}
    for key, value in header.metadata.items():
        if not key.startswith(f"{header.architecture}.") or not isinstance(value, list | GgufArray):
            continue
        kind, values = header.types[key].strip("[]"), header.get_list(key)
        if values is not None and len(values) == count and kind != "str":
            found[key] = numbers_entry(key, kind, values[:layers])
    return found


def _of_folder(
    path: Path,
    source: SourceModel,
    layers: int,
    types: Mapping[str, str | None],
    file_type: int | None,
    made_up: MadeUp,
) -> None:
    shape = replace(source.shape, num_layers=layers, sliding=source.shape.sliding[:layers])
    metadata = dict(source.gguf_metadata())
    if file_type is not None:
        metadata["general.file_type"] = file_type
    plan = GgufPlan(source.family, shape, "F32", metadata, types=types)
    tensors = factor_tensors(plan)
    for rule in source.family.rules(shape):
        kind, size = types[rule.gguf], tensor_bytes(rule, plan.type_of(rule))
        if kind is None:
            parts = tensor_parts(source.source, rule, plan.type_of(rule), None)
        else:
            parts = _made_up_parts(size, made_up, kind, rule.gguf_shape[-1])
        tensors.append(TensorData(size, parts))
    _write(path, model_head(plan), tensors, ALIGNMENT)


def _made_up_parts(num_bytes: int, made_up: MadeUp, type_name: str, width: int) -> Iterator[Part]:
    data = made_up(type_name, width).reshape(-1)
    for start in range(0, num_bytes, data.size):
        yield partial(data.__getitem__, slice(num_bytes - start))


def _write(path: Path, head: bytes, tensors: Sequence[TensorData], alignment: int) -> None:
    with NewFile(path, force=True, is_lasting=False) as new:
        new.file.write(head)
        write_tensors(new.file, tensors, alignment)
