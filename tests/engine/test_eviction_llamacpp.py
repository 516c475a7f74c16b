"""What llama.cpp's cells hold after many random evictions, forks, moves to host memory and restarts:
what the policy says, in order. A tiny model of random weights; what it answers is taken as it comes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edgeinfer.backend import KvLayout, RuntimeSettings
from edgeinfer.engine.disk_cache import DiskCache
from edgeinfer.engine.engine import Engine
from edgeinfer.engine.window import Window
from edgeinfer.registry import get_backend
from edgeinfer_models.resolve import resolve_model
from tests.engine.test_eviction import SINKS, SIZE, PlainCells, Talk, streamed
from tests.fixtures_gguf import write_tiny_gguf

TURNS = 150


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", head_dim=64)


@contextmanager
def talking(model: Path, folder: Path, layout: KvLayout, sequences: int, kv_type: str) -> Iterator[Talk]:
    """As in a process that has just started."""
    settings = RuntimeSettings(
        context=256,
        sequences=sequences,
        threads=1,
        threads_batch=1,
        kv_type_k=kv_type,
        kv_type_v=kv_type,
        kv_layout=layout,
    )
    files = resolve_model(str(model)).files
    runtime = get_backend("llamacpp").load(files, settings, lambda _: True)
    disk = DiskCache(folder, runtime.identity(), 2**30)
    engine = Engine(
        runtime,
        model="tiny",
        max_running=sequences,
        cache_bytes=2**28,
        disk=disk,
        window=Window(SIZE, SINKS),
    )
    engine._prefill_s_per_token = 0.01  # everything is worth a file
    engine._learn_rate = lambda seconds, tokens: None  # type: ignore[method-assign]
    yield Talk(engine)
    engine.close(10.0)


@pytest.mark.parametrize(
    ("layout", "sequences", "kv_type", "seed"),
    [
        ("shared", 2, "f16", 1),
        ("private", 2, "f16", 2),
        ("shared", 2, "q8_0", 3),
        ("private", 2, "q8_0", 4),
        ("private", 1, "f16", 5),
        ("private", 1, "q8_0", 6),
    ],
)
def test_the_cells_hold_what_the_policy_says(
    model: Path, tmp_path: Path, layout: KvLayout, sequences: int, kv_type: str, seed: int
) -> None:
    rng = random.Random(seed)
    plains: list[PlainCells] = []
    evictions = forks = turn = 0
    while turn < TURNS:
        with talking(model, tmp_path, layout, sequences, kv_type) as talk:
            tokenizer = talk.engine.runtime.tokenizer
            plains = plains or [PlainCells(tokenizer=tokenizer)]
            for plain in plains:
                plain.tokenizer = tokenizer
            for _ in range(rng.randint(3, 8)):
                if len(plains) < 5 and rng.random() < 0.3:  # a conversation goes on in two ways
                    # A lone sequence goes on with the first, and the other is read anew.
                    old = rng.choice(plains) if sequences > 1 else PlainCells(tokenizer=tokenizer)
                    held = list(old.history), list(old.cells)
                    plains.append(PlainCells(SIZE, SINKS, *held, tokenizer))
                    forks += 1
                pending = []
                for plain in rng.sample(plains, min(sequences, len(plains))):
                    plain.history += rng.choices(range(3, 250), k=rng.randint(1, 35))
                    talk.submit(turn, streamed(plain.history, rng.randint(1, 40)))
                    pending.append((plain, turn))
                    turn += 1
                while talk.engine.use_idle():
                    pass  # so that a fork finds what the other one takes on
                talk.run()  # which checks the runtime's own books after every step
                for plain, key in pending:
                    assert talk.stats(key).finish_reason == "length"
                    running = talk.running[key]
                    for token in running.answered:
                        plain.read()
                        plain.history.append(token)
                    assert running.tokens[: running.num_computed] == plain.held
                    assert running.evicted == len(plain.history) - 1 - len(plain.held)
                    evictions += running.newly_evicted > 0
    assert evictions > TURNS // 3
    assert forks
