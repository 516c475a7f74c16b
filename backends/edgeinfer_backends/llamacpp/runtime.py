"""A loaded llama.cpp model: ragged steps, samplers, and the KV operations of the contract."""

from __future__ import annotations

import ctypes
import math
import struct
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from edgeinfer.backend import (
    BLOCK_TOKENS,
    Capabilities,
    KvLayout,
    MemoryItem,
    Runtime,
    RuntimeFacts,
    RuntimeSettings,
    Sampler,
    SequenceStep,
    Step,
    StepResult,
)
from edgeinfer.errors import (
    LoadFailed,
    OutOfCells,
    SharedCells,
    SnapshotRejected,
    StepAborted,
    StepFailed,
)
from edgeinfer.sampling import SamplingParams
from edgeinfer_backends.llamacpp.cells import COMPACT_AT_LEAST, CellTable
from edgeinfer_backends.llamacpp.exit_draft import EmbeddedTokens
from edgeinfer_backends.llamacpp.library import (
    build_description,
    library,
    native_log,
    rotation_switch,
    version,
)
from edgeinfer_backends.llamacpp.native import ROPE_TYPE_MROPE, NativeContext, is_slow_to_read
from edgeinfer_backends.llamacpp.prediction import TILE, is_read_in_tiles
from edgeinfer_backends.llamacpp.raw_bytes import address_of, overwrite, unfilled_bytes
from edgeinfer_backends.llamacpp.samplers import LlamaSampler
from edgeinfer_backends.llamacpp.stream_table import StreamTable
from edgeinfer_backends.llamacpp.vocabulary import LlamaTokenizer
from edgeinfer_models.model_files import ModelFiles
from edgeinfer_models.token_rows import TokenRows

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgeinfer.backend import Logits

_FIRST_ROW = [0]
_ONE_ROW = StepResult((0,), (1,))

SNAPSHOT = struct.Struct("<4sHHIII")  # magic, version, parts, start, stop, checksum of the part heads
SNAPSHOT_MAGIC = b"eiKV"
_PART = struct.Struct("<IIQ")  # start, stop, bytes
_HEAD_BYTES = 8192  # the cells' positions and owners come first in llama.cpp's state: checked

_COMPACT_ABOVE = 0.5  # of the cells below the top


class LlamaCppRuntime(Runtime):
    """The layout `shared`: one unified KV cache, `CellTable` its mirror.

    Three sequences of llama.cpp's are kept for our own use: `scratch` (padding rows, block copies,
    the step that computes a shift), `grave` (dead cells, see cells.py) and `guard` (a second owner
    that keeps a sliding-window cache from recycling cells while the head is not at the top).
    """

    _layout: KvLayout = "shared"

    def __init__(
        self,
        native: NativeContext,
        files: ModelFiles,
        settings: RuntimeSettings,
        embeddings: TokenRows | None = None,
    ) -> None:
        """embeddings: of tokens, where the model has no vocabulary."""
        sequences = native.sequences
        import numpy as np

        self._np = np
        self._lib = lib = library()
        self._native = native
        self._files = files
        self._settings = settings
        self._ctx = native.context
        self._memory = native.memory
        self._closed = False
        self._abort_lock = threading.Lock()
        self._abortable = False
        self._abort_is_set = False
        self._tokenizer = LlamaTokenizer(native.vocab)
        self._vocab_size = self._tokenizer.vocab_size  # of logits
        self._embeddings = embeddings
        self._num_tokens = self._vocab_size if embeddings is None else embeddings.num_tokens
        self._max_sequences = sequences
        self._scratch, self._grave, self._guard = sequences, sequences + 1, sequences + 2
        self._unpacked = native.unpacked
        self._filler = b""  # one cell's state, to fill cells with
        self._window: int = max(0, lib.llama_model_n_swa(native.model))
        self._rope_type: int = lib.llama_model_rope_type(native.model)
        self._step_tokens: int = lib.llama_n_batch(self._ctx)
        self._table: CellTable | StreamTable = self._make_table(lib.llama_n_ctx(self._ctx))
        self._ids = list(range(sequences))  # llama.cpp's sequence for each of ours
        self._row_to_batch: list[int] = []
        # LLAMA_API float * llama_get_logits_ith(struct llama_context * ctx, int32_t i): as an address,
        # a prototype of our own, for it is called for every token
        prototype = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32)
        self._logits_address = prototype(("llama_get_logits_ith", lib._lib))
        self._logit_views: dict[int, Logits] = {}
        self._free_handles = list(range(sequences - 1, -1, -1))
        # LLAMA_API struct llama_batch llama_batch_init(int32_t n_tokens, int32_t embd,
        #     int32_t n_seq_max): with embd, room for so many numbers a token and none for ids
        width = 0 if embeddings is None else embeddings.width
        if embeddings is not None and width != lib.llama_model_n_embd(native.model):
            native.close()
            raise LoadFailed(f"{files.name}: embeddings of {width} numbers are not of its width")
        self._batch = lib.llama_batch_init(self._step_tokens, width, 1)
        as_array = np.ctypeslib.as_array
        shape = (self._step_tokens,)
        self._batch_tokens: Any
        if embeddings is None:
            self._batch_tokens = as_array(self._batch.token, shape)
        else:
            self._batch_tokens = EmbeddedTokens(as_array(self._batch.embd, (*shape, width)), embeddings)
        self._batch_pos = as_array(self._batch.pos, shape)
        self._batch_logits = as_array(self._batch.logits, shape)
        as_array(self._batch.n_seq_id, shape)[:] = 1
        # seq_id is one pointer per token, each to one id: llama_batch_init(…, n_seq_max = 1)
        self._batch_seq = [self._batch.seq_id[i] for i in range(self._step_tokens)]
        self._embedding_size: int = lib.llama_model_n_embd_out(native.model)
        try:
            cell_bytes = self._warm_up()
            unpacked_bytes = self._reserve_unpacked()
        except BaseException:
            self.close()
            raise
        self._is_tiled = is_read_in_tiles(settings) or unpacked_bytes > 0
        warnings = []
        if unpacked_bytes:
            native.items.append(MemoryItem("unpacked", unpacked_bytes))
        reads_slowly = not unpacked_bytes and is_slow_to_read(lib, settings)
        if reads_slowly:
            warnings.append(
                f"a prompt is read slowly over a KV cache of {settings.kv_type_k}/{settings.kv_type_v}"
                " with this build of llama.cpp; --kv-type f16 is several times faster"
            )
        self._default_threads = (
            lib.llama_n_threads(self._ctx),
            lib.llama_n_threads_batch(self._ctx),
        )
        self._facts = RuntimeFacts(
            backend="llamacpp",
            device=_device_name(lib, settings),
            vocab_size=self._vocab_size,
            embedding_size=self._embedding_size,
            context=min(settings.context, self._table.most),
            context_trained=max(0, lib.llama_model_n_ctx_train(native.model)),
            cells=self._table.size,
            max_sequences=sequences,
            max_step_tokens=self._step_tokens,
            max_logit_rows=min(settings.logit_rows, self._step_tokens),
            stable_chunk_tokens=TILE,
            kv_type_k=settings.kv_type_k,
            kv_type_v=settings.kv_type_v,
            kv_bytes_per_token=cell_bytes,
            kv_layout=self._layout,
            threads=self._default_threads[0],
            threads_batch=self._default_threads[1],
            can=Capabilities(
                rewind=True,
                evict=native.can_shift,
                fork=True,
                snapshot=True,
                token_masks=True,
                embeddings=True,
                abort=True,
            ),
            reads_slowly=reads_slowly,
            warnings=tuple(warnings),
        )

    def _make_table(self, cells: int) -> CellTable | StreamTable:
        return CellTable(cells)

    @property
    def _cells(self) -> CellTable:
        """The mirror, for those who ask which cells."""
        assert isinstance(self._table, CellTable)
        return self._table

    # -- facts -----------------------------------------------------------------------------------

    @property
    def facts(self) -> RuntimeFacts:
        return self._facts

    @property
    def tokenizer(self) -> LlamaTokenizer:
        return self._tokenizer

    def identity(self) -> Mapping[str, str]:
        weights = self._files.digest or ";".join(_file_stamp(path) for path in self._files.paths)
        adapters = ";".join(f"{path}*{scale}" for path, scale in self._settings.adapters)
        return {
            "weights": weights,
            "kv_types": f"{self._settings.kv_type_k}/{self._settings.kv_type_v}",
            "flash_attention": str(self._settings.flash_attention),  # off: V is stored transposed
            "rope": "long" if self._is_past_original_context() else "model",
            "adapters": adapters,
            "backend": f"llamacpp {version()}",
            "build": build_description(),
            "rotation": rotation_switch(),
            "layout": self._layout,  # which has a form of snapshots of its own
        }

    def _is_past_original_context(self) -> bool:
        """Models with two sets of RoPE factors (LongRoPE: Phi 3.5, Phi 4 mini) use the long ones at
        every position, as soon as the context there is room for is larger than the one they were first
        trained on (llama_model::get_rope_factors)."""
        lib, native = self._lib, self._native
        text = ctypes.create_string_buffer(64)

        def number(key: str) -> int:
            # LLAMA_API int32_t llama_model_meta_val_str(const struct llama_model * model,
            #     const char * key, char * buf, size_t buf_size): -1 where there is none
            found = lib.llama_model_meta_val_str(native.model, key.encode(), text, len(text))
            return int(text.value) if found > 0 and text.value.isdigit() else 0

        lib.llama_model_meta_val_str(native.model, b"general.architecture", text, len(text))
        arch = text.value.decode(errors="replace")
        original = number(f"{arch}.rope.scaling.original_context_length")
        original = original or lib.llama_model_n_ctx_train(native.model)
        return bool(lib.llama_n_ctx_seq(self._ctx) > original)

    def memory(self) -> list[MemoryItem]:
        return list(self._native.items)

    # -- running ---------------------------------------------------------------------------------

    def forward(self, step: Step) -> StepResult:
        parts = step.parts
        if len(parts) == 1 and len(parts[0].tokens) == 1 and not step.padding:
            result = self._forward_one(parts[0])
            if result is not None:
                return result
        return self._forward_any(step)

    def _forward_one(self, part: SequenceStep) -> StepResult | None:
        """A lone token to decode: the step that is run for nearly every token there is, with nothing in
        it that the general one would do in vain. None where something is out of the ordinary."""
        sequence, token, table = part.sequence, part.tokens[0], self._table
        length = table.length_of(sequence)
        if (
            length is None
            or self._closed
            or part.logits == "none"
            or not 0 <= token < self._num_tokens
            or not table.can_decode(sequence)
        ):
            return None
        self._batch_tokens[0] = token
        self._batch_pos[0] = length
        self._batch_logits[0] = 1
        self._batch_seq[0][0] = self._ids[sequence]
        self._begin_abortable()
        code = self._decode(1)
        self._abortable = False
        if code != 0:
            self._undo(Step([part]))
            self._fail_step(code, 1)
        table.append(sequence, 1)
        self._row_to_batch = _FIRST_ROW
        return _ONE_ROW

    def _forward_any(self, step: Step) -> StepResult:
        starts, counts, rows = self._check_step(step)
        total = step.num_tokens
        # Already here: moving cells takes milliseconds, and an abort that came in them would be lost.
        self._begin_abortable()
        try:
            self._prepare(step)
            padding = self._fill_padding(step, total)
            self._fill(step)
            self._row_to_batch = rows
            code = self._decode(total + len(padding))
        finally:
            self._abortable = False
        # the dummies' cells are the topmost: they are given back and the head follows
        for dummy in set(padding):
            self._lib.llama_memory_seq_rm(self._memory, dummy, -1, -1)
        if code != 0:
            self._undo(step)
            self._fail_step(code, total)
        for part in step.parts:
            self._table.append(part.sequence, len(part.tokens))
        return StepResult(starts, counts)

    def _prepare(self, step: Step) -> None:
        """Room for a step, where its cells belong. Raises OutOfCells, changing nothing."""
        total = step.num_tokens
        self._make_room(total)
        if self._is_tiled and total >= TILE:
            self._align(step.parts[0].sequence, total)

    def _undo(self, step: Step) -> None:
        """After a failed step: llama.cpp has removed its positions again."""

    def _fail_step(self, code: int, total: int) -> NoReturn:
        self._row_to_batch = []
        if code == 2:  # llama.cpp has removed the step's positions again
            raise StepAborted("the step was interrupted")
        if code == 1:
            raise OutOfCells(f"no {total} free cells in the KV cache of {self._table.size}")
        reason = native_log.reason() or "no reason given"
        raise StepFailed(f"llama.cpp failed on a step (code {code}): {reason}")

    def _check_step(self, step: Step) -> tuple[list[int], list[int], list[int]]:
        """Row starts, row counts and each row's place in the batch. Raises ValueError."""
        if not step.parts or step.padding < 0:
            raise ValueError("a step needs at least one part and no negative padding")
        seen: set[int] = set()
        starts: list[int] = []
        counts: list[int] = []
        rows: list[int] = []
        offset = 0
        for part in step.parts:  # (one by one: whatever is wrong is said of the first)
            self._check_sequence(part.sequence)
            if part.sequence in seen:
                raise ValueError(f"sequence {part.sequence} stands in the step twice")
            seen.add(part.sequence)
            count = len(part.tokens)
            if count == 0:
                raise ValueError(f"no tokens for sequence {part.sequence}")
            if min(part.tokens) < 0 or max(part.tokens) >= self._num_tokens:
                raise ValueError(f"a token is outside the vocabulary of {self._num_tokens}")
            starts.append(len(rows))
            if part.logits == "all":
                rows.extend(range(offset, offset + count))
            elif part.logits == "last":
                rows.append(offset + count - 1)
            counts.append(len(rows) - starts[-1])
            offset += count
        if offset > self._step_tokens:
            raise ValueError(f"a step of {offset} tokens; at most {self._step_tokens}")
        if len(rows) > self._settings.logit_rows:
            raise ValueError(f"{len(rows)} rows of logits; at most {self._settings.logit_rows}")
        return starts, counts, rows

    def _fill(self, step: Step) -> None:
        offset = 0
        for part in step.parts:
            count = len(part.tokens)
            begin = self._table.length(part.sequence)
            if count == 1:  # the decode path: no array temporaries
                self._batch_tokens[offset] = part.tokens[0]
                self._batch_pos[offset] = begin
                self._batch_logits[offset] = part.logits != "none"
                self._batch_seq[offset][0] = self._ids[part.sequence]
                offset += 1
                continue
            end = offset + count
            self._batch_tokens[offset:end] = part.tokens
            self._batch_pos[offset:end] = self._np.arange(begin, begin + count)
            self._batch_logits[offset:end] = part.logits == "all"
            if part.logits == "last":
                self._batch_logits[end - 1] = 1
            for index in range(offset, end):
                self._batch_seq[index][0] = self._ids[part.sequence]
            offset = end

    def _fill_padding(self, step: Step, total: int) -> list[int]:
        """Put dummy rows behind the step's; llama.cpp's sequences that have them."""
        count = min(step.padding, self._cells.room() - total, self._step_tokens - total)
        for index in range(max(0, count)):
            self._put_dummy(total + index, self._scratch, index)
        return [self._scratch] * max(0, count)

    def _put_dummy(self, offset: int, native: int, position: int) -> None:
        self._batch_tokens[offset] = 0
        self._batch_pos[offset] = position
        self._batch_logits[offset] = 0
        self._batch_seq[offset][0] = native

    def _decode(self, num_tokens: int) -> int:
        self._batch.n_tokens = num_tokens
        if self._unpacked is not None and num_tokens >= TILE:
            with self._unpacked:
                code: int = self._lib.llama_decode(self._ctx, self._batch)
            return code
        # LLAMA_API int32_t llama_decode(struct llama_context * ctx, struct llama_batch batch)
        return int(self._lib.llama_decode(self._ctx, self._batch))

    def abort(self) -> None:
        with self._abort_lock:
            if self._abortable:
                self._abort_is_set = True
                self._native.abort_flag[0] = b"\1"

    def _begin_abortable(self) -> None:
        if self._abort_is_set:  # one that came too late for the step it was meant for
            self._clear_abort()
        self._abortable = True

    def _clear_abort(self) -> None:
        with self._abort_lock:
            self._abort_is_set = False
            self._native.abort_flag[0] = b"\0"

    def logits(self, row: int) -> Logits:
        if not 0 <= row < len(self._row_to_batch):
            raise ValueError(f"row {row}: the last step has {len(self._row_to_batch)} rows of logits")
        address = self._logits_address(self._ctx, self._row_to_batch[row])
        if not address:
            raise StepFailed(f"llama.cpp has no logits for row {row}")
        view = self._logit_views.get(address)
        if view is None:  # llama.cpp keeps one output buffer: each row has its place in it
            if len(self._logit_views) > 2 * self._settings.logit_rows:
                self._logit_views.clear()
            buffer = (ctypes.c_float * self._vocab_size).from_address(address)
            view = self._np.frombuffer(memoryview(buffer).cast("B"), dtype=self._np.float32)
            self._logit_views[address] = view
        return view

    def create_sampler(self, params: SamplingParams, seed: int) -> LlamaSampler:
        return LlamaSampler(params, seed, self._native.vocab, self._vocab_size)

    def sample(self, row: int | Logits, sampler: Sampler, mask: bytes | None = None) -> int:
        if not isinstance(sampler, LlamaSampler) or sampler.chain is None:
            raise ValueError("the sampler is closed or belongs to another backend")
        logits = self.logits(row) if isinstance(row, int) else self._checked_logits(row)
        best = int(logits.argmax())
        if not math.isfinite(logits[best]):
            # samplers abort the process on NaN; a damaged file is the usual cause
            raise StepFailed("the model produced numbers that are not finite; is the file damaged?")
        if mask is not None:
            return self._sample_masked(logits, sampler, mask)
        if sampler.is_argmax:  # a chain would copy the vocabulary
            if sampler.moves(best):
                logits = logits.copy()
                for biased, bias in sampler.logit_bias:
                    logits[biased] += bias
                best = int(logits.argmax())
            return best
        if not isinstance(row, int):
            return self._sample_among(self._np.arange(self._vocab_size), logits, sampler)
        # LLAMA_API llama_token llama_sampler_sample(struct llama_sampler * smpl,
        #     struct llama_context * ctx, int32_t idx): applies the chain, accepts the token
        token: int = self._lib.llama_sampler_sample(sampler.chain, self._ctx, self._row_to_batch[row])
        return token

    def _sample_masked(self, logits: Logits, sampler: LlamaSampler, mask: bytes) -> int:
        np = self._np
        if len(mask) * 8 < self._vocab_size:
            raise ValueError(f"a mask of {len(mask)} bytes for a vocabulary of {self._vocab_size}")
        bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits[: self._vocab_size])
        allowed = allowed[np.isfinite(logits[allowed])]
        if allowed.size == 0:
            raise ValueError("the token mask allows nothing")
        return self._sample_among(allowed, logits, sampler)

    def _checked_logits(self, logits: Logits) -> Logits:
        if logits.shape != (self._vocab_size,):
            raise ValueError(f"logits of shape {logits.shape} for a vocabulary of {self._vocab_size}")
        return logits

    def _sample_among(
        self, allowed: npt.NDArray[np.int64], logits: Logits, sampler: LlamaSampler
    ) -> int:
        np, lib = self._np, self._lib
        # llama_token_data: { llama_token id; float logit; float p; }
        data = np.zeros(allowed.size, dtype=[("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])
        data["id"] = allowed
        data["logit"] = logits[allowed]
        candidates = lib.llama_token_data_array()
        candidates.data = ctypes.cast(data.ctypes.data, ctypes.POINTER(lib.llama_token_data))
        candidates.size = allowed.size
        candidates.selected = -1
        candidates.sorted = False
        # LLAMA_API void llama_sampler_apply(struct llama_sampler * smpl,
        #     llama_token_data_array * cur_p)
        lib.llama_sampler_apply(sampler.chain, ctypes.byref(candidates))
        if not 0 <= candidates.selected < candidates.size:
            raise StepFailed("the sampler chose nothing")
        token: int = candidates.data[candidates.selected].id
        lib.llama_sampler_accept(sampler.chain, token)
        return token

    def set_threads(self, threads: int, threads_batch: int) -> None:
        if threads < 0 or threads_batch < 0:
            raise ValueError("thread counts must be at least 1, or 0 for those of the load")
        threads = threads or self._default_threads[0]
        threads_batch = threads_batch or self._default_threads[1]
        self._lib.llama_set_n_threads(self._ctx, threads, threads_batch)
        self._facts = replace(self._facts, threads=threads, threads_batch=threads_batch)

    def embed(self, sequence: int, tokens: Sequence[int]) -> list[float]:
        np, lib = self._np, self._lib
        starts, _, _ = self._check_step(Step([SequenceStep(sequence, tokens, "none")]))
        assert starts == [0]
        self._prepare_embedding(sequence, len(tokens))
        self._row_to_batch = []
        self._clear_abort()
        total = np.zeros(self._embedding_size, dtype=np.float64)
        length = self._table.length(sequence)
        chunk = self._facts.max_logit_rows  # with embeddings on, every row is an output
        lib.llama_set_embeddings(self._ctx, True)
        try:
            for begin in range(0, len(tokens), chunk):
                self._embed_rows(sequence, tokens[begin : begin + chunk], total)
        except BaseException:
            self._drop(sequence, length, self._table.length(sequence))
            raise
        finally:
            lib.llama_set_embeddings(self._ctx, False)
        return [float(x) for x in total]

    def _prepare_embedding(self, sequence: int, count: int) -> None:
        self._make_room(count)

    def _embed_rows(self, sequence: int, tokens: Sequence[int], total: npt.NDArray[np.float64]) -> None:
        """One step of `embed`, its hidden states added to `total`."""
        np, count = self._np, len(tokens)
        self._fill(Step([SequenceStep(sequence, tokens, "all")]))
        code = self._decode(count)
        if code != 0:
            self._fail_step(code, count)
        self._table.append(sequence, count)
        for index in range(count):
            # LLAMA_API float * llama_get_embeddings_ith(struct llama_context * ctx, int32_t i)
            pointer = self._lib.llama_get_embeddings_ith(self._ctx, index)
            if not pointer:
                raise StepFailed("llama.cpp gives no embeddings for this model")
            total += np.ctypeslib.as_array(pointer, (self._embedding_size,))

    # -- sequences -------------------------------------------------------------------------------

    def open(self) -> int:
        if not self._free_handles:
            raise OutOfCells(f"all {self._max_sequences} sequences are in use")
        sequence = self._free_handles.pop()
        self._table.open(sequence)
        return sequence

    def free(self, sequence: int) -> None:
        self._check_sequence(sequence)
        self._drop(sequence, 0, self._table.length(sequence))
        self._table.close(sequence)
        self._free_handles.append(sequence)

    def length(self, sequence: int) -> int:
        self._check_sequence(sequence)
        return self._table.length(sequence)

    def free_cells(self) -> int:
        return self._table.reclaimable()

    def fork(self, sequence: int, length: int) -> int:
        self._check_range(sequence, 0, length)
        if not self._free_handles:
            raise OutOfCells(f"all {self._max_sequences} sequences are in use")
        target = self._free_handles.pop()
        self._cells.share(sequence, target, length)
        if length:
            self._copy(sequence, target, 0, length)
        return target

    def rewind(self, sequence: int, length: int) -> None:
        self._check_range(sequence, 0, length)
        self._drop(sequence, length, self._table.length(sequence))

    def evict(self, sequence: int, start: int, stop: int) -> None:
        self._check_range(sequence, start, stop)
        if not self._facts.can.evict:
            raise ValueError("this model's positions cannot be shifted")
        if self._cells.is_shared(sequence, start):
            raise SharedCells(f"positions from {start} on are shared; privatise the sequence first")
        if start == stop:
            return
        length = self._cells.length(sequence)
        if stop == length:
            self._drop(sequence, start, stop)
            return
        if self._cells.room() < 1:
            self._compact(1)  # the step that computes the shift needs a cell
        full = self._cells.room() < 1
        if full:
            # Not a cell anywhere: really free the first dropped one, and compact afterwards.
            self._lib.llama_memory_seq_rm(self._memory, sequence, start, start + 1)
        self._drop(sequence, start, stop)
        # LLAMA_API void llama_memory_seq_add(llama_memory_t mem, llama_seq_id seq_id, llama_pos p0,
        #     llama_pos p1, llama_pos delta): only notes the shift, and sets the head to 0
        self._lib.llama_memory_seq_add(self._memory, sequence, stop, -1, start - stop)
        self._compute_shift()
        if full:
            self._compact(self._cells.size)

    def _compute_shift(self) -> None:
        """Run one dummy position: llama.cpp applies pending shifts at the next decode only, and a
        snapshot taken before that is silently wrong (measured: KL 0.92)."""
        guarded = self._cells.sequences() if self._window else ()
        for sequence in guarded:
            self._copy(sequence, self._guard, 0, -1)
        self._batch_tokens[0] = 0
        self._batch_pos[0] = 0
        self._batch_logits[0] = 0
        self._batch_seq[0][0] = self._scratch
        self._row_to_batch = []
        # Interrupting this decode would leave a wrong cache without an error (measured: KL 1.3). No
        # step is abortable now, and whoever set the flag before has let go of the lock.
        self._clear_abort()
        code = self._decode(1)
        self._lib.llama_memory_seq_rm(self._memory, self._scratch, -1, -1)
        if guarded:
            self._lib.llama_memory_seq_rm(self._memory, self._guard, -1, -1)
        if code != 0:
            raise StepFailed(f"llama.cpp failed to re-rotate the KV cache (code {code})")

    def privatise(self, sequence: int) -> None:
        self._check_sequence(sequence)
        if not self._cells.is_shared(sequence):
            return
        length = self._cells.length(sequence)
        if length > self._cells.reclaimable():
            raise OutOfCells(f"no {length} free cells to make sequence {sequence} private")
        self._make_room(length)
        parts = self._extract(sequence, 0, length)
        self._drop(sequence, 0, length)
        for start, stop, payload in parts:
            self._insert((sequence,), start, stop, payload)
            self._cells.append(sequence, stop - start)

    def snapshot(self, sequence: int, start: int, stop: int) -> bytes:
        self._check_range(sequence, start, stop)
        if not 0 < stop - start <= BLOCK_TOKENS:
            raise ValueError(f"a snapshot holds 1 to {BLOCK_TOKENS} positions, not {stop - start}")
        if not self._window or stop - start <= self._window:
            # One part, as nearly always: written where it stays (copying megabytes takes milliseconds).
            head = SNAPSHOT.size + _PART.size
            data = self._extract_part(sequence, start, stop, head)
            overwrite(data, SNAPSHOT.size, _PART.pack(start, stop, len(data) - head))
            parts = 1
        else:
            pieces = [bytes(SNAPSHOT.size)]
            extracted = self._extract(sequence, start, stop)
            for a, b, payload in extracted:
                pieces += [_PART.pack(a, b, len(payload)), payload]
            data, parts = b"".join(pieces), len(extracted)
        check = head_checksum(memoryview(data)[SNAPSHOT.size :])
        overwrite(data, 0, SNAPSHOT.pack(SNAPSHOT_MAGIC, 1, parts, start, stop, check))
        return data

    def restore(self, sequence: int, payload: bytes, num_positions: int) -> None:
        self._check_sequence(sequence)
        begin = self._cells.length(sequence)
        parts = _read_snapshot(payload, begin, num_positions)
        if num_positions > self._cells.reclaimable():
            raise OutOfCells(f"no {num_positions} free cells to restore into")
        self._make_room(num_positions)
        for start, stop, offset, size in parts:
            try:
                self._insert((sequence,), start, stop, payload, offset, size)
            except SnapshotRejected:
                self._drop(sequence, begin, self._cells.length(sequence))
                raise
            self._cells.append(sequence, stop - start)

    def is_in_order(self, sequence: int) -> bool:
        self._check_sequence(sequence)
        return self._table.is_in_order(sequence)

    def check_integrity(self) -> None:
        self._table.check_integrity()
        lib, memory = self._lib, self._memory
        for sequence in range(self._max_sequences):
            last = lib.llama_memory_seq_pos_max(memory, sequence)
            known = sequence in self._table.sequences()
            expected = self._table.length(sequence) - 1 if known else -1
            assert last == expected, f"sequence {sequence} ends at {last}, the mirror says {expected}"
            assert known != (sequence in self._free_handles)
            if expected >= 0:
                positions = self._native_positions(sequence)
                assert positions == list(range(expected + 1)), (
                    f"cells of sequence {sequence} are not in position order"
                )
        for own in (self._scratch, self._guard):
            assert lib.llama_memory_seq_pos_max(memory, own) == -1

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._lib.llama_batch_free(self._batch)
            self._native.close()
            if self._embeddings is not None:
                self._embeddings.close()

    # -- cells -----------------------------------------------------------------------------------

    def _make_room(self, count: int) -> None:
        """Room for `count` cells at the top. Raises OutOfCells, changing nothing."""
        table = self._cells
        if count > table.reclaimable():
            raise OutOfCells(
                f"{count} cells are needed and {table.reclaimable()} of {table.size} are free"
            )
        wasteful = table.dead >= max(COMPACT_AT_LEAST, _COMPACT_ABOVE * table.top)
        if count > table.room() or wasteful:
            self._compact(count)

    def _align(self, sequence: int, count: int) -> None:
        """Place what a prefill of `count` tokens will read and write as in a cache of the sequence's
        own, if there is room for it."""
        table = self._cells
        length = table.length(sequence)
        start = table.first_untiled(sequence, TILE)
        moving = length - start
        if moving == 0 and (length % TILE or table.top % TILE == 0):
            return  # the next cell continues the last tile, or begins one
        if table.room() < moving + count + TILE:
            self._compact(moving + count + TILE)
            start = table.first_untiled(sequence, TILE)
            moving = length - start
            if table.room() < moving + count + TILE:
                return
        parts = self._extract(sequence, start, length) if moving else []
        self._drop(sequence, start, length)
        self._bury(-table.top % TILE)
        for begin, end, payload in parts:
            self._insert((sequence,), begin, end, payload)
            table.append(sequence, end - begin)

    def _bury(self, count: int) -> None:
        """Fill `count` cells at the top with nothing anybody reads."""
        for _ in range(count):
            self._set_state(self._filler, self._scratch, 0, len(self._filler))
            self._copy(self._scratch, self._grave, 0, -1)
            self._lib.llama_memory_seq_rm(self._memory, self._scratch, -1, -1)
        self._cells.bury(count)

    def _compact(self, needed: int) -> None:
        """Take out every live cell above the lowest dead one and put it back without gaps but those that
        keep tiles aligned, as far as `needed` cells remain."""
        table = self._cells
        if table.dead == 0:
            return
        bottom = table.lowest_dead()
        taken = []
        for piece in table.pieces(bottom):
            taken.append((piece, self._extract(piece.owners[0], piece.start, piece.stop)))
        self._lib.llama_memory_seq_rm(self._memory, self._grave, -1, -1)
        for sequence in table.sequences():
            first = table.first_position_from(sequence, bottom)
            if first < table.length(sequence):
                self._lib.llama_memory_seq_rm(self._memory, sequence, first, -1)
        table.lift(bottom)
        spare = table.room() - sum(piece.stop - piece.start for piece, _ in taken) - needed
        for piece, parts in taken:
            gap = (piece.start - table.top) % TILE
            if self._is_tiled and gap <= spare:
                self._bury(gap)
                spare -= gap
            for start, stop, payload in parts:
                self._insert(piece.owners, start, stop, payload)
                table.put(piece, start, stop)

    def _drop(self, sequence: int, start: int, stop: int) -> None:
        if start == stop:
            return
        self._row_to_batch = []
        drop = self._cells.drop(sequence, start, stop)
        for begin, end in drop.buried:
            self._copy(sequence, self._grave, begin, end)
        self._lib.llama_memory_seq_rm(self._memory, sequence, start, stop)
        if not self._cells.has_live_cells() and self._cells.dead:
            self._lib.llama_memory_seq_rm(self._memory, self._grave, -1, -1)
            self._cells.clear()

    def _copy(self, source: int, target: int, start: int, stop: int) -> None:
        # LLAMA_API void llama_memory_seq_cp(llama_memory_t mem, llama_seq_id seq_id_src,
        #     llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1): unified cache, no data moves
        self._lib.llama_memory_seq_cp(self._memory, source, target, start, stop)

    def _extract(self, sequence: int, start: int, stop: int) -> list[tuple[int, int, bytes]]:
        """Positions [start, stop) as llama.cpp's sequence state, in parts no longer than the sliding
        window (llama.cpp leaves out what its window has passed)."""
        size = self._window or (stop - start)
        return [
            (
                begin,
                min(begin + size, stop),
                self._extract_part(sequence, begin, min(begin + size, stop)),
            )
            for begin in range(start, stop, size)
        ]

    def _extract_part(self, sequence: int, start: int, stop: int, head: int = 0) -> bytes:
        """One part, behind `head` bytes of room."""
        lib = self._lib
        self._copy(sequence, self._scratch, start, stop)
        # LLAMA_API size_t llama_state_seq_get_size(struct llama_context * ctx, llama_seq_id seq_id)
        num_bytes = lib.llama_state_seq_get_size(self._ctx, self._scratch)
        data = unfilled_bytes(head + num_bytes)
        # LLAMA_API size_t llama_state_seq_get_data(struct llama_context * ctx, uint8_t * dst,
        #     size_t size, llama_seq_id seq_id)
        target = address_of(data, head)
        written = lib.llama_state_seq_get_data(self._ctx, target, num_bytes, self._scratch)
        lib.llama_memory_seq_rm(self._memory, self._scratch, -1, -1)
        if written != num_bytes:
            raise StepFailed(f"llama.cpp wrote {written} of {num_bytes} bytes of a KV snapshot")
        return data

    def _insert(
        self,
        owners: Sequence[int],
        start: int,
        stop: int,
        payload: bytes,
        offset: int = 0,
        size: int | None = None,
    ) -> None:
        """Put a part back at the top for its owners; the caller keeps the mirror. The part is `size`
        bytes of `payload` from `offset`, all of it without them."""
        lib = self._lib
        self._row_to_batch = []
        num_bytes = len(payload) if size is None else size
        read = self._set_state(payload, self._scratch, offset, num_bytes)
        last = lib.llama_memory_seq_pos_max(self._memory, self._scratch)
        if read != num_bytes or last != stop - 1:
            lib.llama_memory_seq_rm(self._memory, self._scratch, -1, -1)
            raise SnapshotRejected(
                f"llama.cpp refused a KV snapshot: {native_log.reason() or 'no reason given'}"
            )
        for owner in owners:
            self._copy(self._scratch, owner, start, stop)
        lib.llama_memory_seq_rm(self._memory, self._scratch, -1, -1)

    def _set_state(self, payload: bytes, sequence: int, offset: int, size: int) -> int:
        """Bytes read; 0 if llama.cpp refused."""
        assert 0 <= offset <= offset + size <= len(payload)
        # LLAMA_API size_t llama_state_seq_set_data(struct llama_context * ctx, const uint8_t * src,
        #     size_t size, llama_seq_id dest_seq_id): 0 on failure
        read: int = self._lib.llama_state_seq_set_data(
            self._ctx, address_of(payload, offset), size, sequence
        )
        return read

    def _native_positions(self, sequence: int) -> list[int]:
        """The positions of llama.cpp's sequence's cells in cell order, read from its state."""
        num_bytes = self._lib.llama_state_seq_get_size(self._ctx, sequence)
        buffer = (ctypes.c_uint8 * num_bytes)()
        self._lib.llama_state_seq_get_data(self._ctx, buffer, num_bytes, sequence)
        return _cell_positions(bytes(buffer))

    def _warm_up(self) -> int:
        """Run two positions once (the first step pays for page faults and the graph) and learn what a
        cell takes: the growth of the state from one position to two."""
        lib = self._lib
        sizes = []
        for index in range(2):
            self._batch_tokens[0] = 0
            self._batch_pos[0] = index
            self._batch_logits[0] = 1
            self._batch_seq[0][0] = self._scratch
            if self._decode(1) != 0:
                raise LoadFailed(
                    f"{self._files.name}: the first step failed: {native_log.reason() or 'no reason'}"
                )
            sizes.append(lib.llama_state_seq_get_size(self._ctx, self._scratch))
            if index == 0:
                buffer = (ctypes.c_uint8 * sizes[0])()
                lib.llama_state_seq_get_data(self._ctx, buffer, sizes[0], self._scratch)
                self._filler = bytes(buffer)
        lib.llama_memory_clear(self._memory, False)
        caches = 2 if self._window else 1
        # position, owner count and owner; M-RoPE models also keep an extension of three integers
        head = caches * (12 if self._rope_type < ROPE_TYPE_MROPE else 24)
        return max(1, int(sizes[1] - sizes[0]) - head)

    def _reserve_unpacked(self) -> int:
        """Bytes that large steps unpack keys and values into; 0 where they do not."""
        if self._unpacked is None:
            return 0
        native = 0 if self._layout == "private" else self._scratch
        for index in range(min(TILE, self._step_tokens)):
            self._put_dummy(index, native, index)
        # It is enough that the graph is built: the step ends behind its first operation.
        self._native.abort_flag[0] = b"\1"
        try:
            code = self._decode(TILE) if self._step_tokens >= TILE else 0
        finally:
            self._native.abort_flag[0] = b"\0"
        self._lib.llama_memory_clear(self._memory, False)
        size = self._unpacked.reserve(self._table.most) if code == 2 else 0
        if not size:
            self._unpacked = None
        return size

    # -- arguments -------------------------------------------------------------------------------

    def _check_sequence(self, sequence: int) -> None:
        if self._closed:
            raise ValueError("the runtime is closed")
        if sequence not in self._table.sequences():
            raise ValueError(f"there is no sequence {sequence}")

    def _check_range(self, sequence: int, start: int, stop: int) -> None:
        self._check_sequence(sequence)
        if not 0 <= start <= stop <= self._table.length(sequence):
            raise ValueError(
                f"positions [{start}, {stop}) of a sequence of {self._table.length(sequence)}"
            )


def _read_snapshot(payload: bytes, begin: int, num_positions: int) -> list[tuple[int, int, int, int]]:
    """The parts of a snapshot as (start, stop, offset, size), its frame checked. Raises
    SnapshotRejected."""
    if len(payload) < SNAPSHOT.size:
        raise SnapshotRejected(f"a KV snapshot of {len(payload)} bytes is too short to be one")
    magic, form, num_parts, start, stop, check = SNAPSHOT.unpack_from(payload)
    body = memoryview(payload)[SNAPSHOT.size :]
    if magic != SNAPSHOT_MAGIC or form != 1:
        raise SnapshotRejected("these bytes are not a KV snapshot of this version")
    if (start, stop) != (begin, begin + num_positions):
        raise SnapshotRejected(
            f"the KV snapshot holds positions [{start}, {stop}), not [{begin}, {begin + num_positions})"
        )
    if head_checksum(body) != check:
        raise SnapshotRejected("the KV snapshot is damaged")
    parts = []
    offset, position = 0, start
    for _ in range(num_parts):
        if len(body) - offset < _PART.size:
            raise SnapshotRejected("the KV snapshot is truncated")
        a, b, size = _PART.unpack_from(body, offset)
        offset += _PART.size
        if a != position or b <= a or size > len(body) - offset:
            raise SnapshotRejected("the KV snapshot is truncated or damaged")
        parts.append((a, b, SNAPSHOT.size + offset, size))
        offset, position = offset + size, b
    if position != stop or offset != len(body):
        raise SnapshotRejected("the KV snapshot has missing or surplus bytes")
    return parts


def head_checksum(body: memoryview | bytes) -> int:
    """Guards lengths and positions; the payload's own checksum is its keeper's (the prompt cache)."""
    return zlib.crc32(body[:_HEAD_BYTES], len(body) & 0xFFFFFFFF)


def _cell_positions(state: bytes) -> list[int]:
    """Positions in cell order out of a sequence state (llama-cpp-python 0.3.36): u32 magic, i32
    sequence, u32 streams, u32 cells, then for each cell i32 position, u32 owners, 3 x i32 extension
    where the model has one, i32 owner. A sliding-window model's full layers come first."""
    streams, cells = struct.unpack_from("<II", state, 8)
    assert streams == 1
    for stride in (12, 24):
        heads = [struct.unpack_from("<iI", state, 16 + i * stride) for i in range(cells)]
        if all(owners == 1 for _, owners in heads):
            return [position for position, _ in heads]
    raise AssertionError("the state's layout is not the one of llama-cpp-python 0.3.36")


def _file_stamp(path: Any) -> str:
    stat = path.stat()
    return f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"


def _device_name(lib: Any, settings: RuntimeSettings) -> str:
    if settings.gpu_layers != 0 and lib.llama_supports_gpu_offload():
        from edgeinfer_backends.llamacpp.library import devices

        gpus = [device.name for device in devices() if device.kind == "gpu"]
        if gpus:
            return ", ".join(gpus)
    return "cpu"
