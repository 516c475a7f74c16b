"""How far a pull is: what every kind of pull tells its caller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PullProgress:
    phase: Literal["wait", "download", "verify"]  # wait: another process pulls it
    done: int  # the first one of a download that goes on says how much was there
    total: int  # bytes; a catalogue download's are those of the wheel


ProgressCallback = Callable[[PullProgress], None]
NoteCallback = Callable[[str], None]  # given one line that the user should read
