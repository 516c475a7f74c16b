"""A folder for files of types that are tried: gone when it is closed, and where the process was killed,
with the next one that is opened a day later."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from pathlib import Path

_PREFIX = "edgeinfer-types-"
_STALE_S = 24 * 3600.0


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """In the system's folder for temporary files (TMPDIR). Raises OSError."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or gone meanwhile
            if time.time() - folder.stat().st_mtime > _STALE_S:
                shutil.rmtree(folder)
    return tempfile.TemporaryDirectory(prefix=_PREFIX)
