"""The console script as a user starts it, and what it leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from edgeinfer.cli.app import run as run_in_process
from tests.fixtures_gguf import write_tiny_gguf

CONSOLE_SCRIPT = str(Path(sys.executable).with_name("edgeinfer"))
_MARK = "LEFT_BEHIND_BY"
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def error_line(self) -> str:
        """The only line on stderr, which says what went wrong."""
        assert "Traceback" not in self.err
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("edgeinfer: ")
        return lines[0].removeprefix("edgeinfer: ")

    @property
    def json(self) -> dict[str, Any]:
        """The only line on stdout, an object."""
        assert self.out.endswith("\n") and self.out.count("\n") == 1
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


class Console:
    """The installed script in a process of its own; its descendants carry a mark."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self.environment = {**os.environ, _MARK: self.mark}

    def __call__(self, *arguments: str | Path | bytes, stdin: bytes = b"", **variables: str) -> Done:
        done = subprocess.run(
            [CONSOLE_SCRIPT, *arguments],
            input=stdin,
            capture_output=True,
            env={**self.environment, **variables},
            timeout=_PATIENCE_S,
        )
        self.wait_until_nothing_runs()
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode())

    def start(self, *arguments: str | Path, **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen([CONSOLE_SCRIPT, *arguments], env=self.environment, **options)

    def running(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARK) == self.mark:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        return found

    def worker(self) -> psutil.Process:
        """The process that holds the model, as soon as there is one."""
        return self._eventually(
            lambda: next((p for p in self.running() if "edgeinfer.engine.worker" in _command(p)), None)
        )

    def wait_until_nothing_runs(self) -> None:
        self._eventually(lambda: None if self.running() else True)

    def _eventually(self, look: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            found = look()
            if found is not None:
                return found
            time.sleep(0.02)
        raise AssertionError(f"never came true; running: {[_command(p) for p in self.running()]}")


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture
def console() -> Console:
    return Console()


Invoke = Callable[..., Done]


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str]) -> Invoke:
    """The same command line in this process: quicker, without the script's own start and end."""

    def run(*arguments: str | Path) -> Done:
        capsys.readouterr()
        code = run_in_process([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run


Script = Callable[..., tuple[str, ...]]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Writes a scripted model; the arguments that choose it."""

    def write(**script: Any) -> tuple[str, ...]:
        path = tmp_path / "scripted.json"
        path.write_text(json.dumps({"answers": {"*": "Hello there."}, **script}))
        return "--backend", "scripted", str(path)

    return write


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small valid model. Tests that change it work on a copy."""
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture
def config_file() -> Path:
    """Where the user's config file goes; not there yet."""
    return Path(os.environ["EDGEINFER_CONFIG"])
