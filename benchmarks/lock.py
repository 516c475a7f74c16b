"""One benchmark at a time on a machine: two that share its cores measure each other."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from scripts.wheel_cache import cache_folder, exclusive


@contextlib.contextmanager
def one_at_a_time(path: Path | None = None) -> Iterator[None]:
    """Wait until no other benchmark of this user runs, then hold the machine."""
    path = path or cache_folder() / "benchmark.lock"
    with exclusive(path, lambda: print("waiting for another benchmark to end", file=sys.stderr)):
        yield
