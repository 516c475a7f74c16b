"""A tiny model trains exits from end to end: it writes, is read, exits learn, stop, and go on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeinfer.distill.learnt import Learnt, load_learnt, save_learnt
from edgeinfer.distill.openings import ChatFrame, Library
from edgeinfer.distill.training import ExitFigures, ExitTraining, TrainingPlan, summary
from edgeinfer.errors import ModelFileInvalid
from edgeinfer.exits import ExitPlace, ExitRecipe
from edgeinfer.registry import get_backend
from tests.fixtures_hf import write_tiny_folder

pytest.importorskip("torch")

PLACES = (ExitPlace(1), ExitPlace(2, 2))
PLAN = TrainingPlan(
    PLACES,
    ExitRecipe(learning_rate=3e-3, batch_texts=8),
    length=72,
    texts_at_once=16,
    most_tokens=2500,
    held_out=4,
    most_rounds=6.0,
)


def chatml(messages: Sequence[Mapping[str, Any]]) -> str:
    turns = [f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>\n" for each in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


def training_of(
    trainer: Any, told: list[str], points: list[int], stop: list[Learnt] | None = None
) -> ExitTraining:
    frame = ChatFrame(chatml, trainer.tokenizer)

    def on_point(figures: ExitFigures) -> None:
        points.append(figures.learnt_tokens)
        if stop is not None and 0.3 < figures.done < 0.7:
            stop.append(training.learnt(figures))

    training = ExitTraining(trainer, PLAN, frame, Library(), told.append, on_point)
    return training


def test_exits_learn_and_go_on_where_they_stopped(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "tiny", layers=4)
    trainer = get_backend("torch").exit_trainer(folder, "cpu")
    told: list[str] = []
    points: list[int] = []
    stopped: list[Learnt] = []
    training = training_of(trainer, told, points, stopped)
    far = time.monotonic() + 3600.0
    train, held_out = training.write(far, far)
    assert len(held_out) == 4 and len(train) == 3 * 16 - 4 and train.length == 72
    assert 0 < train.written_tokens < train.tokens.size
    figures = training.train(train, held_out, far)
    assert figures.done == 1.0 and points == sorted(points) and len(points) > 4
    # 44 texts, 6 rounds, 8 at a time
    assert figures.steps == 33 and figures.learnt_tokens == 33 * 8 * 72
    first, last = figures.curve[1], figures.curve[-1]
    assert all(last.loss[place] < first.loss[place] for place in PLACES)
    found = figures.as_json()
    assert found["steps"] == 33 and set(found["curve"][-1]["exits"]) == {"1", "2x2"}
    assert any("exit   2x2" in line for line in summary(figures))

    path = tmp_path / "learnt"
    save_learnt(path, stopped[0], "digest")
    learnt = load_learnt(path, "digest")
    assert learnt.done == stopped[0].done and np.array_equal(learnt.kept, figures.kept)
    again = training_of(trainer, told, []).train(train, held_out, far, learnt)
    assert again.done == 1.0 and again.steps == 33
    assert again.curve[0].done == learnt.done
    trainer.close()


def test_time_that_is_over_ends_the_training_with_what_there_is(tmp_path: Path) -> None:
    trainer = get_backend("torch").exit_trainer(write_tiny_folder(tmp_path / "tiny", layers=4), "cpu")
    training = training_of(trainer, [], [])
    now = time.monotonic()
    train, held_out = training.write(now, now)
    assert train.length == held_out.length == 64  # as few positions as are worth anything
    figures = training.train(train, held_out, now)
    assert figures.done == 1.0 and figures.steps == 1 and len(figures.curve) == 2
    trainer.close()


def test_damaged_progress_is_one_clear_line(tmp_path: Path) -> None:
    path, kept = tmp_path / "learnt", np.arange(4, dtype=np.int32)
    state = {"weight/1/norm.weight": np.ones(8, np.float32), "step/1/norm.weight": np.float32(3)}
    save_learnt(path, Learnt(0.5, 7, kept, state), "digest")
    assert load_learnt(path, "digest").steps == 7
    with pytest.raises(ModelFileInvalid, match="not of this model"):
        load_learnt(path, "other")
    for bad in (np.full(8, np.nan, np.float32), np.ones(8, np.float64)):
        save_learnt(path, Learnt(0.5, 7, kept, {**state, "weight/1/norm.weight": bad}), "digest")
        with pytest.raises(ModelFileInvalid, match="is damaged"):
            load_learnt(path, "digest")
    save_learnt(path, Learnt(1.5, 7, kept, state), "digest")
    with pytest.raises(ModelFileInvalid, match="is damaged"):
        load_learnt(path, "digest")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ModelFileInvalid, match="is damaged"):
        load_learnt(path, "digest")
