"""What exits are trained with on the torch backend: texts written side by side, states, loss, steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeinfer.errors import UnsupportedModel, UsageError
from edgeinfer.exits import ANSWERED, ASKED, FORCED, ExitPlace, ExitRecipe, Opening, Turns
from edgeinfer.registry import get_backend
from tests.fixtures_families import CONFIGS, full, write_folder
from tests.fixtures_hf import write_tiny_folder

torch = pytest.importorskip("torch")

LENGTH, END, NEXT = 40, 7, 9
TURNS = Turns((END, 20, 21), (END, 22), (23,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("exits") / "tiny", layers=4, kv_heads=2)


@pytest.fixture
def trainer(folder: Path) -> Any:
    found: Any = get_backend("torch").exit_trainer(folder, "cpu")
    found._decoder.float()
    found._bf16 = False
    yield found
    found.close()


def writer_of(trainer: Any, texts: int, *, records: bool = False, ends: int = END) -> Any:
    from edgeinfer_backends.torch.generation import BatchWriter

    is_end = torch.arange(trainer._decoder.shape.vocab_size) == ends
    return BatchWriter(trainer._decoder, is_end, TURNS, texts, LENGTH, records=records)


def whole_logits(trainer: Any, tokens: Any) -> Any:
    """(texts, length, vocabulary), by layers that share no code with what is tested."""
    from edgeinfer_backends.torch.layers import LayerAccess

    layers = LayerAccess(trainer._decoder, torch.device("cpu"), torch.float32, 256)
    states = layers.embed(tokens.tolist())
    for layer in range(layers.num_layers):
        states = layers.run(layer, states)
    return layers.head(states)


def test_texts_written_side_by_side_are_what_the_model_says_of_each_alone(trainer: Any) -> None:
    openings = [Opening((5, 30 + i, 40 + 2 * i), False, 0.0) for i in range(6)]
    writer = writer_of(trainer, 6, ends=-1)
    tokens, kinds = writer.write(openings, 1, lambda _: True)
    assert tokens.shape == (6, LENGTH)
    likeliest = whole_logits(trainer, tokens.numpy()).argmax(-1)
    own = kinds[:, 1:].numpy() == ANSWERED
    assert own[:, 2:].all() and not own[:, :2].any()
    assert (likeliest[:, :-1][own] == tokens[:, 1:].numpy()[own]).all()


def test_a_turn_that_ends_is_followed_by_what_the_template_puts_there(trainer: Any) -> None:
    writer = writer_of(trainer, 2, ends=-1)
    opening = Opening((5, 30, 31), True, 0.0)
    plain = writer.write([opening, Opening((5, 60), False, 0.0)], 3, lambda _: True)[0]
    ends_asking, ends_plain = int(plain[0, 10]), int(plain[1, 12])
    again = writer_of(trainer, 2)
    again._ends[[ends_asking, ends_plain]] = True
    tokens, kinds = again.write([opening, Opening((5, 60), False, 0.0)], 3, lambda _: True)
    first = next(at for at in range(3, 11) if plain[0, at] in (ends_asking, ends_plain))
    assert tokens[0, :first].tolist() == plain[0, :first].tolist()
    assert tokens[0, first : first + 3].tolist() == list(TURNS.after_question)
    assert kinds[0, : first + 4].tolist() == [
        *[FORCED] * 3, *[ASKED] * (first - 2), FORCED, FORCED, ANSWERED
    ]  # fmt: skip
    first = next(at for at in range(2, 13) if plain[1, at] in (ends_asking, ends_plain))
    assert tokens[1, first] == TURNS.after_text[0] and kinds[1, first] == FORCED
    assert kinds[1, first + 1] == ANSWERED


def test_draws_follow_the_distribution_less_its_tail(trainer: Any) -> None:
    writer = writer_of(trainer, 4000)
    writer._phase.fill_(2)
    writer._temperature.fill_(0.5)
    logits = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0]).repeat(4000, 1)
    writer._noise = torch.empty(4000, 5).exponential_(generator=torch.Generator().manual_seed(1))
    counts = torch.bincount(writer._drawn(logits), minlength=5) / 4000
    wanted = torch.softmax(logits[0] / 0.5, -1)
    wanted[wanted < 0.05 * wanted.max()] = 0
    assert (counts - wanted / wanted.sum()).abs().max() < 0.03
    assert counts[3] == counts[4] == 0


def test_recording_a_step_leaves_nothing_behind(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a recording does to the numbers, without a device that records: a few runs, then replays."""
    from edgeinfer_backends.torch import generation

    def pretended(step: Any, pool: Any) -> Any:
        for _ in range(3):
            step()
        return step

    openings = [Opening((5, 30 + i), i % 2 == 0, 0.7) for i in range(4)]
    wanted = writer_of(trainer, 4).write(openings, 5, lambda _: True)
    monkeypatch.setattr(generation, "recorded", pretended)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    writer = writer_of(trainer, 4, records=True)
    for _ in range(2):  # and a batch nothing for the next
        found = writer.write(openings, 5, lambda _: True)
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


def test_a_step_that_is_recorded_asks_the_device_for_nothing(trainer: Any) -> None:
    """Each of these operators waits for a device, or has a result of unknown size, or copies a number to
    it: none may be recorded."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from edgeinfer_backends.torch.exit_states import StateReader

    called: set[str] = set()

    class Listing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.add(str(func).split(".")[1])
            return func(*args, **(kwargs or {}))

    writer = writer_of(trainer, 3)
    reader = StateReader(trainer._decoder, [2], torch.arange(50), 8, 2, 16, records=False)
    with torch.no_grad(), Listing():
        writer._steps[LENGTH]()
        reader._read()
    forbidden = {
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "lift_fresh",
        "scalar_tensor",
        "item",
    }
    assert called and not called & forbidden


def test_states_and_distribution_are_the_models(trainer: Any) -> None:
    vocab = trainer._decoder.shape.vocab_size
    tokens = np.random.default_rng(3).integers(5, vocab - 10, (11, 24)).astype(np.int32)
    kinds = np.full(tokens.shape, ANSWERED, dtype=np.uint8)
    kept = np.arange(0, vocab, 2, dtype=np.int32)
    recipe = ExitRecipe(target_tokens=vocab, question_weight=0.5)
    kinds[:, 5], kinds[:, 6] = FORCED, ASKED
    trainer.begin([ExitPlace(2), ExitPlace(3)], kept, recipe, texts=11, held_out=0, length=24)
    trainer.capture(tokens, kinds, held_out=False)
    texts = trainer._learning.texts
    assert texts.filled == 11
    logits = whole_logits(trainer, tokens)
    assert (texts.likeliest.numpy() == logits.argmax(-1)).all()
    shares = np.exp(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    found = np.zeros((*tokens.shape, len(kept)))
    np.add.at(found, (*np.indices(texts.targets.shape)[:2], texts.targets.numpy()), texts.shares.numpy())
    assert np.abs(found - shares[..., kept]).max() < 1e-3
    assert texts.weight[0, 3:7].tolist() == [1.0, 0.0, 0.5, 1.0] and not texts.weight[:, -1].any()


def test_the_slope_of_the_loss_is_what_differentiation_finds() -> None:
    from edgeinfer_backends.torch.exit_loss import cross_entropy

    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(50, 8, generator=generator, requires_grad=True)
    head = torch.randn(30, 8, generator=generator)
    targets = torch.stack([torch.randperm(30, generator=generator)[:5] for _ in range(50)])
    shares = torch.rand(50, 5, generator=generator)
    shares = shares / shares.sum(-1, keepdim=True)
    shares[7] = 0
    weight = torch.rand(50, generator=generator)
    picked = torch.log_softmax(hidden @ head.t(), -1).gather(1, targets)
    wanted = -((picked * shares).sum(-1) * weight).sum() / weight.sum()
    wanted.backward()
    loss, slope = cross_entropy(hidden.detach(), head, targets, shares, weight)
    assert torch.allclose(loss, wanted.detach(), atol=1e-6)
    assert torch.allclose(slope, hidden.grad, atol=1e-7)


def begun(trainer: Any, places: list[ExitPlace]) -> None:
    vocab = trainer._decoder.shape.vocab_size
    random = np.random.default_rng(3)
    tokens = random.integers(5, vocab - 10, (12, 32)).astype(np.int32)
    kinds = np.full(tokens.shape, ANSWERED, dtype=np.uint8)
    recipe = ExitRecipe(learning_rate=3e-3, batch_texts=4, hard_share=0.2)
    kept = np.arange(vocab, dtype=np.int32)
    trainer.begin(places, kept, recipe, texts=12, held_out=12, length=32)
    trainer.capture(tokens, kinds, held_out=False)
    trainer.capture(tokens, kinds, held_out=True)


def test_exits_learn_what_their_model_says(trainer: Any) -> None:
    places = [ExitPlace(1), ExitPlace(2, 2)]
    begun(trainer, places)
    assert trainer.losses() == {}
    trainer.step(0.05)
    before = trainer.losses()
    for index in range(60):
        trainer.step(0.05 + index / 70)
    after, predicted = trainer.losses(), trainer.predict()
    for place in places:
        assert after[place] < before[place]
        agreed = (predicted.exits[place] == predicted.model)[:, :-1].mean()
        assert agreed > 0.5
    assert set(trainer.weights(places[1])) >= {"norm.weight", "layers.1.mlp.down_proj.weight"}


def test_an_exit_of_the_last_layer_begins_as_the_model(trainer: Any) -> None:
    place = ExitPlace(3)
    begun(trainer, [place])
    predicted = trainer.predict()
    assert (predicted.exits[place] == predicted.model).mean() > 0.999


def test_training_that_was_restored_goes_on_as_if_it_had_never_stopped(trainer: Any) -> None:
    place = ExitPlace(2)
    begun(trainer, [place])
    for _ in range(3):
        trainer.step(0.3)
    kept = {name: np.array(each) for name, each in trainer.state().items()}
    for _ in range(3):  # a whole round of the texts: the order of the next is drawn anew
        trainer.step(0.3)
    wanted = trainer.weights(place)
    begun(trainer, [place])
    for _ in range(3):
        trainer.step(0.9)
    trainer.restore(kept)
    for _ in range(3):
        trainer.step(0.3)
    for name, each in trainer.weights(place).items():
        assert np.allclose(each, wanted[name], atol=1e-6), name
    with pytest.raises(ValueError, match="lacks weight/2/"):
        trainer.restore({})


def test_what_cannot_be_trained_is_refused(trainer: Any, tmp_path: Path) -> None:
    kept = np.arange(9, dtype=np.int32)
    for place in (ExitPlace(4), ExitPlace(1, 5)):
        with pytest.raises(UsageError, match="an exit at"):
            trainer.begin([place], kept, ExitRecipe(), texts=1, held_out=1, length=16)
    with pytest.raises(UsageError, match="longer than the model reads"):
        trainer.begin([ExitPlace(1)], kept, ExitRecipe(), texts=1, held_out=1, length=10**6)
    for text in ("0", "x", "8x0", "8x", "-1"):
        with pytest.raises(UsageError, match="no place of an exit"):
            ExitPlace.parse(text)
    gemma = write_folder(tmp_path / "gemma", full(CONFIGS["gemma2"]))
    with pytest.raises(UnsupportedModel, match="no exit can be trained"):
        get_backend("torch").exit_trainer(gemma, "cpu")
