"""What an answer has to be: JSON, JSON of a schema, text of a regular expression or of a grammar.

    check_constraint(Constraint("json_schema", schema))    # before a request is accepted

Fails closed: what cannot be enforced is refused by its name. The engine turns a constraint into token
masks (`engine/grammar.py`); llguidance is imported here and there only, and only when it is needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from edgeinfer.constraint.deep_stack import call_with_deep_stack
from edgeinfer.constraint.json_schema import COMPACT, checked_schema
from edgeinfer.constraint.keywords import COMPLAINTS
from edgeinfer.constraint.patterns import PatternRefused, portable_pattern
from edgeinfer.constraint.schema_text import MAX_BYTES, read_schema
from edgeinfer.errors import ConstraintInvalid, one_line

if TYPE_CHECKING:
    from llguidance import LLParserLimits, LLTokenizer

__all__ = [
    "Constraint",
    "ConstraintKind",
    "as_lark",
    "check_constraint",
    "checked_schema",
    "explained",
    "grammar_of",
    "parser_limits",
    "read_schema",
]

ConstraintKind = Literal["json_object", "json_schema", "regex", "lark"]


@dataclass(frozen=True)
class Constraint:
    """text: the schema as JSON, the regular expression (of the whole answer), or the grammar in
    llguidance's dialect of Lark, which must come from us and not from a user; "" for json_object."""

    kind: ConstraintKind
    text: str = ""

    @property
    def is_json(self) -> bool:
        return self.kind in ("json_object", "json_schema")


def check_constraint(constraint: Constraint, name: str = "response_format") -> None:
    """Whether answers can be held to it, without a model. Takes milliseconds, bounded by the limits on a
    schema; may be called from any thread.

    name: what the message begins with. Raises ConstraintInvalid.
    """
    grammar = grammar_of(constraint, name)
    # (a grammar of ours may have tokens of the model's vocabulary)
    find = _fault_in_text if constraint.kind == "lark" else _fault_of
    fault = call_with_deep_stack(lambda: find(grammar))
    if fault:
        raise ConstraintInvalid(*explained(fault, constraint, name))


def grammar_of(constraint: Constraint, name: str = "response_format") -> str:
    """The constraint as llguidance takes it; not compiled yet. Raises ConstraintInvalid."""
    from llguidance import LLMatcher

    if constraint.kind == "json_object":
        return LLMatcher.grammar_from_json_schema(json.dumps({"type": "object", "x-guidance": COMPACT}))
    if constraint.kind == "json_schema":
        schema = checked_schema(read_schema(constraint.text, name), name)
        return LLMatcher.grammar_from_json_schema(json.dumps(schema))
    size = len(constraint.text.encode("utf-8", "replace"))
    if size > MAX_BYTES:
        raise ConstraintInvalid(f"{name}: the {constraint.kind} has {size} bytes; at most {MAX_BYTES}")
    if constraint.kind == "regex":
        try:
            return LLMatcher.grammar_from_regex(portable_pattern(constraint.text))
        except PatternRefused as error:
            raise ConstraintInvalid(
                f"{name}: the regular expression is not supported: {error}"
            ) from None
    if constraint.kind == "lark":
        return LLMatcher.grammar_from_lark(constraint.text)
    raise ConstraintInvalid(f"{name}: there is no constraint of kind {constraint.kind!r}")


def as_lark(constraint: Constraint, name: str = "response_format") -> str:
    """The constraint as a grammar in llguidance's dialect of Lark, to be put into another one: its first
    rule is `start`, on a line of its own. Not for a regex. Raises ConstraintInvalid."""
    if constraint.kind == "lark":
        return constraint.text
    if constraint.kind == "json_object":
        schema: Mapping[str, Any] = {"type": "object", "x-guidance": COMPACT}
    else:
        schema = checked_schema(read_schema(constraint.text, name), name)
    return f"start: %json {json.dumps(schema)}\n"


def parser_limits() -> LLParserLimits:
    """Of compiling, of one token's mask, and of the automaton's memory (about 1.5 kB a state)."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=500_000,
        step_lexer_fuel=100_000,
        max_lexer_states=50_000,
        verbose_errors=False,  # they would quote the schema
    )


def _fault_in_text(grammar: str) -> str:
    from llguidance import LLMatcher

    return LLMatcher.validate_grammar(grammar, limits=parser_limits())


def _fault_of(grammar: str) -> str:
    """Also what is only found where an answer is begun: automata that are too big, no beginning."""
    from llguidance import LLMatcher

    matcher = LLMatcher(_bytes_as_tokens(), grammar, log_level=0, limits=parser_limits())
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher.get_error() if matcher.is_error() else ""


@cache
def _bytes_as_tokens() -> LLTokenizer:
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


def explained(fault: str, constraint: Constraint, name: str) -> tuple[str, str | None]:
    """llguidance's complaint as a message, and the keyword it is about."""
    said = one_line(fault.partition("<non-verbose/>")[0], 200)
    if constraint.kind != "json_schema":
        return f"{name}: the {constraint.kind} cannot be used: {said}", None
    if "NoExtensionBias" in fault:
        return f"{name}: no JSON fits the schema: it has no beginning", None
    if "nsatisfiable" in fault:
        return f"{name}: no JSON fits the schema: {said}", None
    if "fuel" in fault or "too big" in fault:
        return (
            f"{name}: the schema takes too large an automaton; use fewer alternatives, and shorter"
            f" patterns and bounds: {said}",
            None,
        )
    keyword = next((each for sign, each in COMPLAINTS if sign in fault), None)
    if keyword == "minProperties" and '"minProperties"' not in constraint.text:
        keyword = "maxProperties"
    about = f"the schema keyword '{keyword}' cannot be used" if keyword else "the schema cannot be used"
    return f"{name}: {about}: {said}", keyword
