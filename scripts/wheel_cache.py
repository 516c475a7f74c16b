"""Compiled wheels kept in the user's cache folder, one folder per key, never half-written.

~/.cache/edgeinfer/wheels/KEY/llama_cpp_python-….whl
                              wheel.json            {"file", "sha256", "size", "ingredients"}
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from scripts.wheel_key import Ingredients

try:
    import fcntl
except ImportError:  # no file locks on this system
    fcntl = None  # type: ignore[assignment]

RECORD = "wheel.json"


def cache_folder(environ: Mapping[str, str] | None = None, system: str | None = None) -> Path:
    """edgeinfer's cache folder, as platformdirs would name it; made if missing.

    Where the home folder is absent or read-only, a folder under the system's temporary one.
    """
    environ = os.environ if environ is None else environ
    if environ.get("XDG_CACHE_HOME"):
        base = Path(environ["XDG_CACHE_HOME"])
    else:
        inside = "Library/Caches" if (system or platform.system()) == "Darwin" else ".cache"
        base = _home(environ) / inside
    folder = base / "edgeinfer"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir()) / f"edgeinfer-cache-{os.getuid()}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():  # somebody else's folder: never trust its wheels
            folder = Path(tempfile.mkdtemp(prefix="edgeinfer-cache-"))
    return folder


class WheelCache:
    """Wheels by key. `find` trusts nothing it has not verified."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, key: str) -> Path | None:
        """The wheel for `key`, or None: absent, or damaged (it is then removed)."""
        entry = self.folder / key
        try:
            wheel = _verified(entry)
        except FileNotFoundError:
            wheel = None
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
            wheel = None
        if wheel is None and entry.exists():
            shutil.rmtree(entry, ignore_errors=True)
        return wheel

    @contextlib.contextmanager
    def building(self) -> Iterator[Path]:
        """A temporary folder on the cache's own file system, gone afterwards whatever happens."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=self.folder) as folder:
            yield Path(folder)

    def store(self, wheel: Path, ingredients: Ingredients) -> Path:
        """Move `wheel` (a file inside `building()`) to its key. All or nothing, also across a crash:
        contents are on the disk before the folder gets its name."""
        with zipfile.ZipFile(wheel) as archive:
            bad = archive.testzip()
        if bad is not None:
            raise ValueError(f"{wheel.name}: {bad} fails its checksum")
        with self.building() as temporary:
            entry = temporary / "entry"
            entry.mkdir()
            target = entry / wheel.name
            wheel.replace(target)
            record = {
                "file": target.name,
                "sha256": sha256_of(target),
                "size": target.stat().st_size,
                "ingredients": asdict(ingredients),
            }
            (entry / RECORD).write_text(json.dumps(record, indent=1) + "\n")
            for path in (target, entry / RECORD, entry):
                _to_disk(path)
            final = self.folder / ingredients.key()
            if final.exists() and self.find(final.name) is None:
                shutil.rmtree(final, ignore_errors=True)
            try:
                entry.rename(final)
            except OSError:
                # Another process was first; its wheel serves as well if it is whole.
                if self.find(final.name) is None:
                    raise
            _to_disk(self.folder)
        stored = self.find(ingredients.key())
        if stored is None:
            raise ValueError(f"{final} did not survive being written")
        return stored


@contextlib.contextmanager
def exclusive(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """One process at a time holds `path`; the others wait, after `on_wait()`. Freed by the system if
    the holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                on_wait()
                fcntl.flock(handle, fcntl.LOCK_EX)
            # A child started with close_fds=False goes on holding it if this process is killed.
            os.set_inheritable(handle.fileno(), True)
        yield


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _verified(entry: Path) -> Path:
    record = json.loads((entry / RECORD).read_text())
    name = record["file"]
    if Path(name).name != name or not name.endswith(".whl"):
        raise ValueError(f"{entry}: {name!r} is not the name of a wheel")
    wheel: Path = entry / name
    if wheel.stat().st_size != record["size"] or sha256_of(wheel) != record["sha256"]:
        raise ValueError(f"{wheel} is not what was stored")
    with zipfile.ZipFile(wheel) as archive:
        if archive.testzip() is not None:
            raise ValueError(f"{wheel} is damaged")
    return wheel


def _home(environ: Mapping[str, str]) -> Path:
    """The home folder also when HOME is unset or the empty string."""
    if environ.get("HOME"):
        return Path(environ["HOME"])
    import pwd

    return Path(pwd.getpwuid(os.getuid()).pw_dir)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
