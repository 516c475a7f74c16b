"""`edgeinfer train-exit`: one exit for one model, from nothing to its file.

What is done lies in a folder of its own until the exit is written, so that what was interrupted goes on:
the texts so far after each batch, what was learnt at every point of the curve and when it is stopped.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeinfer.distill.exit_file_of import write_exit
from edgeinfer.distill.exit_place import best_layer
from edgeinfer.distill.learnt import Learnt, load_learnt, save_learnt
from edgeinfer.distill.openings import GROUPS, ChatFrame, Library
from edgeinfer.distill.texts import Texts, joined, load_texts, save_texts
from edgeinfer.distill.training import ExitFigures, ExitTraining, TrainingPlan
from edgeinfer.errors import ModelFileInvalid, UnsupportedModel, UsageError
from edgeinfer.exits import ANSWERED, ExitPlace, ExitTrainer
from edgeinfer.machine.cost_store import costs_folder
from edgeinfer.registry import get_backend
from edgeinfer_models.chat_template import TemplateRenderer, template_of
from edgeinfer_models.conversion.conversion import lacking_room
from edgeinfer_models.conversion.draft_file import write_draft
from edgeinfer_models.conversion.new_file import require_place
from edgeinfer_models.exit_file import ARCHITECTURES, fingerprint, read_exit_file
from edgeinfer_models.gguf_header import GgufHeader
from edgeinfer_models.gguf_model import read_gguf_model

if TYPE_CHECKING:
    from edgeinfer_models.tokenizer import Tokenizer

LEAST_MINUTES = 0.05
MOST_TEXT_BYTES = 64 * 2**20
_WRITING = 0.4  # of the time
_TEXTS_AT_ONCE = {"cpu": 32}  # else a GPU's
_ON_GPU = 1024
_TEXT_BYTES = 64 * 2**20  # on the disk, for the texts
_STATES = 3 * 4  # bytes a weight while learning: itself and two moments
_PROSE = GROUPS.index("prose")

Told = Callable[[str], None]
# What is being done ("writing", "learning"), how far it is (0 to 1), the last loss or 0.
Progress = Callable[[str, float, float], None]


@dataclass(frozen=True)
class ExitJob:
    """model: a GGUF file. minutes: for everything. text: of the user's, to be learnt from too.
    draft_path: of a draft model for other programs; None: none."""

    model: Path
    out: Path
    minutes: float = 30.0
    place: ExitPlace | None = None  # None: chosen
    text: Path | None = None
    device: str = "auto"
    draft_path: Path | None = None
    force: bool = False
    plan: TrainingPlan = field(default_factory=lambda: TrainingPlan((ExitPlace(1),)))


@dataclass(frozen=True)
class TrainedExit:
    path: Path
    place: ExitPlace
    figures: ExitFigures
    num_bytes: int
    seconds: float


def plan_exit(job: ExitJob) -> tuple[GgufHeader, ExitPlace]:
    """Whether it can be trained, and where it will lie. Raises UsageError, UnsupportedModel,
    ModelFileInvalid, before anything is loaded."""
    if not LEAST_MINUTES <= job.minutes <= 10_000:
        raise UsageError(f"--minutes {job.minutes:g} is outside [{LEAST_MINUTES}, 10000]")
    header = read_gguf_model(job.model)
    if header.architecture not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{job.model.name}: no exit can be trained for models of the architecture"
            f" {header.architecture[:40]}; for {', '.join(ARCHITECTURES)} it can"
        )
    num_layers = header.get_int("{arch}.block_count")
    if num_layers < 2:
        raise UnsupportedModel(f"{job.model.name}: has one layer; there is nothing to leave early")
    place = job.place or ExitPlace(best_layer(num_layers))
    if place.new_layers > num_layers:
        raise UsageError(f"--layer {place.name}: an exit has at most the model's {num_layers} layers")
    if not 0 < place.layer < num_layers:
        raise UsageError(
            f"--layer {place.name}: the model has {num_layers} layers; an exit lies after layer 1 to"
            f" {num_layers - 1}"
        )
    for path in filter(None, (job.out, job.draft_path)):
        require_place(path, job.model, force=job.force)
    if job.draft_path is not None and job.draft_path.absolute() == job.out.absolute():
        raise UsageError("--export-draft and -o name one file; give the draft model another")
    if job.draft_path is not None and not job.draft_path.absolute().parent.is_dir():
        raise UsageError(f"--export-draft {job.draft_path}: there is no such folder")
    if job.text is not None and not job.text.is_file():
        raise UsageError(f"--text {job.text}: no such file")
    if job.text is not None and job.text.stat().st_size > MOST_TEXT_BYTES:
        most = MOST_TEXT_BYTES // 2**20
        raise UsageError(f"--text {job.text}: is larger than {most} MiB; give a part of it")
    _require_room(job, header, place, num_layers)
    return header, place


def train_exit(job: ExitJob, told: Told, progress: Progress) -> TrainedExit:
    """Raises UsageError, UnsupportedModel, ModelFileInvalid, BackendUnavailable, LoadFailed, OSError;
    KeyboardInterrupt with what was done kept in `work_folder(job)`."""
    header, place = plan_exit(job)
    begin = time.monotonic()
    rows = get_backend("llamacpp").row_quantizer()
    trainer = get_backend("torch").exit_trainer(job.model, job.device, told)
    told(f"loaded {job.model.name} on {trainer.device_name}; the exit is after layer {place.name}")
    try:
        figures = _trained(job, header, place, trainer, told, progress)
        write_exit(
            job.out,
            header,
            place,
            trainer.weights(place),
            figures.kept,
            _told_in_file(figures, place),
            rows,
            force=job.force,
        )
    finally:
        trainer.close()
        rows.close()
    if job.draft_path is not None:
        exit_file = read_exit_file(job.out)
        write_draft(job.draft_path, header, exit_file, has_whole_head=True, force=job.force)
    shutil.rmtree(work_folder(job, header, place), ignore_errors=True)
    size = job.out.stat().st_size
    return TrainedExit(job.out, place, figures, size, time.monotonic() - begin)


def work_folder(job: ExitJob, header: GgufHeader, place: ExitPlace) -> Path:
    """Of all that decides what is learnt from what."""
    found = hashlib.sha256(fingerprint(header).encode())
    found.update(f"{place.name} {job.device} {job.plan}".encode())
    if job.text is not None:
        found.update(job.text.read_bytes())
    return costs_folder().parent / "train-exit" / found.hexdigest()[:24]


# -- parts -----------------------------------------------------------------------------------------


def _trained(
    job: ExitJob,
    header: GgufHeader,
    place: ExitPlace,
    trainer: ExitTrainer,
    told: Told,
    progress: Progress,
) -> ExitFigures:
    plan = _plan(job, place, trainer)
    own_texts: Texts | None = None
    if job.text is not None:
        own_texts = _own_texts(job.text, trainer.tokenizer, plan.length)
    folder, digest = work_folder(job, header, place), fingerprint(header)
    folder.mkdir(parents=True, exist_ok=True)
    texts_path, learnt_path = folder / "texts", folder / "learnt"
    texts = _read(lambda: load_texts(texts_path, digest, trainer.tokenizer.vocab_size), texts_path, told)
    learnt = _read(lambda: load_learnt(learnt_path, digest), learnt_path, told)
    current: list[ExitFigures] = []

    def kept(save: Callable[[], None]) -> None:
        """Training goes on where what is done so far cannot be kept."""
        try:
            save()
        except OSError as error:
            told(f"what is done so far could not be kept ({error}); it would be lost if this is stopped")

    def keep(figures: ExitFigures) -> None:
        current[:] = [figures]
        if 0.0 < figures.done < 1.0:
            kept(lambda: save_learnt(learnt_path, training.learnt(figures), digest))

    template = template_of(header)
    with TemplateRenderer(template.text, template.bos, template.eos) as renderer:
        frame = ChatFrame(renderer.render, trainer.tokenizer)
        training = ExitTraining(
            trainer,
            plan,
            frame,
            Library(),
            told,
            keep,
            lambda written: kept(lambda: save_texts(texts_path, written, digest)),
            progress,
        )
        train, held_out = _texts(job, plan, training, texts, learnt, told)
    if own_texts is not None:
        told(f"and {len(own_texts):,} texts of yours")
        train = joined([train, own_texts.cut(train.length)])
    share = 1.0 - _WRITING
    if learnt is not None:
        told(f"goes on where it stopped: {learnt.done:.0%} learnt")
        share *= 1.0 - learnt.done
    until = time.monotonic() + 60.0 * job.minutes * share
    try:
        return training.train(train, held_out, until, learnt)
    except KeyboardInterrupt:
        if current and 0.0 < current[0].done < 1.0:
            kept(lambda: save_learnt(learnt_path, training.learnt(current[0]), digest))
        raise


def _texts(
    job: ExitJob,
    plan: TrainingPlan,
    training: ExitTraining,
    begun: Texts | None,
    learnt: Learnt | None,
    told: Told,
) -> tuple[Texts, Texts]:
    """To learn from, and held out."""
    if begun is not None and learnt is not None:  # it learns from them already
        held_out = min(plan.held_out, plan.texts_at_once // 2)
        train, held = begun.part(held_out, len(begun)), begun.part(0, held_out)
    else:
        if begun is not None:
            told(f"goes on where it stopped: {len(begun):,} texts are written")
        now, seconds = time.monotonic(), 60.0 * job.minutes * _WRITING
        train, held = training.write(now + seconds, now + 1.5 * seconds, begun)
    told(f"{len(train):,} texts to learn from, {train.written_tokens:,} tokens of the model's own")
    return train, held


def _plan(job: ExitJob, place: ExitPlace, trainer: ExitTrainer) -> TrainingPlan:
    from dataclasses import replace

    at_once = _TEXTS_AT_ONCE.get(trainer.device_name, _ON_GPU)
    if job.plan.texts_at_once != TrainingPlan(job.plan.places).texts_at_once:
        at_once = job.plan.texts_at_once
    return replace(job.plan, places=(place,), texts_at_once=at_once)


def _own_texts(path: Path, tokenizer: Tokenizer, length: int) -> Texts:
    """A user's text in pieces of so many tokens. Raises UsageError."""
    if path.stat().st_size > MOST_TEXT_BYTES:
        raise UsageError(
            f"--text {path}: is larger than {MOST_TEXT_BYTES // 2**20} MiB; give a part of it"
        )
    text = path.read_bytes().decode("utf-8", "replace")
    tokens = tokenizer.encode(text, add_special=False, parse_special=False)
    count = len(tokens) // length
    if count == 0:
        raise UsageError(f"--text {path}: has {len(tokens)} tokens, and one text takes {length}")
    rows = np.array(tokens[: count * length], dtype=np.int32).reshape(count, length)
    kinds = np.full(rows.shape, ANSWERED, dtype=np.uint8)
    groups = np.full(count, _PROSE, dtype=np.uint8)
    return Texts(rows, kinds, groups, np.zeros(count, dtype=np.float32))


def _read(load: Callable[[], Any], path: Path, told: Told) -> Any:
    """What an interrupted training left; None where there is none, or it is of no use."""
    if not path.is_file():
        return None
    try:
        return load()
    except (ModelFileInvalid, OSError) as error:
        told(f"begins anew: {error}")
        path.unlink(missing_ok=True)
        return None


def _told_in_file(figures: ExitFigures, place: ExitPlace) -> dict[str, Any]:
    """agreement: by position, on held-out chats (or what there is)."""
    found = figures.curve[-1].agreements.get(place, {})
    chosen = next((found[kind] for kind in ("chat", "code", "prose") if kind in found), None)
    if chosen is None:
        chosen = next(iter(found.values()), None)
    return {
        "agreement": [] if chosen is None else [round(each, 4) for each in chosen.by_position],
        "agreement_by_kind": {kind: each.as_json() for kind, each in found.items()},
        "device": figures.device,
        "texts": figures.texts,
        "learnt_tokens": figures.learnt_tokens,
        "seconds": {stage: round(each, 1) for stage, each in figures.seconds.items()},
    }


def _require_room(job: ExitJob, header: GgufHeader, place: ExitPlace, num_layers: int) -> None:
    elements = sum(tensor.elements for tensor in header.tensors if tensor.name.startswith("blk."))
    own = elements // num_layers * place.new_layers
    for folder, size in (
        (job.out.parent, 2 * own),
        (costs_folder().parent, _TEXT_BYTES + _STATES * own),
        *([(job.draft_path.parent, job.model.stat().st_size)] if job.draft_path else []),
    ):
        there = next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
        lacking = lacking_room(there, size)
        if lacking:
            raise UsageError(f"{folder}: {lacking}; free some")
