"""Downloads that can go on: the bytes so far, kept apart from the models, one process at a time.

    DATA/models/.partial/hf--owner--repo--0123456789ab/about.json   the model's name and size
    DATA/models/.partial/hf--owner--repo--0123456789ab/SHA256       the first bytes of that file
    DATA/models/.partial/hf--owner--repo--0123456789ab.lock         held while it is worked on

Files go by the digest they must have, so that bytes of another revision are never taken for a beginning.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edgeinfer.errors import DownloadFailed
from edgeinfer_models.sole_use import InUse, sole_use
from edgeinfer_models.store import folder_name, models_folder, write_atomically

_ABOUT = "about.json"


@dataclass(frozen=True)
class PartialModel:
    name: str
    num_bytes: int  # so far
    total_bytes: int


def partials_folder() -> Path:
    return models_folder() / ".partial"


@contextlib.contextmanager
def partial_folder(name: str, on_wait: Callable[[], None] | None) -> Iterator[Path]:
    """The folder of a model's download, which is ours alone until the end of the block.

    on_wait: called five times a second while another process has it, and may raise; None: that is an
    error. The system gives the lock back when its process dies, however that happens. Raises
    DownloadFailed.
    """
    folder = _folder(name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        held = contextlib.ExitStack()
        held.enter_context(sole_use(folder.with_name(f"{folder.name}.lock"), on_wait))
    except InUse:
        raise DownloadFailed(
            f"{name}: another edgeinfer is pulling it right now; end that one first"
        ) from None
    except OSError as error:
        raise DownloadFailed(
            f"{folder.parent}: cannot be written to ({error.strerror}); set EDGEINFER_DATA_DIR to"
            " another folder"
        ) from None
    with held:
        yield folder


def start_partial(folder: Path, name: str, files: dict[str, int]) -> int:
    """Make ready for a download of these files (digest -> bytes); the bytes that are there already.

    What does not belong to them, an older revision's bytes, is deleted. May raise OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stray in folder.iterdir():
        if stray.name not in files:
            stray.unlink()
    about = {"name": name, "num_bytes": sum(files.values())}
    write_atomically(folder / _ABOUT, json.dumps(about) + "\n")
    return _bytes_in(folder)


def discard_partial(folder: Path) -> None:
    """Its model is installed, or is not wanted any more."""
    shutil.rmtree(folder, ignore_errors=True)


def list_partials() -> tuple[PartialModel, ...]:
    """Downloads that were begun, by name; nothing where nothing came."""
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for folder in sorted(partials_folder().iterdir()):
            if not folder.is_dir():
                continue
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                about = json.loads((folder / _ABOUT).read_text("utf-8"))
                name, total = about["name"], about["num_bytes"]
                if folder_name(name) == folder.name and type(total) is int:
                    found.append(PartialModel(name, _bytes_in(folder), total))
    return tuple(found)


def find_partial(name: str) -> PartialModel | None:
    return next((partial for partial in list_partials() if partial.name == name), None)


def remove_partial(name: str) -> int:
    """Delete what was downloaded of a model; the bytes that became free, 0 if nothing was there.

    Raises DownloadFailed while another process downloads it.
    """
    if folder_name(name) is None or not _folder(name).is_dir():
        return 0
    with partial_folder(name, on_wait=None) as folder:
        freed = _bytes_in(folder)
        discard_partial(folder)
    return freed


def _folder(name: str) -> Path:
    own = folder_name(name)
    assert own is not None, name  # noqa: S101 (names were parsed)
    return partials_folder() / own


def _bytes_in(folder: Path) -> int:
    total = 0
    for file in folder.iterdir():
        with contextlib.suppress(OSError):
            if not file.name.startswith(".") and file.name != _ABOUT:
                total += file.stat().st_size
    return total
