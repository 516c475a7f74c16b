"""Calls found in an answer's text while it comes. The families say how a call is written (`Reader`)."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass, field

from edgeinfer_models.tool_formats.call_text import MAX_CALLS, CallText, Delta, NotACall, Reading

_ALPHANUMERICS = string.ascii_letters + string.digits


def random_id(length: int, prefix: str = "") -> str:
    return prefix + "".join(secrets.choice(_ALPHANUMERICS) for _ in range(length))


def call_id() -> str:
    return random_id(24, "call_")


@dataclass(frozen=True)
class Reader:
    """read: reads on after a trigger, one call or several. triggers: begin a call anywhere in an answer.
    starts: do so only at its beginning or right after a call, and are left to take for `read_start`, or
    `read` where there is none. is_edge_only: so do triggers, elsewhere they are text."""

    read: Callable[[CallText], Reading]
    triggers: tuple[str, ...]
    starts: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()  # right after a call these are no text
    new_id: Callable[[], str] = field(default=call_id)
    read_start: Callable[[CallText], Reading] | None = None
    is_edge_only: bool = False


class ToolParser:
    """One answer's text, told apart into text and calls to `names`. Never raises, whatever comes; its
    cost is linear in the text, and the deltas, joined, are the same wherever the text was cut.

    Text that could begin a call is held back until that is decided; so is white space at the beginning
    of the answer and after calls, which is left out beside a call. A call to an unknown name, and what
    breaks off before its name is known, is text. Once it has started a call stays one: CallEnded says
    whether its arguments are complete, and what follows a broken one is text.
    """

    def __init__(self, reader: Reader, names: Collection[str], most: int = MAX_CALLS) -> None:
        """most: calls after these are text."""
        self._reader = reader
        self._source = CallText(frozenset(names), reader.new_id, most)
        self._machine = self._run()
        next(self._machine)

    def feed(self, text: str) -> list[Delta]:
        if text:
            self._source.add(text)
            next(self._machine, None)
        return self._source.drain()

    def finish(self) -> list[Delta]:
        """What was held back, at the end of the answer."""
        self._source.end_of_text()
        next(self._machine, None)
        return self._source.drain()

    @property
    def num_calls(self) -> int:
        """Calls that have ended so far."""
        return self._source.num_calls

    def _run(self) -> Reading:
        yield
        source, reader = self._source, self._reader
        is_edge = True  # the answer's beginning, or right after a call
        while True:
            source.mark()
            if is_edge:
                yield from source.blanks()
                if not (yield from source.peek()):
                    source.text("" if source.num_calls else source.since_mark())
                    return
                is_edge = yield from self._at_edge()
                continue
            try:
                triggers = () if reader.is_edge_only else reader.triggers
                yield from source.until(triggers, self._give_text)
            except NotACall:
                return
            is_edge = yield from self._calls(reader.read)

    def _at_edge(self) -> Generator[None, None, bool]:
        """Whether there was a call, so that the text goes on right after one."""
        source, reader = self._source, self._reader
        for dropped in reader.dropped if source.num_calls else ():
            if (yield from source.optional(dropped)):
                return True
        for trigger in reader.triggers:
            if (yield from source.optional(trigger)):
                return (yield from self._calls(reader.read))
        for start in reader.starts:
            if (yield from source.optional(start)):
                return (yield from self._calls(reader.read_start or reader.read, put_back=len(start)))
        source.text(source.since_mark())
        return False

    def _calls(
        self, read: Callable[[CallText], Reading], put_back: int = 0
    ) -> Generator[None, None, bool]:
        """After a trigger. Whether a call was read last; if there was none the trigger was text."""
        source = self._source
        led_here, num_before = source.since_mark(), source.num_calls
        source.skip(-put_back)
        try:
            yield from read(source)
        except NotACall:
            was_open = source.is_open
            source.give_up()
            if source.num_calls == num_before:
                source.text(led_here)
                source.skip(len(led_here))
            return source.num_calls > num_before and not was_open
        return True

    def _give_text(self, text: str) -> None:
        self._source.text(text)
        self._source.mark()
