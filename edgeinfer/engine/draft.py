"""What whoever guesses the next tokens hands to the engine, and how often such guesses turn out right.

A drafter says of each token of what kind the guess is (how long the copied run is, how sure an exit is):
how likely a kind is right is learnt from what the model then says, whether the guess was used or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Draft:
    """kinds: of each token, a number of its drafter's own."""

    tokens: tuple[int, ...]
    kinds: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def cut(self, length: int) -> Draft:
        return self if length >= len(self) else Draft(self.tokens[:length], self.kinds[:length])


NO_DRAFT = Draft((), ())


@dataclass(frozen=True)
class Outcome:
    """Of one guess that followed only right ones."""

    kind: int
    is_hit: bool


class Drafter(Protocol):
    """Guesses how one request's text goes on."""

    def append(self, token: int) -> Outcome | None:
        """The text has one more token. Returns what became of the guess that there was for it."""
        ...

    def propose(self, most: int) -> Draft:
        """At most so many tokens, which may be none."""
        ...


class Acceptance:
    """The share of guesses of each kind that are right, in one request: what it began with, drawn on by
    what is seen here. The last guesses count most, since answers change what they are about."""

    def __init__(self, prior: Sequence[float], weight: float = 6.0, memory: float = 64.0) -> None:
        """prior: by kind, each within (0, 1). weight: of how many guesses it is worth. memory: of how
        many of a kind the past ones are worth at most."""
        self._prior = tuple(prior)
        self._weight = weight
        self._keeps = 1.0 - 1.0 / memory
        self._hits = [0.0] * len(self._prior)
        self._tries = [0.0] * len(self._prior)

    def learn(self, outcome: Outcome) -> None:
        kind = outcome.kind
        self._hits[kind] = self._keeps * self._hits[kind] + outcome.is_hit
        self._tries[kind] = self._keeps * self._tries[kind] + 1.0

    def odds(self, kind: int) -> float:
        """That a guess of this kind is right, if all before it in its draft are."""
        prior = self._prior[kind] * self._weight
        return (prior + self._hits[kind]) / (self._weight + self._tries[kind])

    def of(self, draft: Draft, least: float = 0.0) -> list[float]:
        """Token by token, as far as all of it so far is right with the odds of `least`."""
        found, whole = [], 1.0
        for kind in draft.kinds:
            odds = self.odds(kind)
            whole *= odds
            if whole < least:
                break
            found.append(odds)
        return found
