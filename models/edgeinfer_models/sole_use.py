"""Something on disk that one process at a time may change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

_POLL_S = 0.2


class InUse(Exception):
    """Another process has it, and we were not to wait."""


@contextlib.contextmanager
def sole_use(lock_file: Path, on_wait: Callable[[], None] | None) -> Iterator[None]:
    """Hold a lock until the end of the block.

    on_wait: called five times a second while another process has it, and may raise; None: that is InUse.
    The system gives the lock back when its process dies, however that happens; the file stays, since
    removing it would let two processes hold locks of one name. May raise OSError.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(lock_file)
    while not lock.is_locked:
        try:
            lock.acquire(timeout=0 if on_wait is None else _POLL_S)
        except Timeout:
            if on_wait is None:
                raise InUse from None
            on_wait()
    try:
        yield
    finally:
        lock.release()
