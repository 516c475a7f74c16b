"""Leaving the chat, in a real terminal: it is given back on every way out."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pexpect
import pytest

from edgeinfer.errors import ModelNotFound

_HERE = Path(__file__).parent
_RUN = """
import sys, threading
sys.path.insert(0, {here!r})
from fake_client import FakeClient, Script
from edgeinfer.errors import ModelNotFound
from edgeinfer_tui import run_chat
hold = threading.Event()
{before}
sys.exit(run_chat({client}))
"""
_ANSWERING = "FakeClient(Script(['some words'], hold=hold))"
_LOADING = "FakeClient(load_hold=hold)"
_CRASHING = """
class Crashing(FakeClient):
    def start(self, *args, **options):
        raise RuntimeError("a bug")
"""


class Terminal:
    """The chat in a pseudo-terminal, and what it left behind."""

    def __init__(self, code: str) -> None:
        self.child = pexpect.spawn(
            sys.executable,
            ["-c", code],
            dimensions=(24, 80),
            timeout=30,
            encoding="utf-8",
            env={**os.environ, "TERM": "xterm-256color", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self.seen = ""
        self.modes = termios.tcgetattr(self.child.fileno())

    def wait_for(self, text: str) -> None:
        self.child.expect_exact(text)
        self.seen += self.child.before + text

    def end(self) -> int:
        """The exit code. Checks that the terminal is as it was."""
        self.child.expect(pexpect.EOF)
        self.seen += self.child.before
        modes = termios.tcgetattr(self.child.fileno())
        self.child.close()
        assert modes == self.modes
        for switched_on, off in [("?1049h", "?1049l"), ("?25l", "?25h"), ("?2004h", "?2004l")]:
            assert self.seen.rfind(f"\x1b[{off}") >= self.seen.rfind(f"\x1b[{switched_on}")
        assert self.child.exitstatus is not None, f"killed by signal {self.child.signalstatus}"
        return int(self.child.exitstatus)

    @property
    def last_words(self) -> list[str]:
        """The lines printed after the main screen came back."""
        after = re.sub(r"\x1b\[[?<>\d;]*[a-z]", "", self.seen.rpartition("\x1b[?1049l")[2])
        return [line for line in after.splitlines() if line.strip()]


def _chat(client: str, before: str = "") -> Terminal:
    return Terminal(_RUN.format(here=str(_HERE), client=client, before=before))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_in_mid_answer_ends_the_chat_in_order(name: str) -> None:
    number = getattr(signal, name)
    terminal = _chat(_ANSWERING)
    terminal.wait_for("ready")
    terminal.child.send("hello\r")
    terminal.wait_for("some words")
    terminal.child.kill(number)
    assert terminal.end() == 128 + number
    assert terminal.last_words == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_during_loading_ends_the_chat_in_order(name: str) -> None:
    number = getattr(signal, name)
    terminal = _chat(_LOADING)
    terminal.wait_for("loading")
    terminal.child.kill(number)
    assert terminal.end() == 128 + number


def test_ctrl_c_leaves_without_a_word() -> None:
    terminal = _chat("FakeClient()")
    terminal.wait_for("ready")
    terminal.child.send("\x03")
    assert terminal.end() == 0
    assert terminal.last_words == []


def test_a_line_feed_breaks_the_line_in_a_real_terminal() -> None:
    terminal = _chat("FakeClient(Script(['heard you']))")
    terminal.wait_for("ready")
    terminal.child.send("one\ntwo\x1b\rthree\r")
    terminal.wait_for("heard you")
    terminal.child.send("\x11")
    assert terminal.end() == 0


def test_leaving_without_a_model_says_why_in_one_line() -> None:
    error = ModelNotFound("no model named 'x'")
    terminal = _chat(f"FakeClient(load_errors=[ModelNotFound({str(error)!r})])")
    terminal.wait_for("Try again")
    terminal.child.send("\x11")
    assert terminal.end() == 1
    assert terminal.last_words == [f"edgeinfer: {error}"]


def test_a_crash_of_the_chat_itself_is_one_line() -> None:
    terminal = _chat("Crashing()", _CRASHING)
    terminal.wait_for("ready")
    terminal.child.send("hello\r")
    assert terminal.end() == 1
    assert len(terminal.last_words) == 1
    assert "RuntimeError: a bug" in terminal.last_words[0]


def test_a_chat_that_hangs_is_ended_by_the_guard() -> None:
    terminal = Terminal(
        "import sys, time\n"
        "from edgeinfer_tui.terminal import TerminalGuard\n"
        "with TerminalGuard(lambda code: None, lambda: None, grace_s=0.1):\n"
        "    sys.stderr.write('\\x1b[?1049h\\x1b[?25l\\x1b[?2004hhanging'); sys.stderr.flush()\n"
        "    time.sleep(60)\n"
    )
    terminal.wait_for("hanging")
    terminal.child.kill(signal.SIGTERM)
    assert terminal.end() == 128 + signal.SIGTERM


def test_without_a_terminal_the_chat_says_what_to_use_instead() -> None:
    code = _RUN.format(here=str(_HERE), client="FakeClient()", before="")
    ended = subprocess.run(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.splitlines() == [
        "edgeinfer: the chat needs a terminal; `edgeinfer run` answers without one"
    ]
