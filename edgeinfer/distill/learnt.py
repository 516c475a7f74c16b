"""How far training has come, as a file: it goes on from there after it was interrupted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeinfer.distill.checked_file import load_arrays, save_arrays
from edgeinfer.errors import ModelFileInvalid

if TYPE_CHECKING:
    from edgeinfer.exits import Floats, Tokens

_FORMAT = "edgeinfer-learnt-1"
_AGAIN = "remove it, and training begins anew"
_KEPT = "kept_tokens"


@dataclass(frozen=True)
class Learnt:
    """done: share of the training. steps: how many. state: of `ExitTrainer.state`. kept: the head's
    tokens."""

    done: float
    steps: int
    kept: Tokens
    state: Mapping[str, Floats]


def save_learnt(path: Path, learnt: Learnt, model_digest: str) -> None:
    """Raises OSError."""
    heading = {
        "format": _FORMAT,
        "model": model_digest,
        "done": repr(learnt.done),
        "steps": str(learnt.steps),
    }
    save_arrays(path, {**learnt.state, _KEPT: learnt.kept}, heading)


def load_learnt(path: Path, model_digest: str) -> Learnt:
    """Raises ModelFileInvalid: damaged, or of another model; OSError. (Whether the state suits the
    exits, `ExitTrainer.restore` says.)"""
    state, heading = load_arrays(
        path, {"format": _FORMAT, "model": model_digest}, "what was learnt", _AGAIN
    )
    kept = state.pop(_KEPT, None)
    try:
        done, steps = float(heading["done"]), int(heading["steps"])
    except (KeyError, ValueError):
        done, steps = math.nan, 0
    if kept is None or kept.dtype != np.int32 or not 0.0 <= done <= 1.0 or steps < 0:
        raise ModelFileInvalid(f"{path}: what was learnt so far is damaged; {_AGAIN}")
    if any(each.dtype != np.float32 or not np.isfinite(each).all() for each in state.values()):
        raise ModelFileInvalid(f"{path}: what was learnt so far is damaged; {_AGAIN}")
    return Learnt(done, steps, kept, state)
