"""The runtimes that the contract is tested on. A new backend is one more line in RUNTIMES."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from edgeinfer.backend import Backend, RuntimeSettings
from edgeinfer.errors import BackendUnavailable
from edgeinfer.registry import get_backend
from edgeinfer_backends.scripted import SCRIPTED_FILES, Script, ScriptedBackend
from edgeinfer_models.model_files import ModelFiles
from tests.contract.checked_runtime import CheckedRuntime

SETTINGS = RuntimeSettings(
    context=1024, sequences=3, step_tokens=512, logit_rows=64, threads=1, threads_batch=2, gpu_layers=0
)


@dataclass(frozen=True)
class RuntimeFactory:
    """A backend and a small model for it. The model's file is made when it is first needed."""

    name: str
    find_backend: Callable[[], Backend]
    make_files: Callable[[Path], ModelFiles]

    def load(self, folder: Path, settings: RuntimeSettings) -> CheckedRuntime:
        runtime = self.find_backend().load(self.make_files(folder), settings, lambda done: True)
        return CheckedRuntime(runtime)


def _tiny_gguf(folder: Path) -> ModelFiles:
    from tests.fixtures_gguf import write_tiny_gguf

    path = folder / "tiny.gguf"
    if not path.exists():
        write_tiny_gguf(path)
    return ModelFiles(name="tiny", paths=(path,), format="gguf")


def _scripted(script: Script) -> RuntimeFactory:
    name = "scripted" if script.kv_layout == "shared" else f"scripted-{script.kv_layout}"
    return RuntimeFactory(name, lambda: ScriptedBackend(script), lambda folder: SCRIPTED_FILES)


RUNTIMES = (
    _scripted(Script()),
    _scripted(Script(kv_layout="private")),
    RuntimeFactory("llamacpp", lambda: get_backend("llamacpp"), _tiny_gguf),
)


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


@pytest.fixture
def load(factory: RuntimeFactory, model_folder: Path) -> Iterator[Callable[..., CheckedRuntime]]:
    """`load(**settings)`: a runtime, closed when the test ends."""
    loaded: list[CheckedRuntime] = []

    def load_one(**settings: Any) -> CheckedRuntime:
        loaded.append(factory.load(model_folder, replace(SETTINGS, **settings)))
        return loaded[-1]

    yield load_one
    for runtime in loaded:
        runtime.close()


@pytest.fixture
def runtime(load: Callable[..., CheckedRuntime]) -> CheckedRuntime:
    return load()
