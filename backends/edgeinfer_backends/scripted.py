"""A backend over a table: the whole contract with no weights and no framework.

For tests, ours and other people's, as httpx ships `MockTransport`:

    script = Script(answers={"Hello": "Hi there."}, step_s=0.01)
    runtime = ScriptedBackend(script).load(SCRIPTED_FILES, RuntimeSettings(), lambda done: True)

It keeps a real KV cache (scripted_cells.py): what it predicts depends on every cell of a sequence, so a
mistake in the bookkeeping above it shows up in the text.

A worker process loads a script from a file: `ModelFiles("name", (Path("script.json"),), "scripted")`.
The file is one JSON object; every key is optional and means what the field of `Script` means:

    answers        {"prompt": "answer", …}; "*" answers every other chat prompt
    prompt_end     text that ends a chat's prompt (default "<|im_start|>assistant\\n")
    seed           another seed is another model
    step_s         seconds one forward step takes
    fail_at_step   the n-th forward (from 1) raises StepFailed
    die_at_step    the n-th forward ends the process with status 9, as a native crash would
    load_steps     calls of the progress function while loading (default 4)
    load_s         seconds loading takes
    load_error     loading fails with this message
    kv_layout      "shared" (default) or "private"
    without        ["evict", …]: capabilities to do without
    order_noise    how far the logits of a sequence with cells out of order may differ

With no path, the backend's own script is used: the one it was made with, or `Script()`.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgeinfer.backend import (
    BLOCK_TOKENS,
    Backend,
    Device,
    MemoryItem,
    Probe,
    Progress,
    Runtime,
    RuntimeFacts,
    RuntimeSettings,
    Sampler,
    SequenceStep,
    Step,
    StepResult,
)
from edgeinfer.errors import LoadFailed, OutOfCells, StepAborted, StepFailed, UnsupportedModel
from edgeinfer.sampling import SamplingParams
from edgeinfer_backends.sampling_reference import ReferenceSampler
from edgeinfer_backends.scripted_cells import BYTES_PER_CELL, CellTable
from edgeinfer_backends.scripted_logits import Row, RowLogits, uniform
from edgeinfer_backends.scripted_script import Script, read_script
from edgeinfer_backends.scripted_tokenizer import BOS, ByteTokenizer
from edgeinfer_models.model_files import ModelFiles
from edgeinfer_models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgeinfer_models.config import ModelConfig

__all__ = ["SCRIPTED_FILES", "ByteTokenizer", "Script", "ScriptedBackend", "ScriptedRuntime"]

SCRIPTED_FILES = ModelFiles(name="scripted", paths=(), format="scripted")

BUILD = "1"  # changes whenever the same tokens give other logits
EMBEDDING_SIZE = 32
PROCESS_BYTES = 36 * 2**20  # interpreter, our modules and numpy, measured on Linux
IDLE_SEQUENCES = 32  # handles beyond those that run at once


class ScriptedBackend(Backend):
    name = "scripted"
    formats = ("scripted",)

    def __init__(self, script: Script | None = None) -> None:
        self._script = script or Script()

    def probe(self) -> Probe:
        return Probe(usable=True, version=BUILD, build=BUILD, devices=(Device("cpu", "cpu"),))

    def predict_memory(
        self,
        files: ModelFiles,
        config: ModelConfig | None,
        settings: RuntimeSettings,
        devices: Sequence[Device] = (),
    ) -> list[MemoryItem]:
        """A table's worth, on the processor."""
        return _memory(ByteTokenizer().vocab_size, settings)

    def load(self, files: ModelFiles, settings: RuntimeSettings, progress: Progress) -> ScriptedRuntime:
        if files.format not in self.formats:
            raise UnsupportedModel(
                f"{files.name}: the scripted backend opens scripts, not {files.format}"
            )
        if len(files.paths) > 1:
            raise LoadFailed(f"{files.name}: a script is one file, not {len(files.paths)}")
        script = read_script(files.paths[0]) if files.paths else self._script
        for step in range(script.load_steps):
            time.sleep(script.load_s / script.load_steps)
            if not progress((step + 1) / script.load_steps):
                raise LoadFailed(f"loading {files.name} was cancelled")
        if script.load_error:
            raise LoadFailed(f"{files.name}: {script.load_error}")
        return ScriptedRuntime(script, settings)


class ScriptedRuntime(Runtime):
    def __init__(self, script: Script, settings: RuntimeSettings) -> None:
        """Raises ValueError if the settings cannot be."""
        _require_positive(settings)
        self._script = script
        self._tokenizer = ByteTokenizer()
        self._row_logits = RowLogits(script, self._tokenizer)
        self._identity = _identity(script, settings)
        self._identity_digest = hashlib.blake2b(repr(self._identity).encode(), digest_size=16).digest()
        self._facts = _facts(script, settings, self._tokenizer.vocab_size)
        self._memory = _memory(self._tokenizer.vocab_size, settings)
        self._cells = CellTable(
            self._facts.cells, self._facts.context, int.from_bytes(self._identity_digest[:8], "little")
        )
        self._rows: list[Row] = []
        self._abort = threading.Event()
        self._num_steps = 0
        self._next_sequence = 0
        self._closed = False

    @property
    def facts(self) -> RuntimeFacts:
        return self._facts

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def identity(self) -> Mapping[str, str]:
        return dict(self._identity)

    def memory(self) -> list[MemoryItem]:
        return [item for item in self._memory if item.name != "process"]

    # -- running ---------------------------------------------------------------------------------

    def forward(self, step: Step) -> StepResult:
        self._rows = []
        self._abort.clear()
        self._check_step(step)
        plan = self._cells.plan([(part.sequence, len(part.tokens)) for part in step.parts])
        self._spend_step()
        starts, counts = [], []
        for part, cells in zip(step.parts, plan, strict=True):
            states = self._cells.append(part.sequence, cells, part.tokens)
            history = self._cells.tokens(part.sequence)
            in_order = self._cells.is_in_order(part.sequence)
            num_rows = {"none": 0, "last": 1, "all": len(states)}[part.logits]
            starts.append(len(self._rows))
            counts.append(num_rows)
            for back in range(num_rows - 1, -1, -1):
                seen = history[: len(history) - back]
                self._rows.append(Row(states[-1 - back], seen, in_order))
        return StepResult(starts=starts, counts=counts)

    def _check_step(self, step: Step) -> None:
        facts = self._facts
        num_rows = 0
        sequences = set()
        if not step.parts or step.padding < 0:
            raise ValueError("a step needs at least one part, and padding cannot be negative")
        for part in step.parts:
            self._check_sequence(part.sequence)
            if part.sequence in sequences:
                raise ValueError(f"sequence {part.sequence} has two parts in one step")
            sequences.add(part.sequence)
            if not part.tokens:
                raise ValueError(f"sequence {part.sequence} has no tokens in this step")
            self._check_tokens(part.tokens)
            if part.logits not in ("none", "last", "all"):
                raise ValueError(f"logits are none, last or all, not {part.logits!r}")
            num_rows += {"none": 0, "last": 1, "all": len(part.tokens)}[part.logits]
        if step.num_tokens > facts.max_step_tokens:
            raise ValueError(
                f"a step of {step.num_tokens} tokens; at most {facts.max_step_tokens} are taken"
            )
        if num_rows > facts.max_logit_rows:
            raise ValueError(f"{num_rows} rows of logits; at most {facts.max_logit_rows} are computed")

    def _spend_step(self) -> None:
        """The step's time, and its failures. Raises StepAborted, StepFailed."""
        self._num_steps += 1
        if self._num_steps == self._script.die_at_step:
            os._exit(9)
        if self._script.step_s and self._abort.wait(self._script.step_s):
            raise StepAborted("the step was aborted; nothing was kept")
        if self._num_steps == self._script.fail_at_step:
            raise StepFailed(f"step {self._num_steps} failed, as the script says")

    def abort(self) -> None:
        self._require("abort")
        self._abort.set()

    def logits(self, row: int) -> npt.NDArray[np.float32]:
        if not 0 <= row < len(self._rows):
            raise ValueError(f"row {row} is not among the {len(self._rows)} rows of the last step")
        return self._row_logits.compute(self._rows[row])

    def create_sampler(self, params: SamplingParams, seed: int) -> Sampler:
        return ReferenceSampler(params, seed, self._facts.vocab_size)

    def sample(
        self, row: int | npt.NDArray[np.float32], sampler: Sampler, mask: bytes | None = None
    ) -> int:
        if not isinstance(sampler, ReferenceSampler):
            raise ValueError(f"a {type(sampler).__name__} is not a sampler of this runtime")
        if mask is not None:
            self._require("token_masks")
        logits = self.logits(row) if isinstance(row, int) else sampler.checked(row)
        return sampler.draw(logits, mask)

    def set_threads(self, threads: int, threads_batch: int) -> None:
        if threads < 0 or threads_batch < 0:
            raise ValueError(f"{threads} and {threads_batch} threads; 0 means the backend's choice")
        self._facts = replace(self._facts, threads=threads or 1, threads_batch=threads_batch or 1)

    def embed(self, sequence: int, tokens: Sequence[int]) -> list[float]:
        """Each token's hidden state is a hash of itself, the token before it and the seed."""
        self._require("embeddings")
        self._rows = []
        self._abort.clear()
        self._check_step(Step([SequenceStep(sequence, tokens, "none")]))
        (cells,) = self._cells.plan([(sequence, len(tokens))])
        self._spend_step()
        before = [BOS, *self._cells.tokens(sequence)][-1]
        self._cells.append(sequence, cells, tokens)
        pairs = zip(tokens, [before, *tokens[:-1]], strict=True)
        words = [token * 65_537 + before + self._script.seed * 2_000_003 for token, before in pairs]
        vectors = [uniform(word, EMBEDDING_SIZE) - 0.5 for word in words]
        return [float(x) for x in np.sum(vectors, axis=0)]

    # -- sequences -------------------------------------------------------------------------------

    def open(self) -> int:
        if self._closed:
            raise ValueError("the runtime is closed")
        if len(self._cells) >= self._facts.max_sequences:
            raise OutOfCells(f"{len(self._cells)} sequences exist, which is the most; free one")
        sequence = self._next_sequence
        self._next_sequence += 1
        self._cells.open(sequence)
        return sequence

    def free(self, sequence: int) -> None:
        self._check_sequence(sequence)
        self._rows = []
        self._cells.free(sequence)

    def length(self, sequence: int) -> int:
        self._check_sequence(sequence)
        return self._cells.length(sequence)

    def free_cells(self) -> int:
        return self._cells.num_free()

    def fork(self, sequence: int, length: int) -> int:
        self._require("fork")
        self._check_range(sequence, 0, length)
        self._rows = []
        new = self.open()
        if self._script.kv_layout == "shared":
            self._cells.share(sequence, length, new)
            return new
        try:
            self._cells.copy(sequence, length, new)
        except OutOfCells:
            self._cells.free(new)
            raise
        return new

    def rewind(self, sequence: int, length: int) -> None:
        self._require("rewind")
        self._check_range(sequence, 0, length)
        self._rows = []
        self._cells.rewind(sequence, length)

    def evict(self, sequence: int, start: int, stop: int) -> None:
        self._require("evict")
        self._check_range(sequence, start, stop)
        self._rows = []
        self._cells.evict(sequence, start, stop)

    def privatise(self, sequence: int) -> None:
        self._check_sequence(sequence)
        self._rows = []
        self._cells.privatise(sequence)

    def snapshot(self, sequence: int, start: int, stop: int) -> bytes:
        self._require("snapshot")
        self._check_range(sequence, start, stop)
        if not 1 <= stop - start <= BLOCK_TOKENS:
            raise ValueError(f"a snapshot holds 1 to {BLOCK_TOKENS} positions, not {stop - start}")
        self._rows = []
        return self._cells.snapshot(sequence, start, stop, self._identity_digest)

    def restore(self, sequence: int, payload: bytes, num_positions: int) -> None:
        self._require("snapshot")
        self._check_sequence(sequence)
        self._rows = []
        self._cells.restore(sequence, payload, num_positions, self._identity_digest)

    def is_in_order(self, sequence: int) -> bool:
        self._check_sequence(sequence)
        return self._cells.is_in_order(sequence)

    def check_integrity(self) -> None:
        self._cells.check_integrity()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._rows = []
            self._cells = CellTable(0, 0, 0)

    # -- arguments -------------------------------------------------------------------------------

    def _require(self, capability: str) -> None:
        if not getattr(self._facts.can, capability):
            raise NotImplementedError(f"this script does without {capability}")

    def _check_sequence(self, sequence: int) -> None:
        if sequence not in self._cells:
            raise ValueError(f"there is no sequence {sequence}")

    def _check_range(self, sequence: int, start: int, stop: int) -> None:
        self._check_sequence(sequence)
        length = self._cells.length(sequence)
        if not 0 <= start <= stop <= length:
            raise ValueError(f"positions [{start}, {stop}) are not among the {length} of {sequence}")

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if not 0 <= token < self._facts.vocab_size:
                raise ValueError(f"token {token} is outside the vocabulary of {self._facts.vocab_size}")


def _require_positive(settings: RuntimeSettings) -> None:
    for name in ("context", "sequences", "step_tokens", "logit_rows"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(settings, name)}")


def _memory(vocab_size: int, settings: RuntimeSettings) -> list[MemoryItem]:
    return [
        MemoryItem("weights", vocab_size * 8),
        MemoryItem("kv cache", settings.context * settings.sequences * BYTES_PER_CELL),
        MemoryItem("compute", settings.logit_rows * vocab_size * 4),
        MemoryItem("process", PROCESS_BYTES),
    ]


def _identity(script: Script, settings: RuntimeSettings) -> dict[str, str]:
    return {
        "backend": "scripted",
        "build": BUILD,
        "weights": str(script.seed),
        "kv_type_k": settings.kv_type_k,
        "kv_type_v": settings.kv_type_v,
        "adapters": repr(settings.adapters),
    }


def _facts(script: Script, settings: RuntimeSettings, vocab_size: int) -> RuntimeFacts:
    return RuntimeFacts(
        backend="scripted",
        device="cpu",
        vocab_size=vocab_size,
        embedding_size=EMBEDDING_SIZE,
        context=settings.context,
        context_trained=0,
        cells=settings.context * settings.sequences,
        max_sequences=settings.sequences + IDLE_SEQUENCES,
        max_step_tokens=settings.step_tokens,
        max_logit_rows=settings.logit_rows,
        stable_chunk_tokens=1,
        kv_type_k=settings.kv_type_k,
        kv_type_v=settings.kv_type_v,
        kv_bytes_per_token=BYTES_PER_CELL,
        kv_layout=script.kv_layout,
        threads=settings.threads or 1,
        threads_batch=settings.threads_batch or 1,
        can=script.capabilities,
    )
