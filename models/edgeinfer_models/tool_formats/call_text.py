"""An answer's text as a reader of calls sees it: taken character by character or in bulk, and put back.

Reading is written as generators that yield whenever the text is used up and go on when more has come.
They raise NotACall at the first character that does not fit; what was read since the last mark can then
be read again as something else.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass

from edgeinfer_models.json_text import JsonText

MAX_CALLS = 128
_BLANKS = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class TextDelta:
    text: str


@dataclass(frozen=True)
class CallStarted:
    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ArgumentsDelta:
    """A piece of the arguments' JSON text."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnded:
    """complete: the pieces are one JSON object. Otherwise the answer ended in the call, or broke it."""

    index: int
    complete: bool


Delta = TextDelta | CallStarted | ArgumentsDelta | CallEnded
Reading = Generator[None, None, None]


class NotACall(Exception):
    """What was read does not go on as a call."""


class CallText:
    """The text as a reader sees it, and where it reports what it found."""

    def __init__(self, names: Collection[str], new_id: Callable[[], str], most: int = MAX_CALLS) -> None:
        self.names = names
        self.num_calls = 0
        self.is_open = False  # a call has started and not ended
        self._new_id = new_id
        self._most = min(most, MAX_CALLS)
        self._text = ""
        self._at = 0
        self._mark = 0
        self._held: list[str] = []  # what was read since the mark and is no longer in _text
        self._ended = False
        self._out: list[Delta] = []

    # -- what came, and what goes out ------------------------------------------------------------

    def add(self, text: str) -> None:
        if self._mark < self._at:
            self._held.append(self._text[self._mark : self._at])
        self._text = self._text[self._at :] + text
        self._at = self._mark = 0

    def end_of_text(self) -> None:
        self._ended = True

    def drain(self) -> list[Delta]:
        """What was reported since the last time, neighbours of one kind joined."""
        out, self._out = self._out, []
        joined: list[Delta] = []
        for kind, group in itertools.groupby(out, key=type):
            deltas = list(group)
            if kind is TextDelta:
                joined.append(TextDelta(_joined(deltas)))
            elif isinstance(deltas[0], ArgumentsDelta):  # of one call: its end stands before the next's
                joined.append(ArgumentsDelta(deltas[0].index, _joined(deltas)))
            else:
                joined += deltas
        return joined

    def text(self, text: str) -> None:
        if text:
            self._out.append(TextDelta(text))

    def start(self, name: str, id: str = "") -> None:
        """A call to one of the tools begins here for good; what led to it is no text."""
        if name not in self.names or self.num_calls >= self._most:
            raise NotACall
        self._out.append(CallStarted(self.num_calls, id or self._new_id(), name))
        self.is_open = True
        self.mark()

    def arguments(self, json_text: str) -> None:
        if json_text:
            self._out.append(ArgumentsDelta(self.num_calls, json_text))
        self.mark()

    def end_call(self) -> None:
        """The arguments are complete. What closes the call may follow, or not."""
        self._end_call(complete=True)
        self.mark()

    def give_up(self) -> None:
        """After NotACall: everything since the mark is to be read again, and an open call is over."""
        if self.is_open:
            self._end_call(complete=False)
            if self._ended:
                self.mark()  # half a closing tag is no text
        self.reread()

    def reread(self) -> None:
        """Back to the mark."""
        self._text = self.since_mark() + self._text[self._at :]
        self._held.clear()
        self._at = self._mark = 0

    def _end_call(self, *, complete: bool) -> None:
        self._out.append(CallEnded(self.num_calls, complete))
        self.num_calls += 1
        self.is_open = False

    # -- marks -----------------------------------------------------------------------------------

    def mark(self) -> None:
        """What was read up to here is decided."""
        self._held.clear()
        self._mark = self._at

    def since_mark(self) -> str:
        return "".join([*self._held, self._text[self._mark : self._at]])

    # -- reading ---------------------------------------------------------------------------------

    def peek(self) -> Generator[None, None, str]:
        """The next character, not taken; "" at the end of the answer."""
        while self._at == len(self._text):
            if self._ended:
                return ""
            yield
        return self._text[self._at]

    def skip(self, count: int) -> None:
        self._at += count

    def blanks(self) -> Reading:
        while True:
            match = _BLANKS.match(self._text, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._text) or self._ended:
                return
            yield

    def one_of(self, choices: Sequence[str]) -> Generator[None, None, str]:
        """The first of `choices` that the text goes on with, taken; NotACall if it is none of them."""
        while True:
            ready = [each for each in choices if self._text.startswith(each, self._at)]
            if ready:
                self._at += len(ready[0])
                return ready[0]
            rest = self._text[self._at : self._at + max(map(len, choices))]
            if self._ended or not any(each.startswith(rest) for each in choices):
                raise NotACall
            yield

    def literal(self, text: str) -> Reading:
        yield from self.one_of((text,))

    def optional(self, text: str) -> Generator[None, None, bool]:
        """Whether `text` comes next; taken if so, nothing taken if not."""
        while not self._text.startswith(text, self._at):
            if self._ended or not text.startswith(self._text[self._at : self._at + len(text)]):
                return False
            yield
        self._at += len(text)
        return True

    def span(self, ends: str, limit: int) -> Generator[None, None, str]:
        """The characters up to the first of `ends`, which is not taken; at most `limit` of them."""
        taken: list[str] = []
        while (character := (yield from self.peek())) not in ends or not character:
            if not character or len(taken) == limit:
                raise NotACall
            taken.append(character)
            self._at += 1
        return "".join(taken)

    def until(self, stops: Sequence[str], sink: Callable[[str], None]) -> Reading:
        """Everything up to the first of `stops`, into `sink` as it comes; the stop is taken. At the end
        of the answer NotACall, the rest having gone into `sink`."""
        while True:
            found = first_of(stops, self._text, self._at)
            if found is not None:
                self._into(sink, found[0])
                self._at += len(found[1])
                return
            keep = 0 if self._ended else possible_beginning(stops, self._text, self._at)
            self._into(sink, len(self._text) - keep)
            if self._ended:
                raise NotACall
            yield

    def json(self, sink: Callable[[str], None]) -> Reading:
        """One JSON value, into `sink` as it comes."""
        value = JsonText()
        while True:
            end, out = value.feed(self._text, self._at)
            self._at = end
            if out:
                sink(out)
            if value.done:
                return
            if value.broken or self._ended:
                raise NotACall
            yield

    def _into(self, sink: Callable[[str], None], end: int) -> None:
        if end > self._at:
            text = self._text[self._at : end]
            self._at = end
            sink(text)


def first_of(stops: Sequence[str], text: str, start: int) -> tuple[int, str] | None:
    """Where the first of `stops` begins in `text`, and which."""
    found = [(at, stop) for stop in stops if (at := text.find(stop, start)) >= 0]
    return min(found, key=lambda each: each[0], default=None)


def possible_beginning(stops: Sequence[str], text: str, start: int) -> int:
    """Length of the longest end of text[start:] that one of `stops` goes on from."""
    longest = min(max(map(len, stops), default=1) - 1, len(text) - start)
    for size in range(longest, 0, -1):
        end = text[len(text) - size :]
        if any(len(stop) > size and stop.startswith(end) for stop in stops):
            return size
    return 0


def _joined(deltas: Sequence[Delta]) -> str:
    return "".join(each.text for each in deltas if isinstance(each, (TextDelta, ArgumentsDelta)))
