"""JSON as it comes: passed on at once, and never anything that is none."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeinfer_models.json_text import MAX_DEPTH, JsonText, is_json

_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


def is_value(text: str) -> bool:
    try:
        json.loads(text, parse_constant=lambda _: 1 / 0)
    except (ValueError, ZeroDivisionError):
        return False
    return True


@given(value=_VALUES, indent=st.sampled_from([None, 1]), is_ascii=st.booleans())
def test_any_value_passes_unchanged_character_by_character(
    value: Any, indent: Any, is_ascii: bool
) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=is_ascii)
    reader, out = JsonText(), ""
    for character in text:
        end, piece = reader.feed(character)
        assert end == 1
        out += piece
    reader.finish()
    assert reader.done
    assert out == text


@given(text=st.text(alphabet='{}[]",:0123456789.eE+-truefalsn\\u \n\x01', max_size=12))
def test_it_agrees_with_pythons_reader(text: str) -> None:
    if "\x01" in text or "\n" in text:
        assert not is_json(text) or is_value(text)
    else:
        assert is_json(text) == is_value(text)


@pytest.mark.parametrize(
    "text",
    ["01", "1.", ".5", "-", "1e", "+1", "tru", "nul", "NaN", "[1,]", '{"a"}', "{,}", '"\\x"', "]", ""],
)
def test_what_is_no_json_is_broken(text: str) -> None:
    assert not is_json(text)


def test_it_stops_where_the_value_ends() -> None:
    reader = JsonText()
    assert reader.feed('{"a": [1]} and more') == (10, '{"a": [1]}')
    assert reader.done


def test_it_stops_at_the_character_that_breaks_it() -> None:
    reader = JsonText()
    assert reader.feed('{"a": oops') == (6, '{"a": ')
    assert reader.broken


def test_control_characters_in_strings_come_out_escaped() -> None:
    reader = JsonText()
    _, out = reader.feed('"a\nb\x01"')
    assert out == '"a\\nb\\u0001"'
    assert reader.done


def test_depth_is_bounded() -> None:
    assert is_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert not is_json("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))
