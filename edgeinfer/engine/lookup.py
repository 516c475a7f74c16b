"""Drafts copied from the conversation: what came next the last time the newest tokens were there.

Nothing is trained and nothing is run. Where an answer repeats what was said (code that is edited, a text
that is quoted, a list in a fixed form) the longest run of tokens that ends the conversation and was
there before is likely to go on as it did then.

Source: prompt lookup decoding (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding), with
the longest match first as in REST (He et al. 2023, arXiv:2311.08252).
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable

from edgeinfer.engine.draft import NO_DRAFT, Draft, Outcome

LEAST_MATCH = 2  # tokens
MOST_LOOKED_AT = 8  # places where such tokens were before, the newest first
# Matches of at least so many tokens are of a kind: acceptance is known by it.
KINDS = (2, 3, 4, 5, 7, 10, 16, 32)
_LONGEST = KINDS[-1]
_NONE = -1


class Lookup:
    """Of one conversation, which grows at its end."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        self._newest: dict[tuple[int, int], int] = {}  # the end of a pair of tokens, where it was last
        self._before = array("q")  # of each end of a pair, where it was before that
        self._follows = _NONE  # where the match would go on
        self._length = 0  # of the match
        for token in tokens:
            self._put(token)
        self._find()

    def append(self, token: int) -> Outcome | None:
        """What became of the token that would have been drafted; None where none would have been."""
        outcome = None
        if self._follows != _NONE:
            is_hit = self._tokens[self._follows] == token
            outcome = Outcome(kind_of(self._length), is_hit)
        self._put(token)
        if outcome is not None and outcome.is_hit:
            self._follows += 1
            self._length += 1
        else:
            self._find()
        return outcome

    def propose(self, most: int) -> Draft:
        """At most so many tokens. Where the match reaches the end of what was said it goes round: a
        repetition is drafted to go on repeating itself."""
        if self._follows == _NONE or most <= 0:
            return NO_DRAFT
        said, start = self._tokens, self._follows
        period = len(said) - start
        tokens = tuple(said[start + number % period] for number in range(most))
        return Draft(tokens, tuple(kind_of(self._length + number) for number in range(most)))

    def _put(self, token: int) -> None:
        self._tokens.append(token)
        end = len(self._tokens) - 1
        if end == 0:
            self._before.append(_NONE)
            return
        pair = (self._tokens[end - 1], token)
        self._before.append(self._newest.get(pair, _NONE))
        self._newest[pair] = end

    def _find(self) -> None:
        """The longest of the newest matches."""
        self._follows, self._length = _NONE, 0
        end = len(self._tokens) - 1
        if end < LEAST_MATCH:
            return
        place, looked_at = self._before[end], 0
        while place != _NONE and looked_at < MOST_LOOKED_AT and self._length < _LONGEST:
            length = self._match(place, end)
            if length > self._length:
                self._follows, self._length = place + 1, length
            place, looked_at = self._before[place], looked_at + 1

    def _match(self, place: int, end: int) -> int:
        """How many tokens up to a place are those up to the end."""
        said, length = self._tokens, LEAST_MATCH
        while length < _LONGEST and length <= place and said[place - length] == said[end - length]:
            length += 1
        return length


_KIND_OF = tuple(max(bisect_right(KINDS, length) - 1, 0) for length in range(_LONGEST + 1))


def kind_of(length: int) -> int:
    """Of a match, as an index of KINDS."""
    return _KIND_OF[min(length, _LONGEST)]
