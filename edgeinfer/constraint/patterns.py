"""Regular expressions of schemas (ECMA-262), made such that llguidance means the same by them or less.

Its dialect is that of Rust's regex crate. What means another thing there is refused (`[a&&b]` is an
intersection, `\\z` an end), as is what it has not (look-around, back references). `.`, `\\s` and the
negations of `\\w`, `\\d` and `\\s` are narrowed to what every dialect takes: Python's `re`, which
validates many answers, and ECMAScript differ in them. A control character cannot be written (COMPACT
in `json_schema.py`), so what asks for one is refused: the answer would get stuck before it.
"""

from __future__ import annotations

import re
import string

MAX_CHARACTERS = 2000
MAX_COUNT = 10_000  # of {n,m}
MAX_NESTED_COUNT = 1_000  # of one inside another, multiplied: 17 ms a token at 90,000

_HEX = re.compile(r"x[0-9A-Fa-f]{2}|u(?![dD][89a-fA-F])[0-9A-Fa-f]{4}")
_PROPERTY = re.compile(r"[pP]\{[A-Za-z_=]{1,60}\}")
_COUNT = re.compile(r"\{([0-9]{1,6})(?:(,)([0-9]{1,6})?)?\}")
_GROUP = re.compile(r"\?:|\?P?<[A-Za-z_][A-Za-z0-9_]*>")
_WORD = r"\p{L}\p{M}\p{N}\p{Pc}\x{200c}\x{200d}"
_SPACES = r"\t\n\v\f\r "
# Escape -> what stands for it alone, in a class, and in a negated class. (Its own \w and \d are ASCII.)
_CLASSES = {
    "s": (f"[{_SPACES}]", _SPACES, r"\s\x{feff}"),
    "S": (r"[^\s\x{feff}]", r"[^\s\x{feff}]", f"[^{_SPACES}]"),
    "W": (rf"[^{_WORD}]", rf"[^{_WORD}]", r"[^A-Za-z0-9_]"),
    "D": (r"[^\p{Nd}]", r"[^\p{Nd}]", "[^0-9]"),
    "w": (r"\w", r"\w", _WORD),
    "d": (r"\d", r"\d", r"\p{Nd}"),
}
_CONTROLS = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11}
_UNWRITABLE = frozenset({*range(32), 127}) - set(b"\b\f\n\r\t")
_LINE_ENDS = r"\n\r\x{2028}\x{2029}"

# Look-around that a common tool writes, and the same without it. zod 4: no dot first, last or doubled.
_KNOWN = {
    (
        r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]"
        r"@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
    ): (
        r"^[A-Za-z0-9_'+-]*[A-Za-z0-9_+-](?:\.[A-Za-z0-9_'+-]*[A-Za-z0-9_+-])*"
        r"@(?:[A-Za-z0-9][A-Za-z0-9-]*\.)+[A-Za-z]{2,}$"
    ),
}


class PatternRefused(Exception):
    """`str(error)` says why."""


def portable_pattern(pattern: str) -> str:
    """Raises PatternRefused."""
    if len(pattern) > MAX_CHARACTERS:
        raise PatternRefused(f"it has {len(pattern)} characters; at most {MAX_CHARACTERS} are taken")
    return _Reader(_KNOWN.get(pattern, pattern)).read()


class _Reader:
    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0
        self._out: list[str] = []

    def read(self) -> str:
        # How often what stands last is repeated inside; for each open group, the most of its parts.
        last, most = 1, [1]
        while self._at < len(self._pattern):
            character = self._pattern[self._at]
            if character == "(":
                self._open_group()
                most.append(1)
                last = 1
            elif character == ")":
                if len(most) == 1:
                    raise PatternRefused("it has a ) without its (")
                last = most.pop()
                self._take(1)
            elif character == "{":
                last *= self._count(last)
                self._no_second_quantifier()
            elif character in "*+?":
                self._take(1)
                self._no_second_quantifier()
            else:
                last = 1
                self._atom(character)
            most[-1] = max(most[-1], last)
        if len(most) > 1:
            raise PatternRefused("it has a ( without its )")
        return "".join(self._out)

    def _take(self, count: int) -> None:
        self._put(self._pattern[self._at : self._at + count], count)

    def _put(self, text: str, count: int) -> None:
        self._out.append(text)
        self._at += count

    def _open_group(self) -> None:
        begin = 1
        if self._pattern.startswith("?", self._at + 1):
            found = _GROUP.match(self._pattern, self._at + 1)
            if found is None:
                raise PatternRefused("look-around and flags, (?…), are not supported")
            begin += len(found.group())
        # names are of no use here, and two dialects write them differently
        self._put("(?:", begin)

    def _count(self, inside: int) -> int:
        """How often what stands before it is repeated; inside: how often parts of that are."""
        found = _COUNT.match(self._pattern, self._at)
        if found is None:
            raise PatternRefused("a { that is no {n}, {n,} or {n,m} needs a backslash")
        most = max(int(found[1]), int(found[3] or 0))
        if inside * most > (MAX_NESTED_COUNT if inside > 1 else MAX_COUNT):
            raise PatternRefused(f"it repeats something {inside * most} times")
        self._take(len(found.group()))
        return max(most, 1)

    def _no_second_quantifier(self) -> None:
        rest = self._pattern[self._at : self._at + 1]
        if rest == "?":  # lazy: the same texts
            self._take(1)
            rest = self._pattern[self._at : self._at + 1]
        if rest and rest in "*+?{":
            raise PatternRefused("it has a quantifier after a quantifier")

    def _atom(self, character: str) -> None:
        if character == "[":
            self._character_class()
        elif character == ".":
            self._put(f"[^{_LINE_ENDS}]", 1)
        elif character == "\\":
            self._escape(in_class=False, negated=False)
        elif character in "}]":
            self._put("\\" + character, 1)
        else:
            self._must_be_writable(ord(character))
            self._take(1)

    def _must_be_writable(self, code: int | None) -> None:
        if code in _UNWRITABLE:
            raise PatternRefused("a control character in a value cannot be written")

    def _escape(self, *, in_class: bool, negated: bool) -> int | None:
        """Returns the character it stands for, if it is one and known."""
        after = self._pattern[self._at + 1 : self._at + 2]
        found = _HEX.match(self._pattern, self._at + 1) or _PROPERTY.match(self._pattern, self._at + 1)
        code = None
        if found is not None:
            code = int(found.group()[1:], 16) if after in "xu" else None
            self._take(1 + len(found.group()))
        elif after in _CLASSES:
            self._put(_CLASSES[after][in_class + negated], 2)
        elif after and (after in string.punctuation or after in _CONTROLS):
            code = _CONTROLS.get(after, ord(after))
            self._take(2)
        else:
            raise PatternRefused(f"the escape \\{after} is not supported")
        if not in_class:
            self._must_be_writable(code)
        return code

    def _character_class(self) -> None:
        self._take(1)
        negated = self._pattern.startswith("^", self._at)
        if negated:
            self._take(1)
        if self._pattern.startswith("]", self._at):
            raise PatternRefused("[] and [^] are not supported")
        codes: list[int | None] = []  # None: any number of characters; "-" is 45
        while self._at < len(self._pattern):
            character = self._pattern[self._at]
            if character == "]":
                self._take(1)
                if not negated and not _has_writable(codes):
                    self._must_be_writable(0)
                return
            if character == "\\":
                codes.append(self._escape(in_class=True, negated=negated))
                continue
            codes.append(ord(character))
            if character in "[&~":  # sets and set operations in one dialect, ordinary in the other
                self._put("\\" + character, 1)
            elif self._pattern.startswith("--", self._at):
                raise PatternRefused("-- in a class is not supported; put the - last")
            else:
                self._take(1)
        raise PatternRefused("it has a [ without its ]")


def _has_writable(codes: list[int | None]) -> bool:
    """Of a class. A range is one if a character in it is."""
    at = 0
    while at < len(codes):
        first, last = codes[at], codes[at]
        if at + 2 < len(codes) and codes[at + 1] == ord("-"):
            last = codes[at + 2]
            at += 2
        at += 1
        if first is None or last is None or not _UNWRITABLE.issuperset(range(first, last + 1)):
            return True
    return False
