"""The GGUF file of a model that drafts: another model's first layers, an exit's own, and a head.

With the model's whole head any llama.cpp takes it as a draft model (`--export-draft`). With the exit's
own head, of the tokens kept, it has no vocabulary and no embeddings for tokens: those go in as they are
in the model, and what comes out counts the kept tokens. Everything but the exit's layers and norm is
the model's, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeinfer_models.conversion.gguf_head import TensorEntry, entry, head
from edgeinfer_models.conversion.new_file import NewFile
from edgeinfer_models.conversion.rewritten import OF_SPLITS, raw_entries, stored_parts
from edgeinfer_models.conversion.sources import places_of, stored_bytes
from edgeinfer_models.conversion.tensor_data import PART_BYTES, Part, TensorData, write_tensors
from edgeinfer_models.exit_file import ExitFile, is_of_layer, require_exit_of
from edgeinfer_models.gguf_header import GgufHeader, GgufTensor

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[Any]
    Kept = npt.NDArray[np.int32]

_EMBEDDINGS, _HEAD, _NORM = "token_embd.weight", "output.weight", "output_norm.weight"


def write_draft(
    path: Path, model: GgufHeader, exit_file: ExitFile, *, has_whole_head: bool, force: bool = False
) -> None:
    """Raises UnsupportedModel and ModelFileInvalid where the exit does not fit, UsageError where a file
    is there, OSError; then nothing is left."""
    require_exit_of(exit_file, model)
    kept = None if has_whole_head else exit_file.kept
    found: list[tuple[TensorEntry, Iterator[Part]]] = []
    for tensor, place in _of_model(model, exit_file.layer):
        # (Embeddings beside a head of its own are looked up by nobody, but llama.cpp wants them.)
        if kept is not None and tensor.name in (_EMBEDDINGS, _HEAD):
            found.append(_rows_of(tensor, place, kept))
        else:
            found.append(_whole(tensor, place, tensor.name))
    places = places_of(exit_file.header)
    for tensor in exit_file.header.tensors:
        found.append(_whole(tensor, places[tensor.name], _name_in_draft(tensor.name, exit_file.layer)))
    tensors = [TensorData(each.num_bytes, parts) for each, parts in found]
    with NewFile(path, force=force) as new:
        entries = _entries(model, exit_file, kept)
        new.file.write(head(entries, [each for each, _ in found], model.alignment))
        write_tensors(new.file, tensors, model.alignment)


def _of_model(model: GgufHeader, layer: int) -> Iterator[tuple[GgufTensor, tuple[Path, int]]]:
    """What it is made of before the exit, in the file's order."""
    places = places_of(model)
    for tensor in model.tensors:
        if tensor.name == _NORM or (
            is_of_layer(tensor.name) and int(tensor.name.split(".")[1]) >= layer
        ):
            continue
        yield tensor, places[tensor.name]


def _whole(tensor: GgufTensor, place: tuple[Path, int], name: str) -> tuple[TensorEntry, Iterator[Part]]:
    found = TensorEntry(name, tensor.shape, tensor.type_name, tensor.num_bytes)
    return found, stored_parts(tensor, place)


def _rows_of(
    tensor: GgufTensor, place: tuple[Path, int], kept: Kept
) -> tuple[TensorEntry, Iterator[Part]]:
    """Rows are whole blocks of any type, so they can be taken as they lie."""
    row_bytes = tensor.num_bytes // tensor.shape[1]
    shape = (tensor.shape[0], len(kept))
    found = TensorEntry(tensor.name, shape, tensor.type_name, row_bytes * len(kept))
    return found, _row_parts(place, row_bytes, kept)


def _row_parts(place: tuple[Path, int], row_bytes: int, kept: Kept) -> Iterator[Part]:
    step = max(PART_BYTES // row_bytes, 1)
    for start in range(0, len(kept), step):
        yield partial(_gathered, place, row_bytes, kept[start : start + step])


def _gathered(place: tuple[Path, int], row_bytes: int, rows: Kept) -> Array:
    """rows: ascending; what lies between the first and the last is read too."""
    path, offset = place
    first, last = int(rows[0]), int(rows[-1])
    between = stored_bytes(path, offset + first * row_bytes, (last + 1 - first) * row_bytes)
    taken: Array = between.reshape(-1, row_bytes)[rows - first]
    return taken


def _name_in_draft(name: str, layer: int) -> str:
    if not is_of_layer(name):
        return name
    _, number, *rest = name.split(".")
    return ".".join(["blk", str(layer + int(number)), *rest])


def _entries(model: GgufHeader, exit_file: ExitFile, kept: Kept | None) -> list[bytes]:
    arch = model.architecture
    changed: Mapping[str, int | str] = {
        f"{arch}.block_count": exit_file.layer + exit_file.new_layers,
        "general.name": f"{exit_file.model_name}, exit after layer {exit_file.layer}",
    }
    if kept is not None:
        changed = {**changed, f"{arch}.vocab_size": len(kept), "tokenizer.ggml.model": "no_vocab"}
    of_vocabulary = (
        () if kept is None else tuple(k for k in model.metadata if k.startswith("tokenizer."))
    )
    raw = raw_entries(model.path, {*OF_SPLITS, *changed, *of_vocabulary})
    return [*raw, *(entry(key, value) for key, value in changed.items())]
