"""The contract between the engine and whatever runs a model. Mechanism here, policy in the engine.

A `Backend` says whether it can run on this machine and loads a model into a `Runtime`. A `Runtime`
holds weights and a KV cache, runs ragged batches, and moves cached positions about on request. It
never decides: what to evict, when to snapshot or how much to draft is the engine's business.

Words used throughout: a *sequence* is one stream of positions 0, 1, 2, … in the KV cache; a *cell*
stores one position's keys and values and may belong to several sequences (a fork shares cells); a
*step* is one forward pass over several sequences; a *row* is one position of a step whose logits
were asked for. Runtimes are used from one thread at a time, which need not be the one that loaded
them; `abort` and the tokenizer from any.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from edgeinfer.sampling import SamplingParams
from edgeinfer_models.model_files import ModelFiles

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgeinfer.exits import ExitTrainer
    from edgeinfer_models.config import ModelConfig
    from edgeinfer_models.tokenizer import Tokenizer

    Logits = npt.NDArray[np.float32]
    Floats = npt.NDArray[np.float32]
    Blocks = npt.NDArray[np.uint8]

BLOCK_TOKENS = 256  # positions in one snapshot block

KvLayout = Literal["shared", "private"]
LoadAs = Literal["auto", "f32", "bf16", "f16", "int8", "int4"]
LOAD_AS: tuple[LoadAs, ...] = ("auto", "f32", "bf16", "f16", "int8", "int4")
LogitRows = Literal["none", "last", "all"]
Progress = Callable[[float], bool]  # called with 0..1; returning False cancels the load


@dataclass(frozen=True)
class Device:
    """A processor a backend can place work on. Memory in bytes; 0 where it cannot be asked."""

    name: str
    kind: Literal["cpu", "gpu", "npu"]
    total_bytes: int = 0
    free_bytes: int = 0


@dataclass(frozen=True)
class Probe:
    """Whether a backend can be used here; if not, `reason` says why and what would change it."""

    usable: bool
    reason: str = ""
    version: str = ""
    build: str = ""  # everything about the build that can change results
    devices: tuple[Device, ...] = ()


@dataclass(frozen=True)
class RuntimeSettings:
    """How to load. Every number is a request; `RuntimeFacts` has what came of it."""

    context: int = 4096  # cells of context per sequence
    sequences: int = 1  # sequences that run at once with a full context each
    step_tokens: int = 512  # most tokens of one forward step
    logit_rows: int = 128  # most rows of logits of one step
    kv_type_k: str = "f16"
    kv_type_v: str = "f16"
    flash_attention: bool = True
    threads: int = 0  # while decoding; 0: the backend's choice
    threads_batch: int = 0  # while prefilling
    gpu_layers: int = -1  # -1: all that fit; 0: none
    mmap: bool = True  # where it costs no second copy of the weights
    adapters: tuple[tuple[str, float], ...] = ()  # (path, scale); part of every identity
    kv_layout: Literal["auto", "shared", "private"] = "auto"  # where the backend has both
    load_as: LoadAs = "auto"  # in what weights are held and computed with, where a backend can choose
    compiled: bool = False  # compile what a step computes, where a backend can
    # Count how much attention each position gets, for `evict_lightest`, where a backend can.
    heavy_hitters: bool = False


@dataclass(frozen=True)
class Capabilities:
    """What a runtime can do beyond `forward`. The engine does without the rest, and says so."""

    rewind: bool = True  # drop positions from the end of a sequence
    evict: bool = False  # drop from the middle and re-assign the positions after it
    fork: bool = True
    snapshot: bool = False
    token_masks: bool = True
    embeddings: bool = False
    abort: bool = False  # a running step can be interrupted
    threads: bool = True  # `set_threads` changes how many threads compute
    layers: bool = False  # run, capture, replace, differentiate one layer
    heavy_hitters: bool = False  # `evict_lightest`


@dataclass(frozen=True)
class RuntimeFacts:
    backend: str
    device: str
    vocab_size: int
    embedding_size: int
    context: int  # cells per sequence
    context_trained: int  # 0: unknown
    cells: int  # cells in all
    max_sequences: int  # sequence handles that may exist at once
    max_step_tokens: int
    max_logit_rows: int
    # 1, or: steps of at least this many tokens in all may take another kernel than smaller ones, and
    # differ in the last bits (with private cells, parts of at least this many, whatever the step). Exact
    # (a request's results are those it has alone, however its prompt is
    # cut) are then small steps of any mixture, large steps of one sequence, and forks at multiples of
    # this. (llama.cpp's CPU backend: with quantized weights, and one thread; else within about 1e-3.)
    stable_chunk_tokens: int
    kv_type_k: str
    kv_type_v: str
    kv_bytes_per_token: int
    kv_layout: KvLayout
    threads: int
    threads_batch: int
    can: Capabilities = field(default_factory=Capabilities)
    # False: matrix products take other kernels for other numbers of rows, so that results differ in the
    # last bits with how a prompt was cut and what ran beside it. What a fork, a snapshot or a rewind
    # keeps is bit for bit what it was all the same.
    exact: bool = True
    # Prompts take a slower way than another type's would, and the warnings say so.
    reads_slowly: bool = False
    warnings: tuple[str, ...] = ()  # what was asked for and not had, one line each


MemoryForm = Literal["", "mapped", "repacked"]


@dataclass(frozen=True)
class MemoryItem:
    """A use of memory: "weights", "kv cache", "compute" (what a step works in), "logits" (what comes
    out of it), "work" (the threads'), "unpacked" (a layer's quantized KV cache, while a prompt is read;
    as much as is in the cache), "copies" (of cells, while they are moved or kept; the most there may
    be), "tables" (vocabulary, cells), "process" (interpreter, libraries).
    form: mapped weights are the file's own pages; repacked ones are copies in another layout.
    """

    name: str
    num_bytes: int
    device: str = "cpu"  # "cpu", or a kind of device with memory of its own
    form: MemoryForm = ""


@dataclass(frozen=True)
class SequenceStep:
    """`tokens` are appended to `sequence` at its next positions."""

    sequence: int
    tokens: Sequence[int]
    logits: LogitRows = "last"

    @property
    def num_rows(self) -> int:
        """Of logits."""
        return {"none": 0, "last": 1, "all": len(self.tokens)}[self.logits]


@dataclass(frozen=True)
class Step:
    """One forward pass: several sequences, each with one or more tokens, in this order.

    `padding` dummy rows of a scratch sequence ride along (a batch that fills its kernel's tile can be
    cheaper than a smaller one); they change the cost of a step, never its results. A backend that
    gains nothing by them leaves them out.
    """

    parts: Sequence[SequenceStep]
    padding: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(len(part.tokens) for part in self.parts)


@dataclass(frozen=True)
class StepResult:
    """Where each part's logits are: part i has rows `[starts[i], starts[i] + counts[i])`.

    Rows stay readable until the next `forward`, `embed` or KV operation of the runtime.
    """

    starts: Sequence[int]
    counts: Sequence[int]


class Sampler(Protocol):
    """One sequence's sampler state: penalties' history, DRY, and the random stream."""

    @property
    def seed(self) -> int: ...

    def accept(self, token: int) -> None:
        """Count a token that was not drawn by this sampler (a prompt's) into its history."""
        ...

    def close(self) -> None: ...


# Of a column whose inputs are read in F16 the mean square is below 1e10.
MOST_IMPORTANCE = 1e15


class RowQuantizer(Protocol):
    """Rows as blocks of a format's types (ggml's). Thread-safe."""

    def quantize(self, type_name: str, rows: Floats, importance: Floats | None = None) -> Blocks:
        """rows: (n, width). importance: of each column, (width,), from 0 to MOST_IMPORTANCE; None: all
        alike. Returns (n, bytes of a row). Raises ValueError for a type that there is not, for rows that
        are not whole blocks of it, and for numbers that are not finite or larger than any type holds."""
        ...

    def close(self) -> None: ...


class Layers(Protocol):
    """A model as single layers, outside of any sequence: what quantization and training take. Numbers go
    in and out as numpy arrays of float32, whatever the layers compute in.

    States have the shape (texts, n, hidden_size): that many texts of equal length, each from position 0
    on. Matrices are named within their layer ("self_attn.q_proj"); weights have the shape (out, in).
    Wrong shapes and unknown names are ValueError.
    """

    @property
    def num_layers(self) -> int: ...

    def matrices(self, layer: int) -> Sequence[str]:
        """The names of its matrices, in the order in which they are used."""
        ...

    def embed(self, tokens: Sequence[Sequence[int]]) -> Floats:
        """The states before the first layer."""
        ...

    def run(self, layer: int, states: Floats) -> Floats:
        """The states after a layer."""
        ...

    def capture(self, layer: int, states: Floats) -> tuple[Floats, Mapping[str, Floats]]:
        """The states after a layer, and what each of its matrices was given: (rows, in). Rows are
        texts x n, but for experts: those that were routed to it. Matrices that are given the same share
        one array."""
        ...

    def head(self, states: Floats) -> Floats:
        """The logits of states after the last layer: (texts, n, vocab_size)."""
        ...

    def differentiate_head(self, states: Floats, gradient: Floats) -> Floats:
        """gradient: of something with respect to the logits that `head` makes of the states. Returns its
        gradient with respect to the states."""
        ...

    def weight(self, layer: int, matrix: str) -> Floats:
        """As the layer computes with it: of one that was quantized, what its numbers mean."""
        ...

    def replace(self, layer: int, matrix: str, weight: Floats) -> None:
        """Another weight of the same shape, for all that the runtime does from now on. Keys and values
        that were computed before stay."""
        ...

    def differentiate(
        self, layer: int, states: Floats, gradient: Floats
    ) -> tuple[Floats, Mapping[str, Floats]]:
        """gradient: of something with respect to the states after the layer. Returns its gradients with
        respect to the states before, and to each matrix that is not quantized (of experts: zeros where
        none was routed to them). Quantized ones count by what their numbers mean."""
        ...


class LayeredModel(Protocol):
    """What `Backend.open_layers` opens. Of a layer that another was used after, what replaced its
    matrices is forgotten: they are read again."""

    @property
    def layers(self) -> Layers: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    def close(self) -> None: ...


class Runtime(ABC):
    """A loaded model with its KV cache.

    Errors: StepFailed, StepAborted, OutOfCells, SharedCells, SnapshotRejected (edgeinfer.errors).
    Wrong arguments (an unknown sequence, a token outside the vocabulary, a length past the end) are
    ValueError: native code is never called with them.
    """

    @property
    @abstractmethod
    def facts(self) -> RuntimeFacts: ...

    @property
    @abstractmethod
    def tokenizer(self) -> Tokenizer: ...

    @abstractmethod
    def identity(self) -> Mapping[str, str]:
        """All that decides whether a KV snapshot may be used: weights, KV types, RoPE, adapters,
        backend and its build, and switches in the environment that change the cache's contents."""

    @abstractmethod
    def memory(self) -> list[MemoryItem]:
        """What was really allocated, as far as the framework tells: some of the items that
        `Backend.predict_memory` names."""

    # -- running ---------------------------------------------------------------------------------

    @abstractmethod
    def forward(self, step: Step) -> StepResult:
        """Append each part's tokens and compute the logits asked for.

        On any error every sequence is as it was before the call.
        Raises OutOfCells (make room, call again), StepAborted (after `abort`), StepFailed.
        """

    def abort(self) -> None:
        """Interrupt the step that is running; without one, nothing happens. Safe from another thread.
        Never interrupts a KV operation. Needs `can.abort`."""
        raise NotImplementedError

    @abstractmethod
    def logits(self, row: int) -> Logits:
        """One row's logits: shape (vocab_size,), float32, not normalized. Valid as StepResult says."""

    @abstractmethod
    def create_sampler(self, params: SamplingParams, seed: int) -> Sampler: ...

    @abstractmethod
    def sample(self, row: int | Logits, sampler: Sampler, mask: bytes | None = None) -> int:
        """Draw the next token from a row and count it into the sampler's history.

        row: of the last step; or logits, as `logits` gave them, that a copy was kept of. What is drawn
        is the same.
        mask: one bit per token id, least significant bit first, ceil(vocab_size / 8) bytes or more;
        tokens whose bit is 0 cannot be drawn. A mask that allows nothing is a ValueError.
        """

    @abstractmethod
    def set_threads(self, threads: int, threads_batch: int) -> None:
        """For decoding and for prefill; 0: those of the load. Without `can.threads` the framework has no
        such setting: the numbers are checked, and facts and results stay."""

    def embed(self, sequence: int, tokens: Sequence[int]) -> list[float]:
        """Append tokens to a sequence, as `forward` does, and return the sum of their final hidden
        states: shape (embedding_size,). A long text takes several calls, and others' steps run between
        them. At most `max_step_tokens` tokens. Errors as those of `forward`."""
        raise NotImplementedError

    # -- sequences -------------------------------------------------------------------------------

    @abstractmethod
    def open(self) -> int:
        """A new, empty sequence. Raises OutOfCells when `max_sequences` exist."""

    @abstractmethod
    def free(self, sequence: int) -> None:
        """End a sequence; cells nobody else owns become free."""

    @abstractmethod
    def length(self, sequence: int) -> int:
        """Positions in a sequence."""

    @abstractmethod
    def free_cells(self) -> int:
        """Cells that `forward` can still fill (after compaction, if the backend compacts). One pool for
        all sequences, whatever the layout; none of them holds more than `context`."""

    @abstractmethod
    def fork(self, sequence: int, length: int) -> int:
        """A new sequence that starts with the first `length` positions of another. With the `shared`
        layout no cell is copied; with `private` it takes `length` cells, even where the backend copies
        memory at the first write only. Raises OutOfCells."""

    @abstractmethod
    def rewind(self, sequence: int, length: int) -> None:
        """Keep the first `length` positions."""

    def evict(self, sequence: int, start: int, stop: int) -> None:
        """Drop positions [start, stop) and move those after them down by stop - start, re-rotating
        their keys. The move is computed when this returns: a snapshot taken next is right.
        Raises SharedCells if a position at or after `start` is shared: `privatise` first."""
        raise NotImplementedError

    def evict_lightest(self, sequence: int, start: int, stop: int, keep: int) -> bytes:
        """Of positions [start, stop) keep, in every layer and head, the `keep` that got the most
        attention since they were computed, in their order; those after move down as with `evict`. Which
        tokens a position stands for then differs between heads. Returns a digest of what was kept where.

        Attention counts from rows that were rewound since, too, and a snapshot has what was counted when
        it was taken: the same tokens may lose others. Needs `can.heavy_hitters`.
        Source: H2O (Zhang et al. 2023, arXiv:2306.14048). Raises SharedCells."""
        raise NotImplementedError

    def layers(self) -> Layers:
        """Access to the model's single layers. Needs `can.layers`."""
        raise NotImplementedError

    def privatise(self, sequence: int) -> None:
        """Give a sequence cells of its own, bit for bit equal. Raises OutOfCells."""
        raise NotImplementedError

    def snapshot(self, sequence: int, start: int, stop: int) -> bytes:
        """Positions [start, stop) as bytes for `restore`; at most BLOCK_TOKENS of them."""
        raise NotImplementedError

    def restore(self, sequence: int, payload: bytes, num_positions: int) -> None:
        """Append a snapshot whose positions begin at the sequence's length.
        The bytes must be those `snapshot` gave under an equal `identity()`: check that first.
        Raises SnapshotRejected (the sequence is as before), OutOfCells."""
        raise NotImplementedError

    @abstractmethod
    def is_in_order(self, sequence: int) -> bool:
        """Whether the cells lie in position order: then results are those of a run alone."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Raise AssertionError if the bookkeeping and the cache disagree. For tests; may be slow."""

    @abstractmethod
    def close(self) -> None:
        """Free everything. Idempotent."""


@dataclass(frozen=True)
class KvSpeed:
    """How fast steps are over a KV cache of one type, as a multiple of their speed over f16, at some
    2,000 tokens of context: with one row of a sequence (decode), and with many (prefill)."""

    decode: float
    prefill: float


class Backend(ABC):
    """Found by name through the entry points `edgeinfer.backends`."""

    name: str
    formats: tuple[str, ...]  # of ModelFiles it opens
    own_kv_types: tuple[str, ...] = ()  # that no other backend has, beside llama.cpp's
    loads_as: tuple[LoadAs, ...] = ("auto",)  # what `RuntimeSettings.load_as` can be
    compiles: bool = False  # heeds `RuntimeSettings.compiled`
    counts_attention: bool = False  # heeds `RuntimeSettings.heavy_hitters`
    runs_exits: bool = False  # has `load_exit`
    # `model_type` of config.json of the safetensors it opens, and `quant_method` of those that other
    # tools packed; None: any that can be converted.
    model_types: frozenset[str] | None = None
    packings: frozenset[str] | None = None

    @abstractmethod
    def probe(self) -> Probe:
        """Cheap; never raises; does not load a framework that is not there."""

    def lacks(self) -> str:
        """Why it cannot be used, as far as can be told without loading the framework; "": nothing is
        known against it."""
        found = self.probe()
        return "" if found.usable else found.reason

    @abstractmethod
    def predict_memory(
        self,
        files: ModelFiles,
        config: ModelConfig | None,
        settings: RuntimeSettings,
        devices: Sequence[Device] = (),
    ) -> list[MemoryItem]:
        """What a load with these settings will take in all, once its context is full. Arithmetic on
        numbers: nothing is loaded, nothing read.

        config: None for a script. devices: those the backend may use; without a GPU all is on the
        processor. gpu_layers -1 means all of them here.
        """

    def measure_kv_speed(
        self, config: ModelConfig, settings: RuntimeSettings, kv_type: str
    ) -> KvSpeed | None:
        """Estimated from what is measured here and now, in a second or two, for a model of this shape:
        nothing is loaded. None where it cannot be, or where the type has a drawback here that is no
        matter of speed (it cannot be evicted from, say)."""
        return None

    def row_quantizer(self, threads: int = 0) -> RowQuantizer:
        """threads: 0: one for each core. Raises BackendUnavailable, and NotImplementedError where the
        backend has no such types."""
        raise NotImplementedError

    def exit_trainer(
        self, path: Path, device: str = "auto", told: Callable[[str], None] = lambda _: None
    ) -> ExitTrainer:
        """path: of a GGUF file or a folder. device: "auto", or as the backend names it. told: is given
        what a user should know. Raises BackendUnavailable, LoadFailed, UnsupportedModel, and
        NotImplementedError where the backend trains nothing."""
        raise NotImplementedError

    def open_layers(self, files: ModelFiles, context: int) -> LayeredModel:
        """A model to be gone through layer by layer, in order or backwards: its matrices are in memory
        only while their layer is used. context: the longest text. Raises BackendUnavailable,
        UnsupportedModel, LoadFailed, and NotImplementedError where the backend has no such access."""
        raise NotImplementedError

    def switches(self) -> Mapping[str, str]:
        """Those of the environment that change what a KV cache holds: what was found with others does
        not hold with these."""
        return {}

    def load_exit(
        self, files: ModelFiles, exit_path: Path, settings: RuntimeSettings, folder: Path
    ) -> Runtime:
        """A model's early exit as a runtime of its own: the model's tokens go in, and the logits that
        come out are of the exit's kept tokens, in their order. folder: for what is put together for it.
        Raises UnsupportedModel where it is another model's or the model can have none, ModelFileInvalid,
        LoadFailed, and NotImplementedError where not `runs_exits`."""
        raise NotImplementedError

    @abstractmethod
    def load(self, files: ModelFiles, settings: RuntimeSettings, progress: Progress) -> Runtime:
        """Raises BackendUnavailable, LoadFailed, UnsupportedModel, ModelTooLarge; KeyboardInterrupt
        never: a cancelled load raises LoadFailed saying so."""
