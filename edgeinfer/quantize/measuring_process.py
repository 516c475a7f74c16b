"""A process of its own that measures something: native code may abort on what it is given.

It gets its job as JSON on stdin and tells lines of JSON on stdout: {"what": …, "progress": 0.5},
{"row": {…}}, {"error": …, "type": …}.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

from edgeinfer.engine.process import worker_environment
from edgeinfer.errors import EdgeInferError, MeasureFailed, error_from_wire

Progress = Callable[[str, float], None]
_PROGRESS_S = 0.1


class MeasuringProcess:
    """module: what is run, with `run_job` in its main. name: of it, in messages."""

    def __init__(
        self,
        module: str,
        job: Mapping[str, Any],
        progress: Progress,
        name: str = "the measuring process",
    ) -> None:
        self._module = module
        self._job = job
        self._progress = progress
        self._name = name
        self._process: subprocess.Popen[bytes] | None = None
        self._is_stopped = False

    def stop(self) -> None:
        """From any thread. Rows that have not come by then never do."""
        self._is_stopped = True
        if self._process is not None:
            self._process.kill()

    def rows(self) -> Iterator[dict[str, Any]]:
        """As they come; the process ends with them. Raises what it met, MeasureFailed where it died."""
        process = self._process = subprocess.Popen(
            [sys.executable, "-m", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=worker_environment(os.environ),
            start_new_session=True,  # Ctrl+C is for the owner
        )
        assert process.stdin and process.stdout  # noqa: S101 (they are pipes)
        try:
            with process.stdin:
                process.stdin.write(json.dumps(self._job).encode())
            for line in process.stdout:
                found = json.loads(line)
                if "progress" in found:
                    self._progress(found["what"], found["progress"])
                elif "error" in found:
                    raise error_from_wire(found["type"], found["error"])
                else:
                    yield found["row"]
            if process.wait() and not self._is_stopped:
                raise MeasureFailed(f"{self._name} {_how_ended(process.returncode)}")
        except (OSError, ValueError):  # it died, or was ended, in the middle of a line
            if not self._is_stopped:
                raise MeasureFailed(f"{self._name} {_how_ended(process.wait())}") from None
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


class Teller:
    """What the process tells its owner."""

    def __init__(self, output: IO[bytes]) -> None:
        self._output = output
        self._last_told, self._last_what = 0.0, ""

    def row(self, values: Mapping[str, Any]) -> None:
        self._send({"row": values})

    def progress(self, what: str, done: float) -> None:
        now = time.monotonic()
        if what != self._last_what or now - self._last_told >= _PROGRESS_S:
            self._last_what, self._last_told = what, now
            self._send({"what": what, "progress": done})

    def error(self, error: EdgeInferError) -> None:
        self._send({"error": str(error), "type": type(error).__name__})

    def _send(self, message: Mapping[str, Any]) -> None:
        self._output.write(json.dumps(message).encode() + b"\n")
        self._output.flush()


def run_job(run: Callable[[dict[str, Any], Teller], None]) -> None:
    """The main of such a process."""
    output = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever native code prints must not come between two lines
    teller = Teller(output)
    try:
        run(json.load(sys.stdin), teller)
    except EdgeInferError as error:
        teller.error(error)
        sys.exit(1)
    except BrokenPipeError:  # the owner has gone
        sys.exit(1)


def _how_ended(code: int) -> str:
    if code < 0:
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"
    return f"ended with exit code {code}"
