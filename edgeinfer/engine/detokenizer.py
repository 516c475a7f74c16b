"""Tokens to text as they come: whole UTF-8 characters only, and nothing that a stop string may yet
take back."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class Detokenizer:
    """One answer's text. A character or a possible stop string split over tokens is held back until
    it is decided; `feed` and `finish` together give every other character exactly once.

    before: texts from which on nothing stops the answer any more."""

    def __init__(self, stop: Sequence[str] = (), before: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(stop)
        self._before = tuple(before)
        self._given = ""  # the end of what was given out: one of `before` may have begun in it
        self._held = ""
        self.stopped_by: str | None = None

    def feed(self, piece: bytes) -> str:
        """Text that is now certain. "" while undecided, and for ever once a stop string was met."""
        if self.stopped_by is not None:
            return ""
        return self._release(self._decoder.decode(piece))

    def finish(self) -> str:
        """What was held back, at the end of the answer; half a character becomes U+FFFD."""
        if self.stopped_by is not None:
            return ""
        text = self._release(self._decoder.decode(b"", final=True), final=True)
        held, self._held = self._held, ""
        return text + held

    def _release(self, text: str, *, final: bool = False) -> str:
        if not self._stop:
            return text
        self._held += text
        out = self._before_stop(final)
        longest = max(map(len, self._before), default=1)
        self._given = (self._given + out)[1 - longest :] if longest > 1 else ""
        return out

    def _before_stop(self, final: bool) -> str:
        found = [(self._held.find(s), s) for s in self._stop]
        met = min((hit for hit in found if hit[0] >= 0), default=None)
        whole = self._given + self._held
        begun = min((at for each in self._before if (at := whole.find(each)) >= 0), default=None)
        if begun is not None and (met is None or begun - len(self._given) <= met[0]):
            self._stop = ()
            out, self._held = self._held, ""
            return out
        open_ = max((_overlap(whole, each) for each in self._before), default=0)
        if met is not None and not final and open_ > len(self._held) - met[0]:
            out, self._held = self._held[: met[0]], self._held[met[0] :]  # it may be inside a beginning
            return out
        if met is not None:
            out, self._held = self._held[: met[0]], ""
            self.stopped_by = met[1]
            return out
        keep = max(_overlap(self._held, s) for s in self._stop)
        split = len(self._held) - keep
        out, self._held = self._held[:split], self._held[split:]
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
