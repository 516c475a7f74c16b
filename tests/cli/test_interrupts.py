"""Ctrl+C at twenty points of a real run: one line, exit code 130, nothing left running."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Console, Script
from tests.cli.test_bad_input import LOOP
from tests.fixtures_gguf import write_tiny_gguf
from tests.fixtures_hf import write_tiny_folder

_PATIENCE_S = 120.0
STARTED, LOADING, READING = "", "loading ", "reading the prompt"
SHORT_PROMPT = "Write a long story about a lighthouse keeper."
LONG_PROMPT = "Tell me what these words have in common: " + "river mountain lamp stone " * 600

# (what is on the status line, or how many characters of the answer are out; then seconds until Ctrl+C)
POINTS: list[tuple[str | int, float]] = [
    *((STARTED, delay) for delay in (0.06, 0.12, 0.2, 0.3, 0.4, 0.5)),
    *((LOADING, delay) for delay in (0.0, 0.03, 0.08, 0.15)),
    *((READING, delay) for delay in (0.0, 0.1, 0.3, 0.7, 1.5)),
    *((count, 0.0) for count in (1, 2, 40, 200, 400)),
]


class Session:
    """A run whose stdout is a pipe and whose stderr is a terminal, both read as they come."""

    def __init__(self, console: Console, *arguments: str | Path, stdin: str = "") -> None:
        master, slave = os.openpty()
        self.out, self.err = b"", b""
        self.process = console.start(
            *arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        assert self.process.stdin is not None and self.process.stdout is not None
        stdout = self.process.stdout.fileno()
        self._readers = [
            threading.Thread(target=self._collect, args=("out", lambda: os.read(stdout, 4096))),
            threading.Thread(target=self._collect, args=("err", lambda: os.read(master, 4096))),
        ]
        for reader in self._readers:
            reader.start()
        self._master = master
        self.process.stdin.write(stdin.encode())
        self.process.stdin.close()

    def _collect(self, name: str, read: Callable[[], bytes]) -> None:
        while True:
            try:
                data = read()
            except OSError:  # how the end of a terminal is told
                return
            if not data:
                return
            setattr(self, name, getattr(self, name) + data)

    def until(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while not happened():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"never came: {self.out[-200:]!r} {self.err[-500:]!r}")
            time.sleep(0.002)

    def interrupt(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self) -> int:
        """The exit code, when everything was read."""
        code = self.process.wait(_PATIENCE_S)
        for reader in self._readers:
            reader.join(_PATIENCE_S)
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.end()
        assert self.process.stdout is not None
        self.process.stdout.close()
        os.close(self._master)

    @property
    def last_words(self) -> list[str]:
        """What stays on the terminal: lines as rewritten, without a cleared status line."""
        text = self.err.decode().replace("\r\n", "\n")
        shown = [re.split(r"\r", line)[-1].strip() for line in text.split("\n")]
        return [line for line in shown if line]


Start = Callable[..., Session]


@pytest.fixture
def start(console: Console) -> Iterator[Start]:
    """Sessions that end with the test, however that ends."""
    sessions: list[Session] = []

    def begin(*arguments: str | Path, stdin: str = "") -> Session:
        sessions.append(Session(console, *arguments, stdin=stdin))
        return sessions[-1]

    yield begin
    for session in sessions:
        session.close()


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("point", POINTS, ids=str)
def test_ctrl_c_ends_a_real_run_in_one_line(
    console: Console, start: Start, starter: Path, point: tuple[str | int, float]
) -> None:
    what, delay = point
    prompt = SHORT_PROMPT if isinstance(what, int) else LONG_PROMPT
    # Fixed threads: automatic ones add a warning, rightly, where other programs keep this machine busy.
    arguments = ("--temp", "0", "--ctx", "4096", "--threads", "2")
    session = start("run", *arguments, starter, "-", stdin=prompt)
    if isinstance(what, int):
        session.until(lambda: len(session.out) >= what)
    else:
        session.until(lambda: what.encode() in session.err)
    time.sleep(delay)
    session.interrupt()
    assert session.end() == 130
    assert b"Traceback" not in session.err + session.out
    assert b"Exception" not in session.err
    assert len(session.last_words) == 1, session.err
    assert "stopped" in session.last_words[0]
    console.wait_until_nothing_runs()


def test_ctrl_c_keeps_what_was_answered(console: Console, start: Start, script: Script) -> None:
    session = start("run", *script(answers={"*": "word " * 500}, step_s=0.02), "hi")
    session.until(lambda: len(session.out) >= 10)
    session.interrupt()
    assert session.end() == 130
    assert session.out.startswith(b"word word ") and session.out.endswith(b"\n")
    assert session.last_words[0].endswith("; stopped]")
    console.wait_until_nothing_runs()


def test_ctrl_c_with_json_is_one_object(console: Console, start: Start, script: Script) -> None:
    session = start("run", "--json", *script(answers={"*": "word " * 500}, step_s=0.02), "hi")
    session.until(lambda: b"loaded" in session.err)
    time.sleep(0.3)
    session.interrupt()
    assert session.end() == 130
    assert session.out.count(b"\n") == 1
    assert b'"finish_reason": "cancelled"' in session.out
    assert session.last_words == []


def test_ctrl_c_ends_a_comparison_of_models(console: Console, start: Start, script: Script) -> None:
    arguments = script(step_s=0.2)
    session = start("eval", "--reference", arguments[-1], *arguments)
    session.until(lambda: b"reading with" in session.err)
    session.interrupt()
    assert session.end() == 130
    assert session.out == b"" and b"Traceback" not in session.err
    assert len(session.last_words) == 1
    console.wait_until_nothing_runs()


def test_many_ctrl_c_in_a_row_are_no_worse_than_one(
    console: Console, start: Start, script: Script
) -> None:
    slow = script(answers={"*": "word " * 500}, step_s=0.5, without=["abort"])
    session = start("run", *slow, "hi")
    session.until(lambda: len(session.out) >= 1)
    for _ in range(5):
        session.interrupt()
        time.sleep(0.02)
    assert session.end() == 130
    assert b"Traceback" not in session.err
    assert len(session.last_words) == 1
    console.wait_until_nothing_runs()


def test_ctrl_c_while_a_template_loops_is_a_stop(console: Console, start: Start, tmp_path: Path) -> None:
    session = start("run", write_tiny_gguf(tmp_path / "tiny.gguf", template=LOOP), "hi")
    session.until(lambda: b"loaded" in session.err)
    time.sleep(0.3)
    session.interrupt()
    assert session.end() == 130
    assert b"Traceback" not in session.err
    assert len(session.last_words) == 1 and "stopped" in session.last_words[0]
    console.wait_until_nothing_runs()


def test_ctrl_c_while_a_model_is_converted_leaves_nothing(
    console: Console, start: Start, tmp_path: Path
) -> None:
    from edgeinfer_models.converted import converted_folder

    pytest.importorskip("tokenizers", reason="the tiny folder's tokenizer is made by it")
    folder = write_tiny_folder(tmp_path / "wide", hidden=1024, feed_forward=4096, layers=4)  # 0.2 GB
    session = start("run", "--backend", "llamacpp", folder, "hi")
    written = re.compile(rb"converting wide to GGUF \(only once\) \S+ [1-9]\d?%")
    session.until(lambda: written.search(session.err) is not None)
    session.interrupt()
    assert session.end() == 130
    assert session.last_words == ["edgeinfer: stopped"]
    assert [path.suffix for path in converted_folder().iterdir()] == [".lock"]
    console.wait_until_nothing_runs()


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["table", "json"])
def test_ctrl_c_keeps_what_was_measured(
    console: Console, start: Start, script: Script, tmp_path: Path, form: list[str]
) -> None:
    picture = tmp_path / "partial.svg"
    slow = script(step_s=0.01)
    sizes = ("--prompt-tokens", "8", "--new-tokens", "20", "--repeat", "500", "--warmup", "0")
    session = start("bench", *slow, *sizes, "--plot", picture, *form)
    session.until(lambda: b"run 5 of 1000" in session.err)
    session.interrupt()
    assert session.end() == 130
    assert b"Traceback" not in session.err
    assert any("partial" in line for line in session.last_words)
    assert "(partial)" in picture.read_text()
    if form:
        found = json.loads(session.out)
        assert found["partial"] is True
        samples = {f["metric"]: len(f["samples"]) for f in found["figures"]}
        assert samples == {"prefill": 2, "ttft": 2, "decode": 2}
    else:
        assert b"decode, 20 tokens" in session.out
    console.wait_until_nothing_runs()


def test_ctrl_c_before_anything_was_measured_is_a_stop(
    console: Console, start: Start, script: Script
) -> None:
    session = start("bench", *script(step_s=0.5), "--prompt-tokens", "8")
    session.until(lambda: b"prefill of 8" in session.err)
    session.interrupt()
    assert session.end() == 130
    assert session.out == b""
    assert session.last_words[-1] == "edgeinfer: stopped"
    console.wait_until_nothing_runs()
