"""Where pulled models live: a folder each, with a manifest, complete or not there at all.

    DATA/models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
    DATA/models/smollm2/manifest.json      written last; without it there is no model
    DATA/models/.smollm2-4711-x1y2/        being filled or removed by process 4711; never listed
    DATA/last-used.json

DATA is the user data folder of the platform, or EDGEINFER_DATA_DIR.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from edgeinfer.errors import DownloadFailed, ModelError, ModelFileInvalid, ModelNotFound
from edgeinfer_models.catalogue import CATALOGUE, suggestion

MANIFEST = "manifest.json"
_NAME = re.compile(r"^[a-z0-9][a-z0-9._-]{0,63}$")
_STAGING = re.compile(r"^\..+-(\d+)-[^-]+$")


@dataclass(frozen=True)
class Manifest:
    """manifest.json, field by field."""

    name: str
    file: str  # beside the manifest
    num_bytes: int
    sha256: str
    source: str  # where it came from, for a person
    licence: str
    pulled_at: str  # ISO 8601, UTC


@dataclass(frozen=True)
class InstalledModel:
    manifest: Manifest
    folder: Path

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def path(self) -> Path:
        return self.folder / self.manifest.file


@dataclass(frozen=True)
class StoreListing:
    models: tuple[InstalledModel, ...]
    damaged: tuple[str, ...]  # one line each: what is there but cannot be used, and why


def data_folder() -> Path:
    override = os.environ.get("EDGEINFER_DATA_DIR")
    if override:
        return Path(override).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_data_path("edgeinfer", appauthor=False))


def models_folder() -> Path:
    return data_folder() / "models"


def list_models() -> StoreListing:
    """What is installed, by name. Never raises for a damaged entry: it is reported instead."""
    models: list[InstalledModel] = []
    damaged: list[str] = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for folder in sorted(models_folder().iterdir()):
            if folder.name.startswith(".") or not folder.is_dir():
                continue
            try:
                models.append(_read_entry(folder))
            except ModelError as error:
                damaged.append(str(error))
    return StoreListing(tuple(models), tuple(damaged))


def find_model(name: str) -> InstalledModel | None:
    """An installed model; None if it is not there. Raises ModelFileInvalid if it is damaged."""
    if not _NAME.match(name):
        return None
    folder = models_folder() / name
    return _read_entry(folder) if folder.is_dir() else None


def remove_model(name: str) -> int:
    """Delete an installed model, damaged or not; the bytes that became free. Raises ModelNotFound."""
    folder = models_folder() / name
    if not _NAME.match(name) or not folder.is_dir():
        installed = [model.name for model in list_models().models]
        raise ModelNotFound(f"model '{name}' is not installed{suggestion(name, installed)}")
    try:
        freed = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        # Out of sight in one step; an interrupted deletion leaves nothing that could be listed.
        doomed = Path(tempfile.mkdtemp(prefix=f".{name}-{os.getpid()}-", dir=models_folder()))
        folder.rename(doomed / name)
        shutil.rmtree(doomed)
    except OSError as error:
        raise ModelFileInvalid(
            f"{folder}: cannot be removed ({error.strerror}); remove the folder by hand"
        ) from None
    if last_used() == name:
        with contextlib.suppress(OSError):
            _last_used_path().unlink()
    return freed


@contextlib.contextmanager
def staging_folder(name: str) -> Iterator[Path]:
    """An empty folder to assemble a model in; deleted at the end whatever happened. See `publish`."""
    root = models_folder()
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        folder = Path(tempfile.mkdtemp(prefix=f".{name}-{os.getpid()}-", dir=root))
    except OSError as error:
        raise DownloadFailed(
            f"{root}: cannot be written to ({error.strerror}); set EDGEINFER_DATA_DIR to another folder"
        ) from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(staging: Path, manifest: Manifest) -> InstalledModel:
    """Make a staged folder the model of that name, in place of an older one. May raise OSError."""
    final = models_folder() / manifest.name
    content = staging / "content"
    content.mkdir()
    (staging / manifest.file).rename(content / manifest.file)
    write_atomically(content / MANIFEST, json.dumps(asdict(manifest), indent=2) + "\n")
    _sync_folder(content)
    _swap(content, final, staging / "replaced")
    _sync_folder(final.parent)
    return InstalledModel(manifest, final)


def _swap(new: Path, final: Path, aside: Path) -> None:
    """Put `new` where `final` is. If it cannot be, `final` is what it was."""
    for attempt in range(10):
        replaced = aside.with_name(f"{aside.name}-{attempt}")
        with contextlib.suppress(FileNotFoundError):
            final.rename(replaced)
        try:
            new.rename(final)
            return
        except BaseException as error:
            busy = isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST)
            if busy and attempt < 9:  # another pull of the same model was quicker
                continue
            if replaced.exists() and not final.exists():
                replaced.rename(final)
            raise


def write_atomically(path: Path, text: str) -> None:
    """The whole new text or the old file, whatever is interrupted. May raise OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:  # noqa: PTH123 (an open descriptor)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise


def last_used() -> str | None:
    """The model argument that was used last: a name or an absolute path; None if there is none."""
    try:
        value = json.loads(_last_used_path().read_text("utf-8"))
    except (OSError, ValueError):
        return None
    model = value.get("model") if isinstance(value, dict) else None
    return model if isinstance(model, str) and model else None


def record_last_used(spec: str) -> None:
    """Remember a model for the next command without one. A disk that refuses is not an error."""
    if last_used() == spec:
        return
    with contextlib.suppress(OSError):
        write_atomically(_last_used_path(), json.dumps({"model": spec}) + "\n")


def _last_used_path() -> Path:
    return data_folder() / "last-used.json"


def _read_entry(folder: Path) -> InstalledModel:
    name = folder.name
    again = f"run `edgeinfer models {'pull --force' if name in CATALOGUE else 'rm'} {name}`"
    try:
        fields = json.loads((folder / MANIFEST).read_text("utf-8"))
        manifest = Manifest(**fields)
        proper = manifest.name == name and Path(manifest.file).name == manifest.file
        if not proper or type(manifest.num_bytes) is not int:
            raise ValueError("wrong fields")
    except OSError as error:
        raise ModelFileInvalid(f"model '{name}': no manifest ({error.strerror}); {again}") from None
    except (ValueError, TypeError):
        raise ModelFileInvalid(f"model '{name}': its manifest is damaged; {again}") from None
    model = InstalledModel(manifest, folder)
    try:
        num_bytes = model.path.stat().st_size
    except OSError as error:
        raise ModelFileInvalid(
            f"model '{name}': {manifest.file} is missing ({error.strerror}); {again}"
        ) from None
    if num_bytes != manifest.num_bytes:
        raise ModelFileInvalid(
            f"model '{name}': {manifest.file} has {num_bytes:,} bytes, not {manifest.num_bytes:,};"
            f" {again}"
        )
    return model


def _sweep(root: Path) -> None:
    """Delete what killed processes left behind."""
    for folder in root.iterdir():
        match = _STAGING.match(folder.name)
        if match and folder.is_dir() and not _is_alive(int(match[1])):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    import psutil

    return bool(psutil.pid_exists(pid))


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
