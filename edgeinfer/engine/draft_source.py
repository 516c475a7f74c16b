"""Who drafts beside lookups, as it was asked for, and loading it: an early exit, or a smaller model.

Whatever is wrong with it costs drafts, never the model: it is told (at the load, or where it is found
out later as the reason in an answer's stats), and answers come without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeinfer.backend import Backend, MemoryItem, Runtime, RuntimeSettings
from edgeinfer.engine.draft_model import DraftModel
from edgeinfer.errors import EdgeInferError, LoadFailed
from edgeinfer_models.exit_file import ExitFile, read_exit_file
from edgeinfer_models.model_files import ModelFiles

if TYPE_CHECKING:
    from edgeinfer.engine.draft_model import Kept
    from edgeinfer_models.config import ModelConfig

_ROWS = 16  # of logits
_STEP_TOKENS = 32  # of a prompt, at most: what a step computes in takes megabytes
_MOST_SAMPLED = 4096  # tokens whose texts are compared, spread over the vocabulary
_SPARE_BYTES = 256 * 2**20  # that are left for everything else


@dataclass(frozen=True)
class DraftSource:
    """One of the two. config: of the model. is_wanted: even where it is not worth its steps."""

    exit_path: Path | None = None
    files: ModelFiles | None = None
    config: ModelConfig | None = None
    is_wanted: bool = False


@dataclass(frozen=True)
class LoadedDraft:
    """typical: how often its tokens are right, by position, as far as whoever made it knows."""

    model: DraftModel
    typical: tuple[float, ...]
    memory: tuple[MemoryItem, ...]


def load_draft(
    source: DraftSource,
    backend: Backend,
    files: ModelFiles,
    num_layers: int,
    target: Runtime,
    settings: RuntimeSettings,
    folder: Path,
    available_bytes: int,
) -> LoadedDraft:
    """files, num_layers, settings: of the target. folder: for what is put together. Raises
    EdgeInferError."""
    kept: Kept | None = None
    typical: tuple[float, ...] = ()
    own = _settings(settings)
    if source.exit_path is not None:
        if not backend.runs_exits:
            raise LoadFailed(f"the {backend.name} backend runs no exits; it drafts by lookup alone")
        exit_file = read_exit_file(source.exit_path)
        kept, typical = exit_file.kept, exit_typical(exit_file)
        needed = _exit_bytes(exit_file, files, num_layers, target, own)
        _require_memory(needed, available_bytes)
        runtime = backend.load_exit(files, source.exit_path, own, folder)
    else:
        assert source.files is not None
        predicted = backend.predict_memory(source.files, source.config, own)
        needed = sum(item.num_bytes for item in predicted if item.name != "process")
        _require_memory(needed, available_bytes)
        runtime = backend.load(source.files, own, lambda _: True)
    try:
        if kept is None:
            _require_same_tokens(source, runtime, files, target)
        vocab_size = target.facts.vocab_size
        model = DraftModel(runtime, "draft" if kept is None else "exit", kept, vocab_size)
        model.measure()
    except (EdgeInferError, ValueError) as error:
        runtime.close()
        raise error if isinstance(error, EdgeInferError) else LoadFailed(str(error)) from None
    items = (replace(item, name=f"{model.mode} {item.name}") for item in runtime.memory())
    return LoadedDraft(model, typical, tuple(items))


def _settings(target: RuntimeSettings) -> RuntimeSettings:
    return replace(
        target,
        step_tokens=min(_STEP_TOKENS, target.step_tokens),
        logit_rows=max(_ROWS, target.sequences),
        kv_type_k="f16",
        kv_type_v="f16",
        adapters=(),
    )


def exit_typical(exit_file: ExitFile) -> tuple[float, ...]:
    """What its training found on held-out texts, the least of the kinds; () where it says nothing that
    can be used."""
    found = exit_file.told.get("agreement")
    if not isinstance(found, list):
        return ()
    if not all(isinstance(each, float | int) and 0 <= each <= 1 for each in found):
        return ()
    return tuple(float(each) for each in found[:16])


def _exit_bytes(
    exit_file: ExitFile,
    files: ModelFiles,
    num_layers: int,
    target: Runtime,
    settings: RuntimeSettings,
) -> int:
    """Its share of the model's weights and keys and values, about."""
    weights = sum(size for _, size in files.weight_types)
    share = min(1.0, (exit_file.layer + exit_file.new_layers) / max(num_layers, 1))
    cells = settings.context * settings.sequences
    keys_and_values = cells * target.facts.kv_bytes_per_token
    if target.facts.kv_type_k != "f16":  # in which the exit's are
        keys_and_values *= 2
    return int(share * (weights + keys_and_values))


def _require_memory(needed: int, available: int) -> None:
    if needed + _SPARE_BYTES > available:
        raise LoadFailed(
            f"drafting takes about {needed // 2**20:,} MiB, and {available // 2**20:,} MiB of memory are"
            " free; a smaller --ctx takes less"
        )


def _require_same_tokens(
    source: DraftSource, draft: Runtime, files: ModelFiles, target: Runtime
) -> None:
    """Drafts are token ids. (More tokens at the end than the other has are padding.)"""
    assert source.files is not None
    ours, theirs = target.tokenizer, draft.tokenizer
    common = min(ours.vocab_size, theirs.vocab_size)
    apart = abs(ours.vocab_size - theirs.vocab_size)
    tokens: Sequence[int] = range(0, common, max(1, common // _MOST_SAMPLED))
    wrong = next((token for token in tokens if ours.text(token) != theirs.text(token)), None)
    if wrong is not None:
        raise LoadFailed(
            f"{source.files.name} has other tokens than {files.name} (token {wrong} is"
            f" {theirs.text(wrong)[:20]!r}, not {ours.text(wrong)[:20]!r}); take a smaller model of the"
            " same family"
        )
    if apart > max(256, common // 100):
        raise LoadFailed(
            f"{source.files.name} has {theirs.vocab_size} tokens and {files.name} has"
            f" {ours.vocab_size}; take a smaller model of the same family"
        )
