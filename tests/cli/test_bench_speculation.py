"""`edgeinfer bench --suite speculation` from end to end on tiny models, and what it says of what cannot
be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeinfer_models.gguf_header import read_gguf_header
from edgeinfer_models.token_rows import RowsPlace
from tests.cli.conftest import Console, Invoke
from tests.fixtures_exits import write_own_exit
from tests.fixtures_gguf import write_tiny_gguf

KINDS = ["edit", "code", "lists", "chat"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", layers=3, weight_type="Q8_0", context=2048)
    every = np.arange(RowsPlace.of(read_gguf_header(path)).num_tokens, dtype=np.int32)
    write_own_exit(path, tmp_path / "tiny.exit.gguf", every, {"agreement": [0.9]})
    return path


def test_every_way_to_draft_is_measured_beside_none(
    console: Console, model: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "drafts.svg"
    arguments = ("--suite", "speculation", "--repeat", "2", "--warmup", "1", "--new-tokens", "24")
    options = ("--threads", "1", "--ctx", "2048", "--json", "--plot", str(picture))
    done = console("bench", str(model), *arguments, *options)
    assert done.code == 0, done.err
    told = done.json
    assert told["suite"] == "speculation" and told["rounds"] == 2 and not told["partial"]
    figures = {(each["work"], each["mode"]): each for each in told["figures"]}
    assert list(figures) == [(k, m) for k in KINDS for m in ("plain", "lookup", "exit", "auto")]
    for (kind, mode), figure in figures.items():
        assert len(figure["samples"]) == 2 and figure["tok_s"] > 0
        if mode == "plain":
            assert figure["of_plain"] == 1.0 and figure["drafted"] == 0
        if mode == "exit":
            # It is the model itself, and all of its drafts are checked. (It reads prompts in smaller
            # steps, which differ in the last bits, and made-up weights leave many tokens nearly tied.)
            assert figure["accepted"] >= 0.8 * figure["drafted"] > 0, kind
            assert len(figure["by_position"]) == 3
    assert told["costs"]["draft"] == "exit" and told["costs"]["draft_step_s"] > 0
    assert picture.read_text().startswith("<?xml")


def test_another_models_answers_are_said(console: Console, model: Path, tmp_path: Path) -> None:
    """Tokens that a model of other weights would not say, with that one's drafts."""
    other = write_tiny_gguf(tmp_path / "other.gguf", layers=2, seed=9, context=2048)
    arguments = ("--suite", "speculation", "--repeat", "1", "--warmup", "0", "--new-tokens", "24")
    replay = ("--replay", str(model), "--threads", "1", "--ctx", "2048")
    done = console("bench", str(other), *arguments, *replay)
    assert done.code == 0, done.err
    assert "saying what tiny.gguf answered (a replay)" in done.out
    assert "a step of one token takes" in done.out or "not measured yet" in done.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--suite", "speculation", "--prompt-tokens", "8"), "asks questions of its own"),
        (("--suite", "speculation", "--new-tokens", "8,16"), "takes one number"),
        (("--suite", "speculation", "--repeat", "0"), "--repeat 0 is outside [1, 1000]"),
        (("--draft", "smollm2"), "--draft belongs to --suite speculation"),
        (("--replay", "smollm2"), "--replay belongs to --suite speculation"),
        (("--suite", "nonsense"), "there are speed, concurrency and speculation"),
    ],
)
def test_what_cannot_be_is_one_line(
    invoke: Invoke, model: Path, arguments: tuple[str, ...], said: str
) -> None:
    done = invoke("bench", str(model), *arguments)
    assert done.code == 2 and said in done.error_line
