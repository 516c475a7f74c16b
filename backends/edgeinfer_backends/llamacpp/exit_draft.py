"""A model's early exit as a model that drafts: its first layers, the exit's, and a head of few tokens.

The weights are put together as a GGUF file of their own (conversion/draft_file.py), kept for the next
time. It has no vocabulary, so it is given token embeddings, which are read from the model's file.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from edgeinfer.errors import EdgeInferError, LoadFailed, UnsupportedModel
from edgeinfer_models.conversion.draft_file import write_draft
from edgeinfer_models.exit_file import ExitFile, read_exit_file, require_exit_of
from edgeinfer_models.gguf_header import GgufHeader
from edgeinfer_models.gguf_model import read_gguf_model
from edgeinfer_models.model_files import ModelFiles
from edgeinfer_models.token_rows import TokenRows

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

# Whose graphs take embeddings for what token embeddings are (others scale those of tokens alone).
ARCHITECTURES = ("llama", "qwen2", "qwen3")
_KEPT_FILES = 4


class EmbeddedTokens:
    """A batch's token ids, as far as the runtime writes them, of a batch that takes embeddings."""

    def __init__(self, batch: Floats, rows: TokenRows) -> None:
        """batch: (tokens, width)."""
        self._batch = batch
        self._rows = rows

    def __setitem__(self, place: int | slice, tokens: int | list[int]) -> None:
        if isinstance(tokens, int):
            self._batch[place] = self._rows([tokens])[0]
        else:
            self._batch[place] = self._rows(tokens)


def assembled(files: ModelFiles, exit_path: Path, folder: Path) -> tuple[ModelFiles, TokenRows]:
    """The draft model's file, made if it is not there, and what it is fed with. Raises ModelFileInvalid,
    UnsupportedModel, LoadFailed."""
    model = read_gguf_model(files.paths[0])
    exit_file = read_exit_file(exit_path)
    if model.architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{files.name}: no exit is run for models of the architecture {model.architecture[:40]};"
            f" for {', '.join(ARCHITECTURES)} they are"
        )
    require_exit_of(exit_file, model)
    path = folder / f"{_key(model, exit_path)}.gguf"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with contextlib.suppress(OSError):
                _make_room(folder)
            _write(path, model, exit_file)
        path.touch()
    except OSError as error:
        raise LoadFailed(f"{folder}: the exit's first layers cannot be kept there ({error})") from None
    sizes: dict[str, int] = {}
    for tensor in (*model.tensors, *exit_file.header.tensors):
        sizes[tensor.type_name] = sizes.get(tensor.type_name, 0) + tensor.num_bytes
    found = ModelFiles(
        f"{files.name}'s exit", (path,), "gguf", weight_types=tuple(sorted(sizes.items()))
    )
    return found, TokenRows(model)


def _write(path: Path, model: GgufHeader, exit_file: ExitFile) -> None:
    try:
        write_draft(path, model, exit_file, has_whole_head=False)
    except EdgeInferError:
        if not path.exists():  # else another process was faster
            raise


def _key(model: GgufHeader, exit_path: Path) -> str:
    """Of all that it is made of, as files are told apart without reading them."""
    found = hashlib.sha256()
    for path in (*model.shards, exit_path):
        stat = path.stat()
        found.update(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}\n".encode())
    return found.hexdigest()[:32]


def _make_room(folder: Path) -> None:
    """Remove the files that were not used for longest."""
    files = sorted(folder.glob("*.gguf"), key=lambda path: path.stat().st_mtime)
    for path in files[: max(0, len(files) + 1 - _KEPT_FILES)]:
        path.unlink()
