"""The prompt cache on disk: a folder of blocks for each identity, shared by all processes of its user.

    prompts/
      IDENTITY/            digest of the model, KV types, backend and build
        identity.json      the same in words, for `edgeinfer cache list`
        KEY.kv             a block;  KEY.pin beside it: it stays
        KEY.gap            what an evicted conversation holds no more
        edgeinfer-….part   being written

No locks: files are moved into place whole, two writers of one key write the same bytes, and a file that
somebody else removed is a miss. The least recently used go first, by their modification time; a clock
that jumps changes that order and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeinfer.engine.block_files import (
    BLOCK_SUFFIX,
    GAP_SUFFIX,
    KEY_BYTES,
    MOST_BLOCK_BYTES,
    PART_PREFIX,
    PART_SUFFIX,
    PIN_SUFFIX,
    BlockHeader,
    BlockInvalid,
    block_name,
    identity_digest,
    read_block,
    read_gap,
    read_header,
    write_block,
    write_gap,
)
from edgeinfer.engine.history import Gap

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

log = logging.getLogger("edgeinfer.cache")

IDENTITY_FILE = "identity.json"
CACHE_NAME = re.compile(rf"[0-9a-f]{{{2 * KEY_BYTES}}}({BLOCK_SUFFIX}|{GAP_SUFFIX})")
_IDENTITY_NAME = re.compile(rf"[0-9a-f]{{{2 * KEY_BYTES}}}")
_PART_NAME = re.compile(rf"{PART_PREFIX}\w+{PART_SUFFIX}")
DEEPER_S = 0.001  # see `touch`
UNFINISHED_S = 3600.0  # a writer that takes longer was killed
FRESH_NS = 50_000_000  # of a folder's time of change, within which another change may not show
SPARE_BYTES = 2**29  # of the disk, left to others
SHRUNK_TO = 0.9  # of the capacity, so that not every block that is written removes one
MOST_WAITING_BYTES = 2**28  # of blocks to be written; more are not kept
BUSY_WAIT_S = 0.05
LONGEST_WAIT_S = 30.0  # for a moment without work; then a block is written beside it
PAUSE_S = 60.0  # after a failed write, before the next is tried
READERS = 2  # at once: checking a block takes longer than reading it
MOST_GAPS = 4096


def prompts_folder(chosen: str | None = None) -> Path:
    """In `chosen` (--cache-dir), EDGEINFER_CACHE_DIR, or the platform's folder for caches."""
    override = chosen or os.environ.get("EDGEINFER_CACHE_DIR")
    if override:
        return Path(override).expanduser().absolute() / "prompts"
    import platformdirs

    return Path(platformdirs.user_cache_path("edgeinfer", appauthor=False)) / "prompts"


@dataclass(frozen=True)
class Changes:
    """What differs from the last look at the folder."""

    added: Sequence[BlockHeader]
    gone: Sequence[bytes]
    gaps: Sequence[Gap]


@dataclass(frozen=True)
class _Write:
    key: bytes
    parent: bytes
    is_first: bool
    tokens: tuple[int, ...]
    payload: bytes
    gap: Gap | None
    instead_of: tuple[bytes, ...]  # shorter tails of the same history


class DiskCache:
    """The blocks of one identity, and room for them among all. A thread of its own writes them.

    most_block_bytes: of a payload; larger ones are no blocks. is_busy(): whether a request runs, which
    a write would slow down.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, str],
        capacity: int,
        *,
        name: str = "",
        most_block_bytes: int = MOST_BLOCK_BYTES,
        is_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        self._root = folder
        self._identity = identity_digest(identity)
        self._folder = folder / self._identity.hex()
        self._description = {"model": name, **identity}
        self.capacity = capacity
        self._most_block_bytes = most_block_bytes
        self._is_busy = is_busy
        self._names: set[str] = set()
        self._seen_ns = -1
        self._bad: set[str] = set()  # names of files that could be neither used nor removed
        self._removed: set[str] = set()  # of the names: by us, since the last look
        self._problems: deque[str] = deque(maxlen=8)
        self._waiting: deque[_Write] = deque()
        self._waiting_bytes = 0
        self._waiting_keys: dict[bytes, float] = {}  # and when each was used
        self._wake = threading.Condition()
        self._is_closing = False
        self._paused_until = 0.0
        self._writer: threading.Thread | None = None
        self._readers: ThreadPoolExecutor | None = None
        self._try_folder()

    def _try_folder(self) -> None:
        """A short-lived process would write at its end, when nobody is there to be told."""
        try:
            self._make_root()
            with tempfile.TemporaryFile(dir=self._root):  # `access` knows less, and says no reason
                pass
        except OSError as error:
            self._cannot_write(error)

    def _cannot_write(self, error: OSError) -> None:
        self._paused_until = time.monotonic() + PAUSE_S
        self.report(
            f"the prompt cache on disk cannot be written ({error.strerror or error}):"
            f" {self._root}; conversations are kept in memory only"
        )

    # -- looking ---------------------------------------------------------------------------------

    def changes(self) -> Changes | None:
        """Since the last call; None if the folder is as it was. Damaged and foreign files go."""
        try:
            changed_ns = self._folder.stat().st_mtime_ns
            if changed_ns == self._seen_ns:
                return None
            now_ns = time.time_ns()
            names = {
                entry.name for entry in os.scandir(self._folder) if CACHE_NAME.fullmatch(entry.name)
            }
        except OSError:  # not there: nothing was written yet, or somebody cleared it
            names, changed_ns, now_ns = set(), -1, 0
            if not self._names:
                return None
        added: list[BlockHeader] = []
        gaps: list[Gap] = []
        for name in sorted(names - self._names - self._bad):
            path = self._folder / name
            try:
                if name.endswith(BLOCK_SUFFIX):
                    added.append(read_header(path, self._identity))
                elif name.endswith(GAP_SUFFIX):
                    gaps.append(read_gap(path))
            except BlockInvalid as error:
                self._remove_bad(path, str(error))
            except FileNotFoundError:  # removed meanwhile
                self._removed.add(name)
            except OSError:  # not ours to read
                self._bad.add(name)
        gone = [
            bytes.fromhex(name.removesuffix(BLOCK_SUFFIX))
            for name in self._names - names
            if name.endswith(BLOCK_SUFFIX)
        ]
        self._names = names - self._removed
        self._removed = set()
        self._seen_ns = -1 if abs(now_ns - changed_ns) < FRESH_NS else changed_ns
        return Changes(added, gone, gaps)

    def _remove_bad(self, path: Path, reason: str) -> None:
        self.report(f"a file of the prompt cache was not used and is removed: {path.name}: {reason}")
        try:
            path.unlink()
            self._removed.add(path.name)
        except OSError:
            self._bad.add(path.name)

    def report(self, problem: str) -> None:
        log.warning("%s", problem)
        self._problems.append(problem)

    def take_problems(self) -> list[str]:
        """What should be told with the next answer."""
        found = []
        while self._problems:
            found.append(self._problems.popleft())
        return found

    # -- reading ---------------------------------------------------------------------------------

    def read(self, keys: Sequence[bytes]) -> Iterator[bytes | None]:
        """The payloads of blocks, in order; None for one that is not there or damaged, which is removed,
        and after it. Several are read and checked at once."""
        if self._readers is None:
            from concurrent.futures import ThreadPoolExecutor  # half a megabyte that few need

            self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="cache-reader")
        ahead = deque(self._readers.submit(self._read, key) for key in keys[: 2 * READERS])
        rest = iter(keys[2 * READERS :])
        try:
            while ahead:
                payload = ahead.popleft().result()
                yield payload
                if payload is None:
                    return
                for key in rest:
                    ahead.append(self._readers.submit(self._read, key))
                    break
        finally:
            for future in ahead:
                future.cancel()

    def _read(self, key: bytes) -> bytes | None:
        path = self._folder / block_name(key)
        try:
            header, payload = read_block(path, self._identity, self._most_block_bytes)
        except BlockInvalid as error:
            self._remove_bad(path, str(error))
            return None
        except FileNotFoundError:  # somebody made room, or cleared it
            return None
        except (OSError, MemoryError) as error:
            reason = getattr(error, "strerror", None) or repr(error)
            self.report(f"a block of the prompt cache could not be read: {reason}")
            return None
        return payload if header.key == key else None

    def remove(self, key: bytes) -> None:
        with contextlib.suppress(OSError):
            (self._folder / block_name(key)).unlink()
            self._removed.add(block_name(key))

    def touch(self, keys: Sequence[bytes]) -> None:
        """A conversation's blocks, from its first, were used just now. Each is said to have been used a
        little before the one in front of it: without that it is of no use, so it goes first."""
        now = time.time()
        for depth, key in enumerate(keys):
            used = now - depth * DEEPER_S
            with self._wake:
                is_waiting = key in self._waiting_keys
                if is_waiting:
                    self._waiting_keys[key] = used
            if not is_waiting:
                self._set_used(key, used)

    def _set_used(self, key: bytes, used: float) -> None:
        with contextlib.suppress(OSError):
            os.utime(self._folder / block_name(key), (used, used))

    # -- writing ---------------------------------------------------------------------------------

    def write(
        self,
        key: bytes,
        parent: bytes,
        is_first: bool,
        tokens: tuple[int, ...],
        payload: bytes,
        *,
        gap: Gap | None = None,
        instead_of: tuple[bytes, ...] = (),
    ) -> bool:
        """Have a block written when there is time. gap: of the sequence it is of. instead_of: blocks
        that it makes superfluous. False if it will not be: too much waits, or a write just failed."""
        if len(payload) > self.capacity or time.monotonic() < self._paused_until:
            return False
        with self._wake:
            if self._is_closing or self._waiting_bytes + len(payload) > MOST_WAITING_BYTES:
                return False
            self._waiting.append(_Write(key, parent, is_first, tokens, payload, gap, instead_of))
            self._waiting_keys[key] = time.time()
            self._waiting_bytes += len(payload)
            self._wake.notify_all()
        if self._writer is None:
            self._writer = threading.Thread(target=self._write_all, name="cache-writer", daemon=True)
            self._writer.start()
        return True

    def is_waiting(self, key: bytes) -> bool:
        """Whether a block is to be written and is not yet."""
        return key in self._waiting_keys

    def pin(self, keys: Sequence[bytes]) -> int:
        """Blocks that are never removed for room from now on. Returns how many of them are here."""
        count = 0
        for key in keys:
            if (self._folder / block_name(key)).exists():
                with contextlib.suppress(OSError):
                    (self._folder / (key.hex() + PIN_SUFFIX)).touch()
                    count += 1
        return count

    def wait(self, seconds: float) -> bool:
        """Until everything is written; False if it is not by then."""
        end = time.monotonic() + seconds
        with self._wake:
            while self._waiting:
                left = end - time.monotonic()
                if left <= 0:
                    return False
                self._wake.wait(left)
        return True

    def close(self, seconds: float) -> None:
        """Write what waits, as far as that is done in time."""
        with self._wake:
            self._is_closing = True
            self._wake.notify_all()
        self.wait(seconds)
        if self._readers is not None:
            self._readers.shutdown(wait=False, cancel_futures=True)

    def _write_all(self) -> None:
        while True:
            with self._wake:
                while not self._waiting:
                    if self._is_closing:
                        return
                    self._wake.wait()
                job = self._waiting[0]  # stays there until it is written: `wait` looks
            self._await_rest()
            try:
                self._write(job)
            except OSError as error:
                self._cannot_write(error)
            except Exception:  # of ours: the next block may still be written
                log.exception("writing a block failed")
            with self._wake:
                failed = time.monotonic() < self._paused_until
                for _ in range(len(self._waiting) if failed else 1):
                    done = self._waiting.popleft()
                    self._waiting_bytes -= len(done.payload)
                    self._waiting_keys.pop(done.key, None)
                self._wake.notify_all()

    def _await_rest(self) -> None:
        end = time.monotonic() + LONGEST_WAIT_S
        while self._is_busy() and not self._is_closing and time.monotonic() < end:
            time.sleep(BUSY_WAIT_S)

    def _write(self, job: _Write) -> None:
        """Raises OSError."""
        path = self._folder / block_name(job.key)
        used = self._waiting_keys[job.key]
        if path.exists():
            self._set_used(job.key, used)
            return
        self._make_folder()
        if _free_bytes(self._folder) < len(job.payload) + SPARE_BYTES:
            raise OSError(0, "less than 512 MiB of the disk is free")
        if job.gap is not None and not (self._folder / (job.gap.key.hex() + GAP_SUFFIX)).exists():
            write_gap(self._folder, job.gap)
        write_block(
            self._folder, self._identity, job.key, job.parent, job.is_first, job.tokens, job.payload
        )
        self._set_used(job.key, self._waiting_keys[job.key])
        for key in job.instead_of:
            if not (self._folder / (key.hex() + PIN_SUFFIX)).exists():
                with contextlib.suppress(OSError):
                    (self._folder / block_name(key)).unlink()
        make_room(self._root, self.capacity)

    def _make_folder(self) -> None:
        if self._folder.is_dir():
            return
        self._make_root()
        self._folder.mkdir(exist_ok=True, mode=0o700)
        text = json.dumps(self._description, indent=1)
        (self._folder / IDENTITY_FILE).write_text(text)

    def _make_root(self) -> None:
        self._root.parent.mkdir(parents=True, exist_ok=True)
        self._root.mkdir(exist_ok=True, mode=0o700)  # conversations are nobody else's business


@dataclass(frozen=True)
class StoredBlock:
    path: Path
    num_bytes: int
    used: float  # seconds since the epoch
    is_pinned: bool


def stored_blocks(root: Path) -> list[StoredBlock]:
    """All blocks of all identities, least recently used first."""
    found = []
    for folder in identity_folders(root):
        with contextlib.suppress(OSError):
            entries = list(os.scandir(folder))
            pins = {e.name.removesuffix(PIN_SUFFIX) for e in entries if e.name.endswith(PIN_SUFFIX)}
            for entry in entries:
                if entry.name.endswith(BLOCK_SUFFIX) and CACHE_NAME.fullmatch(entry.name):
                    with contextlib.suppress(OSError):
                        status = entry.stat(follow_symlinks=False)
                        is_pinned = entry.name.removesuffix(BLOCK_SUFFIX) in pins
                        found.append(
                            StoredBlock(Path(entry.path), status.st_size, status.st_mtime, is_pinned)
                        )
    return sorted(found, key=lambda block: block.used)


def make_room(root: Path, capacity: int) -> int:
    """Remove the least recently used blocks until the rest fits, pinned ones never; bytes removed."""
    blocks = stored_blocks(root)
    total = sum(block.num_bytes for block in blocks)
    removed = 0
    if total > capacity:
        for block in blocks:
            if total - removed <= capacity * SHRUNK_TO:
                break
            if not block.is_pinned:
                with contextlib.suppress(OSError):
                    block.path.unlink()
                    removed += block.num_bytes
    for folder in identity_folders(root):
        _tidy(folder)
    return removed


def _tidy(folder: Path) -> None:
    """Remove what a killed writer left, and the oldest records of evictions."""
    now = time.time()
    with contextlib.suppress(OSError):
        gaps = []
        for entry in os.scandir(folder):
            with contextlib.suppress(OSError):
                changed = entry.stat(follow_symlinks=False).st_mtime
                if _PART_NAME.fullmatch(entry.name) and abs(now - changed) > UNFINISHED_S:
                    Path(entry.path).unlink()
                elif entry.name.endswith(GAP_SUFFIX) and CACHE_NAME.fullmatch(entry.name):
                    gaps.append((changed, entry.path))
        for _, path in sorted(gaps)[:-MOST_GAPS]:
            with contextlib.suppress(OSError):
                Path(path).unlink()


def _free_bytes(folder: Path) -> int:
    if not hasattr(os, "statvfs"):
        import shutil

        return shutil.disk_usage(folder).free
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def identity_folders(root: Path) -> list[Path]:
    """Only what is named as ours: a folder that was chosen may hold other things."""
    try:
        return sorted(
            Path(entry.path)
            for entry in os.scandir(root)
            if _IDENTITY_NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
        )
    except OSError:
        return []
