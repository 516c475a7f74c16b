"""Early exits in llama.cpp: what they compute, beside the model and in its answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeinfer.backend import KvLayout, Runtime, RuntimeSettings, SequenceStep, Step
from edgeinfer.client import LocalClient, Message, OpenOptions, Request
from edgeinfer.engine.request import RunStats
from edgeinfer.errors import LoadFailed, ModelFileInvalid, UnsupportedModel
from edgeinfer.measure.streams import GREEDY
from edgeinfer_backends.llamacpp import LlamaCppBackend
from edgeinfer_models.gguf_header import read_gguf_header
from edgeinfer_models.model_files import ModelFiles
from edgeinfer_models.token_rows import RowsPlace
from tests.fixtures_exits import write_own_exit
from tests.fixtures_gguf import write_tiny_gguf

KEPT = np.arange(0, 290, 2, dtype=np.int32)
TOKENS = [5, 9, 40, 11, 7, 200, 31, 8, 64, 101, 3, 17]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "tiny.gguf", layers=3, weight_type="Q8_0")


@pytest.fixture
def own_exit(model: Path, tmp_path: Path) -> Path:
    return write_own_exit(model, tmp_path / "tiny.exit.gguf", KEPT)


def loaded(
    model: Path, exit_path: Path | None, folder: Path, layout: KvLayout, sequences: int = 2
) -> Runtime:
    backend, files = LlamaCppBackend(), ModelFiles("tiny", (model,), "gguf")
    settings = RuntimeSettings(
        context=256, sequences=sequences, threads=1, threads_batch=1, kv_layout=layout, step_tokens=64
    )
    if exit_path is None:
        return backend.load(files, settings, lambda _: True)
    return backend.load_exit(files, exit_path, settings, folder)


@pytest.mark.parametrize("layout", ["private", "shared"])
def test_its_logits_are_those_of_its_tokens(
    model: Path, own_exit: Path, tmp_path: Path, layout: KvLayout
) -> None:
    """One by one and in pieces, for two sequences, after tokens were taken back and others evicted."""
    whole = loaded(model, None, tmp_path, layout)
    exit_ = loaded(model, own_exit, tmp_path / "drafts", layout)
    assert exit_.facts.vocab_size == len(KEPT)

    def both(tokens: list[list[int]]) -> None:
        rows = []
        for runtime in (whole, exit_):
            parts = [SequenceStep(handle, own) for handle, own in zip((0, 1), tokens, strict=False)]
            found = runtime.forward(Step(parts))
            rows.append([runtime.logits(start).copy() for start in found.starts])
        for own, reduced in zip(*rows, strict=True):
            assert np.array_equal(own[KEPT], reduced)

    for runtime in (whole, exit_):
        assert [runtime.open(), runtime.open()] == [0, 1]
    both([TOKENS])
    both([[3], TOKENS[:4]])
    for runtime in (whole, exit_):
        runtime.rewind(0, 6)
        runtime.evict(1, 1, 2)
    both([[77], [78]])
    both([[1, 2, 3]])
    for runtime in (whole, exit_):
        runtime.check_integrity()
        runtime.close()


def test_tokens_outside_the_models_vocabulary_are_refused(
    model: Path, own_exit: Path, tmp_path: Path
) -> None:
    runtime = loaded(model, own_exit, tmp_path / "drafts", "private")
    handle, last = runtime.open(), RowsPlace.of(read_gguf_header(model)).num_tokens
    for tokens in ([last], [-1], [1, last]):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            runtime.forward(Step([SequenceStep(handle, tokens)]))
    runtime.close()


@pytest.mark.parametrize("weight_type", ["F32", "F16", "Q8_0", "Q4_0"])
def test_embeddings_are_the_models(tmp_path: Path, weight_type: str) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", layers=2, weight_type=weight_type)
    exit_path = write_own_exit(path, tmp_path / "tiny.exit.gguf", KEPT)
    whole = loaded(path, None, tmp_path, "private", 1)
    exit_ = loaded(path, exit_path, tmp_path / "drafts", "private", 1)
    for runtime in (whole, exit_):
        runtime.forward(Step([SequenceStep(runtime.open(), TOKENS)]))
    assert np.array_equal(whole.logits(0)[KEPT], exit_.logits(0))
    for runtime in (whole, exit_):
        runtime.close()


def test_what_is_put_together_is_used_again_and_old_ones_go(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "drafts"
    for number in range(6):
        kept = KEPT[number:]
        path = write_own_exit(model, tmp_path / f"{number}.exit.gguf", kept)
        for _ in range(2):
            before = {each: each.stat().st_ino for each in folder.glob("*")}
            loaded(model, path, folder, "private").close()
        assert {each: each.stat().st_ino for each in folder.glob("*")} == before
    assert len(list(folder.glob("*.gguf"))) == 4


def test_the_exit_of_another_model_is_refused(model: Path, own_exit: Path, tmp_path: Path) -> None:
    other = write_tiny_gguf(tmp_path / "other.gguf", layers=3, weight_type="Q8_0", seed=9)
    with pytest.raises(UnsupportedModel, match="is the exit of another model"):
        loaded(other, own_exit, tmp_path / "drafts", "private")
    damaged = tmp_path / "damaged.exit.gguf"
    damaged.write_bytes(own_exit.read_bytes()[:-700])
    with pytest.raises(ModelFileInvalid):
        loaded(model, damaged, tmp_path / "drafts", "private")
    assert not list((tmp_path / "drafts").glob("*"))


# -- in answers ------------------------------------------------------------------------------------


def answer(model: Path, **options: object) -> tuple[str, RunStats, list[str]]:
    ask = Request(messages=(Message("user", "Say something."),), max_tokens=60, sampling=GREEDY)
    own = OpenOptions(model=str(model), context=256, threads=1, **options)  # type: ignore[arg-type]
    with LocalClient(own) as client:
        client.load()
        result = client.start(ask).result()
        return result.stats.text, result.stats, list(client.info.warnings)


def test_answers_are_the_models_and_the_figures_say_who_drafted(model: Path, tmp_path: Path) -> None:
    every = np.arange(RowsPlace.of(read_gguf_header(model)).num_tokens, dtype=np.int32)
    write_own_exit(model, tmp_path / "tiny.exit.gguf", every, {"agreement": [1.0]})
    plain, stats, _ = answer(model, speculate="off")
    assert stats.speculation.reason == "--speculate off"
    text, stats, warnings = answer(model, speculate="exit")  # it lies beside the model
    assert text == plain and not warnings
    assert stats.speculation.mode in ("exit", "none")  # by what steps of so small a model cost here
    assert (stats.speculation.reason == "none") == (stats.speculation.mode == "exit")
    assert stats.speculation.accepted == stats.speculation.drafted


def test_what_is_wrong_with_a_draft_is_said_and_answers_come(
    model: Path, own_exit: Path, tmp_path: Path
) -> None:
    plain, _, _ = answer(model, speculate="off")
    other = write_tiny_gguf(tmp_path / "other.gguf", layers=2, weight_type="Q8_0", seed=9)
    foreign = write_own_exit(other, tmp_path / "foreign.exit.gguf", KEPT)
    for draft, speculate, said in (
        (foreign, "exit", "nothing is drafted: .*is the exit of another model"),
        (model, "draft", ""),
    ):
        text, stats, warnings = answer(model, draft=str(draft), speculate=speculate)
        assert text == plain
        if said:
            assert stats.speculation.mode == "none" and len(warnings) == 1
            import re

            assert re.search(said, warnings[0]), warnings


def test_what_was_put_together_is_checked_when_it_is_used_again(
    model: Path, own_exit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged, or told wrongly of: it is made anew. And a model may be named from another folder."""
    folder = tmp_path / "drafts"
    loaded(model, own_exit, folder, "private").close()
    (path,), (about,) = folder.glob("*.gguf"), folder.glob("*.json")
    whole, told = path.read_bytes(), about.read_text()
    for damaged, wrong in (
        (whole[:4096], told),
        (b"\0" * 64 + whole[64:], told),
        (whole, "[" * 5000),
        (whole, told.replace('"width": 64', '"width": 32')),
        (whole, told[:-20]),
    ):
        path.write_bytes(damaged)
        about.write_text(wrong)
        try:
            loaded(model, own_exit, folder, "private").close()
        except LoadFailed as error:  # once: then it is made anew
            assert "not of its width" in str(error) or "cannot be read" in str(error)
            loaded(model, own_exit, folder, "private").close()
        assert path.read_bytes() == whole and about.read_text() == told
    monkeypatch.chdir(tmp_path)
    loaded(Path(model.name), own_exit, folder, "private").close()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded(Path("..") / model.name, own_exit, folder, "private").close()
    assert len(list(folder.glob("*.gguf"))) == 1
