"""A loaded torch model: the whole contract, each sequence with a cache of its own.

The rows of all parts of a step go through the matrices together; attention runs sequence by sequence.
Readable first: this is what the other backends are held to.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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
from edgeinfer_backends.private_sequences import IDLE_SEQUENCES, PrivateRuntime
from edgeinfer_backends.torch.decoder import Decoder, attend, attention_weights, seen_by, weigh
from edgeinfer_backends.torch.devices import kind_of
from edgeinfer_backends.torch.kv_cache import SequenceCache
from edgeinfer_backends.torch.kv_types import head_bytes, nearest
from edgeinfer_backends.torch.layers import LayerAccess
from edgeinfer_backends.torch.number_types import NumberTypes
from edgeinfer_backends.torch.prediction import Sizes, runtime_items
from edgeinfer_backends.torch.recording import obstacle
from edgeinfer_backends.torch.snapshots import SnapshotFormat
from edgeinfer_backends.torch.static_decode import MOST_SPANS, StaticDecoder
from edgeinfer_models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgeinfer.backend import Logits

log = logging.getLogger("edgeinfer.torch")
_FLOAT = 4


class StepAttention:
    """`decoder.Attention` for the rows of a step: each part writes into its own cache and reads it."""

    def __init__(self, decoder: Decoder, parts: Sequence[tuple[SequenceCache, int]]) -> None:
        self._shape = decoder.shape
        self._parts = parts
        self._seen: dict[tuple[int, int], Tensor | None] = {}  # by part and window

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        offset = 0
        found = []
        for index, (cache, count) in enumerate(self._parts):
            own = slice(offset, offset + count)
            offset += count
            keys, values = cache.append(layer, k[own], v[own], q.dtype)
            seen = self._seen_by(index, layer, q.device)
            if cache.weighs:
                weights = attention_weights(self._shape, q[own], keys, seen)
                cache.add_weights(layer, weights)
                found.append(weigh(self._shape, weights, values))
            else:
                found.append(attend(self._shape, q[own], keys, values, seen))
        return torch.cat(found) if len(found) > 1 else found[0]

    def _seen_by(self, index: int, layer: int, device: torch.device) -> Tensor | None:
        window = self._shape.window if self._shape.slides(layer) else 0
        if (index, window) not in self._seen:
            cache, count = self._parts[index]
            length = cache.length
            self._seen[index, window] = seen_by(length, count, length + count, window, device)
        return self._seen[index, window]


class TorchRuntime(PrivateRuntime[SequenceCache]):
    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        settings: RuntimeSettings,
        device: torch.device,
        dtype: torch.dtype,
        types: NumberTypes,
        identity: Mapping[str, str],
    ) -> None:
        shape = decoder.shape
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._device = device
        self._dtype = dtype
        self._settings = settings
        decoder.set_context(settings.context, device)
        (type_k, note_k), (type_v, note_v) = nearest(settings.kv_type_k), nearest(settings.kv_type_v)
        self._kinds = (type_k, type_v)
        notes = dict.fromkeys(note for note in (types.note, note_k, note_v) if note)
        self._identity = {
            **identity,
            "kv_types": f"{type_k}/{type_v}",
            "heavy_hitters": str(settings.heavy_hitters),
            # LongRoPE takes other factors in a longer context.
            "rope_context": decoder.rope_kind(settings.context),
        }
        weighs = settings.heavy_hitters
        has_experts = shape.experts is not None
        why_not = obstacle(self._kinds, types.held, has_experts=has_experts, weighs=weighs)
        self._snapshots = self._snapshot_format()
        self._threads = [settings.threads or torch.get_num_threads()] * 2
        self._threads[1] = settings.threads_batch or self._threads[0]
        self._loaded_threads = tuple(self._threads)
        heads = shape.num_layers * shape.num_kv_heads
        cell = heads * sum(head_bytes(kind, shape.head_dim) for kind in self._kinds)
        facts = RuntimeFacts(
            backend="torch",
            device=str(device),
            vocab_size=shape.vocab_size,
            embedding_size=shape.hidden_size,
            context=settings.context,
            context_trained=shape.context_trained,
            cells=settings.context * settings.sequences,
            max_sequences=settings.sequences + IDLE_SEQUENCES,
            max_step_tokens=settings.step_tokens,
            max_logit_rows=min(settings.logit_rows, settings.step_tokens),
            stable_chunk_tokens=1,
            kv_type_k=type_k,
            kv_type_v=type_v,
            kv_bytes_per_token=cell + (heads * _FLOAT if weighs else 0),
            kv_layout="private",
            threads=self._threads[0],
            threads_batch=self._threads[1],
            can=Capabilities(
                rewind=True,
                evict=True,
                fork=True,
                snapshot=True,
                token_masks=True,
                embeddings=True,
                abort=True,
                threads=device.type == "cpu",
                layers=True,
                heavy_hitters=weighs,
            ),
            exact=False,
            warnings=(*notes, *_setting_warnings(settings, device, why_not)),
        )
        self._begin(facts)
        self._static: StaticDecoder | None = None
        if device.type == "cuda" and not why_not:
            compiler = _compiled if settings.compiled else None
            self._static = StaticDecoder(
                decoder, self._new_cache(), settings.context, device, records=True, compiler=compiler
            )

    # -- facts -----------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def identity(self) -> Mapping[str, str]:
        return dict(self._identity)

    def memory(self) -> list[MemoryItem]:
        """The KV cache as if it were full; it is allocated as it fills."""
        kind, shape, facts = kind_of(self._device), self._decoder.shape, self._facts
        tensors = [*self._decoder.parameters(), *self._decoder.buffers()]
        weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        sizes = Sizes(
            facts.kv_bytes_per_token,
            shape.vocab_size,
            shape.hidden_size,
            max(shape.intermediate_size, 1),
            shape.num_heads if shape.attention_softcap or self._settings.heavy_hitters else 0,
        )
        is_fixed = self._static is not None
        return [
            MemoryItem("weights", weights, kind),
            *runtime_items(sizes, self._settings, kind, has_fixed_buffers=is_fixed),
        ]

    # -- running ---------------------------------------------------------------------------------

    def forward(self, step: Step) -> StepResult:
        """Padding is left out: it would cost its rows and gain nothing here."""
        self._rows = None
        starts, counts = self._check_step(step)
        with self._abortable(), self._mapped("a step"):
            if self._static is not None and step.num_tokens == 1:
                rows = self._decode_alone(self._static, step.parts[0])
            else:
                rows = self._rows_of(self._run(step.parts), step.parts)
            self._interrupt()
        self._commit(step.parts)
        self._rows = rows
        return StepResult(starts, counts)

    def _decode_alone(self, static: StaticDecoder, part: SequenceStep) -> Logits | None:
        cache = self._sequences[part.sequence]
        cache.begin(1)
        try:
            found = static.decode(cache, part.tokens[0])
        except Exception as error:  # no memory for a graph, no compiler …: it goes on without
            self._static = None
            static.give_up()
            first = (str(error).splitlines() or [""])[0][:200]
            self._warn(f"decoding is not recorded as a CUDA graph ({type(error).__name__}: {first})")
            return self._rows_of(self._run([part]), [part])
        rows: Logits | None = None if part.logits == "none" else found.cpu().numpy()
        return rows

    def _warn(self, warning: str) -> None:
        log.warning(warning)
        self._facts = replace(self._facts, warnings=(*self._facts.warnings, warning))

    def _run(self, parts: Sequence[SequenceStep]) -> Tensor:
        """Hidden states after the last norm of all rows. Nothing counts yet."""
        caches = [self._sequences[part.sequence] for part in parts]
        counts = [len(part.tokens) for part in parts]
        tokens = torch.tensor([t for part in parts for t in part.tokens], device=self._device)
        spans = [(c.length, c.length + n) for c, n in zip(caches, counts, strict=True)]
        positions = torch.cat([torch.arange(a, b, device=self._device) for a, b in spans])
        self._use_threads(len(tokens) > len(parts))
        for cache, count in zip(caches, counts, strict=True):
            cache.begin(count)
        attention = StepAttention(self._decoder, list(zip(caches, counts, strict=True)))
        decoder = self._decoder
        x = decoder.embed(tokens)
        for layer in range(decoder.shape.num_layers):
            self._interrupt()
            x = decoder.run_layer(layer, x, positions, attention)
        found: Tensor = decoder.norm(x)
        return found

    def _commit(self, parts: Sequence[SequenceStep]) -> None:
        for part in parts:
            self._sequences[part.sequence].commit(len(part.tokens))

    def _rows_of(self, hidden: Tensor, parts: Sequence[SequenceStep]) -> Logits | None:
        chosen: list[int] = []
        offset = 0
        for part in parts:
            count = len(part.tokens)
            if part.logits == "all":
                chosen += range(offset, offset + count)
            elif part.logits == "last":
                chosen.append(offset + count - 1)
            offset += count
        if not chosen:
            return None
        found: Logits = self._decoder.logits(hidden[chosen]).cpu().numpy()
        return found

    def _use_threads(self, is_batch: bool) -> None:
        wanted = self._threads[1 if is_batch else 0]
        if self._device.type == "cpu" and torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)

    @contextmanager
    def _mapped(self, what: str) -> Iterator[None]:
        """Without gradients, and torch's own errors as ours."""
        try:
            with torch.no_grad():
                yield
        except EdgeInferError:
            raise
        except Exception as error:
            raise StepFailed(f"torch failed on {what} ({type(error).__name__}: {error})") from error

    def set_threads(self, threads: int, threads_batch: int) -> None:
        super().set_threads(threads, threads_batch)
        self._check_open()
        if not self._facts.can.threads:
            return
        self._threads = [threads or self._loaded_threads[0], threads_batch or self._loaded_threads[1]]
        self._facts = replace(self._facts, threads=self._threads[0], threads_batch=self._threads[1])

    def embed(self, sequence: int, tokens: Sequence[int]) -> list[float]:
        part = SequenceStep(sequence, tokens, "none")
        self._check_step(Step([part]))
        self._rows = None
        with self._abortable(), self._mapped("an embedding"):
            hidden = self._run([part])
            found: list[float] = hidden.float().cpu().double().sum(dim=0).tolist()
            self._interrupt()
        self._commit([part])
        return found

    def layers(self) -> LayerAccess:
        self._check_open()
        context = self._facts.context
        return LayerAccess(self._decoder, self._device, self._dtype, context, self._replaced)

    def _replaced(self, matrix: str) -> None:
        """It is another model from now on: its snapshots are not those of before."""
        self._identity["replaced"] = f"{self._identity.get('replaced', '')};{matrix}"
        self._snapshots = self._snapshot_format()
        if self._static is not None:
            self._static.forget()

    def _snapshot_format(self) -> SnapshotFormat:
        weighs = self._settings.heavy_hitters
        return SnapshotFormat(
            self._identity, self._decoder.shape, self._kinds, self._device, weighs=weighs
        )

    # -- sequences -------------------------------------------------------------------------------

    def _new_cache(self) -> SequenceCache:
        weighs = self._settings.heavy_hitters
        return SequenceCache(self._decoder.shape, self._kinds, self._device, weighs=weighs)

    def _evict(self, cache: SequenceCache, start: int, stop: int) -> None:
        cache.evict(start, stop, self._turn)

    def evict_lightest(self, sequence: int, start: int, stop: int, keep: int) -> bytes:
        self._check_range(sequence, start, stop)
        if not self._facts.can.heavy_hitters:
            raise NotImplementedError("loaded without heavy_hitters")
        if not 0 <= keep <= stop - start:
            raise ValueError(f"{keep} of {stop - start} positions cannot be kept")
        if keep == stop - start:
            return b""
        self._rows = None
        with self._mapped("an eviction"):
            return self._sequences[sequence].keep_heaviest(start, stop, keep, self._turn)

    def _turn(self, layer: int, keys: Tensor, by: Tensor) -> Tensor:
        return self._decoder.rotary(layer).turn_back(keys, by)

    def _pack(self, cache: SequenceCache, start: int, stop: int) -> bytes:
        return self._snapshots.pack(cache, start, stop)

    def _unpack(self, payload: bytes, start: int, count: int) -> Any:
        return self._snapshots.unpack(payload, start, count)

    def _extend(self, cache: SequenceCache, unpacked: Any) -> None:
        layers, weight = unpacked
        cache.extend(layers, weight)

    def _release(self) -> None:
        del self._decoder, self._static
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _compiled(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    # A step is compiled for each span, and there may be more of those than torch expects of a function.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_SPANS)
    found: Callable[[], Tensor] = torch.compile(step, fullgraph=True, dynamic=False)
    return found


def _setting_warnings(
    settings: RuntimeSettings, device: torch.device, why_not_recorded: str
) -> list[str]:
    found = []
    if settings.gpu_layers > 0:
        place = "the processor: there is no GPU" if device.type == "cpu" else "the GPU, all of them"
        found.append(f"the torch backend does not divide layers; they run on {place}")
    if settings.compiled and device.type != "cuda":
        found.append("--compile has no effect: steps are compiled for NVIDIA GPUs only")
    elif device.type == "cuda" and why_not_recorded:
        found.append(f"decoding cannot be recorded as a CUDA graph, and is slower: {why_not_recorded}")
    return found
