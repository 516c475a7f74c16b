"""Exits on an NVIDIA GPU: texts written and read as recorded graphs, and what is learnt from them.
Skipped where there is no such device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeinfer.exits import ANSWERED, ExitPlace, ExitRecipe, Opening, Turns
from edgeinfer.registry import get_backend
from tests.fixtures_hf import write_tiny_folder

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device", allow_module_level=True)

TEXTS, LENGTH = 96, 160
PLACES = [ExitPlace(1), ExitPlace(2), ExitPlace(1, 2)]


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Any]:
    """Of the starter's widths, with four layers."""
    folder = write_tiny_folder(
        tmp_path / "tiny", layers=4, hidden=576, heads=9, kv_heads=3, head_dim=64, feed_forward=1536
    )
    told: list[str] = []
    found: Any = get_backend("torch").exit_trainer(folder, "cuda", told.append)
    yield found
    found.close()
    assert told == []  # nothing that could not be recorded


def test_texts_are_written_and_read_and_learnt_from(trainer: Any) -> None:
    vocab = trainer._decoder.shape.vocab_size
    trainer.prepare_writing(TEXTS, LENGTH, Turns((7, 8), (7, 9), (10,)))
    openings = [Opening((5, 20 + row), row % 2 == 0, 0.0) for row in range(TEXTS)]
    pieces = [trainer.write(openings, seed, lambda _: True) for seed in (1, 2)]
    trainer.end_writing()
    assert torch.cuda.memory_allocated() < 2**28  # the caches are gone
    tokens = np.concatenate([piece[0] for piece in pieces])
    kinds = np.concatenate([piece[1] for piece in pieces])
    assert tokens.shape == (2 * TEXTS, LENGTH) and 0 <= tokens.min() <= tokens.max() < vocab
    assert (tokens[:, 0] == 5).all() and (tokens[0, 1], tokens[1, 1]) == (20, 21)

    recipe = ExitRecipe(learning_rate=5e-4, batch_texts=32)
    kept = np.arange(vocab, dtype=np.int32)
    assert trainer.texts_that_fit(PLACES, recipe, LENGTH) > 2 * TEXTS
    trainer.begin(PLACES, kept, recipe, texts=2 * TEXTS, held_out=70, length=LENGTH)
    trainer.capture(tokens, kinds, held_out=False)
    trainer.capture(tokens[:70], kinds[:70], held_out=True)
    texts = trainer._learning.texts
    likeliest = texts.likeliest.cpu().numpy()
    plain = np.arange(2 * TEXTS) % 2 == 1  # greedy from the first position on
    own = (kinds[:, 1:] == ANSWERED) & plain[:, None]
    # Two ways of adding up bf16: what is nearly equal may come out either way.
    assert (likeliest[:, :-1][own] == tokens[:, 1:][own]).mean() > 0.9
    assert texts.filled == 2 * TEXTS and trainer._learning.held_out.filled == 70
    assert torch.isfinite(texts.shares).all() and (texts.shares.sum(-1) <= 1.01).all()

    trainer.step(0.05)
    before = trainer.losses()
    for index in range(60):
        trainer.step(0.05 + index / 70)
    after, predicted = trainer.losses(), trainer.predict()
    for place in PLACES:
        assert np.isfinite(after[place]) and after[place] < before[place]
        assert predicted.exits[place].shape == (70, LENGTH)
    state = {name: np.array(each) for name, each in trainer.state().items()}
    trainer.begin(PLACES, kept, recipe, texts=2 * TEXTS, held_out=70, length=LENGTH)
    trainer.capture(tokens, kinds, held_out=False)
    trainer.restore(state)
    trainer.step(0.5)
    assert all(np.isfinite(loss) for loss in trainer.losses().values())


def test_the_gpu_finds_the_states_that_the_processor_does(trainer: Any) -> None:
    vocab = trainer._decoder.shape.vocab_size
    tokens = np.random.default_rng(1).integers(5, vocab - 10, (70, 96)).astype(np.int32)
    kinds = np.full(tokens.shape, ANSWERED, dtype=np.uint8)
    kept = np.arange(vocab, dtype=np.int32)
    found = []
    for device in ("cuda", "cpu"):
        trainer._decoder.to(device)
        trainer._decoder.set_context(256, torch.device(device))
        trainer._device, trainer._records = torch.device(device), device == "cuda"
        trainer.begin([ExitPlace(2)], kept, ExitRecipe(), texts=70, held_out=0, length=96)
        trainer.capture(tokens, kinds, held_out=False)
        found.append(trainer._learning.texts.states[2].float().cpu())
    trainer._device = torch.device("cuda")
    assert (found[0] - found[1]).norm() / found[1].norm() < 2e-2
