"""What was measured, on disk: one small file for each machine, model, build and set of options.

A file names all that it was measured under, and is used only where every word of that still holds: its
name is a digest, but the words inside are compared. Damaged and foreign files are skipped, and replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeinfer.machine.step_cost import StepCosts

FORMAT = 1
_MAX_BYTES = 4 << 20
_KEEP = 200  # files; the oldest go
_UNFINISHED_S = 3600.0  # a writer that takes longer was killed


def costs_folder() -> Path:
    """In EDGEINFER_CACHE_DIR, or the platform's folder for what can be made again."""
    override = os.environ.get("EDGEINFER_CACHE_DIR")
    if override:
        return Path(override).expanduser().absolute() / "step-costs"
    import platformdirs

    return Path(platformdirs.user_cache_path("edgeinfer", appauthor=False)) / "step-costs"


def costs_path(folder: Path, conditions: Mapping[str, str]) -> Path:
    text = json.dumps(dict(sorted(conditions.items())))
    return folder / f"{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}.json"


def load_costs(folder: Path, conditions: Mapping[str, str]) -> StepCosts | None:
    """Step costs under exactly these conditions; None if there are none or they cannot be trusted."""
    try:
        return StepCosts.from_json(load_measured(folder, conditions))
    except ValueError:
        return None


def save_costs(folder: Path, conditions: Mapping[str, str], costs: StepCosts) -> bool:
    return save_measured(folder, conditions, costs.as_json())


def load_measured(folder: Path, conditions: Mapping[str, str]) -> Any:
    """The JSON value that was kept under exactly these conditions; None if there is none. It is to be
    looked at before it is used: others may have written the file."""
    path = costs_path(folder, conditions)
    try:
        if path.stat().st_size > _MAX_BYTES:
            return None
        data: Any = json.loads(path.read_text())
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            return None
        if data.get("conditions") != dict(conditions):
            return None
        return data.get("costs")
    except (OSError, ValueError, RecursionError):  # not there, or not ours
        return None


def save_measured(folder: Path, conditions: Mapping[str, str], value: Any) -> bool:
    """Replace the file in one move; False where it cannot be written (it will be measured again)."""
    path = costs_path(folder, conditions)
    data = {"format": FORMAT, "conditions": dict(conditions), "costs": value}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=folder, suffix=".part")
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump(data, file)
            Path(name).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise
        _forget_oldest(folder)
    except OSError:
        return False
    return True


def _forget_oldest(folder: Path) -> None:
    files = sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime)
    now = time.time()
    killed = [f for f in folder.glob("*.part") if now - f.stat().st_mtime > _UNFINISHED_S]
    for file in (*files[:-_KEEP], *killed):
        with contextlib.suppress(OSError):
            file.unlink()
