"""A loaded MLX model: each sequence has its own KV cache and its own forward pass.

A step's parts run one after another. On the CPU build that costs next to nothing (one thread, and a
matrix product that has no faster form for more rows), and a sequence's results are those it has alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edgeinfer.backend import (
    BLOCK_TOKENS,
    Capabilities,
    MemoryItem,
    Runtime,
    RuntimeFacts,
    RuntimeSettings,
    Sampler,
    SequenceStep,
    Step,
    StepResult,
)
from edgeinfer.errors import EdgeInferError, OutOfCells, StepAborted, StepFailed
from edgeinfer.sampling import SamplingParams
from edgeinfer_backends.mlx.checked_folder import CheckedFolder
from edgeinfer_backends.mlx.devices import describe_build, on_device, switches
from edgeinfer_backends.mlx.model import MlxModel
from edgeinfer_backends.mlx.prediction import IDLE_SEQUENCES, runtime_items
from edgeinfer_backends.mlx.sequence_cache import SequenceCache, StepLayer
from edgeinfer_backends.mlx.snapshots import SnapshotFormat
from edgeinfer_backends.sampling_reference import ReferenceSampler
from edgeinfer_models.hf_tokenizer import HfTokenizer
from edgeinfer_models.tokenizer import Tokenizer

if TYPE_CHECKING:
    import mlx.core as mx

    from edgeinfer.backend import Logits

_KV_TYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}

# Rows of a GPU's matrix product and attention take other kernels from some count on. Not measured: there
# was no Apple GPU to measure on. The processor build's results do not depend on it (tests hold that).
_GPU_STABLE_CHUNK = 64


class MlxRuntime(Runtime):
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
        self._facts = RuntimeFacts(
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
        self._sequences: dict[int, SequenceCache] = {}
        self._next_sequence = 0
        self._rows: Logits | None = None
        self._abort_lock = threading.Lock()
        self._is_running = False
        self._is_aborted = False
        self._closed = False

    # -- facts -----------------------------------------------------------------------------------

    @property
    def facts(self) -> RuntimeFacts:
        return self._facts

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
        self._check_room(step)
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

    def _check_step(self, step: Step) -> tuple[list[int], list[int]]:
        """Row starts and counts. Raises ValueError."""
        facts = self._facts
        if not step.parts or step.padding < 0:
            raise ValueError("a step needs at least one part and no negative padding")
        seen: set[int] = set()
        starts: list[int] = []
        counts: list[int] = []
        num_rows = 0
        for part in step.parts:
            self._check_sequence(part.sequence)
            if part.sequence in seen:
                raise ValueError(f"sequence {part.sequence} stands in the step twice")
            seen.add(part.sequence)
            self._check_tokens(part.tokens)
            if part.logits not in ("none", "last", "all"):
                raise ValueError(f"logits are none, last or all, not {part.logits!r}")
            starts.append(num_rows)
            counts.append({"none": 0, "last": 1, "all": len(part.tokens)}[part.logits])
            num_rows += counts[-1]
        if step.num_tokens > facts.max_step_tokens:
            raise ValueError(f"a step of {step.num_tokens} tokens; at most {facts.max_step_tokens}")
        if num_rows > facts.max_logit_rows:
            raise ValueError(f"{num_rows} rows of logits; at most {facts.max_logit_rows}")
        return starts, counts

    def _check_room(self, step: Step) -> None:
        for part in step.parts:
            length = self._sequences[part.sequence].length
            if length + len(part.tokens) > self._facts.context:
                raise OutOfCells(
                    f"sequence {part.sequence} has {length} positions and {len(part.tokens)} more do not"
                    f" fit into its context of {self._facts.context}; evict, or load with more context"
                )
        self._need_cells(step.num_tokens)

    def abort(self) -> None:
        with self._abort_lock:
            self._is_aborted = self._is_running

    @contextmanager
    def _abortable(self) -> Iterator[None]:
        with self._abort_lock:
            self._is_running, self._is_aborted = True, False
        try:
            yield
        finally:
            with self._abort_lock:
                self._is_running = False

    def _interrupt(self) -> None:
        if self._is_aborted:
            raise StepAborted("the step was interrupted")

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

    def logits(self, row: int) -> Logits:
        num_rows = 0 if self._rows is None else len(self._rows)
        if self._rows is None or not 0 <= row < num_rows:
            raise ValueError(f"row {row}: the last step has {num_rows} rows of logits")
        found: Logits = self._rows[row]
        return found

    def create_sampler(self, params: SamplingParams, seed: int) -> Sampler:
        return ReferenceSampler(params, seed, self._facts.vocab_size)

    def sample(self, row: int | Logits, sampler: Sampler, mask: bytes | None = None) -> int:
        import numpy as np

        if not isinstance(sampler, ReferenceSampler):
            raise ValueError(f"a {type(sampler).__name__} is not a sampler of this runtime")
        logits = self.logits(row) if isinstance(row, int) else sampler.checked(row)
        if not np.isfinite(logits[logits.argmax()]):  # argmax finds a NaN first
            raise StepFailed("the model produced numbers that are not finite; is the file damaged?")
        return sampler.draw(logits, mask)

    def set_threads(self, threads: int, threads_batch: int) -> None:
        """MLX has no such setting: checked and left."""
        if threads < 0 or threads_batch < 0:
            raise ValueError("thread counts must be at least 1, or 0 for those of the load")

    def embed(self, sequence: int, tokens: Sequence[int]) -> list[float]:
        import mlx.core as mx
        import numpy as np

        part = SequenceStep(sequence, tokens, "none")
        self._check_step(Step([part]))
        self._check_room(Step([part]))
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

    def open(self) -> int:
        self._check_open()
        return self._add(SequenceCache(self._model.num_layers, self._type_k, self._type_v))

    def _add(self, cache: SequenceCache) -> int:
        self._need_handle()
        sequence = self._next_sequence
        self._next_sequence += 1
        self._sequences[sequence] = cache
        return sequence

    def free(self, sequence: int) -> None:
        self._check_sequence(sequence)
        self._rows = None
        del self._sequences[sequence]

    def length(self, sequence: int) -> int:
        self._check_sequence(sequence)
        return self._sequences[sequence].length

    def free_cells(self) -> int:
        return self._facts.cells - sum(cache.length for cache in self._sequences.values())

    def fork(self, sequence: int, length: int) -> int:
        self._check_range(sequence, 0, length)
        self._need_handle()
        self._need_cells(length)
        self._rows = None
        with self._mapped("a fork"):
            return self._add(self._sequences[sequence].fork(length))

    def rewind(self, sequence: int, length: int) -> None:
        self._check_range(sequence, 0, length)
        self._rows = None
        with self._mapped("a rewind"):
            self._sequences[sequence].rewind(length)

    def evict(self, sequence: int, start: int, stop: int) -> None:
        self._check_range(sequence, start, stop)
        if self._rotations is None:
            raise NotImplementedError("this model's positions cannot be shifted")
        self._rows = None
        cache = self._sequences[sequence]
        if start == stop:
            return
        with self._mapped("an eviction"):
            if stop == cache.length:
                cache.rewind(start)
            else:
                cache.evict(start, stop, self._rotations)

    def privatise(self, sequence: int) -> None:
        self._check_sequence(sequence)  # all sequences are

    def snapshot(self, sequence: int, start: int, stop: int) -> bytes:
        self._check_range(sequence, start, stop)
        if not 1 <= stop - start <= BLOCK_TOKENS:
            raise ValueError(f"a snapshot holds 1 to {BLOCK_TOKENS} positions, not {stop - start}")
        self._rows = None
        with self._mapped("a snapshot"):
            return self._snapshots.pack(self._sequences[sequence], start, stop)

    def restore(self, sequence: int, payload: bytes, num_positions: int) -> None:
        self._check_sequence(sequence)
        self._rows = None
        cache = self._sequences[sequence]
        with self._mapped("a restore"):
            staged = self._snapshots.unpack(payload, cache.length, num_positions)
            if cache.length + num_positions > self._facts.context:
                raise OutOfCells(f"{num_positions} positions more do not fit into the context")
            self._need_cells(num_positions)
            cache.commit(staged)

    def is_in_order(self, sequence: int) -> bool:
        self._check_sequence(sequence)
        return True

    def check_integrity(self) -> None:
        assert 0 <= self.free_cells() <= self._facts.cells
        assert len(self._sequences) <= self._facts.max_sequences
        for cache in self._sequences.values():
            assert 0 <= cache.length <= self._facts.context
            cache.check_integrity()

    def close(self) -> None:
        if self._closed:
            return
        import mlx.core as mx

        self._closed = True
        self._rows = None
        self._sequences.clear()
        del self._model, self._rotations
        mx.clear_cache()

    # -- arguments -------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the runtime is closed")

    def _check_sequence(self, sequence: int) -> None:
        self._check_open()
        if sequence not in self._sequences:
            raise ValueError(f"there is no sequence {sequence}")

    def _check_range(self, sequence: int, start: int, stop: int) -> None:
        self._check_sequence(sequence)
        length = self._sequences[sequence].length
        if not 0 <= start <= stop <= length:
            raise ValueError(f"positions [{start}, {stop}) of a sequence of {length}")

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        """MLX reads an embedding row without looking whether there is one."""
        if not len(tokens):
            raise ValueError("a part without tokens")
        if min(tokens) < 0 or max(tokens) >= self._facts.vocab_size:
            raise ValueError(f"a token is outside the vocabulary of {self._facts.vocab_size}")

    def _need_handle(self) -> None:
        if len(self._sequences) >= self._facts.max_sequences:
            raise OutOfCells(f"all {self._facts.max_sequences} sequences are in use; free one")

    def _need_cells(self, count: int) -> None:
        if count > self.free_cells():
            raise OutOfCells(
                f"{count} cells are needed and {self.free_cells()} of {self._facts.cells} are free;"
                " free or shorten a sequence"
            )


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
