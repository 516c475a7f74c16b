"""Fixtures of the contract suite: each test runs on every runtime of runtimes.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeinfer.errors import BackendUnavailable
from tests.contract import driving
from tests.contract.checked_runtime import CheckedRuntime
from tests.contract.runtimes import RUNTIMES, RuntimeFactory


@pytest.fixture(scope="session", params=RUNTIMES, ids=lambda factory: factory.name)
def factory(request: pytest.FixtureRequest) -> RuntimeFactory:
    """Each runtime's factory; one that cannot run here is skipped by name, with its reason."""
    chosen = request.param
    assert isinstance(chosen, RuntimeFactory)
    try:
        found = chosen.find_backend().probe()
    except BackendUnavailable as error:
        pytest.skip(f"{chosen.name}: {error}")
    if not found.usable:
        pytest.skip(f"{chosen.name}: {found.reason}")
    return chosen


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(autouse=True)
def rounding(factory: RuntimeFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `is_alike` allows: nothing, but for a runtime that says it is not exact."""
    monkeypatch.setattr(driving, "rounding", factory.rounding)


@pytest.fixture
def load(factory: RuntimeFactory, model_folder: Path) -> Iterator[Callable[..., CheckedRuntime]]:
    """`load(**settings)`: a runtime, closed when the test ends."""
    loaded: list[CheckedRuntime] = []

    def load_one(**settings: Any) -> CheckedRuntime:
        loaded.append(factory.load(model_folder, replace(factory.settings, **settings)))
        return loaded[-1]

    yield load_one
    for runtime in loaded:
        runtime.close()


@pytest.fixture
def runtime(load: Callable[..., CheckedRuntime]) -> CheckedRuntime:
    return load()
