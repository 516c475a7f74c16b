"""Tensors that are done, in a folder beside the result until the file is written.

An hour's work is not lost to Ctrl+C or a flat battery: each tensor is a file, listed with its digest
once it is whole, and what another job left there (another model, type, text or version) is removed.

with kept_apart(folder):
    finished = FinishedTensors(folder, job)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeinfer.errors import UsageError
from edgeinfer_models.sole_use import InUse, sole_use

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[Any]
    Blocks = npt.NDArray[np.uint8]

_LIST, _JOB, _LOCK, _LEARNT = "finished.jsonl", "job.json", "lock", "learnt.npz"


@contextlib.contextmanager
def kept_apart(folder: Path) -> Iterator[None]:
    """Until the end of the block the folder is there and ours alone. Raises UsageError where another
    process works in it, OSError."""
    if folder.exists() and not folder.is_dir():
        raise _in_the_way(folder)
    folder.mkdir(exist_ok=True)
    try:
        with sole_use(folder / _LOCK, None):
            try:
                yield
            finally:
                if [each.name for each in folder.iterdir()] == [_LOCK]:
                    shutil.rmtree(folder, ignore_errors=True)
    except InUse:
        raise UsageError(
            f"{folder}: another edgeinfer is at work on this file; wait for it, or give another -o"
        ) from None


def is_at_work(folder: Path) -> bool:
    """Whether another process works in it."""
    try:
        with sole_use(folder / _LOCK, None):
            return False
    except InUse:
        return True


@dataclass(frozen=True)
class Finished:
    """shape: (rows, bytes of a row). error: of its outputs, relative to them."""

    file: str
    shape: tuple[int, int]
    sha256: str
    error: float


class FinishedTensors:
    def __init__(self, folder: Path, job: Mapping[str, Any]) -> None:
        """job: all that decides what the tensors are. Raises OSError, UsageError."""
        self._folder = folder
        self._done: dict[str, Finished] = {}
        self._num_files = 0  # a tensor may be kept again, as another file
        self.has_discarded = False  # tensors of another job
        wanted = json.dumps(job, sort_keys=True)
        folder.mkdir(exist_ok=True)
        if _text(folder / _JOB) == wanted:
            self._read()
            return
        if not (folder / _JOB).is_file() and self._contents():
            raise _in_the_way(folder)
        self.has_discarded = bool(_text(folder / _LIST))
        self._empty()
        (folder / _JOB).write_text(wanted)

    def __len__(self) -> int:
        return len(self._done)

    def __contains__(self, name: str) -> bool:
        return name in self._done

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._done)

    def error(self, name: str) -> float:
        return self._done[name].error

    def blocks(self, name: str) -> Blocks:
        """Read when they are used."""
        import numpy as np

        found = self._done[name]
        return np.memmap(self._folder / found.file, np.uint8, "r", shape=found.shape)

    def keep(self, name: str, blocks: Blocks, error: float) -> None:
        """Raises OSError."""
        file = f"{self._num_files}.blocks"
        self._num_files += 1
        data = blocks.tobytes()
        with (self._folder / file).open("wb") as written:
            written.write(data)
            written.flush()
            os.fsync(written.fileno())
        rows, width = blocks.shape
        found = Finished(file, (rows, width), hashlib.sha256(data).hexdigest(), error)
        with (self._folder / _LIST).open("a") as listed:
            listed.write(_line(name, found))
        self._done[name] = found

    def keep_learnt(self, arrays: Mapping[str, Array]) -> None:
        """How far what goes on after the tensors are all there has come. Raises OSError."""
        import numpy as np

        new = self._folder / f"{_LEARNT}.part"
        with new.open("wb") as written:
            np.savez(written, allow_pickle=False, **arrays)
            written.flush()
            os.fsync(written.fileno())
        new.replace(self._folder / _LEARNT)

    def learnt(self) -> dict[str, Array]:
        """Nothing where there is none, or it cannot be read."""
        import numpy as np

        try:
            with (self._folder / _LEARNT).open("rb") as file, np.load(file, allow_pickle=False) as found:
                return dict(found)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return {}

    def remove(self) -> None:
        """Of the folder at most the lock stays, while it is held."""
        self._empty()
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    def _contents(self) -> list[Path]:
        """But for the lock, which another process may look for."""
        return [each for each in self._folder.iterdir() if each.name != _LOCK]

    def _empty(self) -> None:
        for each in self._contents():
            _remove(each)

    def _read(self) -> None:
        for line in (_text(self._folder / _LIST) or "").splitlines():
            try:
                entry = json.loads(line)
                rows, width = entry["shape"]
                found = Finished(
                    str(entry["file"]),
                    (int(rows), int(width)),
                    str(entry["sha256"]),
                    float(entry["error"]),
                )
                name = str(entry["name"])
                data = (self._folder / Path(found.file).name).read_bytes()
            except (OSError, ValueError, KeyError, TypeError):
                break  # a line that was cut, or a file that is gone: what follows is made anew
            is_whole = len(data) == found.shape[0] * found.shape[1]
            if not is_whole or hashlib.sha256(data).hexdigest() != found.sha256:
                break
            self._done[name] = found
            self._num_files = max(self._num_files, int(Path(found.file).stem) + 1)
        kept = (_line(name, each) for name, each in self._done.items())
        (self._folder / _LIST).write_text("".join(kept))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()


def _in_the_way(folder: Path) -> UsageError:
    return UsageError(f"{folder}: is in the way and was not made by edgeinfer; move it")


def _line(name: str, found: Finished) -> str:
    return json.dumps({"name": name, **asdict(found)}) + "\n"


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return None
