"""Qwen3-Coder, Qwen 3.5 and others: tags for each parameter, strings as they are.

<tool_call>
<function=write_file>
<parameter=path>
notes.txt
</parameter>
<parameter=lines>
["one", "two"]
</parameter>
</function>
</tool_call>

A string begins after one line break and ends before one. Which parameters are strings only the schema
says; the others are JSON. Some models leave the outer tags out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from edgeinfer_models.json_text import is_json
from edgeinfer_models.lark_text import ANY_TEXT, LarkText, literal
from edgeinfer_models.tool_formats.call_text import CallText, Reading
from edgeinfer_models.tool_formats.format import CallRules, ToolFormat
from edgeinfer_models.tool_formats.parsing import Reader
from edgeinfer_models.tool_formats.schema_reading import (
    inner_json,
    listed_values,
    lost_beside_reference,
    place,
    resolve,
    says_more,
    shape_of,
    types_of,
    unsupported,
)
from edgeinfer_models.tool_formats.tools import Tool

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
_MAX_OTHERS = 32
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}


class QwenCoder(ToolFormat):
    name = "qwen_coder"
    visible_tokens = (OPEN, CLOSE)

    def _calls(self, rules: LarkText, tools: Sequence[Tool], several: bool) -> CallRules:
        functions = [_function(rules, tool, number) for number, tool in enumerate(tools)]
        function = rules.add("function", " | ".join(functions))
        rules.add("tagged", f"WS {literal(FUNCTION)} {function} WS {rules.mark(CLOSE)}")
        forced = f"{rules.mark(OPEN)} tagged"
        led, bare = rules.up_to("led", "LEAD", OPEN), rules.up_to("bare", "LEAD", FUNCTION)
        ways = (f"{led} tagged", f"{bare} {function} (WS {rules.mark(CLOSE)})?")
        return CallRules(forced, ways, following=f"WS {forced}")

    def _reader(self, tools: Sequence[Tool]) -> Reader:
        schemas = {tool.name: tool.parameters for tool in tools}
        return Reader(partial(_read, schemas), (OPEN, FUNCTION), starts=(FUNCTION,))


# -- grammar -----------------------------------------------------------------------------------------


def _function(rules: LarkText, tool: Tool, number: int) -> str:
    shape = shape_of(tool.parameters, place(tool), strict=tool.strict)
    parts = [literal(f"{tool.name}>\n")]
    for index, each in enumerate(shape.properties):
        if ">" in each.name or "\n" in each.name:
            raise unsupported(place(tool, each.name), "properties")
        value = _value(rules, each.schema, tool, each.name, f"{number}_{index}")
        begin = literal(f"{PARAMETER}{each.name}>\n")
        parts.append(f"{begin} {value}" if each.is_required else f"({begin} {value})?")
    if shape.others is not None and not tool.strict:
        if not rules.has("KEY"):
            rules.add("KEY", r"/[^<>\n]{1,128}/")
        other = f'{literal(PARAMETER)} KEY ">\\n" {_free_text(rules)} "\\n"'
        parts.append(f"({other}){{0,{_MAX_OTHERS}}}")
    elif shape.others is not None:
        raise unsupported(place(tool), "additionalProperties")
    return rules.add(f"function_{number}", f"{' '.join(parts)} {literal(FUNCTION_END)}")


def _value(rules: LarkText, schema: Any, tool: Tool, name: str, rule: str) -> str:
    root = tool.parameters
    resolved = resolve(schema, root)
    end = literal(f"\n{PARAMETER_END}\n")
    lost = lost_beside_reference(schema, root)
    values = listed_values(resolved) if isinstance(resolved, Mapping) else None
    if values is not None:
        listed = "const" if "const" in resolved else "enum"
        lost = lost or says_more(resolved, frozenset({listed}))
        if tool.strict and lost:
            raise unsupported(place(tool, name), lost)
        texts = [each if isinstance(each, str) else json.dumps(each) for each in values]
        if any(PARAMETER_END in text for text in texts):
            raise unsupported(place(tool, name), listed)
        return f"({' | '.join(literal(text) for text in texts)}) {end}"
    if "string" not in types_of(schema, root):
        value = rules.add(f"value_{rule}", f"%json {inner_json(schema, tool, name)}")
        return f"{value} {end}"
    if tool.strict and (more := lost or _says_more(resolved, root)):
        raise unsupported(place(tool, name), more)
    return f'{_free_text(rules)} "\\n"'


def _says_more(schema: Any, root: Mapping[str, Any]) -> str | None:
    """A keyword that free text cannot be held to. Alternatives of plain types are no such keyword."""
    if more := says_more(schema, frozenset({"anyOf"})):
        return more
    alternatives = schema.get("anyOf", []) if isinstance(schema, Mapping) else []
    plain = [resolve(each, root) for each in alternatives] if isinstance(alternatives, list) else []
    return next((more for each in plain if (more := says_more(each))), None)


def _free_text(rules: LarkText) -> str:
    if not rules.has("text"):
        rules.add("text[lazy]", f"TEXT {literal(PARAMETER_END)}")
        rules.add("TEXT", ANY_TEXT)
    return "text"


# -- reading -----------------------------------------------------------------------------------------


def _read(schemas: Mapping[str, Mapping[str, Any]], source: CallText) -> Reading:
    yield from source.blanks()
    yield from source.optional(FUNCTION)  # otherwise it was the trigger
    name = yield from source.span(">\n", 64)
    yield from source.literal(">")
    source.start(name)
    source.arguments("{")
    separator = ""
    while True:
        yield from source.blanks()
        if (yield from source.one_of((PARAMETER, FUNCTION_END))) == FUNCTION_END:
            break
        key = yield from source.span(">\n", 256)
        yield from source.literal(">")
        source.arguments(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
        yield from _read_value(source, schemas[name], key)
        separator = ", "
    source.arguments("}")
    source.end_call()
    yield from source.blanks()
    if (yield from source.optional(CLOSE)):
        source.mark()
    source.reread()


def _read_value(source: CallText, root: Mapping[str, Any], key: str) -> Reading:
    properties = root.get("properties")
    schema = properties.get(key, True) if isinstance(properties, Mapping) else True
    types = types_of(schema, root)
    yield from source.optional("\n")
    stops = (f"\n{PARAMETER_END}", PARAMETER_END)
    if types == {"string"}:
        source.arguments('"')
        yield from source.until(stops, lambda text: source.arguments(_escaped(text)))
        source.arguments('"')
        return
    pieces: list[str] = []
    yield from source.until(stops, pieces.append)
    source.arguments(_as_json("".join(pieces), types))


def _as_json(text: str, types: frozenset[str]) -> str:
    """A parameter's text as JSON of one of `types`; as a string where it is none."""
    value = text.strip()
    value = _PYTHON_WORDS.get(value, value)
    if is_json(value) and ("string" not in types or _kinds(value) & types):
        return value
    return f'"{_escaped(text)}"'


def _kinds(value: str) -> frozenset[str]:
    """The types of a JSON value that is no string. (Not by reading it: Python refuses long integers.)"""
    if value[0] in "-0123456789":
        return frozenset({"number"} if set(value) & set(".eE") else {"number", "integer"})
    names = {"{": "object", "[": "array", "t": "boolean", "f": "boolean", "n": "null"}
    return frozenset({names[value[0]]} if value[0] in names else ())


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def match(template: str) -> ToolFormat | None:
    return QwenCoder() if FUNCTION in template and PARAMETER in template else None
