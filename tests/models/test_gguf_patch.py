"""A reserved value of the metadata is filled in place."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeinfer.errors import ModelFileInvalid
from edgeinfer_models.gguf_model import read_gguf_model
from edgeinfer_models.gguf_patch import patch_metadata, reserved
from tests.fixtures_gguf import write_tiny_gguf

KEY = "edgeinfer.quantize.report"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "tiny.gguf", metadata={KEY: reserved(64), "a.number": 4})


def test_the_value_takes_the_place_of_the_spaces_and_nothing_else_changes(model: Path) -> None:
    before = model.read_bytes()
    patch_metadata(model, KEY, '{"kl":0.1,"of":"Ü"}')
    after = model.read_bytes()
    assert read_gguf_model(model).get_str(KEY).strip() == '{"kl":0.1,"of":"Ü"}'
    place = before.index(b" " * 64)
    assert after == before[:place] + '{"kl":0.1,"of":"Ü"}'.encode().ljust(64) + before[place + 64 :]


def test_a_value_may_fill_all_that_was_reserved_and_no_more(model: Path) -> None:
    with pytest.raises(ValueError, match="has 64 bytes reserved, and 65 are needed"):
        patch_metadata(model, KEY, "x" * 65)
    patch_metadata(model, KEY, "x" * 64)
    assert read_gguf_model(model).get_str(KEY) == "x" * 64
    with pytest.raises(ValueError, match="holds something already"):
        patch_metadata(model, KEY, "y")


@pytest.mark.parametrize("key", ["no.such.key", "a.number", "tokenizer.ggml.tokens"])
def test_only_a_string_that_is_there_can_be_filled(model: Path, key: str) -> None:
    before = model.read_bytes()
    with pytest.raises(ValueError, match="has no string"):
        patch_metadata(model, key, "x")
    assert model.read_bytes() == before


def test_what_is_no_model_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelFileInvalid):
        patch_metadata(tmp_path / "x.gguf", KEY, "x")
