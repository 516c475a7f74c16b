"""Which drafts a model gets when it is loaded, and what is said where it gets none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeinfer.backend import RuntimeSettings
from edgeinfer.engine.draft_source import DraftSource
from edgeinfer.engine.drafting import Drafting, Target
from edgeinfer.engine.speculation import Speculate
from edgeinfer.engine.tuner import Choice, Tuner
from edgeinfer.engine.window import Window
from edgeinfer_backends.llamacpp import LlamaCppBackend
from edgeinfer_models.config import config_from_gguf
from edgeinfer_models.gguf_header import read_gguf_header
from edgeinfer_models.gguf_model import read_gguf_model
from edgeinfer_models.model_files import ModelFiles
from edgeinfer_models.token_rows import RowsPlace
from tests.fixtures_exits import write_own_exit
from tests.fixtures_gguf import write_tiny_gguf

CHEAP = {1: 0.010, 2: 0.010, 4: 0.010}  # checks cost nothing
DEAR = {1: 0.010, 2: 0.020, 4: 0.040}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "tiny.gguf", layers=3, weight_type="Q8_0")


@pytest.fixture
def own_exit(model: Path, tmp_path: Path) -> Path:
    every = np.arange(RowsPlace.of(read_gguf_header(model)).num_tokens, dtype=np.int32)
    return write_own_exit(model, tmp_path / "tiny.exit.gguf", every, {"agreement": [0.6, 0.7]})


class Loaded:
    def __init__(self, model: Path, tmp_path: Path, num_layers: int = 12) -> None:
        backend, files = LlamaCppBackend(), ModelFiles("tiny", (model,), "gguf")
        settings = RuntimeSettings(context=256, threads=1, threads_batch=1)
        self.runtime = backend.load(files, settings, lambda _: True)
        self.tuner = Tuner.of_padding(1, 1)
        self.folder = tmp_path / "drafts"
        # (of more layers than there are, so that an exit behind two of them is a small part)
        self.target = Target(
            backend, files, num_layers, settings, self.runtime, Window(256, 4), self.tuner
        )

    def measured(self, costs: dict[int, float]) -> None:
        for size, seconds in costs.items():
            for _ in range(3):
                self.tuner.observe(Choice(1), size, size, 0, seconds)

    def drafting(
        self, speculate: Speculate, source: DraftSource | None, available: int = 2**40
    ) -> Drafting:
        return Drafting(speculate, source, self.target, self.folder, lambda: available)


@pytest.fixture
def loaded(model: Path, tmp_path: Path) -> Loaded:
    return Loaded(model, tmp_path)


def test_an_exit_is_loaded_once_costs_say_that_it_may_pay(loaded: Loaded, own_exit: Path) -> None:
    drafting = loaded.drafting("auto", DraftSource(own_exit))
    assert drafting.speculation is not None and not drafting.memory
    assert "not measured yet" in drafting.speculation.no_model
    assert not drafting.decide()
    loaded.measured(CHEAP)
    assert drafting.decide() and drafting.memory and drafting.speculation.no_model == ""
    assert {item.name for item in drafting.memory} >= {"exit weights", "exit kv cache"}
    assert not drafting.decide()  # once
    assert drafting.warnings == []
    drafting.close()


def test_one_that_would_not_pay_is_not_loaded_and_it_says_by_how_much(
    loaded: Loaded, own_exit: Path, model: Path, tmp_path: Path
) -> None:
    loaded.measured({1: 0.010, 2: 0.016, 4: 0.024})
    drafting = loaded.drafting("auto", DraftSource(own_exit))
    assert drafting.speculation is not None and not drafting.memory
    assert "its exit would have to be right" in drafting.speculation.no_model
    assert "(60% where it was measured)" in drafting.speculation.no_model
    hopeless = Loaded(model, tmp_path)
    hopeless.measured(DEAR)
    drafting = hopeless.drafting("auto", DraftSource(own_exit))
    assert drafting.speculation is not None
    assert drafting.speculation.no_model == "its exit takes longer here than it could save"


def test_one_that_was_asked_for_is_loaded_whatever_it_costs(loaded: Loaded, own_exit: Path) -> None:
    for speculate, source in (
        ("exit", DraftSource(own_exit)),
        ("auto", DraftSource(own_exit, is_wanted=True)),
    ):
        drafting = loaded.drafting(speculate, source)  # type: ignore[arg-type]
        assert drafting.memory and not drafting.warnings and not drafting.reason
        drafting.close()


def test_what_is_missing_or_wrong_is_said_and_lookups_go_on(
    loaded: Loaded, own_exit: Path, tmp_path: Path
) -> None:
    drafting = loaded.drafting("exit", None)
    why = "no exit of tiny is here; `edgeinfer train-exit` makes one"
    assert drafting.speculation is None and drafting.reason == why
    assert drafting.warnings == [f"nothing is drafted: {why}"]
    other = write_tiny_gguf(tmp_path / "other.gguf", layers=3, seed=5)
    every = np.arange(RowsPlace.of(read_gguf_header(other)).num_tokens, dtype=np.int32)
    foreign = write_own_exit(other, tmp_path / "foreign.exit.gguf", every)
    drafting = loaded.drafting("auto", DraftSource(foreign, is_wanted=True))
    assert drafting.speculation is not None and not drafting.memory
    (warning,) = drafting.warnings
    assert warning.startswith("drafts are by lookup alone: ") and "of another model" in warning
    drafting = loaded.drafting("exit", DraftSource(own_exit), available=2**20)
    assert drafting.speculation is None and "of memory are free" in drafting.reason


def draft_of(path: Path) -> DraftSource:
    files = ModelFiles(path.stem, (path,), "gguf")
    return DraftSource(files=files, config=config_from_gguf(read_gguf_model(path)))


def test_a_model_that_drafts_must_have_the_same_tokens(loaded: Loaded, tmp_path: Path) -> None:
    same = write_tiny_gguf(tmp_path / "same.gguf", layers=1, hidden=32, heads=1, seed=5)
    drafting = loaded.drafting("auto", draft_of(same))
    assert drafting.memory and not drafting.warnings
    drafting.close()
    other = write_tiny_gguf(tmp_path / "spm.gguf", layers=1, tokenizer="spm")
    drafting = loaded.drafting("draft", draft_of(other))
    assert drafting.speculation is None
    assert "has other tokens than tiny" in drafting.reason or "tokens and tiny has" in drafting.reason
    assert "take a smaller model of the same family" in drafting.reason


def test_off_and_lookup_load_nothing(loaded: Loaded, own_exit: Path) -> None:
    off = loaded.drafting("off", DraftSource(own_exit))
    assert off.speculation is None and off.reason == "--speculate off" and not off.warnings
    lookup = loaded.drafting("lookup", DraftSource(own_exit))
    assert lookup.speculation is not None and not lookup.memory and not lookup.decide()
