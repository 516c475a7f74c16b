"""Answers that are held to a constraint: for each token, which may come next.

    matcher = Grammars(tokenizer, vocab_size).matcher(constraint)
    token = runtime.sample(row, sampler, matcher.mask())
    token = matcher.accept(token, tokens_left)

llguidance's matcher says errors in a state that it keeps. Here they are exceptions: a request whose
grammar failed ends `failed`, and never goes on without it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from edgeinfer.constraint import Constraint, explained, grammar_of, parser_limits
from edgeinfer.constraint.deep_stack import call_with_deep_stack
from edgeinfer.engine.closing import find_closing
from edgeinfer.engine.json_text import BEGIN, FRACTION, MOST_DIGITS, STRING, WHOLE, State, advance
from edgeinfer.errors import ConstraintInvalid, RequestFailed, one_line

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from edgeinfer.engine.token_table import TokenTable
    from edgeinfer_models.tokenizer import Tokenizer

# With so many tokens left, how far an end is is looked at for the first time: milliseconds that most
# answers never pay. Then again whenever an eighth of what is to spare is used up, at last after every
# token; and at what may need much more text, another item for example.
FIRST_LOOK = 512
_SHARE_BETWEEN_LOOKS = 8
_OPENERS = b",[{"


class Grammars:
    """Of one loaded model. Thread-safe; a `Matcher` is not."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._making = threading.Lock()
        self._table: TokenTable | None = None

    def matcher(self, constraint: Constraint) -> Matcher:
        """For one answer. The first call reads the vocabulary, which takes half a second.
        Raises ConstraintInvalid."""
        from llguidance import LLMatcher

        grammar = grammar_of(constraint)
        with self._making:
            if self._table is None:
                from edgeinfer.engine.token_table import TokenTable

                self._table = TokenTable(self._tokenizer, self._vocab_size)
        table = self._table
        limits = parser_limits()
        parser = call_with_deep_stack(
            lambda: LLMatcher(table.native, grammar, log_level=0, limits=limits)
        )
        if parser.is_error():
            if constraint.kind == "lark":  # nobody wrote that: it may be about tools, too
                raise ConstraintInvalid(f"the answer's lark cannot be used: {_reason(parser)}")
            raise ConstraintInvalid(*explained(parser.get_error(), constraint, "response_format"))
        return Matcher(parser, table, constraint)


class Matcher:
    """One answer's way through its grammar.

    It also sees to it that an answer ends in time: when the tokens left are no more than it takes to
    close what is open, only those may come. `closed_early` says that they did.
    """

    def __init__(self, parser: LLMatcher, table: TokenTable, constraint: Constraint) -> None:
        self._parser = parser
        self._table = table
        self._is_json = constraint.is_json
        # Where in a JSON text it stands, after each token. A grammar of ours has JSON in places, where
        # only numbers are followed; empty for a regex.
        self._states: list[State] = [BEGIN] if constraint.kind != "regex" else []
        self._look_at = FIRST_LOOK  # tokens left
        self._closing: list[int] | None = None  # what is left of the only way, once it is taken
        self._num_accepted = 0

    @property
    def closed_early(self) -> bool:
        return self._closing is not None

    @property
    def may_end(self) -> bool:
        """Whether the text is complete as it stands."""
        return bool(self._parser.is_accepting())

    @property
    def is_over(self) -> bool:
        """Whether nothing but the end can follow."""
        return self._closing == [] or (self._parser.is_stopped() and not self._parser.is_error())

    def mask(self) -> bytes:
        """What may come next, as `Runtime.sample` takes it. Every end token may, exactly where the text
        is complete. Raises RequestFailed."""
        if self._closing:
            return self._table.only(self._closing[0])
        mask = self._parser.compute_bitmask()
        if self._parser.is_error():
            raise self._failure()
        if self._states and self._states[-1][0] >= WHOLE:
            mask = self._with_fewer_digits(mask)
        if mask.count(0) == len(mask):
            raise RequestFailed("no token of this model's vocabulary can continue the answer's form")
        return mask

    def accept(self, token: int, tokens_left: int | None = None) -> int:
        """Take a token that the mask allows and that is no end token, or another one in its place, if
        after it the answer could not be ended in time: an end token, if it is complete without it.
        Returns the one taken.

        tokens_left: that may still come after it; None: as many as it takes. Raises RequestFailed.
        """
        self._consume(token)
        if self._closing:
            self._closing.pop(0)
        elif (
            tokens_left is not None
            and tokens_left <= FIRST_LOOK
            and not self._parser.is_stopped()
            and (tokens_left <= self._look_at or self._opens(token))
        ):
            return self._look(token, tokens_left)
        return token

    def rollback(self, num_tokens: int) -> None:
        """Take back the last tokens. Raises RequestFailed."""
        assert 0 <= num_tokens <= self._num_accepted
        if num_tokens:
            self._take_back(num_tokens)
            self._closing = None
            self._look_at = FIRST_LOOK

    def _consume(self, token: int) -> None:
        if not self._parser.consume_token(token):
            raise self._failure()
        self._num_accepted += 1
        if self._states:
            piece = self._table.pieces[token]
            self._states.append(advance(self._states[-1], piece, has_strings=self._is_json))

    def _take_back(self, num_tokens: int) -> None:
        if not self._parser.rollback(num_tokens):
            raise self._failure()
        self._num_accepted -= num_tokens
        if self._states:
            del self._states[-num_tokens:]

    def _look(self, token: int, tokens_left: int) -> int:
        """How far the end is; and if it has become too far with this token, the first one on the way to
        the end without it."""
        way = self._find(tokens_left)
        if way is not None:
            self._look_at = tokens_left - max(1, (tokens_left - len(way)) // _SHARE_BETWEEN_LOOKS)
            return token
        self._take_back(1)
        way = self._find(tokens_left + 1)
        if way == [] and self._table.ends:
            self._closing = []
            return self._table.ends[0]
        if not way:
            self._consume(token)
            self._look_at = tokens_left - max(1, tokens_left // _SHARE_BETWEEN_LOOKS)
            return token
        self._closing = way
        return self.accept(way[0])

    def _opens(self, token: int) -> bool:
        piece = self._table.pieces[token]
        if not any(byte in piece for byte in _OPENERS):
            return False
        is_in_string = self._is_json and self._states[-2][0] == self._states[-1][0] == STRING
        return not is_in_string or b'"' in piece

    def _find(self, most: int) -> list[int] | None:
        state = self._states[-1] if self._is_json else None
        return find_closing(self._parser, self._table, state, most)

    def _with_fewer_digits(self, mask: bytes) -> bytes:
        place, digits = self._states[-1]
        left = MOST_DIGITS[place] - digits
        if left >= self._table.most_digits and not self._table.has_long_numbers:
            return mask
        allowed = int.from_bytes(mask, "little")
        # A quote never follows a number in our grammars, and always may in free text and in a string.
        if not self._is_json and allowed & self._table.quotes:
            return mask
        fewer = allowed & self._table.with_digits(max(0, left))
        if not fewer and place == FRACTION:  # 0.000… may not end yet
            fewer = allowed & self._table.not_zero
        return fewer.to_bytes(len(mask), "little") if fewer else mask

    def _failure(self) -> RequestFailed:
        return RequestFailed(f"the answer could not be held to its form: {_reason(self._parser)}")


def _reason(parser: LLMatcher) -> str:
    return one_line(parser.get_error().partition("\n")[0], 200)
