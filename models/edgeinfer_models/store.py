"""Where pulled models live: a folder each, with a manifest, complete or not there at all.

    DATA/models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
    DATA/models/smollm2/manifest.json      written last; without it there is no model
    DATA/models/hf--owner--repo--0123456789ab/    a model of the hub: its manifest has its whole name
    DATA/models/.smollm2-4711-x1y2/        being filled or removed by process 4711; never listed
    DATA/models/.partial/                  downloads that can go on: see partial.py
    DATA/last-used.json

DATA is the user data folder of the platform, or EDGEINFER_DATA_DIR.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from edgeinfer.errors import DownloadFailed, ModelError, ModelFileInvalid, ModelNotFound
from edgeinfer_models.catalogue import CATALOGUE, suggestion
from edgeinfer_models.hub_name import is_hub_name, is_safe_path, parse_hub_name

MANIFEST = "manifest.json"
_NAME = re.compile(r"^[a-z0-9][a-z0-9._-]{0,63}$")
_STAGING = re.compile(r"^\..+-(\d+)-[^-]+$")
_HUB_FOLDER = "hf--"
_NAME_OF_DAMAGED = re.compile(r"^hf--[a-z0-9._-]{1,200}--[0-9a-f]{12}$")


@dataclass(frozen=True)
class Shard:
    file: str  # beside the manifest
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """manifest.json, field by field. Fields with a default are left out where they have it, so that a
    whole file's manifest is what edgeinfer has always written."""

    name: str
    file: str  # beside the manifest; the first one of a split model
    num_bytes: int  # of all files
    sha256: str  # of the file; of a split model, see `split_digest`
    source: str  # where it came from, for a person
    licence: str
    pulled_at: str  # ISO 8601, UTC
    repo: str = ""  # owner/repo on the hub
    revision: str = ""  # the commit
    shards: tuple[Shard, ...] = ()  # of a split model, in order

    @property
    def files(self) -> tuple[Shard, ...]:
        return self.shards or (Shard(self.file, self.num_bytes, self.sha256),)


def split_digest(shards: tuple[Shard, ...]) -> str:
    """One digest for a split model: the SHA-256 of its files' SHA-256 digests, in order."""
    return hashlib.sha256(b"".join(bytes.fromhex(shard.sha256) for shard in shards)).hexdigest()


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
    models.sort(key=lambda model: model.name)
    return StoreListing(tuple(models), tuple(damaged))


def folder_name(name: str) -> str | None:
    """A model's folder inside the store; None for what cannot be a model's name.

    A hub name becomes letters that every file system keeps apart, with a digest of the name: names that
    differ in capitals or in their file alone are different models.
    """
    if not is_hub_name(name):
        return name if _NAME.match(name) and not name.startswith(_HUB_FOLDER) else None
    try:
        parsed = parse_hub_name(name)
    except ModelNotFound:
        return None
    if not parsed.file:
        return None
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{_HUB_FOLDER}{parsed.repo.replace('/', '--').lower()}--{digest}"


def find_model(name: str) -> InstalledModel | None:
    """An installed model; None if it is not there. Raises ModelFileInvalid if it is damaged.

    name: of the catalogue, or a whole hub name, with its file.
    """
    folder = model_folder(name)
    return _read_entry(folder) if folder is not None and folder.is_dir() else None


def model_folder(name: str) -> Path | None:
    """Where a model of that name is or would be; None for what cannot be a name. A damaged hub model,
    whose manifest no longer says its name, goes by its folder's."""
    folder = folder_name(name)
    if folder is None and _NAME_OF_DAMAGED.match(name):
        folder = name
    return None if folder is None else models_folder() / folder


def remove_model(name: str) -> int:
    """Delete an installed model, damaged or not; the bytes that became free. Raises ModelNotFound."""
    folder = model_folder(name)
    if folder is None or not folder.is_dir():
        installed = [model.name for model in list_models().models]
        raise ModelNotFound(f"model '{name}' is not installed{suggestion(name, installed)}")
    try:
        freed = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        # Out of sight in one step; an interrupted deletion leaves nothing that could be listed.
        doomed = Path(tempfile.mkdtemp(prefix=f".{folder.name}-{os.getpid()}-", dir=models_folder()))
        folder.rename(doomed / folder.name)
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
        prefix = f".{folder_name(name) or name}-{os.getpid()}-"
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
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
    final = model_folder(manifest.name)
    assert final is not None, manifest.name  # noqa: S101 (names come from the catalogue or were parsed)
    content = staging / "content"
    content.mkdir()
    for each in manifest.files:
        (staging / each.file).rename(content / each.file)
    write_atomically(content / MANIFEST, json.dumps(_as_json(manifest), indent=2) + "\n")
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


def _as_json(manifest: Manifest) -> dict[str, object]:
    return {key: value for key, value in asdict(manifest).items() if value not in ("", (), [])}


def _read_entry(folder: Path) -> InstalledModel:
    name = folder.name
    again = f"run `edgeinfer models {'pull --force' if name in CATALOGUE else 'rm'} {name}`"
    try:
        manifest = _manifest(json.loads((folder / MANIFEST).read_text("utf-8")))
        if folder_name(manifest.name) != folder.name:
            raise ValueError("another model's")
    except OSError as error:
        raise ModelFileInvalid(f"model '{name}': no manifest ({error.strerror}); {again}") from None
    except (ValueError, TypeError, RecursionError):
        raise ModelFileInvalid(f"model '{name}': its manifest is damaged; {again}") from None
    if is_hub_name(manifest.name):
        name = manifest.name
        again = f"run `edgeinfer models pull --force {name}`"
    model = InstalledModel(manifest, folder)
    for each in manifest.files:
        try:
            num_bytes = (folder / each.file).stat().st_size
        except OSError as error:
            raise ModelFileInvalid(
                f"model '{name}': {each.file} is missing ({error.strerror}); {again}"
            ) from None
        if num_bytes != each.num_bytes:
            raise ModelFileInvalid(
                f"model '{name}': {each.file} has {num_bytes:,} bytes, not {each.num_bytes:,}; {again}"
            )
    return model


def _manifest(found: object) -> Manifest:
    """Raises ValueError or TypeError. What a later edgeinfer added is passed over."""
    if not isinstance(found, dict):
        raise TypeError("not an object")
    known = {key: value for key, value in found.items() if key in {f.name for f in fields(Manifest)}}
    shards = tuple(Shard(**shard) for shard in known.pop("shards", ()))
    manifest = Manifest(**{"licence": "", **known, "shards": shards})
    texts = (manifest.name, manifest.sha256, manifest.source, manifest.licence, manifest.pulled_at)
    files = manifest.files
    proper = (
        all(isinstance(text, str) for text in (*texts, manifest.repo, manifest.revision))
        and all(isinstance(each.file, str) and isinstance(each.sha256, str) for each in files)
        and all(is_safe_path(each.file) and "/" not in each.file for each in files)
        and all(type(each.num_bytes) is int for each in files)
        and files[0].file == manifest.file
        and sum(each.num_bytes for each in files) == manifest.num_bytes
    )
    if not proper:
        raise ValueError("wrong fields")
    return manifest


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
