"""Calls written as JSON objects: what reading them has in common, whatever stands around them."""

from __future__ import annotations

import json
from collections.abc import Generator

from edgeinfer_models.json_text import is_json
from edgeinfer_models.lark_text import LarkText
from edgeinfer_models.tool_formats.call_text import CallText, NotACall, Reading

_ARGUMENTS = ("arguments", "parameters")
_MAX_KEY = 64
OPENING = '{"name": "'


def bare_call(rules: LarkText) -> str:
    """Adds the rule for what begins a call that nothing stands around, up to its name's quote.

    An answer may be other JSON: only what begins like this is held to be a call, and read as one.
    """
    blank = r"[ \t\r\n]*"
    kind = rf'("type"{blank}:{blank}"function"{blank},{blank})?'
    rules.add("BARE", rf'/{blank}\{{{blank}{kind}"name"{blank}:{blank}"/')
    return rules.add("bare[lazy]", "BARE")


def read_json_calls(source: CallText) -> Reading:
    """One call, or a list of them, or several that only white space, `,` or `;` separates."""
    yield from source.blanks()
    if (yield from source.optional("[")):
        while True:
            yield from source.blanks()
            yield from read_json_call(source)
            yield from source.blanks()
            if (yield from source.one_of((",", "]"))) == "]":
                break
        source.mark()
        return
    while True:
        yield from read_json_call(source)
        yield from source.blanks()
        if (yield from source.peek()) in (";", ","):
            source.skip(1)
            yield from source.blanks()
        elif (yield from source.peek()) != "{":
            source.reread()  # white space may belong to the text that follows
            return


def read_json_call(source: CallText, *, is_inner: bool = False) -> Reading:
    """`{"name": …, "arguments": {…}}`; keys in any order, `parameters` for `arguments`, also inside
    `{"type": "function", "function": {…}}`. Without arguments they are `{}`."""
    yield from source.literal("{")
    name = ""
    held: list[str] = []  # arguments that came before the name
    is_done = False
    yield from source.blanks()
    is_last = yield from source.optional("}")
    while not is_last:
        key = yield from _short_string(source)
        yield from source.blanks()
        yield from source.literal(":")
        yield from source.blanks()
        if key == "function" and not (name or is_inner) and (yield from source.peek()) == "{":
            yield from read_json_call(source, is_inner=True)
            name, is_done = "function", True
        elif key in ("name", "function") and not name:
            name = yield from _short_string(source)
            if name not in source.names:
                raise NotACall
            if held:
                _give_at_once(source, name, held)
                is_done = True
        elif key in _ARGUMENTS and not is_done and not held:
            if name:
                yield from _arguments(source, name)
                is_done = True
            else:
                yield from source.json(held.append)
        elif key in ("id", "type", "index"):
            yield from source.json(lambda _: None)
        else:
            raise NotACall
        yield from source.blanks()
        is_last = (yield from source.one_of((",", "}"))) == "}"
        if not is_last:
            yield from source.blanks()
    if not name:
        raise NotACall
    if not is_done:
        _give_at_once(source, name, ["{}"])
    source.mark()


def read_bare_calls(key: str, source: CallText) -> Reading:
    """Calls that nothing stands around, with white space or `;` between them. Only as the grammar of a
    free answer holds them: any other JSON is the answer's text."""
    while True:
        yield from _bare_call(source, key)
        yield from source.blanks()
        if (yield from source.optional(";")):
            yield from source.blanks()
        elif (yield from source.peek()) != "{":
            source.reread()
            return


def _bare_call(source: CallText, key: str) -> Reading:
    yield from source.literal("{")
    yield from source.blanks()
    if (yield from source.one_of(('"type"', '"name"'))) == '"type"':
        for part in (":", '"function"', ",", '"name"'):
            yield from source.blanks()
            yield from source.literal(part)
    yield from source.blanks()
    yield from source.literal(":")
    yield from source.blanks()
    name = yield from _short_string(source)
    if name not in source.names:
        raise NotACall
    for part in (",", f'"{key}"', ":"):
        yield from source.blanks()
        yield from source.literal(part)
    yield from source.blanks()
    if (yield from source.peek()) != "{":
        raise NotACall
    yield from _arguments(source, name)
    yield from source.blanks()
    yield from source.literal("}")
    source.mark()


def _short_string(source: CallText) -> Generator[None, None, str]:
    if (yield from source.peek()) != '"':
        raise NotACall
    source.skip(1)
    text = yield from source.span('"\\\\', _MAX_KEY)
    yield from source.literal('"')
    return text


def _arguments(source: CallText, name: str) -> Reading:
    if (yield from source.peek()) == "{":
        source.start(name)
        yield from source.json(source.arguments)
        source.end_call()
        return
    held: list[str] = []
    yield from source.json(held.append)
    _give_at_once(source, name, held)


def _give_at_once(source: CallText, name: str, pieces: list[str]) -> None:
    """Arguments that had to be held: before the name, or no object (null, or JSON text in a string)."""
    text = "".join(pieces).strip()
    if text == "null":
        text = "{}"
    elif text.startswith('"'):
        text = json.loads(text).strip() or "{}"
        if not is_json(text):
            raise NotACall
    if not text.startswith("{"):
        raise NotACall
    source.start(name)
    source.arguments(text)
    source.end_call()
