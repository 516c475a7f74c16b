"""The shortest way found from within an answer to an end that its grammar accepts.

llguidance knows what may come next and not how far the end is. So a copy of the parser is walked there,
along the tokens that close what is open or begin the least. The way need not be the shortest there is,
and there may be one where none is found; one that is found is right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeinfer.engine.json_text import ESCAPE, STRING, State, advance

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from edgeinfer.engine.token_table import Ranks, TokenTable

_SHORT = 4  # a way that leaves so many times its tokens is taken without looking for a shorter one
_FREE_TEXT = 8  # of a text that is not known to be JSON: inside a string if a token in so many may come


def find_closing(
    parser: LLMatcher, table: TokenTable, state: State | None, most: int
) -> list[int] | None:
    """Tokens to an accepted end; [] if it is one already. None if none of at most `most` was found.

    parser: is left as it was. state: where in a JSON text it stands; None if it need not be JSON.
    """
    found: list[int] | None = None
    for ranks in table.closing_ways:
        way = _walk(parser.deep_copy(), table, ranks, state, most)
        if way is not None:
            if len(way) * _SHORT <= most:
                return way
            found, most = way, len(way) - 1
            if most < 0:
                break
    return found


def _walk(
    parser: LLMatcher,
    table: TokenTable,
    ranks: tuple[Ranks, Ranks],
    state: State | None,
    most: int,
) -> list[int] | None:
    tokens: list[int] = []
    while not parser.is_accepting():
        if parser.is_error() or len(tokens) >= most:
            return None
        step = _forced(parser, table)
        if not step:
            mask = parser.compute_bitmask()
            best = table.best(mask, ranks[_is_inside(state, mask)])
            if best is None:
                return None
            step = [best]
        if not parser.consume_tokens(step):
            return None
        tokens += step
        if state is not None:
            for token in step:
                state = advance(state, table.pieces[token])
    return tokens if len(tokens) <= most else None


def _forced(parser: LLMatcher, table: TokenTable) -> list[int]:
    """Tokens of the text that must come next, a key for example."""
    try:
        return table.native.greedy_tokenize(parser.compute_ff_bytes().decode())
    except UnicodeDecodeError:  # it ends inside a character
        return []


def _is_inside(state: State | None, mask: bytes) -> bool:
    if state is not None:
        return state[0] in (STRING, ESCAPE)
    allowed = int.from_bytes(mask, "little").bit_count()
    return allowed * _FREE_TEXT > len(mask) * 8
