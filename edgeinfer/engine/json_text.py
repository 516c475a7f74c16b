"""Where in a JSON text an answer stands: inside a string, or how far into a number.

The text is known to be right, as a grammar made it; so this is a fraction of a JSON reader.

In a text that is JSON only in places, quotes say nothing: there a run of digits is followed wherever it
stands, and whether it is a number is seen from what may follow (`Matcher`).
"""

from __future__ import annotations

import re

OUTSIDE, STRING, ESCAPE, WHOLE, FRACTION, POWER = range(6)

# (place, digits so far in this part of a number)
State = tuple[int, int]
BEGIN: State = (OUTSIDE, 0)

# Most digits of a part of a number, where the grammar allows it to end. JSON sets no limit, and a small
# model writes zeros until its tokens are used up. 15 behind the point are told apart by doubles: with
# more, 0.29999… is 0.3 to who reads it, and not below it. Above 1e99 comes, with more digits, what is no
# double any more.
MOST_DIGITS = {WHOLE: 40, FRACTION: 15, POWER: 2}

# A piece of text with such a number in it has too long a one, wherever it comes.
TOO_LONG = re.compile(
    rb"\d{%d}|\.\d{%d}|(?:^|\d)[eE][+-]?\d{%d}" % tuple(most + 1 for most in MOST_DIGITS.values())
)

_QUOTE, _BACKSLASH, _POINT, _ZERO, _NINE = b'"\\.09'
_POWER_SIGNS = b"+-"


def advance(state: State, piece: bytes, *, has_strings: bool = True) -> State:
    """The state after more text. has_strings: all of it is JSON."""
    place, digits = state
    for byte in piece:
        if place == STRING:
            if byte == _QUOTE:
                place = OUTSIDE
            elif byte == _BACKSLASH:
                place = ESCAPE
        elif place == ESCAPE:
            place = STRING
        elif _ZERO <= byte <= _NINE:
            place, digits = (WHOLE, 1) if place == OUTSIDE else (place, digits + 1)
        elif byte == _POINT and place == WHOLE:
            place, digits = FRACTION, 0
        elif byte in b"eE" and place in (WHOLE, FRACTION):
            place, digits = POWER, 0
        elif not (byte in _POWER_SIGNS and place == POWER):
            place, digits = (STRING if byte == _QUOTE and has_strings else OUTSIDE), 0
    return place, digits
