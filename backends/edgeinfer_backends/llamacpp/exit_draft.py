"""A model's early exit as a model that drafts: its first layers, the exit's, and a head of few tokens.

The weights are put together as a GGUF file of their own (conversion/draft_file.py), kept for the next
time. It has no vocabulary, so it is given token embeddings, which are read from the model's file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeinfer.errors import EdgeInferError, LoadFailed, UnsupportedModel
from edgeinfer_models.conversion.new_file import NewFile
from edgeinfer_models.model_files import ModelFiles
from edgeinfer_models.token_rows import RowsPlace, TokenRows

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgeinfer_models.exit_file import ExitFile
    from edgeinfer_models.gguf_header import GgufHeader

    Floats = npt.NDArray[np.float32]

_KEPT_FILES = 4
_HEAD_BYTES = 2**20


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
    path = folder / f"{_key(files.paths, exit_path)}.gguf"
    about = path.with_suffix(".json")
    found = _told(path, about)
    if found is None:
        try:
            _assemble(files, exit_path, path, about)
        except OSError as error:
            raise LoadFailed(
                f"{folder}: the exit's first layers could not be put together there ({error})"
            ) from None
        found = _told(path, about)
    if found is None:
        raise LoadFailed(f"{about}: was changed while it was read; load the model again")
    with contextlib.suppress(OSError):
        os.utime(path)
    # All that is needed of the model is told there: its header, read, leaves megabytes behind.
    shard, place, weight_types = found
    try:
        rows = TokenRows(replace(place, path=files.paths[shard]))
    except (OSError, IndexError) as error:
        raise LoadFailed(f"{files.name}: its embeddings cannot be read ({error})") from None
    return ModelFiles(f"{files.name}'s exit", (path,), "gguf", weight_types=weight_types), rows


def forget_assembled(files: ModelFiles) -> None:
    """Where it could not be loaded: it is made anew the next time."""
    for path in files.paths:
        for each in (path, path.with_suffix(".json")):
            with contextlib.suppress(OSError):
                each.unlink()


def _told(path: Path, about: Path) -> tuple[int, RowsPlace, tuple[tuple[str, int], ...]] | None:
    """Which of the model's files has its embeddings, where, and the draft's types; None where either
    file is not there or not what it was."""
    try:
        told = json.loads(about.read_text("utf-8"))
        if told["head"] != _head(path):
            return None
        place = RowsPlace(Path(), **told["embeddings"])
        types = tuple((str(name), int(size)) for name, size in told["weight_types"])
        return int(told["shard"]), place, types
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _head(path: Path) -> str:
    """Of a file's size and its beginning, where all is that native code takes at its word. Raises
    OSError."""
    with path.open("rb") as file:
        return f"{path.stat().st_size} {hashlib.sha256(file.read(_HEAD_BYTES)).hexdigest()}"


def _assemble(files: ModelFiles, exit_path: Path, path: Path, about: Path) -> None:
    from edgeinfer_models.exit_file import ARCHITECTURES, read_exit_file, require_exit_of
    from edgeinfer_models.gguf_model import read_gguf_model

    model, exit_file = read_gguf_model(files.paths[0]), read_exit_file(exit_path)
    if model.architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{files.name}: no exit is run for models of the architecture {model.architecture[:40]};"
            f" for {', '.join(ARCHITECTURES)} they are"
        )
    require_exit_of(exit_file, model)
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        _make_room(path.parent)
    path.unlink(missing_ok=True)  # (one without what is told of it)
    _write(path, model, exit_file)
    sizes: dict[str, int] = {}
    for tensor in (*model.tensors, *exit_file.header.tensors):
        sizes[tensor.type_name] = sizes.get(tensor.type_name, 0) + tensor.num_bytes
    place = asdict(RowsPlace.of(model))
    told = {
        "shard": model.shards.index(place.pop("path")),
        "embeddings": place,
        "weight_types": sorted(sizes.items()),
        "head": _head(path),
    }
    with NewFile(about, force=True) as new:
        new.file.write(json.dumps(told).encode())


def _write(path: Path, model: GgufHeader, exit_file: ExitFile) -> None:
    from edgeinfer_models.conversion.draft_file import write_draft

    try:
        write_draft(path, model, exit_file, has_whole_head=False)
    except EdgeInferError:
        if not path.exists():  # else another process was faster
            raise


def _key(paths: Sequence[Path], exit_path: Path) -> str:
    """Of all that it is made of, as files are told apart without reading them."""
    found = hashlib.sha256()
    for path in (*paths, exit_path):
        stat = path.stat()
        found.update(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}\n".encode())
    return found.hexdigest()[:32]


def _make_room(folder: Path) -> None:
    """Remove the files that were not used for longest."""
    files = sorted(folder.glob("*.gguf"), key=lambda path: path.stat().st_mtime)
    for path in files[: max(0, len(files) + 1 - _KEPT_FILES)]:
        path.unlink()
        path.with_suffix(".json").unlink(missing_ok=True)
