"""A chat whose lightest tokens leave (H2O): each turn reads only what is new, also after restarts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edgeinfer.backend import RuntimeSettings
from edgeinfer.engine.disk_cache import DiskCache
from edgeinfer.engine.engine import Engine
from edgeinfer.engine.window import Eviction, Window
from edgeinfer.registry import get_backend
from edgeinfer_models.model_files import ModelFiles
from tests.engine.test_eviction import SINKS, SIZE, Talk, streamed
from tests.fixtures_hf import write_tiny_folder

torch = pytest.importorskip("torch")
TURNS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("tiny") / "tiny")


@contextmanager
def talking(model: Path, folder: Path, eviction: Eviction = "h2o") -> Iterator[Talk]:
    """As in a process that has just started."""
    settings = RuntimeSettings(
        context=256,
        threads=1,
        threads_batch=1,
        kv_type_k="f32",
        kv_type_v="f32",
        gpu_layers=0,
        heavy_hitters=eviction == "h2o",
    )
    files = ModelFiles("tiny", (model / "model.safetensors",), "safetensors")
    runtime = get_backend("torch").load(files, settings, lambda _: True)
    engine = Engine(
        runtime,
        model="tiny",
        cache_bytes=2**28,
        disk=DiskCache(folder, runtime.identity(), 2**30),
        window=Window(SIZE, SINKS, eviction),
    )
    engine._prefill_s_per_token = 0.01  # everything is worth a file
    engine._learn_rate = lambda seconds, tokens: None  # type: ignore[method-assign]
    yield Talk(engine)
    engine.close(10.0)


def asked_for(turn: int) -> list[int]:
    return random.Random(turn).choices(range(5, 250), k=20 + turn)


def answer(talk: Talk, history: list[int], turn: int) -> tuple[list[int], int]:
    """The answer's tokens, and how many of the history were not read again."""
    talk.submit(turn, streamed([*history, *asked_for(turn)], 30))
    talk.run()
    return list(talk.running[turn].answered), talk.stats(turn).cache.tokens


def test_a_chat_through_heavy_hitters_is_the_same_live_and_after_restarts(
    model: Path, tmp_path: Path
) -> None:
    histories: list[list[int]] = [[], []]
    evicted = 0
    with talking(model, tmp_path / "one") as live:
        for turn in range(TURNS):
            answers = []
            for which in range(2):
                if which == 0:
                    found, cached = answer(live, histories[0], turn)
                    evicted = live.running[turn].evicted
                else:
                    with talking(model, tmp_path / "other") as restarted:
                        found, cached = answer(restarted, histories[1], turn)
                answers.append(found)
                if turn:
                    assert cached >= len(histories[which]) - 1, "only what is new was read"
                histories[which] += [*asked_for(turn), *found]
            assert answers[0] == answers[1], f"turn {turn}"
    assert evicted > SIZE


def test_what_one_policy_left_is_not_taken_for_the_other_s(model: Path, tmp_path: Path) -> None:
    """In one cache folder, switched with every start."""
    history: list[int] = []
    alone: dict[Eviction, list[int]] = {}
    for turn in range(4):
        with talking(model, tmp_path / "h2o") as talk:
            found, _ = answer(talk, history, turn)
        history += [*asked_for(turn), *found]
    for eviction in ("streaming", "h2o"):
        with talking(model, tmp_path / f"fresh-{eviction}", eviction) as talk:
            alone[eviction], _ = answer(talk, history, 9)
    with talking(model, tmp_path / "h2o", "streaming") as talk:
        found, cached = answer(talk, history, 9)
    assert cached == 0
    assert found == alone["streaming"]
