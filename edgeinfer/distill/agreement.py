"""How often an exit guesses what its model goes on to say.

A drafted token is kept where it is the model's likeliest, and what is drafted behind one that was not
kept is thrown away. So the tokens that a draft of several was made from are those that the model wrote,
as far as it matters, and one reading of a text says how each length of draft would have fared: the
second drafted token counts where the first agreed *and* the text went on with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeinfer.distill.openings import GROUPS
from edgeinfer.distill.texts import Texts
from edgeinfer.exits import ANSWERED

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgeinfer.exits import Tokens

DRAFTED = 4


@dataclass(frozen=True)
class Agreement:
    """by_position: how often the first, second, … drafted token agrees with the model, where all before
    it did. positions: how many of each that is out of. written: how often the first is the token that
    the text went on with (less where that was drawn at random)."""

    by_position: tuple[float, ...]
    positions: tuple[int, ...]
    written: float

    @property
    def first(self) -> float:
        return self.by_position[0]

    @property
    def accepted(self) -> float:
        """Tokens that are kept of a draft of DRAFTED, on average."""
        return float(np.cumprod(self.by_position).sum())

    def as_json(self) -> dict[str, Any]:
        return {
            "by_position": [round(each, 4) for each in self.by_position],
            "positions": list(self.positions),
            "written": round(self.written, 4),
            "accepted_of_4": round(self.accepted, 4),
        }


def agreement(model: Tokens, guessed: Tokens, texts: Texts, rows: Sequence[int]) -> Agreement:
    """model, guessed: the likeliest next token at each position, (texts, length). rows: of the texts
    that count. Only answers count."""
    own = list(rows)
    tokens, kinds = texts.tokens[own], texts.kinds[own]
    agrees = (model[own] == guessed[own])[:, :-1]
    counts = kinds[:, 1:] == ANSWERED
    goes_on = agrees & counts & (model[own][:, :-1] == tokens[:, 1:])
    reached = np.ones_like(counts)
    rates, positions = [], []
    for _ in range(DRAFTED):
        at = reached & counts
        positions.append(int(at.sum()))
        rates.append(float(agrees[at].mean()) if positions[-1] else 0.0)
        reached = _later(reached & goes_on)
    is_written = guessed[own][:, :-1] == tokens[:, 1:]
    written = float(is_written[counts].mean()) if counts.any() else 0.0
    return Agreement(tuple(rates), tuple(positions), written)


def agreements(model: Tokens, guessed: Tokens, texts: Texts) -> Mapping[str, Agreement]:
    """By kind of text: "chat", "code" (asked for, and Python source), "prose", each with answers that
    were drawn, and "chat, greedy" and so on for those that were not."""
    kinds = {"chat": ("chat",), "code": ("code", "source"), "prose": ("prose",)}
    found = {}
    for name, members in kinds.items():
        is_member = np.isin(texts.groups, [GROUPS.index(member) for member in members])
        for suffix, is_temperature in (
            ("", texts.temperatures > 0),
            (", greedy", texts.temperatures == 0),
        ):
            rows = np.flatnonzero(is_member & is_temperature).tolist()
            if rows:
                found[name + suffix] = agreement(model, guessed, texts, rows)
    return found


def _later(flags: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """A position further in each text."""
    found = np.zeros_like(flags)
    found[:, 1:] = flags[:, :-1]
    return found
