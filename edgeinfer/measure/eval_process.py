"""The process that measures for `edgeinfer eval`: a job as JSON on stdin, lines of JSON on stdout."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from edgeinfer.backend import Runtime, RuntimeSettings
from edgeinfer.engine.window import Window
from edgeinfer.errors import MeasureFailed
from edgeinfer.measure.evaluation import REFERENCE, EvalPlan, Setting
from edgeinfer.measure.long_texts import recomputed, slices, stream
from edgeinfer.measure.recall import recall
from edgeinfer.quality.agreement import Agreement, agreement
from edgeinfer.quality.predictions import CHUNK, chunk_of, perplexity
from edgeinfer.quality.reference import Reference, agreement_with, write_reference
from edgeinfer.quality.windows import SIZE, Windows, windows_of
from edgeinfer.quantize.measuring_process import Teller, run_job
from edgeinfer.registry import get_backend
from edgeinfer_models.model_files import ModelFiles

MIN_TOKENS = 2 * CHUNK


@dataclass(frozen=True)
class _Loading:
    backend: str
    files: ModelFiles
    settings: RuntimeSettings

    @classmethod
    def from_wire(cls, values: dict[str, Any]) -> _Loading:
        files = dict(values["files"])
        files["paths"] = tuple(Path(path) for path in files["paths"])
        files["weight_types"] = tuple((name, size) for name, size in files["weight_types"])
        settings = dict(values["settings"])
        settings["adapters"] = tuple((path, scale) for path, scale in settings["adapters"])
        return cls(values["backend"], ModelFiles(**files), RuntimeSettings(**settings))


class EvalProcess:
    def __init__(self, job: dict[str, Any], teller: Teller) -> None:
        self._teller = teller
        plan = dict(job["plan"])
        plan["settings"] = tuple(Setting(**each) for each in plan["settings"])
        self.plan = EvalPlan(**plan)
        self._model = _Loading.from_wire(job["model"])
        self._reference = _Loading.from_wire(job["reference"]) if job["reference"] else None

    def run(self) -> None:
        suites = {
            "kv": self._kv,
            "stream": self._stream,
            "recall": self._recall,
            "reference": self._against_reference,
        }
        suites[self.plan.suite]()

    # -- suites ----------------------------------------------------------------------------------

    def _kv(self) -> None:
        """Each KV type against f16, and f16 against itself in other steps: the noise floor."""
        with self._loaded(Setting(REFERENCE, REFERENCE), self.plan.tokens) as reference:
            tokens = self._tokens(reference)
            same = Setting(REFERENCE, REFERENCE)
            with self._loaded(same, self.plan.tokens, logit_rows=CHUNK // 2) as other:
                found = agreement(other, reference, tokens, self._progress("the noise floor"))
                self._tell_agreement("noise floor", other, found)
            for setting in self.plan.settings:
                with self._loaded(setting, self.plan.tokens) as runtime:
                    found = agreement(runtime, reference, tokens, self._progress(str(setting)))
                    self._tell_agreement(str(setting), runtime, found)

    def _tell_agreement(self, name: str, runtime: Runtime, found: Agreement) -> None:
        size = runtime.facts.kv_bytes_per_token
        self._teller.row({"setting": name, "bytes_per_token": size, **_figures(found)})

    def _stream(self) -> None:
        """Perplexity in slices, and of the end against reading it afresh with the same window."""
        plan = self.plan
        fresh: dict[int, float] = {}
        for setting in plan.settings:
            with self._loaded(setting, setting.window) as runtime:
                tokens = self._tokens(runtime)
                last = min(plan.last, len(tokens) // 2)
                window = Window(setting.window, setting.sinks, setting.eviction)
                found = stream(runtime, tokens, window, self._progress(str(setting)))
            if setting.window not in fresh:
                with self._loaded(Setting(REFERENCE, REFERENCE), setting.window) as runtime:
                    show = self._progress(f"reading afresh, {setting.window}")
                    nll = recomputed(runtime, tokens, len(tokens) - last, setting.window, progress=show)
                fresh[setting.window] = perplexity(nll)
            end = perplexity(found.nll[-last:])
            self._teller.row(
                {
                    "setting": str(setting),
                    "tokens": len(tokens),
                    "evicted": found.evicted,
                    "cells": max(found.used_cells),
                    "slices": [[at, value] for at, value in slices(found.nll, plan.slice_tokens)],
                    "perplexity": end,
                    "recomputed_perplexity": fresh[setting.window],
                    "ratio": end / fresh[setting.window],
                }
            )

    def _recall(self) -> None:
        for setting in self.plan.settings:
            with self._loaded(setting, setting.window) as runtime:
                tokens = runtime.tokenizer.encode(self.plan.text, add_special=False, parse_special=False)
                if len(tokens) < 4 * setting.window:
                    raise MeasureFailed(
                        f"the text has {len(tokens)} tokens; a window of {setting.window} needs"
                        f" {4 * setting.window}"
                    )
                window = Window(setting.window, setting.sinks, setting.eviction)
                show = self._progress(str(setting))
                found = recall(runtime, tokens, window, self.plan.facts, show)
            self._teller.row({"setting": str(setting), "places": [asdict(each) for each in found]})

    def _against_reference(self) -> None:
        """What two models predict of one text, one after the other, so that the larger alone has to fit;
        and the reference against itself in other steps: the noise floor."""
        assert self._reference is not None  # noqa: S101 (the suite's)
        try:
            with tempfile.TemporaryFile() as file:  # it has no name: nothing is left, however this ends
                windows, reference = self._read_reference(file, _in_windows(self._reference))
                self._read_model(_in_windows(self._model), windows, reference)
        except OSError as error:
            raise MeasureFailed(
                f"{tempfile.gettempdir()}: the reference's predictions cannot be kept there"
                f" ({error.strerror or error}); free some room, or name another folder in TMPDIR"
            ) from None

    def _read_reference(self, file: IO[bytes], model: _Loading) -> tuple[Windows, Reference]:
        with self._opened(model) as runtime:
            windows = windows_of(runtime, self.plan.text, self.plan.tokens, first=self.plan.first)
            show = self._progress(f"reading with {model.files.name}")
            reference = write_reference(file, runtime, windows, progress=show)
            beginning = windows.beginning(-(-len(windows.counts) // 8))
            show = self._progress("the noise floor")
            other_steps = max(1, chunk_of(runtime) // 2)
            found = agreement_with(reference, runtime, beginning, show, other_steps)
        self._teller.row({"setting": "noise floor", **_figures(found)})
        return windows, reference

    def _read_model(self, model: _Loading, windows: Windows, reference: Reference) -> None:
        with self._opened(model) as runtime:
            if runtime.facts.vocab_size == reference.vocab_size:
                own = windows_of(runtime, self.plan.text, self.plan.tokens, first=self.plan.first)
                if own != windows:
                    raise MeasureFailed(
                        "the two models have different tokenizers: they read the same text as other"
                        " tokens, so their predictions cannot be compared"
                    )
            show = self._progress(f"reading with {model.files.name}")
            found = agreement_with(reference, runtime, windows, show)
        self._teller.row({"setting": model.files.name, **_figures(found)})

    # -- parts -----------------------------------------------------------------------------------

    @contextmanager
    def _loaded(self, setting: Setting, context: int, logit_rows: int = CHUNK) -> Iterator[Runtime]:
        settings = replace(
            self._model.settings,
            context=-(-context // 256) * 256,
            sequences=1,
            logit_rows=logit_rows,
            kv_type_k=setting.kv_type_k,
            kv_type_v=setting.kv_type_v,
            heavy_hitters=setting.eviction == "h2o",
        )
        with self._opened(replace(self._model, settings=settings), str(setting)) as runtime:
            yield runtime

    @contextmanager
    def _opened(self, model: _Loading, what_for: str = "") -> Iterator[Runtime]:
        show = self._progress(f"loading {model.files.name}" + (what_for and f" for {what_for}"))

        def progress(done: float) -> bool:
            show(done)
            return True

        runtime = get_backend(model.backend).load(model.files, model.settings, progress)
        try:
            yield runtime
        finally:
            runtime.close()

    def _tokens(self, runtime: Runtime) -> list[int]:
        tokens = runtime.tokenizer.encode(self.plan.text, add_special=False, parse_special=False)
        if len(tokens) < max(MIN_TOKENS, min(self.plan.tokens, MIN_TOKENS)):
            raise MeasureFailed(f"the text has {len(tokens)} tokens; it needs {MIN_TOKENS} at least")
        return tokens[: self.plan.tokens]

    def _progress(self, what: str) -> Callable[[float], None]:
        return lambda done: self._teller.progress(what, done)


def _figures(found: Agreement) -> dict[str, Any]:
    return {
        "tokens": len(found.kl),
        "mean_kl": found.mean_kl,
        "median_kl": found.median_kl,
        "p99_kl": found.p99_kl,
        "top1": found.top1,
        "perplexity": found.perplexity,
        "reference_perplexity": found.reference_perplexity,
    }


def _in_windows(model: _Loading) -> _Loading:
    settings = replace(model.settings, context=SIZE, sequences=1, logit_rows=CHUNK)
    return replace(model, settings=settings)


if __name__ == "__main__":
    run_job(lambda job, teller: EvalProcess(job, teller).run())
