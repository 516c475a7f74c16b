"""Giving the terminal back, whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import termios
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Textual replaces these; they are put back too.
_ALSO_SAVED = (signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH)

# Mouse, focus and paste reports off, synchronised output off, line wrap on, Kitty keys popped, main
# screen, cursor shown, colours plain.
_RESET = (
    "\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?1015l\x1b[?1016l\x1b[?1004l\x1b[?2004l\x1b[?2026l"
    "\x1b[?2048l\x1b[?7h\x1b[<u\x1b[?1049l\x1b[?25h\x1b[0m"
)


class TerminalGuard:
    """A context that a full-screen app runs in.

    A first SIGINT, SIGTERM or SIGHUP calls `leave(128 + signal)`, which should end the app. If it has
    not ended within `grace_s` (its loop hangs, the terminal is gone), or a second signal comes, the
    guard calls `abandon`, resets the terminal and ends the process with that code.
    """

    def __init__(
        self, leave: Callable[[int], None], abandon: Callable[[], None], grace_s: float = 5.0
    ) -> None:
        self._leave = leave
        self._abandon = abandon
        self._grace_s = grace_s
        self._left = threading.Event()
        self._signalled = False
        self._handlers: dict[int, Any] = {}
        self._modes: list[Any] | None = None

    def __enter__(self) -> TerminalGuard:
        with contextlib.suppress(termios.error, OSError, ValueError):
            self._modes = termios.tcgetattr(_fileno(sys.__stdin__))
        for number in (*_SIGNALS, *_ALSO_SAVED):
            self._handlers[number] = signal.getsignal(number)
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._left.set()
        if kind is not None:
            self.reset()  # the app did not end by its own way out
        self._restore_modes()
        for number, handler in self._handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def reset(self) -> None:
        """Everything an app may have switched on, off again; needs no working app."""
        with contextlib.suppress(OSError, ValueError):
            os.write(_fileno(sys.__stderr__), _RESET.encode())
        self._restore_modes()

    def _restore_modes(self) -> None:
        if self._modes is not None:
            with contextlib.suppress(termios.error, OSError, ValueError):
                termios.tcsetattr(_fileno(sys.__stdin__), termios.TCSANOW, self._modes)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        code = 128 + number
        grace_s = 0.0 if self._signalled else self._grace_s
        threading.Thread(target=self._end_if_hanging, args=(code, grace_s), daemon=True).start()
        if not self._signalled:
            self._signalled = True
            self._leave(code)

    def _end_if_hanging(self, code: int, grace_s: float) -> None:
        if self._left.wait(grace_s):
            return
        # Each in a thread with a limit: a worker may not answer, a dead terminal may block a write.
        for last_act in (self._abandon, self.reset):
            thread = threading.Thread(target=last_act, daemon=True)
            thread.start()
            thread.join(2.0)
        os._exit(code)


def has_terminal() -> bool:
    """Whether a full-screen app can run here: it reads keys from stdin and draws on stderr."""
    return all(stream is not None and stream.isatty() for stream in (sys.__stdin__, sys.__stderr__))


def _fileno(stream: Any) -> int:
    if stream is None:
        raise ValueError("closed at start")
    return int(stream.fileno())
