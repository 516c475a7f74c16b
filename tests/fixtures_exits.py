"""Exits that are always right: a model's own last layer and norm, after all layers but that."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeinfer_models.conversion.sources import places_of, stored_bytes
from edgeinfer_models.exit_file import ExitTensor, fingerprint, write_exit_file
from edgeinfer_models.gguf_header import GgufHeader, read_gguf_header

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def data_of(header: GgufHeader, name: str) -> bytes:
    """Of a tensor, as its file has it."""
    tensor = header.tensor(name)
    assert tensor is not None
    path, offset = places_of(header)[name]
    return stored_bytes(path, offset, tensor.num_bytes).tobytes()


def write_own_exit(
    model: Path, path: Path, kept: npt.NDArray[np.int32], told: Mapping[str, Any] | None = None
) -> Path:
    """kept: the tokens of its head, ascending."""
    header = read_gguf_header(model)
    layers = header.get_int("{arch}.block_count")
    last, tensors = f"blk.{layers - 1}.", {}
    for tensor in header.tensors:
        if tensor.name.startswith(last) or tensor.name == "output_norm.weight":
            name = tensor.name.replace(last, "blk.0.")
            tensors[name] = ExitTensor(tensor.type_name, tensor.shape, data_of(header, tensor.name))
    write_exit_file(
        path,
        fingerprint=fingerprint(header),
        model_name=model.stem,
        layer=layers - 1,
        new_layers=1,
        kept=kept,
        tensors=tensors,
        told=told or {},
    )
    return path
