"""What work of minutes or hours says: how far it is, how long it will take, and what of it is kept."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeinfer.cli.output import StatusLine


class Clock:
    """Says how far something is and how long it will take, by how long it has taken."""

    def __init__(self, status: StatusLine) -> None:
        self._status = status
        self._what = ""
        self._begin = (0.0, 0.0)

    def show(self, what: str, done: float) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._begin = what, (now, done)
        began, first = self._begin
        gained = done - first
        left = ""
        if gained > 0.02 and now - began > 5:
            left = f", {_span((now - began) * (1 - done) / gained)} left"
        self._status.show(f"{what} … {done:.0%}{left}")


@contextmanager
def long_work(out: Path, status: StatusLine, *, quiet: bool) -> Iterator[None]:
    """For as long as `out` is being made. Where that is cut short, what is kept of it is said, and what
    the system says of a disk (that it is full, say) gets the name of what was written there."""
    try:
        yield
    except (KeyboardInterrupt, OSError) as problem:
        status.close()
        if isinstance(problem, OSError) and _is_our_own(problem.filename):
            problem.filename = str(out)
        _say_what_is_kept(out, quiet=quiet)
        raise
    finally:
        status.close()


def _is_our_own(name: str | bytes | int | None) -> bool:
    """Whether that says nothing to a user: no name, or that of a temporary file."""
    return name is None or Path(str(name)).name.startswith(".edgeinfer-")


def _say_what_is_kept(out: Path, *, quiet: bool) -> None:
    from edgeinfer.quantize.calibrated import work_folder

    folder = work_folder(out)
    if folder.is_dir() and not quiet:
        sys.stderr.write(
            f"edgeinfer: what is finished is kept in {folder}; the same command goes on from there\n"
        )


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
