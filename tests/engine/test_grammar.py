"""Constrained answers over the scripted backend: what may come next, where it ends, what goes wrong."""

from __future__ import annotations

import datetime
import json
import random
from typing import Any

import jsonschema
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from edgeinfer.constraint import Constraint, as_lark
from edgeinfer.engine.engine import CLOSED_EARLY
from edgeinfer.engine.grammar import Grammars, Matcher
from edgeinfer.engine.json_text import BEGIN, ESCAPE, FRACTION, OUTSIDE, POWER, STRING, WHOLE, advance
from edgeinfer.engine.request import NO_STOP_STRINGS, Request
from edgeinfer.engine.wire import request_from_wire, request_to_wire
from edgeinfer.errors import ConstraintInvalid, RequestFailed, UsageError
from edgeinfer.sampling import SamplingParams
from edgeinfer_backends.scripted import Script
from edgeinfer_backends.scripted_tokenizer import BOS, TURN_END, TURN_START, ByteTokenizer
from tests.engine.test_engine import GREEDY, Driver, make_engine
from tests.grammar_walk import GRAMMARS, TOKENIZER, allowed, matcher_of, walk

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
}


def held(schema: object, **options: Any) -> Request:
    values = {"prompt": "x", "sampling": GREEDY, "max_tokens": 60, **options}
    return Request(constraint=Constraint("json_schema", json.dumps(schema)), **values)


def answer(request: Request, script: Script | None = None, context: int = 1024) -> Driver:
    driver = Driver(make_engine(script, context=context))
    driver.events[1] = []
    driver._keep(
        driver.engine.submit(1, request, TOKENIZER.encode("x", add_special=True, parse_special=True))
    )
    driver.run()
    return driver


def pinned(text: str) -> Script:
    return Script(answers={"x": text})


# -- the matcher ---------------------------------------------------------------------------------


def test_only_what_fits_may_come_next() -> None:
    matcher = matcher_of(PERSON)
    assert allowed(matcher) == [ord("{")]
    for byte in b'{"name":"':
        matcher.accept(byte)
    tokens = allowed(matcher)
    assert {
        ord("a"),
        ord('"'),
        ord("}"),
        TOKENIZER.encode("hello", add_special=False, parse_special=False)[0],
    } <= set(tokens)
    assert not {BOS, TURN_START, TURN_END, ord("\n")} & set(tokens)


def test_end_tokens_may_come_exactly_where_the_text_is_complete() -> None:
    matcher = matcher_of({"type": "integer"})
    assert TURN_END not in allowed(matcher) and not matcher.may_end
    matcher.accept(ord("1"))
    assert TURN_END in allowed(matcher) and matcher.may_end and not matcher.is_over
    matcher = matcher_of({"const": "a"})
    for byte in b'"a"':
        assert TURN_END not in allowed(matcher)
        matcher.accept(byte)
    assert matcher.is_over and matcher.may_end
    assert allowed(matcher) == [TURN_END]


class SeveralEnds(ByteTokenizer):
    """End tokens that are control tokens, and one that has a text."""

    def is_end(self, token: int) -> bool:
        return token in (TURN_END, BOS, ord("z"))


class NoEnd(ByteTokenizer):
    def is_end(self, token: int) -> bool:
        return False


def test_each_end_token_may_come_and_none_as_text() -> None:
    matcher = Grammars(SeveralEnds(), 268).matcher(Constraint("json_schema", '{"type":"string"}'))
    matcher.accept(ord('"'))
    tokens = allowed(matcher)
    assert ord("y") in tokens and ord("z") not in tokens
    matcher.accept(ord('"'))
    assert allowed(matcher) == [ord("z"), BOS, TURN_END]


def test_a_vocabulary_without_an_end_has_none() -> None:
    matcher = Grammars(NoEnd(), 268).matcher(Constraint("json_schema", '{"const":1}'))
    assert allowed(matcher) == [ord("1")]
    matcher.accept(ord("1"))
    assert matcher.is_over


def test_rows_beyond_the_vocabulary_are_never_chosen() -> None:
    matcher = Grammars(ByteTokenizer(), 400).matcher(Constraint("json_schema", '{"type":"string"}'))
    matcher.accept(ord('"'))
    mask = matcher.mask()
    assert len(mask) >= 50
    assert not any(
        mask[token // 8] >> token % 8 & 1 for token in range(TOKENIZER.vocab_size, len(mask) * 8)
    )


def test_tokens_can_be_taken_back() -> None:
    matcher = matcher_of(PERSON)
    masks = []
    for byte in b'{"name":"a\\"b","age":12}':
        masks.append(matcher.mask())
        matcher.accept(byte)
    assert matcher.is_over
    for mask in reversed(masks):
        matcher.rollback(1)
        assert matcher.mask() == mask
    matcher.rollback(0)
    for byte in b'{"name":"x","age":1}':
        assert byte in allowed(matcher)
        matcher.accept(byte)
    assert matcher.is_over


def test_a_token_that_does_not_fit_is_an_error_and_stays_one() -> None:
    matcher = matcher_of(PERSON)
    for act in (lambda: matcher.accept(ord("x")), matcher.mask, lambda: matcher.accept(ord("{"))):
        with pytest.raises(RequestFailed, match="could not be held to its form") as caught:
            act()
        assert "\n" not in str(caught.value)


def test_a_constraint_that_cannot_be_is_said() -> None:
    with pytest.raises(ConstraintInvalid, match="'not'"):
        matcher_of({"not": {}})
    with pytest.raises(ConstraintInvalid, match="lark cannot be used"):
        GRAMMARS.matcher(Constraint("lark", "start: nothing\n"))


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ('{"a', (STRING, 0)),
        ('{"a\\', (ESCAPE, 0)),
        ('{"a\\"', (STRING, 0)),
        ('{"a\\\\"', (OUTSIDE, 0)),
        ('{"a":12', (WHOLE, 2)),
        ("[-1.250", (FRACTION, 3)),
        ("[1.5e-1", (POWER, 1)),
        ("[1.5e-12,true", (OUTSIDE, 0)),
        ('["1.5', (STRING, 0)),
    ],
)
def test_where_in_a_text_it_stands(text: str, state: tuple[int, int]) -> None:
    place, digits = advance(BEGIN, text.encode())
    assert place == state[0]
    assert place not in (WHOLE, FRACTION, POWER) or digits == state[1]
    halves = advance(advance(BEGIN, text[:4].encode()), text[4:].encode())
    assert halves == (place, digits)


def digits_of(schema: object, first: str, then: str) -> str:
    """The number begun with `first`, going on with the character `then` for as long as it may."""
    matcher = matcher_of(schema)
    text = first
    for byte in first.encode():
        matcher.accept(byte)
    while ord(then) in allowed(matcher) and len(text) < 200:
        matcher.accept(ord(then))
        text += then
    return text


def test_numbers_do_not_go_on_for_ever() -> None:
    number = {"type": "number"}
    assert digits_of(number, "0.", "0") == "0." + "0" * 15
    assert len(digits_of(number, "1", "1")) == 40
    assert digits_of(number, "1e", "9") == "1e99"
    assert digits_of(number, "1e-", "9") == "1e-99"
    assert digits_of({"const": 10**17}, "1", "0") == str(10**17)


@pytest.mark.parametrize(
    ("schema", "first", "then"),
    [
        ({"type": "number", "exclusiveMaximum": 0.3, "minimum": 0}, "0.2", "9"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, "0.", "0"),
    ],
)
def test_digits_that_a_double_does_not_tell_apart_are_not_written(
    schema: Any, first: str, then: str
) -> None:
    text = digits_of(schema, first, then)
    matcher = matcher_of(schema)
    for byte in text.encode():
        matcher.accept(byte)
    while not matcher.may_end:
        token = allowed(matcher)[0]
        matcher.accept(token)
        text += chr(token)
    jsonschema.validate(json.loads(text), schema)


def test_numbers_in_a_grammar_do_not_go_on_for_ever_either() -> None:
    schema = as_lark(
        Constraint("json_schema", '{"type":"object","additionalProperties":{"type":"number"}}')
    )
    matcher = GRAMMARS.matcher(
        Constraint(
            "lark",
            'start: THOUGHT "</think>" answer\nTHOUGHT: /[^<]*/\n'
            + schema.replace("start", "answer", 1),
        )
    )
    thought = "it's \"0." + "3" * 60 + " e1" + "0" * 99 + "\\</think>"
    for text, ends in (
        (thought + '{"a":0.29999999999999', True),
        ("9", False),
        (',"0.' + "1" * 60 + 'e999":1e9', True),
        ("9", False),
        (',"b":' + "1" * 39, True),
        ("1", False),
    ):
        for byte in text.encode():
            assert byte in allowed(matcher), text
            matcher.accept(byte)
        assert (ord("9") in allowed(matcher)) == ends
        assert ord("}") in allowed(matcher)
    matcher.rollback(1)
    assert ord("9") in allowed(matcher)


def test_a_regex_may_have_as_many_digits_as_it_says() -> None:
    matcher = GRAMMARS.matcher(Constraint("regex", r"\d{1,60}"))
    for _ in range(60):
        assert ord("1") in allowed(matcher)
        matcher.accept(ord("1"))


class LongNumbers(ByteTokenizer):
    """Some of its words are numbers, as in vocabularies that have seen much code."""

    def __init__(self) -> None:
        super().__init__()
        self._pieces += [b".0000000000000000", b"e999", b"1" * 41, b"e10", b".5"]


def test_a_token_with_too_long_a_number_does_not_come() -> None:
    tokenizer = LongNumbers()
    matcher = Grammars(tokenizer, tokenizer.vocab_size).matcher(
        Constraint("json_schema", '{"type":"number"}')
    )
    first = ByteTokenizer().vocab_size
    matcher.accept(ord("1"))
    mask = matcher.mask()
    found = [t for t in range(first, tokenizer.vocab_size) if mask[t // 8] >> t % 8 & 1]
    assert [tokenizer.piece(token) for token in found] == [b"e10", b".5"]


# -- ending in time ------------------------------------------------------------------------------

ROWS = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            key: {"type": "string", "minLength": 3} for key in ("one", "two", "three", "four")
        },
        "required": ["one", "two", "three", "four"],
    },
    "minItems": 1,
}


def rambling(matcher: Matcher, seed: int, most: int) -> str | None:
    """As a small model writes: strings go on, and rather another item than an end."""
    draw = random.Random(seed)
    text = b""
    for left in reversed(range(most)):
        tokens = [t for t in allowed(matcher) if not TOKENIZER.is_end(t)]
        more = [t for t in tokens if TOKENIZER.piece(t)[:1] not in (b'"', b"}", b"]")]
        wanted = [t for t in tokens if TOKENIZER.piece(t) in (b",", b"{", b"[")]
        pool = wanted or more or tokens
        if ord('"') in tokens and draw.random() < 0.1:
            pool = [ord('"')]
        text += TOKENIZER.piece(matcher.accept(draw.choice(pool), left))
        if matcher.is_over:
            return text.decode()
    return None


@pytest.mark.parametrize("most", [75, 80, 120, 300, 700])
@pytest.mark.parametrize("seed", range(5))
def test_an_answer_that_rambles_is_closed_in_time(most: int, seed: int) -> None:
    matcher = matcher_of(ROWS)
    text = rambling(matcher, seed, most)
    assert text is not None
    assert matcher.closed_early
    jsonschema.validate(json.loads(text), ROWS)
    assert len(text.encode()) <= most * 7


def test_what_cannot_be_closed_in_time_is_not_hindered() -> None:
    matcher = matcher_of(ROWS)
    assert rambling(matcher, 1, 20) is None
    assert not matcher.closed_early


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^[a-z]+@[a-z]+[.][a-z]{2}$"},
        {"type": "string", "format": "email"},
        {"type": "string", "format": "uri"},
        {"type": "string", "format": "date-time"},
        {"type": "string", "minLength": 40},
        {"type": "integer", "multipleOf": 10, "minimum": 100},
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.01},
        {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 4},
        {"$ref": "#/$defs/t", "$defs": {"t": {"type": "object", "properties": {"l": {"anyOf": [
            {"$ref": "#/$defs/t"}, {"type": "null"}]}, "v": {"type": "number"}},
            "required": ["l", "v"]}}},
    ],
)  # fmt: skip
def test_every_form_has_a_way_to_its_end(schema: Any) -> None:
    for seed in range(5):
        rows = {"type": "array", "items": schema, "minItems": 1, "$defs": schema.get("$defs", {})}
        text = rambling(matcher_of(rows), seed, 150)
        assert text is not None
        jsonschema.validate(json.loads(text), rows)


def test_a_grammar_is_closed_in_time_too() -> None:
    arguments = '{"type":"object","properties":{"a":{"type":"string"}},"required":["a"]}'
    grammar = f'start: "<call>" %json {arguments} "</call>"\n'
    matcher = GRAMMARS.matcher(Constraint("lark", grammar))
    text = rambling(matcher, 3, 60)
    assert text is not None and matcher.closed_early
    assert isinstance(json.loads(text.removeprefix("<call>").removesuffix("</call>"))["a"], str)


def test_what_is_complete_is_not_followed_by_what_cannot_be() -> None:
    call = '"<call>" %json {"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]}'
    matcher = GRAMMARS.matcher(Constraint("lark", f'start: call+\ncall: {call} "</call>"\n'))
    text = b""
    for left in reversed(range(60)):
        tokens = [t for t in allowed(matcher) if not TOKENIZER.is_end(t)]
        tokens = [t for t in tokens if TOKENIZER.piece(t) == b"}"] or tokens  # numbers stay short
        token = matcher.accept(tokens[0], left)
        text += TOKENIZER.piece(token)
        if TOKENIZER.is_end(token):
            break
    assert matcher.is_over and matcher.closed_early
    assert text.count(b"<call>") == text.count(b"</call>") > 0


def test_free_text_is_cut_and_not_closed() -> None:
    matcher = GRAMMARS.matcher(Constraint("lark", "start: /(.|\\n)*/\n"))
    for left in reversed(range(20)):
        assert matcher.accept(ord("a"), left) == ord("a")
    assert not matcher.closed_early and not matcher.is_over


# -- random schemas ------------------------------------------------------------------------------

WORDS = st.sampled_from(["a", "b", "id", "näme", "x y"])
BOUND = st.integers(-200, 200) | st.floats(-50, 50).map(lambda x: round(x, 3))


@st.composite
def leaves(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["string", "pattern", "format", "number", "integer", "enum", "other"]))
    if kind == "string":
        return {
            "type": "string",
            "minLength": draw(st.integers(0, 4)),
            "maxLength": draw(st.integers(3, 9)),
        }
    if kind == "pattern":
        return {
            "type": "string",
            "pattern": draw(st.sampled_from(["^[a-z]{2,4}$", "[0-9]", "^(a|bc)*$", "^\\S+$"])),
        }
    if kind == "format":
        return {
            "type": "string",
            "format": draw(st.sampled_from(["date", "time", "ipv4", "email", "uuid"])),
        }
    if kind in ("number", "integer"):
        low, high = sorted([draw(BOUND), draw(BOUND)])
        names = draw(st.sampled_from([("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")]))
        found: dict[str, Any] = {"type": kind, names[0]: low, names[1]: high + 2}
        if draw(st.booleans()):
            del found[names[draw(st.integers(0, 1))]]
        if draw(st.booleans()):
            found["multipleOf"] = draw(st.sampled_from([1, 2, 7, 0.5, 0.25]))
        return found
    if kind == "enum":
        return {
            "enum": draw(
                st.lists(st.sampled_from([1, 2.5, "a", 'b\n"', None, True, [1], {"k": "v"}]), min_size=1)
            )
        }
    return draw(
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["integer", "null"]}, {}])
    )


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def build(properties: dict[str, Any], needed: list[str], others: Any) -> dict[str, Any]:
        found = {
            "type": "object",
            "properties": properties,
            "required": [k for k in needed if k in properties],
        }
        return found if others is None else {**found, "additionalProperties": others}

    others = st.none() | st.booleans() | inner
    return st.builds(
        build, st.dictionaries(WORDS, inner, max_size=3), st.lists(WORDS, max_size=3), others
    )


def arrays(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    plain = st.builds(
        lambda items, least, more: {
            "type": "array", "items": items, "minItems": least, "maxItems": least + more,
        },
        inner, st.integers(0, 2), st.integers(0, 3),
    )  # fmt: skip
    tuples = st.builds(
        lambda first, rest: {"type": "array", "prefixItems": first, "items": rest},
        st.lists(inner, min_size=1, max_size=3), st.just(False) | inner,
    )  # fmt: skip
    return plain | tuples


SCHEMAS = st.recursive(
    leaves(),
    lambda inner: (
        objects(inner)
        | arrays(inner)
        | st.lists(inner, min_size=1, max_size=3).map(lambda branches: {"anyOf": branches})
        | st.lists(inner, min_size=2, max_size=2).map(lambda branches: {"oneOf": branches})
        | st.tuples(objects(inner), objects(inner)).map(lambda pair: {"allOf": list(pair)})
    ),
    max_leaves=6,
)
# Of two formats, exactly one holds only for who looks at formats at all.
CHECKED = jsonschema.FormatChecker(["date", "ipv4", "email", "uuid"])


@CHECKED.checks("time", raises=ValueError)
def is_time(value: object) -> bool:
    return not isinstance(value, str) or bool(datetime.time.fromisoformat(value))


@given(SCHEMAS, st.integers(0, 2**32))
def test_answers_of_random_schemas_are_valid(schema: dict[str, Any], seed: int) -> None:
    try:
        matcher = matcher_of(schema)
    except ConstraintInvalid:
        assume(False)
    text = walk(matcher, seed)
    assert text is not None
    jsonschema.Draft202012Validator(schema, format_checker=CHECKED).validate(json.loads(text))


@given(SCHEMAS, st.integers(0, 2**31))
def test_answers_of_the_engine_are_valid_where_they_stop(schema: dict[str, Any], seed: int) -> None:
    request = held(schema, sampling=SamplingParams(temperature=1.5, seed=seed), max_tokens=120)
    driver = answer(request)
    ended = driver.end(1)
    if ended.error_type == "ConstraintInvalid":
        return
    assert ended.outcome == "finished", ended.error
    if ended.stats.finish_reason == "stop":
        validator = jsonschema.Draft202012Validator(schema, format_checker=CHECKED)
        validator.validate(json.loads(ended.stats.text))


# -- the engine ----------------------------------------------------------------------------------


def test_an_answer_is_held_to_its_schema_and_ends_without_a_step_for_the_end() -> None:
    driver = answer(held(PERSON), pinned('{"name":"Ada","age":36}'))
    stats = driver.stats(1)
    assert (driver.answer(1), stats.finish_reason) == ('{"name":"Ada","age":36}', "stop")
    assert stats.usage.completion_tokens == len('{"name":"Ada","age":36}')
    assert stats.warnings == []


def test_what_the_model_would_say_instead_is_not_said() -> None:
    driver = answer(held({"enum": ["yes", "no"]}), pinned("I think yes"))
    assert driver.answer(1) in ('"yes"', '"no"')
    assert driver.stats(1).finish_reason == "stop"


def test_max_tokens_ends_with_length_where_no_end_is_near() -> None:
    driver = answer(held(ROWS, max_tokens=10))
    assert driver.stats(1).finish_reason == "length"
    assert driver.stats(1).usage.completion_tokens == 10
    with pytest.raises(ValueError):
        json.loads(driver.answer(1))


def test_an_answer_closed_early_says_so() -> None:
    driver = answer(held(PERSON, max_tokens=40), pinned('{"name":"' + "a" * 200))
    stats = driver.stats(1)
    assert stats.finish_reason == "stop"
    assert stats.usage.completion_tokens <= 40
    assert stats.warnings == [CLOSED_EARLY]
    jsonschema.validate(json.loads(driver.answer(1)), PERSON)


def test_the_context_is_a_limit_too() -> None:
    driver = answer(held(PERSON, max_tokens=None), pinned('{"name":"' + "a" * 200), context=64)
    assert driver.stats(1).finish_reason == "stop"
    assert driver.stats(1).warnings == [CLOSED_EARLY]
    jsonschema.validate(json.loads(driver.answer(1)), PERSON)


def test_a_number_may_end_at_an_end_token_and_not_at_the_limit() -> None:
    driver = answer(held({"type": "integer"}), pinned("12"))
    assert (driver.answer(1), driver.stats(1).finish_reason) == ("12", "stop")
    driver = answer(held({"type": "integer"}, max_tokens=2), pinned("123"))
    assert (driver.answer(1), driver.stats(1).finish_reason) == ("12", "length")


def test_stop_strings_do_not_end_json() -> None:
    driver = answer(held(PERSON, stop=("Ada", "}")), pinned('{"name":"Ada","age":36}'))
    assert driver.answer(1) == '{"name":"Ada","age":36}'
    assert driver.stats(1).warnings == [NO_STOP_STRINGS]


def test_stop_strings_end_other_forms() -> None:
    request = Request(prompt="x", sampling=GREEDY, stop=("c",), constraint=Constraint("regex", "[a-z]+"))
    driver = answer(request, pinned("abcd"))
    assert (driver.answer(1), driver.stats(1).finish_reason) == ("ab", "stop")


@pytest.mark.parametrize(
    ("constraint", "said", "error"),
    [
        (Constraint("json_schema", '{"not":{}}'), "'not'", "ConstraintInvalid"),
        (Constraint("lark", "start: nothing\n"), "lark", "ConstraintInvalid"),
    ],
)
def test_a_request_with_a_wrong_constraint_fails_at_once(
    constraint: Constraint, said: str, error: str
) -> None:
    ended = answer(Request(prompt="x", constraint=constraint)).end(1)
    assert (ended.outcome, ended.error_type) == ("failed", error)
    assert said in ended.error


def test_without_token_masks_nothing_is_answered() -> None:
    ended = answer(held(PERSON), Script(without=("token_masks",))).end(1)
    assert (ended.outcome, ended.error_type) == ("failed", "BackendUnavailable")
    assert "no token masks" in ended.error


def test_a_grammar_that_fails_on_its_way_fails_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        """Says what llguidance says once it has given up."""

        def __init__(self, parser: Any) -> None:
            self._parser = parser

        def __getattr__(self, name: str) -> Any:
            return getattr(self._parser, name)

        def compute_bitmask(self) -> bytes:
            self._parser.consume_token(0)  # no JSON begins with it
            return bytes(40)

    make = Grammars.matcher

    def broken(self: Grammars, constraint: Constraint) -> Matcher:
        matcher = make(self, constraint)
        matcher._parser = Broken(matcher._parser)  # type: ignore[assignment]
        return matcher

    monkeypatch.setattr(Grammars, "matcher", broken)
    driver = answer(held(PERSON))
    ended = driver.end(1)
    assert (ended.outcome, ended.error_type) == ("failed", "RequestFailed")
    assert "could not be held to its form" in ended.error
    assert ended.stats.text == ""


def test_constrained_and_free_answers_run_side_by_side() -> None:
    engine = make_engine(sequences=3)
    driver = Driver(engine)
    alone = Driver(make_engine())
    free = Request(tokens=(97, 98, 99), sampling=GREEDY, max_tokens=30, ignore_eos=True)
    alone.submit(1, free)
    alone.run()
    driver.submit(1, free)
    for key in (2, 3):
        driver.submit(key, held(PERSON, prompt=None, tokens=(100 + key, 98), max_tokens=50))
    driver.run()
    assert driver.answer(1) == alone.answer(1)
    for key in (2, 3):
        jsonschema.validate(json.loads(driver.answer(key)), PERSON)


def test_a_matcher_made_before_is_used() -> None:
    driver = Driver(make_engine(pinned("12")))
    driver.events[1] = []
    request = held({"type": "string"})
    matcher = driver.engine.grammars.matcher(Constraint("json_schema", '{"type":"integer"}'))
    driver._keep(
        driver.engine.submit(
            1, request, TOKENIZER.encode("x", add_special=True, parse_special=True), matcher=matcher
        )
    )
    driver.run()
    assert driver.answer(1) == "12"


def test_logprobs_are_of_the_tokens_taken() -> None:
    driver = answer(held(PERSON, max_tokens=40, logprobs=0), pinned('{"name":"' + "a" * 200))
    told = [logprob for event in driver.events[1] for logprob in getattr(event, "logprobs", ())]
    assert "".join(each.token for each in told) == driver.answer(1)


def test_a_constraint_goes_over_the_wire() -> None:
    for constraint in (None, Constraint("json_object"), Constraint("regex", "ä+")):
        request = Request(prompt="x", stop=("b",), stop_before=("{",), constraint=constraint)
        wire = json.loads(json.dumps(request_to_wire(request)))
        assert request_from_wire(wire) == request


def test_ignoring_the_end_and_a_form_that_ends_do_not_go_together() -> None:
    with pytest.raises(UsageError, match="ignore_eos"):
        Request(prompt="x", ignore_eos=True, constraint=Constraint("json_object"))
