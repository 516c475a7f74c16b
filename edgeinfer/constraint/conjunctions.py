"""What a schema would cost llguidance, counted before it sees it, as its own limits do not bound that.

It looks whether a string is left that fits all patterns which meet in one place, in a product of their
automata: with 1.9.1, 20 patterns take seconds and 257 MB. Two coprime `multipleOf` that meet end the
process, out of memory. So what meets where is found here the way it combines schemas: alternatives are
multiplied out, and properties of the same name meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import product
from math import gcd, lcm
from typing import Any

from edgeinfer.constraint.keywords import APPLICATORS
from edgeinfer.constraint.schema_text import objects_in

MAX_MEETING = 6  # patterns and formats for one string; 1 ms at 8, twice that for each more
MAX_CHECKS = 300  # of strings that several are for
MAX_COMBINATIONS = 100_000  # parts of alternatives multiplied out, in all
MAX_PATTERNS = 300  # different ones, and formats, in all
MAX_PATTERN_PROPERTIES = 50  # in all: each is compared with each
MAX_PROPERTIES = 1_500  # of one object; the sum of squares, as that is what they cost
MAX_MULTIPLE = 4_000  # an automaton with that many states, and more with bounds
_CHOICES_A_CHECK = 20  # listed values that cost as much as a pattern, when they meet one

Schema = bool | dict[str, Any]
_COMBINING = frozenset(APPLICATORS) - {"enum", "const"}


class TooMuch(Exception):
    """keyword: what there is too much of. `str(error)` says how much is taken."""

    def __init__(self, keyword: str, message: str) -> None:
        super().__init__(message)
        self.keyword = keyword


def check_conjunctions(root: Schema, definitions: Mapping[str, Schema]) -> None:
    """Of a checked schema (`json_schema.py`). Raises TooMuch."""
    counter = _Counter(definitions)
    for schema in (root, *definitions.values()):
        for each in _schemas_in(schema):
            counter.count(each)
    for schema in counter.combined:
        try:
            counter.visit(schema)
        except RecursionError:
            raise TooMuch("$ref", "references of references, with other keywords beside them") from None


class _Counter:
    def __init__(self, definitions: Mapping[str, Schema]) -> None:
        self.combined: list[dict[str, Any]] = []  # those that are not said in one piece
        self._definitions = definitions
        self._visited: set[frozenset[int]] = set()
        self._combining = "allOf"  # of what is looked at now
        self._texts: set[str] = set()
        self._pattern_properties = self._checks = self._combinations = self._squares = 0

    def count(self, schema: dict[str, Any]) -> None:
        self._texts.update(_texts_of(schema))
        if len(self._texts) > MAX_PATTERNS:
            raise TooMuch("pattern", f"there are more than {MAX_PATTERNS} different ones")
        self._count_properties(len(_keys_of(schema)))
        for each in objects_in([schema.get("const"), *schema.get("enum", ())]):
            self._count_properties(len(each))
        self._pattern_properties += len(schema.get("patternProperties", ()))
        if self._pattern_properties > MAX_PATTERN_PROPERTIES:
            raise TooMuch("patternProperties", f"at most {MAX_PATTERN_PROPERTIES} in the whole schema")
        if (
            len(_texts_of(schema)) > 1
            or "allOf" in schema
            or schema.keys() >= {"properties", "patternProperties"}
            or (_COMBINING & schema.keys() and len(schema) > 1)
        ):
            self.combined.append(schema)

    def visit(self, schema: dict[str, Any]) -> None:
        """What it combines in one place, and then inside of it."""
        said = ("allOf", "anyOf", "$ref", "patternProperties")
        self._combining = next((key for key in said if key in schema), "pattern")
        pending: list[tuple[Schema, ...]] = [(schema,)]
        while pending:
            meeting = pending.pop()
            key = frozenset(map(id, meeting))
            if key in self._visited:
                continue
            self._visited.add(key)
            for alternative in self._alternatives(meeting, frozenset()):
                self._check(alternative)
                if len(alternative) > 1:
                    self._count_properties(
                        len({key for schema in alternative for key in _keys_of(schema)})
                    )
                for inside in _inside(alternative):
                    self._spend(len(alternative))
                    pending.append(inside)

    def _spend(self, count: int) -> None:
        self._combinations += count
        if self._combinations > MAX_COMBINATIONS:
            raise TooMuch(self._combining, "it combines too many alternatives or properties")

    def _check(self, alternative: list[dict[str, Any]]) -> None:
        texts = {text for schema in alternative for text in _texts_of(schema)}
        if len(texts) > MAX_MEETING:
            raise TooMuch("pattern", f"more than {MAX_MEETING} patterns and formats for one string")
        listed = sum(len(schema.get("enum", ())) + ("const" in schema) for schema in alternative)
        if texts and (len(texts) > 1 or listed):
            self._checks += 1 + listed // _CHOICES_A_CHECK
        if self._checks > MAX_CHECKS:
            raise TooMuch("pattern", f"more than {MAX_CHECKS} strings that have several of them")
        multiples = {schema["multipleOf"] for schema in alternative if "multipleOf" in schema}
        if len(multiples) > 1 and _common_multiple(multiples) > MAX_MULTIPLE:
            raise TooMuch("multipleOf", "what is a multiple of all that meet is too far apart")

    def _count_properties(self, count: int) -> None:
        self._squares += count**2
        if self._squares > MAX_PROPERTIES**2:
            raise TooMuch("properties", f"at most {MAX_PROPERTIES} in one object, fewer in several")

    def _alternatives(
        self, meeting: tuple[Schema, ...], on_the_way: frozenset[str]
    ) -> Iterator[list[dict[str, Any]]]:
        """Each a list of schemas that say what they say themselves."""
        ways = [list(self._ways(schema, on_the_way)) for schema in meeting if isinstance(schema, dict)]
        for chosen in product(*ways):
            alternative = [each for way in chosen for each in way]
            self._spend(len(alternative) + 1)
            yield alternative

    def _ways(
        self, schema: dict[str, Any], on_the_way: frozenset[str]
    ) -> Iterator[list[dict[str, Any]]]:
        parts: list[Schema] = list(schema.get("allOf", ()))
        if "$ref" in schema and schema["$ref"] not in on_the_way:
            on_the_way |= {schema["$ref"]}
            parts.append(self._definitions[schema["$ref"].rpartition("/")[2]])
        for combination in self._alternatives(tuple(parts), on_the_way):
            for branch in schema.get("anyOf", (True,)):
                branches = self._ways(branch, on_the_way) if isinstance(branch, dict) else [[]]
                for chosen in branches:
                    self._spend(len(combination) + len(chosen) + 1)
                    yield [schema, *combination, *chosen]


def decimal_coefficient(value: int | float) -> int:
    """Its digits, the point and zeros around left out: what llguidance counts multiples by."""
    numerator, denominator = value.as_integer_ratio()
    while denominator > 1 and numerator < 10**18:
        numerator *= 10
        common = gcd(numerator, denominator)
        numerator, denominator = numerator // common, denominator // common
    return numerator


def _common_multiple(values: set[int | float]) -> int:
    """As a coefficient too, of the most digits behind the point that one of them has."""
    fractions = [Fraction(value) for value in values]
    scale = 1
    while any((each * scale).denominator > 1 for each in fractions):
        scale *= 10
    return lcm(*(int(each * scale) for each in fractions))


def _inside(alternative: list[dict[str, Any]]) -> Iterator[tuple[Schema, ...]]:
    """What meets in each property and item."""
    keys = {key for schema in alternative for key in schema.get("properties", ())}
    for key in (*keys, None):
        yield _several(part for schema in alternative for part in _for_property(schema, key))
    longest = max((len(schema.get("prefixItems", ())) for schema in alternative), default=0)
    for index in range(longest + 1):
        yield _several(
            (schema.get("prefixItems", ())[index : index + 1] or [schema.get("items", True)])[0]
            for schema in alternative
        )


def _for_property(schema: Mapping[str, Any], key: str | None) -> Iterator[Schema]:
    if key in schema.get("properties", ()):
        yield schema["properties"][key]
    else:
        yield schema.get("additionalProperties", True)
    yield from schema.get("patternProperties", {}).values()


def _several(schemas: Iterator[Schema]) -> tuple[Schema, ...]:
    """() if there is but one: that one is looked at by itself."""
    found = tuple({id(each): each for each in schemas if isinstance(each, dict)}.values())
    return found if len(found) > 1 else ()


def _keys_of(schema: Mapping[str, Any]) -> set[str]:
    return {*schema.get("properties", ()), *schema.get("required", ())}


def _texts_of(schema: Mapping[str, Any]) -> list[str]:
    return [f"{key} {schema[key]}" for key in ("pattern", "format") if key in schema]


def _schemas_in(schema: Schema) -> Iterator[dict[str, Any]]:
    pending: list[Any] = [schema]
    while pending:
        value = pending.pop()
        if not isinstance(value, dict):
            continue
        yield value
        for keyword in ("allOf", "anyOf", "prefixItems"):
            pending += value.get(keyword, ())
        for keyword in ("properties", "patternProperties"):
            pending += value.get(keyword, {}).values()
        pending += [value.get("items"), value.get("additionalProperties")]
