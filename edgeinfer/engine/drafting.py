"""Which drafts a loaded model gets: decided when it is loaded and, where it takes measured costs to say
whether its exit would pay, once those are known.

What only might help is not loaded: an exit takes memory, and time to load.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeinfer.backend import Backend, MemoryItem, Runtime, RuntimeSettings
from edgeinfer.engine.draft_source import DraftSource, exit_typical, load_draft
from edgeinfer.engine.model_drafting import odds_needed
from edgeinfer.engine.speculation import Speculate, Speculation, impossible
from edgeinfer.engine.tuner import Tuner
from edgeinfer.engine.window import Window
from edgeinfer.errors import EdgeInferError
from edgeinfer_models.exit_file import read_exit_file
from edgeinfer_models.model_files import ModelFiles

log = logging.getLogger("edgeinfer.drafts")

_BETTER = 0.15  # that an exit may be right more often here than where it was measured
_HEAD = 0.1  # of an exit's layers, for its head


@dataclass(frozen=True)
class Target:
    """What was loaded, and how."""

    backend: Backend
    files: ModelFiles
    num_layers: int
    settings: RuntimeSettings
    runtime: Runtime
    window: Window
    tuner: Tuner | None


class Drafting:
    """speculation: None where nothing is drafted, and `reason` says why. warnings: what was asked for
    and is not had. memory: what drafting took beside the model."""

    def __init__(
        self,
        speculate: Speculate,
        source: DraftSource | None,
        target: Target,
        folder: Path,
        available_bytes: Callable[[], int],
    ) -> None:
        self._speculate = speculate
        self._source = source
        self._target = target
        self._folder = folder
        self._available_bytes = available_bytes
        self._is_undecided = False
        self.speculation: Speculation | None = None
        self.warnings: list[str] = []
        self.memory: tuple[MemoryItem, ...] = ()
        self.reason = self._begin()
        if self.reason:
            self.speculation = None
            if speculate not in ("auto", "off"):
                self.warnings.append(f"nothing is drafted: {self.reason}")

    def _begin(self) -> str:
        """Why nothing is drafted, or ""."""
        speculate, source, target = self._speculate, self._source, self._target
        tuner = target.tuner
        reason = impossible(speculate, target.runtime.facts, target.window, tuner)
        if reason or tuner is None:
            return reason
        if speculate == "exit" and (source is None or source.exit_path is None):
            return f"no exit of {target.files.name} is here; `edgeinfer train-exit` makes one"
        has_lookup = speculate in ("auto", "lookup")
        self.speculation = Speculation.of(target.runtime, target.window, tuner, has_lookup=has_lookup)
        if source is None or speculate == "lookup":
            return ""
        if has_lookup and source.exit_path is not None and not source.is_wanted:
            self._is_undecided = True
            self.decide()
            return ""
        problem = self._loaded(source)
        if problem and not has_lookup:
            return problem
        if problem:
            self.warnings.append(f"drafts are by lookup alone: {problem}")
        return ""

    def decide(self) -> bool:
        """Whether anything was done for an exit that may be worth it, now that costs may be known."""
        speculation, source = self.speculation, self._source
        if not self._is_undecided or speculation is None or source is None or not source.exit_path:
            return False
        known = speculation.costs(0)
        if 1 not in known or 4 not in known:
            speculation.no_model = "whether its exit would pay is not measured yet"
            return False
        self._is_undecided = False
        speculation.no_model = self._decided(speculation, source, source.exit_path, known)
        if speculation.no_model:
            log.info("no drafts by the exit: %s", speculation.no_model)
        return True

    def _decided(
        self,
        speculation: Speculation,
        source: DraftSource,
        exit_path: Path,
        known: Mapping[int, float],
    ) -> str:
        """Why the exit is not loaded, or "". known: seconds of steps of so many tokens."""
        try:
            found = read_exit_file(exit_path)
        except EdgeInferError as error:
            return str(error)
        layers = found.layer + found.new_layers
        draft_s = known[1] * (1.0 + _HEAD) * layers / max(self._target.num_layers, layers)
        needed = odds_needed(lambda tokens: known.get(sum(tokens)), draft_s)
        typical = exit_typical(found)
        if needed is None:
            return "its exit takes longer here than it could save"
        if typical and typical[0] + _BETTER < needed:
            return (
                f"its exit would have to be right {needed:.0%} of the time to pay here"
                f" ({typical[0]:.0%} where it was measured)"
            )
        return self._loaded(source)

    def _loaded(self, source: DraftSource) -> str:
        """What is wrong with it, or ""."""
        try:
            self._load(source)
        except EdgeInferError as error:
            log.warning("no drafts: %s", error)
            return str(error)
        except Exception as error:  # of drafts, which the model can do without
            log.exception("what drafts could not be loaded")
            return f"what drafts could not be loaded: {error!r}"
        return ""

    def _load(self, source: DraftSource) -> None:
        assert self.speculation is not None
        target = self._target
        loaded = load_draft(
            source,
            target.backend,
            target.files,
            target.num_layers,
            target.runtime,
            target.settings,
            self._folder,
            self._available_bytes(),
        )
        self.memory = loaded.memory
        self.speculation.use_model(loaded.model, loaded.typical, lambda: target.runtime.facts.threads)

    def close(self) -> None:
        if self.speculation is not None:
            self.speculation.close()
