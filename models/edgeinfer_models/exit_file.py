"""Files of early exits (`NAME.exit.gguf`): what an exit has of its own, and which model it belongs to.

A GGUF file of the architecture `edgeinfer-exit`, which no other program takes for a model: the exit's
layers (`blk.0.…`, named and laid out as its model's are in GGUF), its norm, the tokens of its head, and
a fingerprint of the model. The head's rows, the embeddings and the first layers are the model's own.

The fingerprint is of the norms, which every quantization keeps as they are, and of the shape: an exit
fits each form of the weights it was trained on, and no other model's. (Where norms were changed to make
up for scaled weights, as by awq, it does not fit, though it might work.)
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeinfer.errors import ModelFileInvalid, UnsupportedModel
from edgeinfer_models.ggml_types import GGML_TYPES_BY_NAME, MATRIX_TYPES, row_bytes
from edgeinfer_models.gguf_header import GgufHeader, read_gguf_header

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[Any]
    Kept = npt.NDArray[np.int32]

SUFFIX = ".exit.gguf"
SHIPPED_EXITS = Path(__file__).parent / "exits"
ARCHITECTURE = "edgeinfer-exit"
VERSION = 1
# Of models that can have exits. llama.cpp's graphs take embeddings for what token embeddings are there;
# those of others scale those of tokens alone.
ARCHITECTURES = ("llama", "qwen2", "qwen3")
_KEY = ARCHITECTURE
_ALIGNMENT = 32
_MOST_LAYERS = 1024
_MOST_TOLD = 2**20  # characters
_SHAPE_KEYS = (
    *("block_count", "embedding_length", "feed_forward_length", "attention.head_count"),
    *("attention.head_count_kv", "rope.dimension_count"),
)


@dataclass(frozen=True)
class ExitTensor:
    """data: rows of `type_name`'s bytes. shape: ggml's order, the row length first."""

    type_name: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class ExitFile:
    """layer: how many of the model's layers come before the exit; new_layers: of its own. kept_tokens:
    those of its head, ascending. told: what whoever trained it says of it, as JSON has it."""

    path: Path
    fingerprint: str
    model_name: str
    layer: int
    new_layers: int
    kept_tokens: tuple[int, ...]
    header: GgufHeader
    told: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kept(self) -> Kept:
        import numpy as np

        return np.array(self.kept_tokens, dtype=np.int32)

    @property
    def width(self) -> int:
        """Of the hidden states of its model."""
        return next((t.shape[0] for t in self.header.tensors if t.name == "output_norm.weight"), 0)


def fingerprint(header: GgufHeader) -> str:
    """Of a model in GGUF, whatever types its matrices have. Raises ModelFileInvalid."""
    found = hashlib.sha256()
    shape = {
        key: header.get_list(f"{{arch}}.{key}") or header.get(f"{{arch}}.{key}") for key in _SHAPE_KEYS
    }
    vocab = header.get_length("tokenizer.ggml.tokens")
    found.update(json.dumps([header.architecture, shape, vocab], sort_keys=True).encode())
    norms = sorted(
        (tensor for tensor in header.tensors if tensor.name.endswith("norm.weight")),
        key=lambda tensor: tensor.name,
    )
    for tensor in norms:
        found.update(tensor.name.encode())
        found.update(_norm_bytes(header, tensor.name))
    return found.hexdigest()


def write_exit_file(
    path: Path,
    *,
    fingerprint: str,
    model_name: str,
    layer: int,
    new_layers: int,
    kept: Kept,
    tensors: Mapping[str, ExitTensor],
    told: Mapping[str, Any],
    force: bool = False,
) -> None:
    """Whole or not at all. Raises UsageError where a file is there, OSError."""
    from edgeinfer_models.conversion.gguf_head import TensorEntry, entry, head, numbers_entry
    from edgeinfer_models.conversion.new_file import NewFile

    entries = [
        entry("general.architecture", ARCHITECTURE),
        entry("general.name", f"exit of {model_name} after layer {layer}"),
        entry(f"{_KEY}.version", VERSION),
        entry(f"{_KEY}.model", fingerprint),
        entry(f"{_KEY}.model_name", model_name),
        entry(f"{_KEY}.layer", layer),
        entry(f"{_KEY}.new_layers", new_layers),
        numbers_entry(f"{_KEY}.kept", "i32", kept.tolist()),
        entry(f"{_KEY}.told", json.dumps(told)),
    ]
    infos = [
        TensorEntry(name, each.shape, each.type_name, len(each.data)) for name, each in tensors.items()
    ]
    with NewFile(path, force=force) as new:
        new.file.write(head(entries, infos, _ALIGNMENT))
        for each in tensors.values():
            new.file.write(each.data)
            new.file.write(bytes(-len(each.data) % _ALIGNMENT))


def read_exit_file(path: Path) -> ExitFile:
    """Read and check all that is not the tensors' numbers. Raises ModelNotFound, ModelFileInvalid,
    UnsupportedModel."""
    header = read_gguf_header(path)
    if header.architecture != ARCHITECTURE:
        raise UnsupportedModel(f"{path}: is a model ({header.architecture[:40]}), not an exit of one")
    version = header.get_int(f"{_KEY}.version")
    if version != VERSION:
        raise UnsupportedModel(
            f"{path}: is an exit in form {version}, which this version does not read; train it again"
        )
    kept = header.get_list(f"{_KEY}.kept")
    if not kept or any(type(token) is not int or not 0 <= token < 2**31 for token in kept):
        raise _damaged(path, "its head has no tokens, or none that there can be")
    if any(a >= b for a, b in itertools.pairwise(kept)):  # type: ignore[operator]
        raise _damaged(path, "the tokens of its head are not in order")
    layer, new_layers = header.get_int(f"{_KEY}.layer"), header.get_int(f"{_KEY}.new_layers")
    if not 1 <= layer <= _MOST_LAYERS or not 1 <= new_layers <= _MOST_LAYERS:
        raise _damaged(path, f"it lies after layer {layer} and has {new_layers} of its own")
    names = {tensor.name for tensor in header.tensors}
    numbers = {int(name.split(".")[1]) for name in names if is_of_layer(name)}
    if numbers != set(range(new_layers)) or "output_norm.weight" not in names:
        raise _damaged(path, "tensors of its layers are missing")
    for tensor in header.tensors:
        # llama.cpp ends the process for vectors of another type, and for matrices it cannot multiply.
        is_vector = len(tensor.shape) == 1
        if tensor.type_name not in (("F32",) if is_vector else MATRIX_TYPES):
            raise _damaged(path, f"tensor '{tensor.name[:60]}' is of type {tensor.type_name}")
    told: Any = {}
    try:
        text = header.get_str(f"{_KEY}.told", "{}")
        told = json.loads(text) if len(text) <= _MOST_TOLD else {}
    except (ValueError, RecursionError):
        raise _damaged(path, "what it says of itself cannot be read") from None
    return ExitFile(
        path,
        header.get_str(f"{_KEY}.model"),
        header.get_str(f"{_KEY}.model_name"),
        layer,
        new_layers,
        tuple(kept),  # type: ignore[arg-type]
        header,
        told if isinstance(told, dict) else {},
    )


def require_exit_of(exit_file: ExitFile, model: GgufHeader) -> None:
    """Raises UnsupportedModel where it was trained for another model, ModelFileInvalid where its tensors
    are not of that one's shapes."""
    if exit_file.fingerprint != fingerprint(model):
        raise UnsupportedModel(
            f"{exit_file.path}: is the exit of another model ({exit_file.model_name[:60]}), not of"
            f" {model.path.name}; `edgeinfer train-exit` makes one"
        )
    if exit_file.layer >= model.get_int("{arch}.block_count"):
        raise _damaged(exit_file.path, "it lies behind the model's last layer")
    vocab = model.get_length("tokenizer.ggml.tokens") or 0
    if exit_file.kept_tokens[-1] >= vocab:
        raise _damaged(exit_file.path, f"a token of its head is outside the vocabulary of {vocab}")
    shapes = {tensor.name: tensor.shape for tensor in model.tensors}
    wanted = {"output_norm.weight": shapes.get("output_norm.weight")}
    for name, shape in shapes.items():
        if name.startswith("blk.0."):
            for layer in range(exit_file.new_layers):
                wanted[f"blk.{layer}.{name.removeprefix('blk.0.')}"] = shape
    found = {tensor.name: tensor.shape for tensor in exit_file.header.tensors}
    for name in (*wanted, *found):
        if found.get(name) != wanted.get(name):
            raise _damaged(exit_file.path, f"tensor '{name[:60]}' is not of the model's shape")


def _norm_bytes(header: GgufHeader, name: str) -> bytes:
    """A norm's numbers in F32: those of the file, where it has them so."""
    from edgeinfer_models.conversion.sources import places_of

    tensor = header.tensor(name)
    assert tensor is not None  # noqa: S101 (its name came from there)
    path, offset = places_of(header)[name]
    if tensor.type_name == "F32":  # as nearly always: without numpy, which takes a moment to import
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(4 * tensor.elements)
    import numpy as np

    from edgeinfer_models.conversion.floats import to_float32
    from edgeinfer_models.conversion.sources import stored_bytes

    if GGML_TYPES_BY_NAME[tensor.type_name].block != 1 or tensor.type_name not in ("F32", "F16", "BF16"):
        raise ModelFileInvalid(f"{header.path}: the norm '{name[:60]}' is of type {tensor.type_name}")
    raw = stored_bytes(path, offset, row_bytes(tensor.type_name, tensor.elements))
    held = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[tensor.type_name]
    return to_float32(raw.view(held), tensor.type_name).astype("<f4").tobytes()


def is_of_layer(name: str) -> bool:
    parts = name.split(".")
    return len(parts) > 2 and parts[0] == "blk" and parts[1].isascii() and parts[1].isdigit()


def _damaged(path: Path, why: str) -> ModelFileInvalid:
    return ModelFileInvalid(f"{path}: is damaged ({why}); train it again, or take another copy")
