"""A loaded MLX model: each sequence has its own KV cache and its own forward pass.

A step's parts run one after another. On the CPU build that costs next to nothing (one thread, and a
matrix product that has no faster form for more rows), and a sequence's results are those it has alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from edgeinfer.backend import (
    Capabilities,
    MemoryItem,
    RuntimeFacts,
    RuntimeSettings,
    SequenceStep,
    Step,
    StepResult,
)
from edgeinfer.errors import EdgeInferError, StepFailed
from edgeinfer_backends.mlx.checked_folder import CheckedFolder
from edgeinfer_backends.mlx.devices import describe_build, on_device, switches
from edgeinfer_backends.mlx.model import MlxModel
from edgeinfer_backends.mlx.prediction import runtime_items
from edgeinfer_backends.mlx.sequence_cache import SequenceCache, StepLayer
from edgeinfer_backends.mlx.snapshots import SnapshotFormat
from edgeinfer_backends.private_sequences import IDLE_SEQUENCES, PrivateRuntime
from edgeinfer_models.hf_tokenizer import HfTokenizer
from edgeinfer_models.tokenizer import Tokenizer

if TYPE_CHECKING:
    import mlx.core as mx

    from edgeinfer.backend import Logits

_KV_TYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}

# Rows of a GPU's matrix product and attention take other kernels from some count on. Not measured: there
# was no Apple GPU to measure on. The processor build's results do not depend on it (tests hold that).
_GPU_STABLE_CHUNK = 64


class MlxRuntime(PrivateRuntime[SequenceCache]):
    def __init__(
        self,
        model: MlxModel,
        tokenizer: HfTokenizer,
        folder: CheckedFolder,
        settings: RuntimeSettings,
        device: str,
    ) -> None:
        import mlx.core as mx

        self._model = model
        self._tokenizer = tokenizer
        self._device = device
        self._settings = settings
        self._warnings = list(folder.warnings)
        type_k, type_v = self._kv_type(settings.kv_type_k), self._kv_type(settings.kv_type_v)
        self._type_k, self._type_v = (getattr(mx, _KV_TYPES[kind]) for kind in (type_k, type_v))
        shapes = self._warm_up(folder.vocab_size)
        self._rotations = model.rotations(shapes[0][1])
        self._identity = {
            **folder.identity(),
            "kv_types": f"{type_k}/{type_v}",
            "adapters": "",
            "backend": "mlx",
            "build": _build(),
            "device": device,
            "switches": switches(),
        }
        self._snapshots = SnapshotFormat(self._identity, shapes, self._type_k, self._type_v)
        self._warn(settings)
        facts = RuntimeFacts(
            backend="mlx",
            device=device,
            vocab_size=folder.vocab_size,
            embedding_size=model.hidden_size,
            context=settings.context,
            context_trained=folder.context_trained,
            cells=settings.context * settings.sequences,
            max_sequences=settings.sequences + IDLE_SEQUENCES,
            max_step_tokens=settings.step_tokens,
            max_logit_rows=min(settings.logit_rows, settings.step_tokens),
            stable_chunk_tokens=1 if device == "cpu" else _GPU_STABLE_CHUNK,
            kv_type_k=type_k,
            kv_type_v=type_v,
            kv_bytes_per_token=self._snapshots.bytes_per_position,
            kv_layout="private",
            threads=1,
            threads_batch=1,
            can=Capabilities(
                rewind=True,
                evict=self._rotations is not None,
                fork=True,
                snapshot=True,
                token_masks=True,
                embeddings=True,
                abort=True,
                threads=False,
            ),
            warnings=tuple(self._warnings),
        )
        self._weight_bytes = model.num_bytes
        self._begin(facts)

    # -- facts -----------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def identity(self) -> Mapping[str, str]:
        return dict(self._identity)

    def memory(self) -> list[MemoryItem]:
        """The KV cache as if it were full; it is allocated as it fills."""
        facts = self._facts
        sizes = (facts.kv_bytes_per_token, facts.vocab_size, facts.embedding_size)
        return [
            MemoryItem("weights", self._weight_bytes, self._device),
            *runtime_items(*sizes, self._settings, self._device),
        ]

    def _kv_type(self, wanted: str) -> str:
        if wanted in _KV_TYPES:
            return wanted
        self._warnings.append(f"the mlx backend has no KV cache of type {wanted}; f16 is used")
        return "f16"

    def _warn(self, settings: RuntimeSettings) -> None:
        warnings = self._warnings
        if self._rotations is None:
            warnings.append("this model's positions cannot be shifted; nothing can be evicted")
        if not settings.flash_attention:
            warnings.append("the mlx backend has one kind of attention; the setting has no effect")
        if settings.gpu_layers > 0:
            place = "the processor: there is no GPU" if self._device == "cpu" else "the GPU, all of them"
            warnings.append(f"the mlx backend does not divide layers; they run on {place}")
        if self._device == "cpu" and self._model.scale_types - {"mlx.core.float32"}:
            warnings.append(
                "quantized weights with 16-bit scales are some 45 times slower on MLX's CPU build than"
                " with 32-bit ones; llama.cpp is the faster backend here"
            )

    def _warm_up(self, vocab_size: int) -> list[tuple[int, int, int]]:
        """Run two tokens, which also computes what mlx-lm's modules left lazy (until then it belongs to
        this thread's stream). Returns each layer's (KV heads, size of a key, size of a value)."""
        import mlx.core as mx

        cache = SequenceCache(self._model.num_layers, self._type_k, self._type_v)
        layers = cache.step()
        logits = self._model.logits(self._model.hidden([0, vocab_size - 1], layers))
        staged = _staged(layers)
        mx.eval(logits, staged)
        if logits.shape != (2, vocab_size):
            raise ValueError(f"logits of shape {logits.shape} for a vocabulary of {vocab_size}")
        return [(k.shape[1], k.shape[3], v.shape[3]) for k, v in staged]

    # -- running ---------------------------------------------------------------------------------

    def forward(self, step: Step) -> StepResult:
        """Padding is left out: it would cost its rows and gain nothing here."""
        self._rows = None
        starts, counts = self._check_step(step)
        with self._abortable(), self._mapped("a step"):
            computed = [self._compute(part) for part in step.parts]
        with self._mapped("a step"):
            rows = [logits for logits, _ in computed if logits is not None]
            found = _to_numpy(rows) if rows else None
            self._commit(
                [(self._sequences[p.sequence], c[1]) for p, c in zip(step.parts, computed, strict=True)]
            )
        self._rows = found
        return StepResult(starts, counts)

    def _compute(self, part: SequenceStep) -> tuple[mx.array | None, list[tuple[mx.array, mx.array]]]:
        """The rows asked for and what is to be kept, both computed, nothing kept yet."""
        import mlx.core as mx

        cache = self._sequences[part.sequence]
        # One token is over soon, and stopping at each layer would cost a GPU more than the layer.
        layers = cache.step(self._interrupt if len(part.tokens) > 1 else None)
        hidden = self._model.hidden(part.tokens, layers)
        staged = _staged(layers)
        logits = None
        if part.logits != "none":
            logits = self._model.logits(hidden if part.logits == "all" else hidden[-1:])
            mx.eval(logits, staged)
        else:
            mx.eval(staged)
        self._interrupt()
        return logits, staged

    def _commit(self, work: list[tuple[SequenceCache, list[tuple[mx.array, mx.array]]]]) -> None:
        """All or none: there may be no memory for the last one's buffers."""
        lengths = [cache.length for cache, _ in work]
        try:
            for cache, staged in work:
                cache.commit(staged)
        except BaseException:
            for (cache, _), length in zip(work, lengths, strict=True):
                cache.length = length
            raise

    @contextmanager
    def _mapped(self, what: str) -> Iterator[None]:
        """MLX's own errors, on this runtime's device."""
        try:
            with on_device(self._device):
                yield
        except EdgeInferError:
            raise
        except Exception as error:
            raise StepFailed(f"MLX failed on {what} ({type(error).__name__}: {error})") from error

    def embed(self, sequence: int, tokens: Sequence[int]) -> list[float]:
        import mlx.core as mx
        import numpy as np

        part = SequenceStep(sequence, tokens, "none")
        self._check_step(Step([part]))
        self._rows = None
        cache = self._sequences[sequence]
        with self._mapped("an embedding"):
            layers = cache.step()
            hidden = self._model.hidden(tokens, layers)
            staged = _staged(layers)
            mx.eval(hidden, staged)
            total = np.array(hidden.astype(mx.float32)).sum(axis=0, dtype=np.float64)
            self._commit([(cache, staged)])
        return [float(x) for x in total]

    # -- sequences -------------------------------------------------------------------------------

    def _new_cache(self) -> SequenceCache:
        return SequenceCache(self._model.num_layers, self._type_k, self._type_v)

    def _evict(self, cache: SequenceCache, start: int, stop: int) -> None:
        assert self._rotations is not None
        cache.evict(start, stop, self._rotations)

    def _pack(self, cache: SequenceCache, start: int, stop: int) -> bytes:
        return self._snapshots.pack(cache, start, stop)

    def _unpack(self, payload: bytes, start: int, count: int) -> Any:
        return self._snapshots.unpack(payload, start, count)

    def _extend(self, cache: SequenceCache, unpacked: Any) -> None:
        cache.commit(unpacked)

    def _release(self) -> None:
        import mlx.core as mx

        del self._model, self._rotations
        mx.clear_cache()


def _staged(layers: Sequence[StepLayer]) -> list[tuple[mx.array, mx.array]]:
    staged = [layer.staged for layer in layers]
    found = [each for each in staged if each is not None]
    assert len(found) == len(staged), "a layer of the model did not ask its cache"
    return found


def _to_numpy(rows: Sequence[mx.array]) -> Logits:
    import mlx.core as mx
    import numpy as np

    return np.array(mx.concatenate(list(rows)) if len(rows) > 1 else rows[0])


def _build() -> str:
    from importlib.metadata import version

    return describe_build(version("mlx"), version("mlx-lm"))
