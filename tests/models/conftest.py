"""Fixtures of the models room: a tiny model, an empty data folder, and the starter where it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fixtures_gguf import write_tiny_gguf


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small valid model. Tests that change it work on a copy."""
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user data folder."""
    folder = tmp_path / "data"
    monkeypatch.setenv("EDGEINFER_DATA_DIR", str(folder))
    return folder


@pytest.fixture(scope="session")
def starter_model() -> Path:
    """The starter's GGUF: EDGEINFER_TEST_MODEL, or the one in the user data folder."""
    from edgeinfer.errors import ModelError
    from edgeinfer_models.store import find_model

    given = os.environ.get("EDGEINFER_TEST_MODEL")
    if given:
        return Path(given)
    try:
        installed = find_model("smollm2")
    except ModelError as error:
        pytest.skip(str(error))
    if installed is None:
        pytest.skip("the starter model is not installed: run `edgeinfer models pull smollm2`")
    return installed.path
