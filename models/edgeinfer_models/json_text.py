"""One JSON value as it comes, piece by piece: passed on at once, and never anything that is no JSON."""

from __future__ import annotations

import json
import re
from typing import Literal

MAX_DEPTH = 128  # Python's own reader gives up near 1,000; no tool's arguments come near this
_RUN = re.compile(r'[^"\\\x00-\x1f]+')
_BLANKS = re.compile(r"[ \t\r\n]+")
_HEX = frozenset("0123456789abcdefABCDEF")
_WORDS = {"t": "rue", "f": "alse", "n": "ull"}

_State = Literal[
    "value", "value or ]", "key or }", "key", "colon", "next", "string", "escape", "hex", "word",
    "number", "done", "broken",
]  # fmt: skip


def _moves(**to: str) -> dict[str, str]:
    """Character -> next place in a number, from `place="characters"`."""
    return {character: place for place, characters in to.items() for character in characters}


_DIGITS = "0123456789"
_NUMBER: dict[str, dict[str, str]] = {
    "minus": _moves(zero="0", whole="123456789"),
    "zero": _moves(point=".", e="eE"),
    "whole": _moves(whole=_DIGITS, point=".", e="eE"),
    "point": _moves(part=_DIGITS),
    "part": _moves(part=_DIGITS, e="eE"),
    "e": _moves(sign="+-", power=_DIGITS),
    "sign": _moves(power=_DIGITS),
    "power": _moves(power=_DIGITS),
}
_NUMBER_ENDS = frozenset({"zero", "whole", "part", "power"})


class JsonText:
    """Reads one value. `feed` until `done` or `broken`; the cost is linear and the depth bounded.

    A raw control character inside a string, which models write and JSON forbids, is passed on escaped.
    """

    def __init__(self) -> None:
        self._state: _State = "value"
        self._open: list[str] = []  # brackets that are open
        self._is_key = False
        self._left = ""  # of a word
        self._place = ""  # in a number
        self._hex_left = 0

    @property
    def done(self) -> bool:
        return self._state == "done"

    @property
    def broken(self) -> bool:
        return self._state == "broken"

    def feed(self, text: str, start: int = 0) -> tuple[int, str]:
        """Takes what belongs to the value from text[start:]. Returns where it stopped, and the JSON.

        It stops before the end of `text` only when the value is done, or broken at that character."""
        out: list[str] = []
        at = start
        while at < len(text) and not self.done and not self.broken:
            if self._state == "string":
                at = self._in_string(text, at, out)
            elif self._state in ("value", "value or ]", "key or }", "key", "colon", "next") and (
                blanks := _BLANKS.match(text, at)
            ):
                out.append(blanks.group())
                at = blanks.end()
            else:
                taken = self._step(text[at])
                if taken:
                    out.append(text[at])
                    at += 1
        return at, "".join(out)

    def finish(self) -> None:
        """The text ends here: a number outside any bracket is done only now."""
        if self._state == "number" and self._place in _NUMBER_ENDS and not self._open:
            self._state = "done"
        elif not self.done:
            self._state = "broken"

    def _in_string(self, text: str, at: int, out: list[str]) -> int:
        if run := _RUN.match(text, at):
            out.append(run.group())
            return run.end()
        character = text[at]
        if character == '"':
            if self._is_key:
                self._state = "colon"
            else:
                self._value_ended()
        elif character == "\\":
            self._state = "escape"
        else:
            character = json.dumps(character)[1:-1]
        out.append(character)
        return at + 1

    def _step(self, character: str) -> bool:
        """One character outside a string. False: it was not taken (the state has changed)."""
        state = self._state
        if state == "escape":
            return self._escaped(character)
        if state == "hex":
            self._hex_left -= 1
            return self._go("string" if self._hex_left == 0 else "hex", character in _HEX)
        if state == "word":
            is_right = character == self._left[0]
            self._left = self._left[1:]
            if is_right and not self._left:
                self._value_ended()
                return True
            return self._go("word", is_right)
        if state == "number":
            return self._in_number(character)
        if state == "colon":
            return self._go("value", character == ":")
        if state == "next":
            return self._after_value(character)
        if state in ("key", "key or }"):
            if character == "}" and state == "key or }":
                return self._close(character)
            self._is_key = True
            return self._go("string", character == '"')
        if character == "]" and state == "value or ]":
            return self._close(character)
        return self._begin(character)

    def _begin(self, character: str) -> bool:
        if character in ("{", "["):
            self._open.append(character)
            return self._go(
                "key or }" if character == "{" else "value or ]", len(self._open) <= MAX_DEPTH
            )
        if character == '"':
            self._is_key = False
            return self._go("string")
        if character in _WORDS:
            self._left = _WORDS[character]
            return self._go("word")
        self._place = {"-": "minus", "0": "zero"}.get(character, "whole")
        return self._go("number", character == "-" or character in _DIGITS)

    def _in_number(self, character: str) -> bool:
        place = _NUMBER[self._place].get(character)
        if place is not None:
            self._place = place
            return True
        if self._place not in _NUMBER_ENDS:
            return self._go("broken", False)
        self._value_ended()
        return False

    def _escaped(self, character: str) -> bool:
        if character == "u":
            self._hex_left = 4
            return self._go("hex")
        return self._go("string", character in '"\\/bfnrt')

    def _after_value(self, character: str) -> bool:
        if character == ",":
            return self._go("key" if self._open[-1] == "{" else "value")
        return self._close(character)

    def _close(self, character: str) -> bool:
        if (self._open[-1], character) not in (("{", "}"), ("[", "]")):
            return self._go("broken", False)
        self._open.pop()
        self._value_ended()
        return True

    def _value_ended(self) -> None:
        self._state = "next" if self._open else "done"

    def _go(self, state: _State, is_allowed: bool = True) -> bool:
        self._state = state if is_allowed else "broken"
        return is_allowed


def is_json(text: str) -> bool:
    """Whether `text` is one JSON value, not deeper than MAX_DEPTH. (`json.loads` takes NaN, and may
    exceed the interpreter's recursion.)"""
    reader = JsonText()
    end, same = reader.feed(text)
    reader.finish()
    return reader.done and not text[end:].strip(" \t\r\n") and same == text[:end]
