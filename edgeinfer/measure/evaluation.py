"""What `edgeinfer eval` runs: a plan, and its rows as they come. The model runs in a process of its own
(eval_process.py), since native code may abort on a hostile file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from edgeinfer.engine.process import LoadCommand
from edgeinfer.engine.window import DEFAULT_SINKS, Eviction
from edgeinfer.errors import UsageError
from edgeinfer.quantize.measuring_process import MeasuringProcess

Suite = Literal["kv", "stream", "recall", "reference"]
SUITES: tuple[Suite, ...] = ("kv", "stream", "recall")  # that --suite chooses
DEFAULT_SETTINGS: Mapping[Suite, str] = {
    "kv": "q8_0,q4_0",
    "stream": "f16:512:4,f16:512:0,q8_0:512:4",
    "recall": "f16:512:4,f16:512:0",
}
# reference: about a minute for SmolLM2 135M in F16 and Q4_0 on two cores (estimated from its processor
# time); the mean KL is then known within some 2 %.
DEFAULT_TOKENS: Mapping[Suite, int] = {"kv": 2000, "stream": 10_000, "recall": 0, "reference": 5000}
REFERENCE = "f16"


@dataclass(frozen=True)
class Setting:
    """A KV type for K and V, or both with a slash between; a window and its sinks (stream, recall)."""

    kv_type_k: str
    kv_type_v: str
    window: int = 0  # none
    sinks: int = DEFAULT_SINKS
    eviction: Eviction = "streaming"

    def __str__(self) -> str:
        same = self.kv_type_k == self.kv_type_v
        kv = self.kv_type_k if same else f"{self.kv_type_k}/{self.kv_type_v}"
        if not self.window:
            return kv
        how = "" if self.eviction == "streaming" else f":{self.eviction}"
        return f"{kv}:{self.window}:{self.sinks}{how}"


@dataclass(frozen=True)
class EvalPlan:
    suite: Suite
    settings: tuple[Setting, ...]
    tokens: int  # of the text
    text: str
    facts: int = 5
    slice_tokens: int = 1000
    last: int = 2000  # tokens at the end that the recompute is compared on
    first: int = 0  # of a window's positions, the first whose prediction counts (reference)


def parse_settings(suite: Suite, text: str, kv_types: Sequence[str]) -> tuple[Setting, ...]:
    """ "q8_0,f16:512:4" -> settings. Raises UsageError."""
    found = []
    for word in text.split(","):
        match = re.fullmatch(
            r"\s*([a-z0-9_]+)(?:/([a-z0-9_]+))?(?::([0-9]{1,7}))?(?::([0-9]{1,7}))?(:h2o)?\s*", word
        )
        if match is None:
            raise UsageError(f"--settings {word[:40]!r} is no setting; write for example q8_0:512:4")
        k, v, window, sinks, h2o = match.groups()
        for kind in (k, v or k):
            if kind not in kv_types:
                known = ", ".join(kv_types)
                raise UsageError(f"--settings: {kind[:40]!r} is not a KV cache type; one of {known}")
        num_sinks = DEFAULT_SINKS if sinks is None else int(sinks)
        setting = Setting(k, v or k, int(window or 0), num_sinks, "h2o" if h2o else "streaming")
        if suite == "kv" and setting.window:
            raise UsageError(f"--settings {word.strip()!r}: --suite kv has no windows; write {k}")
        if suite != "kv" and not 32 <= setting.window <= 2**20:
            raise UsageError(f"--settings {word.strip()!r} needs a window of 32 or more: {k}:512:4")
        if setting.window and setting.sinks >= setting.window:
            raise UsageError(f"--settings {word.strip()!r}: the window is not larger than the sinks")
        found.append(setting)
    return tuple(dict.fromkeys(found))


class Evaluation:
    """A plan under way. `rows` yields each setting's figures as they are known; `stop` ends it."""

    def __init__(
        self,
        command: LoadCommand,
        plan: EvalPlan,
        progress: Callable[[str, float], None],
        reference: LoadCommand | None = None,
    ) -> None:
        """reference: what the model is compared with (suite "reference")."""
        job = {
            "model": _to_wire(command),
            "reference": None if reference is None else _to_wire(reference),
            "plan": asdict(plan),
        }
        self._process = MeasuringProcess(
            "edgeinfer.measure.eval_process", job, progress, "the model's process"
        )

    def rows(self) -> Iterator[dict[str, Any]]:
        """Raises what the process met: LoadFailed, MeasureFailed …"""
        return self._process.rows()

    def stop(self) -> None:
        self._process.stop()


def _to_wire(command: LoadCommand) -> dict[str, Any]:
    files = command.files
    return {
        "backend": command.backend,
        "files": {**asdict(files), "paths": [str(path) for path in files.paths]},
        "settings": asdict(command.settings),
    }
