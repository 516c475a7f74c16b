"""What every test gets: no trace of the user's own data, and the starter model where it is."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from benchmarks.hub_stand_in import HubStandIn

# Run in the background (`make test &`, nohup), pytest and all it starts would ignore these, and what is
# tested about Ctrl+C and a closed terminal would not be what a user has.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Machines are noisy, this one most of all: no test may depend on how long an example takes.
settings.register_profile("edgeinfer", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("edgeinfer")

_FOLDERS = ("EDGEINFER_DATA_DIR", "EDGEINFER_CACHE_DIR", "EDGEINFER_CONFIG")


@pytest.fixture(scope="session")
def starter(_starter_path: Path | None) -> Path:
    """The starter's GGUF, as `edgeinfer models pull smollm2` installs it."""
    if _starter_path is None:
        pytest.skip("the starter model is not installed: run `edgeinfer models pull smollm2`")
    return _starter_path


@pytest.fixture(scope="session", autouse=True)
def _starter_path() -> Path | None:
    # Looked up before any test points the data folder elsewhere.
    from edgeinfer.errors import ModelError
    from edgeinfer_models.store import find_model

    given = os.environ.get("EDGEINFER_TEST_MODEL")
    if given:
        return Path(given)
    try:
        installed = find_model("smollm2")
    except ModelError:
        return None
    return installed.path if installed else None


@pytest.fixture(autouse=True)
def _own_folders(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, _starter_path: Path | None
) -> Iterator[None]:
    """Data, cache and config folders of the test's own, and no EDGEINFER_* option from outside."""
    for name in list(os.environ):
        if name.startswith("EDGEINFER_") and name != "EDGEINFER_TEST_MODEL":
            monkeypatch.delenv(name)
    for name in ("HF_TOKEN", "HF_TOKEN_PATH", "HF_ENDPOINT", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # but for tests with a stand-in of the hub
    for name in _FOLDERS:
        monkeypatch.setenv(name, str(home / name.lower()))
    yield


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubStandIn]:
    """A stand-in of the hub that this process, and those it starts, take for the hub."""
    with HubStandIn() as stand_in:
        for name, value in stand_in.environment.items():
            monkeypatch.setenv(name, value)
        import huggingface_hub.constants

        # Read when the library was imported, perhaps by a test before this one.
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield stand_in
        huggingface_hub.close_session()
