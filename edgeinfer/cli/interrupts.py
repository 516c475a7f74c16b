"""Ctrl+C while something runs that can be asked to end."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, current_thread, main_thread


@contextmanager
def first_interrupt(act: Callable[[], None]) -> Iterator[Event]:
    """The first Ctrl+C inside calls `act` and sets the event, so that no exception can fall between two
    events of an answer; a second one is KeyboardInterrupt."""
    happened = Event()
    if current_thread() is not main_thread():
        yield happened
        return

    def interrupt(number: int, frame: object) -> None:
        if happened.is_set():
            raise KeyboardInterrupt
        happened.set()
        act()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield happened
    finally:
        signal.signal(signal.SIGINT, before)
