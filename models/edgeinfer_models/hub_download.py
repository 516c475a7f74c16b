"""One file of the hub into one file here, from where an earlier attempt ended."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from edgeinfer.errors import ChecksumMismatch, DownloadFailed
from edgeinfer_models.hub import Body, BrokenOff, Hub, HubFile, Repository

# Seconds before each try after one that brought nothing; a byte that comes starts them anew.
WAITS_S = (1.0, 2.0, 4.0, 8.0, 8.0)
_TELL_EVERY_S = 0.05
_CHUNK = 1 << 20

Report = Callable[[int], None]  # given the bytes of the file that are here


def download(hub: Hub, repository: Repository, file: HubFile, target: Path, report: Report) -> None:
    """Complete `target`. Its bytes stay on any error but one: when they cannot be the beginning.

    report: called ten times a second even where nothing comes, and may raise to end it. Raises
    DownloadFailed, ModelNotFound, OSError of the disk.
    """
    tries = 0
    while True:
        before = _size(target)
        report(min(before, file.num_bytes))
        if before == file.num_bytes:
            return
        if before > file.num_bytes:
            target.unlink()
            continue
        try:
            with hub.open(repository, file.path, before) as body:
                _append(file, body, target, report)
            if _size(target) == file.num_bytes:
                continue
            raise BrokenOff("the server closed the connection")
        except BrokenOff as error:
            tries = 0 if _size(target) > before else tries + 1
            if tries == len(WAITS_S):
                raise DownloadFailed(
                    f"{repository.name}: {file.path} broke off after {_size(target):,} of"
                    f" {file.num_bytes:,} bytes ({error}); check the network. What came is kept: the"
                    " same command goes on from there"
                ) from None
        _wait(WAITS_S[tries], lambda: report(_size(target)))


def verify(name: str, file: HubFile, path: Path, report: Report) -> None:
    """Read the file back from the disk and compare it with what the hub published; if it is another,
    delete it. Raises ChecksumMismatch, OSError."""
    digest = hashlib.sha256()
    done = 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            report(done)
    if digest.hexdigest() != file.sha256:
        path.unlink()
        raise ChecksumMismatch(
            f"{name}: what was downloaded as {file.path} is not the published file (SHA-256"
            f" {digest.hexdigest()[:12]}… instead of {file.sha256[:12]}…) and is deleted; pull it again,"
            " and if that repeats check the proxy and HF_ENDPOINT"
        )


def _append(file: HubFile, body: Body, target: Path, report: Report) -> None:
    """Raises BrokenOff, DownloadFailed, OSError."""
    if body.total_bytes is not None and body.total_bytes != file.num_bytes:
        target.unlink(missing_ok=True)
        raise DownloadFailed(
            f"{file.path}: the server has {body.total_bytes:,} bytes where the hub announces"
            f" {file.num_bytes:,}; pull it again, and if that repeats check the proxy and HF_ENDPOINT"
        )
    with target.open("ab") as output:
        output.truncate(body.offset)  # 0 if the server sends it all again
        done, told = body.offset, 0.0
        for chunk in body.chunks:
            output.write(chunk[: file.num_bytes - done])
            output.flush()  # a kill loses nothing that came
            done += len(chunk)
            if done >= file.num_bytes:
                break
            if time.monotonic() - told >= _TELL_EVERY_S:
                told = time.monotonic()
                report(done)
        os.fsync(output.fileno())


def _wait(seconds: float, tell: Callable[[], None]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.1))
        tell()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
