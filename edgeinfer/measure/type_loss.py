"""What a weight type loses: the model in it, beside the model as it is, on a text.

    with TypeLoss(source, path, text, tokens, progress) as measure:
        measure("q4_0")     # mean KL in nats a token

The comparison runs in a process of its own (`python -m edgeinfer.measure.type_loss`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any

from edgeinfer.backend import RuntimeSettings
from edgeinfer.errors import MeasureFailed
from edgeinfer.measure.quality import CHUNK, agreement
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
    """Files of its own lie in a temporary folder while it is open, one type's at a time."""

    def __init__(
        self, source: Source, path: Path, text: str, progress: Progress, tokens: int = TOKENS
    ) -> None:
        """path: the model's own."""
        self._source = source
        self._path = path
        self._text = text
        self._tokens = tokens
        self._progress = progress
        self._temporary = scratch_folder()
        self._folder = Path(self._temporary.name)
        self._reference: Path | None = path if isinstance(source, GgufHeader) else None

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
        if self._reference is None:
            assert isinstance(self._source, SourceModel)  # noqa: S101 (a GGUF file is its own reference)
            types = [(self._source.source.info(n).dtype, 1) for n in self._source.source.names]
            self._reference = self._converted(
                self._source, kept_dtype(types), self._folder / "original.gguf", "the model as it is"
            )
        candidate = self._written(type_name)
        try:
            job = {
                "reference": str(self._reference),
                "candidate": str(candidate),
                "name": type_name,
                "text": self._text,
                "tokens": self._tokens,
            }
            process = MeasuringProcess("edgeinfer.measure.type_loss", job, self._progress)
            (row,) = process.rows()
            return float(row["kl"])
        finally:
            candidate.unlink()

    def _written(self, type_name: str) -> Path:
        what = f"what {type_name} loses: writing it"
        out = self._folder / f"{type_name}.gguf"
        if type_name == "f16":
            assert isinstance(self._source, SourceModel)  # noqa: S101 (as it is it loses nothing)
            return self._converted(self._source, "F16", out, what)
        plan = plan_quantization(self._source, self._path, type_name, out, force=True)
        quantize(plan, lambda done: self._progress(what, done))
        return out

    def _converted(self, model: SourceModel, dtype: str, out: Path, what: str) -> Path:
        plan = prepare_conversion(model, "gguf", dtype, out, force=True)
        lacking = lacking_room(self._folder, plan.num_bytes)
        if lacking:
            raise MeasureFailed(f"{self._folder}: comparing types {lacking}; free some, or set TMPDIR")
        convert(plan, lambda done: self._progress(what, done))
        return out


def _compare(job: Mapping[str, Any], teller: Teller) -> None:
    backend = get_backend(_BACKEND)
    tokens = int(job["tokens"])
    settings = RuntimeSettings(context=-(-tokens // 256) * 256, sequences=1, logit_rows=CHUNK)
    reference = resolve_model(job["reference"])
    trained = reference.config.context_trained
    with closing(backend.load(reference.files, settings, lambda _: True)) as one:
        text = one.tokenizer.encode(job["text"], add_special=False, parse_special=False)
        text = text[: min(tokens, one.facts.context, trained or tokens)]
        if len(text) < CHUNK:
            raise MeasureFailed(f"the text has {len(text)} tokens; it needs {CHUNK} at least")
        with closing(
            backend.load(resolve_model(job["candidate"]).files, settings, lambda _: True)
        ) as other:
            what = f"what {job['name']} loses"
            found = agreement(other, one, text, lambda done: teller.progress(what, done))
    teller.row({"kl": found.mean_kl, "top1": found.top1})


if __name__ == "__main__":
    run_job(_compare)
