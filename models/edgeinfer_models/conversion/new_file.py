"""Files that appear whole or not at all, even where the process is killed while it writes them.

On Linux an unnamed file (O_TMPFILE) is written and gets its name at the end: nothing is left of one that
was not finished. Elsewhere a file beside it with a name of its own is renamed; one that a kill left is
removed by the next that is written there.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO

from edgeinfer.errors import UsageError

_PREFIX, _SUFFIX = ".edgeinfer-", ".part"
_STALE_S = 24 * 3600.0
_SPLIT = re.compile(r"-[0-9]{5}-of-([0-9]{5})\.gguf$")


class NewFile:
    """with NewFile(path) as new: new.file.write(…); it is there after the block, if that did not raise.

    force: whether a file of that name may be replaced. within: a folder of the same file system to write
    in, where the file's own is to be made at the end. is_lasting: whether it is to outlive a power cut,
    which takes the time to write it to the disk. Raises UsageError where a file is there, OSError.
    """

    def __init__(
        self,
        path: Path,
        *,
        force: bool = False,
        within: Path | None = None,
        is_lasting: bool = True,
    ) -> None:
        self.path = path
        self._force = force
        self._is_lasting = is_lasting
        self._within = within or path.parent
        self._named: Path | None = None
        self.file: IO[bytes] = self._open()

    def _open(self) -> IO[bytes]:
        if not self._force and os.path.lexists(self.path):
            raise exists(self.path)
        _remove_stale(self._within)
        flag = getattr(os, "O_TMPFILE", None)
        if flag is not None:
            with contextlib.suppress(OSError):  # a file system that has no unnamed files
                return os.fdopen(os.open(self._within, flag | os.O_RDWR, 0o666), "r+b")
        descriptor, name = tempfile.mkstemp(_SUFFIX, _PREFIX, self._within)
        self._named = Path(name)
        return os.fdopen(descriptor, "r+b")

    def __enter__(self) -> NewFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self.file:
            if kind is None:
                self._finish()
        if self._named is not None:
            with contextlib.suppress(OSError):
                self._named.unlink()

    def _finish(self) -> None:
        self.file.flush()
        if self._is_lasting:
            os.fsync(self.file.fileno())
        self.path.parent.mkdir(exist_ok=True)
        if self._named is None:
            self._link()
        elif self._force:
            self._named.replace(self.path)
            self._named = None
        else:
            try:
                os.link(self._named, self.path)  # `replace` would take whatever came there meanwhile
            except FileExistsError:
                raise exists(self.path) from None
        _sync_folder(self.path.parent)

    def _link(self) -> None:
        """Give the unnamed file its name."""
        try:
            _link_unnamed(self.file.fileno(), self.path)
        except FileExistsError:
            if not self._force:
                raise exists(self.path) from None
            with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=self.path.parent) as folder:
                named = Path(folder) / self.path.name
                _link_unnamed(self.file.fileno(), named)
                named.replace(self.path)


def _link_unnamed(descriptor: int, path: Path) -> None:
    # linkat(2) with AT_SYMLINK_FOLLOW, which Python asks for only where it is given a folder too.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.link(
            f"/proc/self/fd/{descriptor}",
            path.name,
            src_dir_fd=folder,
            dst_dir_fd=folder,
            follow_symlinks=True,
        )
    finally:
        os.close(folder)


def require_place(path: Path, source: Path, *, force: bool) -> None:
    """Whether a file may be made there. source: the model it is made from, a file or a folder, whose own
    files nothing replaces. Raises UsageError."""
    if path.is_dir():
        name = source.name.removesuffix(".gguf") or "model"
        raise UsageError(f"{path}: is a folder; give a file's name, for example {path / name}.gguf")
    if not os.path.lexists(path):
        return
    if belongs_to(path, source):
        raise UsageError(f"{path}: is of the model that is read; give another -o")
    if not force:
        raise exists(path)


def belongs_to(path: Path, source: Path) -> bool:
    """Whether a file is one of a model's own, by whatever name or link."""
    parts = [source]
    split = _SPLIT.search(source.name)
    if source.is_dir():
        # A GGUF file in such a folder is something that was made of it.
        parts = [each for each in source.rglob("*") if each.suffix.lower() != ".gguf"]
    elif split is not None:
        parts += source.parent.glob(f"{glob.escape(source.name[: split.start()])}-*-of-{split[1]}.gguf")
    for part in parts:
        with contextlib.suppress(OSError):  # one of them is not there
            if part.is_file() and part.samefile(path):
                return True
    return False


def exists(path: Path) -> UsageError:
    return UsageError(f"{path}: is there already; --force replaces it, -o gives another name")


def _remove_stale(folder: Path) -> None:
    import time

    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_S:
                path.unlink()


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError, AttributeError):  # no such thing on Windows
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
