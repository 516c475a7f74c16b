"""What a weight type loses: the model in it, beside the model as it is, on a text.

    with TypeLoss(source, path, text, tokens, progress) as measure:
        measure("q4_0")     # mean KL in nats a token

Each model is read in a process of its own (`python -m edgeinfer.measure.type_loss`), one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any

from edgeinfer.backend import RuntimeSettings
from edgeinfer.errors import MeasureFailed
from edgeinfer.quality.predictions import CHUNK
from edgeinfer.quality.reference import agreement_with, kept_reference, write_reference
from edgeinfer.quality.windows import SIZE, windows_of
from edgeinfer.quantize.importance import NamedImatrix
from edgeinfer.quantize.measuring_process import MeasuringProcess, Teller, run_job
from edgeinfer.quantize.quantization import Source, plan_quantization, quantize
from edgeinfer.quantize.scratch_folder import scratch_folder
from edgeinfer.registry import get_backend
from edgeinfer_models.conversion.conversion import (
    convert,
    kept_dtype,
    lacking_room,
    prepare_conversion,
)
from edgeinfer_models.conversion.model import SourceModel
from edgeinfer_models.gguf_header import GgufHeader
from edgeinfer_models.resolve import resolve_model

Progress = Callable[[str, float], None]
TOKENS = 1024  # where types differ by factors, and a mean over these is right to some 5 %
_BACKEND = "llamacpp"


class TypeLoss:
    """What the original predicts is found out once, at the first call. Files of its own lie in a
    temporary folder while it is open, one model's at a time."""

    def __init__(
        self,
        source: Source,
        path: Path,
        text: str,
        progress: Progress,
        tokens: int = TOKENS,
        imatrix: NamedImatrix | None = None,
    ) -> None:
        """path: the model's own. imatrix: what its types are weighed by."""
        self._source = source
        self._path = path
        self._text = text
        self._tokens = tokens
        self._progress = progress
        self._imatrix = imatrix
        self._temporary = scratch_folder()
        self._folder = Path(self._temporary.name)
        self._predictions = self._folder / "predictions"

    def __enter__(self) -> TypeLoss:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._temporary.cleanup()

    def __call__(self, type_name: str) -> float:
        """Mean KL in nats a token. Raises MeasureFailed (no room for the file, no room for the model),
        ModelFileInvalid, UnsupportedModel, OSError."""
        if not self._predictions.exists():
            self._read_original()
        candidate = self._written(type_name)
        try:
            return float(self._read(candidate, f"what {type_name} loses")["kl"])
        finally:
            candidate.unlink()

    def _read_original(self) -> None:
        if isinstance(self._source, GgufHeader):
            self._read(self._path, "reading the model as it is", is_original=True)
            return
        types = [(self._source.source.info(n).dtype, 1) for n in self._source.source.names]
        out = self._folder / "original.gguf"
        self._converted(self._source, kept_dtype(types), out, "the model as it is")
        try:
            self._read(out, "reading the model as it is", is_original=True)
        finally:
            out.unlink()

    def _read(self, model: Path, what: str, *, is_original: bool = False) -> Mapping[str, Any]:
        job = {
            "model": str(model),
            "what": what,
            "is_original": is_original,
            "predictions": str(self._predictions),
            "text": self._text,
            "tokens": self._tokens,
        }
        (row,) = MeasuringProcess("edgeinfer.measure.type_loss", job, self._progress).rows()
        return row

    def _written(self, type_name: str) -> Path:
        what = f"what {type_name} loses: writing it"
        out = self._folder / f"{type_name}.gguf"
        if type_name == "f16":
            assert isinstance(self._source, SourceModel)  # noqa: S101 (as it is it loses nothing)
            return self._converted(self._source, "F16", out, what)
        plan = plan_quantization(
            self._source, self._path, type_name, out, force=True, imatrix=self._imatrix
        )
        quantize(plan, lambda done: self._progress(what, done))
        return out

    def _converted(self, model: SourceModel, dtype: str, out: Path, what: str) -> Path:
        plan = prepare_conversion(model, "gguf", dtype, out, force=True)
        lacking = lacking_room(self._folder, plan.num_bytes)
        if lacking:
            raise MeasureFailed(f"{self._folder}: comparing types {lacking}; free some, or set TMPDIR")
        convert(plan, lambda done: self._progress(what, done))
        return out


def _read(job: Mapping[str, Any], teller: Teller) -> None:
    """Keep what the original predicts, or compare a candidate with what was kept."""
    model = resolve_model(job["model"])
    size = min(SIZE, model.config.context_trained or SIZE)
    settings = RuntimeSettings(context=SIZE, sequences=1, logit_rows=CHUNK)
    predictions = Path(job["predictions"])

    def show(done: float) -> None:
        teller.progress(job["what"], done)

    with closing(get_backend(_BACKEND).load(model.files, settings, lambda _: True)) as runtime:
        windows = windows_of(runtime, job["text"], job["tokens"], size)
        if job["is_original"]:
            with predictions.open("w+b") as file:
                write_reference(file, runtime, windows, progress=show)
            teller.row({})
            return
        reference = kept_reference(predictions, windows, runtime.facts.vocab_size, "")
        if reference is None:
            raise MeasureFailed(f"{predictions}: what the original predicts was damaged; try again")
        with closing(reference):
            found = agreement_with(reference, runtime, windows, show)
    teller.row({"kl": found.mean_kl})


if __name__ == "__main__":
    run_job(_read)
