"""Results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Mapping
from typing import Any

from edgeinfer.errors import EdgeInferError, one_line


class OutputFailed(EdgeInferError):
    """Standard output takes no more: the disk is full, or the device has gone."""


def emit(text: str) -> None:
    """Text on stdout, now. Raises BrokenPipeError if the reader has gone, OutputFailed."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_stdout()
        raise OutputFailed(f"the output cannot be written: {error.strerror or error}") from None


def emit_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout, on one line, ASCII (any terminal and any locale can carry it)."""
    emit(json.dumps(value) + "\n")


def discard_stdout() -> None:
    """After a write that failed: what is still buffered would be tried, and complained about, again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printable(text: str) -> str:
    """Text of a model made safe for a terminal: control characters but newline and tab are dropped,
    so that an answer cannot move the cursor, retitle the window or write the clipboard."""
    return "".join(c for c in text if c in "\n\t" or not ("\x00" <= c < " " or "\x7f" <= c < "\xa0"))


class StatusLine:
    """A line on stderr that is rewritten in place; silent unless stderr is a terminal. Any thread may
    show; after `close` nothing is shown any more."""

    def __init__(self, enabled: bool = True) -> None:
        self._shown = 0
        self._enabled = enabled and sys.stderr.isatty()
        self._lock = threading.Lock()

    def show(self, text: str) -> None:
        with self._lock:
            if not self._enabled:
                return
            text = one_line(text, limit=max(1, _width() - 1))  # a wrapped line cannot be rewritten
            padding = " " * max(0, self._shown - len(text))
            sys.stderr.write(f"\r{text}{padding}")
            sys.stderr.flush()
            self._shown = len(text)

    def clear(self) -> None:
        with self._lock:
            if self._enabled and self._shown:
                sys.stderr.write("\r" + " " * self._shown + "\r")
                sys.stderr.flush()
                self._shown = 0

    def close(self) -> None:
        self.clear()
        self._enabled = False


def _width() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        return 80
