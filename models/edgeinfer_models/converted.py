"""Models that were converted because a backend opens another form than theirs, kept for the next time.

    DATA/converted/tiny-gguf-0123456789ab/tiny.gguf    what a backend opens; or a folder `tiny`
    DATA/converted/tiny-gguf-0123456789ab/about.json   of what it was made, and what its files are
    DATA/converted/.tiny-gguf-0123456789ab/            being written or removed; never listed
    DATA/converted/.tiny-gguf-0123456789ab.lock        held meanwhile

A result belongs to the place of its original, so there is one for each form, and a changed original
replaces it. Used is only what was made of the original as it is now, by this converter, and whose files
are as they were written.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeinfer.errors import ConversionFailed, ModelFileInvalid
from edgeinfer_models.conversion.conversion import (
    CONTAINERS,
    Container,
    Progress,
    convert,
    kept_dtype,
    lacking_room,
    prepare_conversion,
)
from edgeinfer_models.conversion.model import SourceModel, source_of_folder, source_of_gguf
from edgeinfer_models.model_files import ModelFiles
from edgeinfer_models.sole_use import InUse, sole_use
from edgeinfer_models.store import data_folder, write_atomically

# Raised where a model would be converted to other bytes than before.
CONVERTER_VERSION = 1
_ABOUT = "about.json"
_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,59}-(?:gguf|safetensors)-[0-9a-f]{12}$")
_BESIDE_WEIGHTS = ("*.json", "*.jinja", "*.model")  # what a conversion reads of a folder, too


@dataclass(frozen=True)
class ConvertedModel:
    """name: its folder's, by which it can be removed. source: the original's path. dtype: of its weights
    (F16); source_type: of most of the original's (Q4_K). notes: what it does otherwise than the
    original, a line each."""

    name: str
    path: Path  # what `resolve_model` takes
    source: str
    to: Container
    dtype: str
    source_type: str
    num_bytes: int
    notes: tuple[str, ...]

    @property
    def is_orphan(self) -> bool:
        """Whether its original is gone."""
        return not Path(self.source).exists()


def converted_folder() -> Path:
    return data_folder() / "converted"


def source_of(files: ModelFiles) -> SourceModel:
    """Raises ModelFileInvalid, UnsupportedModel, which says why it cannot be converted."""
    path = _source_path(files)
    return source_of_gguf(path) if files.format == "gguf" else source_of_folder(path)


def find_converted(files: ModelFiles, to: Container) -> ConvertedModel | None:
    """The result for this original as it is now; None if there is none that can be used."""
    name = _name_of(files, to)
    about = _read_about(name)
    try:
        if about is not None and about["stamp"] == _stamp(files):
            return _entry(name, about)
    except ModelFileInvalid:  # the original went away meanwhile; whoever opens it will say so
        return None
    return None


def make_converted(
    model: SourceModel,
    files: ModelFiles,
    to: Container,
    progress: Progress,
    on_wait: Callable[[], None],
) -> ConvertedModel:
    """Convert an original (`source_of(files)`), in place of an older result, and keep what comes of it.

    Its weights keep their precision (`kept_dtype`). on_wait: called while another process converts the
    same model, whose result is then taken. Both callbacks may raise: nothing is left, as after a kill or
    where the disk fills. Raises ConversionFailed, ModelFileInvalid, UnsupportedModel.
    """
    name, root = _name_of(files, to), converted_folder()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with sole_use(_lock_file(name), on_wait):
            found = find_converted(files, to)
            if found is None:
                _discard(name)
                _sweep()
                found = _make(model, files, to, name, progress)
            return found
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ConversionFailed(
                f"{files.name}: the disk took no more while it was converted ({error.strerror}); nothing"
                f" is left of it; free some of {root}, or set EDGEINFER_DATA_DIR to a folder elsewhere"
            ) from None
        raise ConversionFailed(
            f"{root}: cannot be written to ({error.strerror}); set EDGEINFER_DATA_DIR to another folder"
        ) from None


def list_converted() -> tuple[ConvertedModel, ...]:
    """Results whose files are as they were written, by name; their originals may have changed."""
    entries = (_entry(name, about) for name in _names() if (about := _read_about(name)) is not None)
    return tuple(entries)


def damaged_converted() -> tuple[str, ...]:
    """One line for each result that is not as it was written and is never used."""
    return tuple(
        f"conversion '{name}': its files are not as they were written; it is not used, and the next"
        f" conversion replaces it, or run `edgeinfer models rm {name}`"
        for name in _names()
        if _read_about(name) is None
    )


def converted_of(originals: Iterable[Path]) -> tuple[ConvertedModel, ...]:
    """Those made of these files or folders, or of files in these folders; all of which may be gone."""
    wanted: set[Path] = set()
    for path in originals:
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # what cannot be a path
            path = path.expanduser().resolve()
            is_part = path.name.endswith((".safetensors", ".safetensors.index.json"))
            wanted.add(path.parent if is_part else path)
    return tuple(
        model
        for model in list_converted()
        if wanted & {Path(model.source), *Path(model.source).parents[:1]}
    )


def has_converted(name: str) -> bool:
    """Whether there is a result of that name, usable or not."""
    return bool(_NAME.match(name)) and (converted_folder() / name).is_dir()


def remove_converted(name: str) -> int:
    """Delete a result, damaged or not; the bytes that became free. name: as `has_converted` knows it.
    Raises ConversionFailed while another process makes it."""
    folder = converted_folder() / name
    try:
        with sole_use(_lock_file(name), on_wait=None):
            freed = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            _discard(name)
    except InUse:
        raise ConversionFailed(
            f"{name}: another edgeinfer is making it right now; end that one first"
        ) from None
    except OSError as error:
        raise ConversionFailed(
            f"{folder}: cannot be removed ({error.strerror}); remove the folder by hand"
        ) from None
    return freed


def _make(
    model: SourceModel, files: ModelFiles, to: Container, name: str, progress: Progress
) -> ConvertedModel:
    """Under the lock, where nothing of that name is."""
    final, staging = converted_folder() / name, _staging(name)
    stamp = _stamp(files)
    content = _slug(files) + (".gguf" if to == "gguf" else "")
    planned = prepare_conversion(model, to, kept_dtype(files.weight_types), staging / content)
    lacking = lacking_room(converted_folder(), planned.num_bytes)
    if lacking:
        raise ConversionFailed(
            f"{files.name}: converting it to {to} {lacking} ({final.parent}); free some, or set"
            " EDGEINFER_DATA_DIR to a folder elsewhere"
        )
    try:
        staging.mkdir()
        convert(planned, progress)
        if _stamp(files) != stamp:
            raise ModelFileInvalid(f"{files.name}: changed while it was converted; try again")
        about = {
            "source": str(_source_path(files)),
            "stamp": stamp,
            "to": to,
            "content": content,
            "dtype": planned.dtype,
            "source_type": _most(files),
            "notes": list(planned.notes),
            "files": _states(staging / content),
        }
        write_atomically(staging / _ABOUT, json.dumps(about, indent=1) + "\n")
        staging.rename(final)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return _entry(name, about)


def _entry(name: str, about: dict[str, Any]) -> ConvertedModel:
    return ConvertedModel(
        name,
        converted_folder() / name / about["content"],
        about["source"],
        about["to"],
        about["dtype"],
        about["source_type"],
        sum(size for _, size, _ in about["files"]),
        tuple(about["notes"]),
    )


def _read_about(name: str) -> dict[str, Any] | None:
    """None where it is not there, is not ours, or does not describe the files beside it."""
    folder = converted_folder() / name
    try:
        about = json.loads((folder / _ABOUT).read_text("utf-8"))
        texts = [about[key] for key in ("source", "stamp", "content", "dtype", "source_type")]
        proper = (
            all(isinstance(text, str) for text in [*texts, *about["notes"]])
            and about["to"] in CONTAINERS
            and Path(about["content"]).name == about["content"]
            and about["files"] == _states(folder / about["content"])
        )
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return about if proper else None


def _states(content: Path) -> list[list[Any]]:
    """Name, size and time of every file of a result: a change that no crash explains shows there. Raises
    OSError if it is not there."""
    paths = sorted(content.iterdir()) if content.is_dir() else [content]
    states = [(path.name, path.stat()) for path in paths]
    return [[name, state.st_size, state.st_mtime_ns] for name, state in states]


def _stamp(files: ModelFiles) -> str:
    """Changes with what a conversion reads: by the store's digest, else by sizes and times. Raises
    ModelFileInvalid."""
    parts: list[object] = [CONVERTER_VERSION, files.digest]
    if not files.digest:
        read = {*files.paths}
        if files.format == "safetensors":
            read.update(path for each in _BESIDE_WEIGHTS for path in files.paths[0].parent.glob(each))
        for path in sorted(read):
            try:
                state = path.stat()
            except OSError as error:
                raise ModelFileInvalid(f"{path}: cannot be read ({error.strerror})") from None
            parts.append([path.name, state.st_size, state.st_mtime_ns])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _source_path(files: ModelFiles) -> Path:
    """The folder of safetensors, or the (first) GGUF file."""
    path = files.paths[0].absolute()
    return path.resolve() if files.format == "gguf" else path.parent.resolve()


def _name_of(files: ModelFiles, to: Container) -> str:
    digest = hashlib.sha256(str(_source_path(files)).encode("utf-8", "surrogateescape")).hexdigest()
    return f"{_slug(files)}-{to}-{digest[:12]}"


def _slug(files: ModelFiles) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", files.name).strip("-.")[:60].rstrip("-.") or "model"


def _most(files: ModelFiles) -> str:
    sizes = dict(files.weight_types)
    return max(sizes, key=lambda kind: sizes[kind], default="")


def _names() -> Iterator[str]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for folder in sorted(converted_folder().iterdir()):
            if has_converted(folder.name):
                yield folder.name


def _staging(name: str) -> Path:
    return converted_folder() / f".{name}"


def _lock_file(name: str) -> Path:
    return converted_folder() / f".{name}.lock"


def _discard(name: str) -> None:
    """Out of sight in one step: an interrupted deletion leaves nothing that could be used. May raise
    OSError."""
    staging = _staging(name)
    if staging.exists():  # what a killed process left
        shutil.rmtree(staging)
    with contextlib.suppress(FileNotFoundError):
        (converted_folder() / name).rename(staging)
        shutil.rmtree(staging)


def _sweep() -> None:
    """Delete what killed processes left of other models."""
    for staging in converted_folder().glob(".*"):
        name = staging.name[1:]
        if _NAME.match(name) and staging.is_dir():
            with contextlib.suppress(InUse, OSError), sole_use(_lock_file(name), on_wait=None):
                shutil.rmtree(staging, ignore_errors=True)
