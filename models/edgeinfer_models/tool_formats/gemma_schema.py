"""A JSON schema as a grammar of Gemma's notation."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from edgeinfer_models.lark_text import ANY_TEXT, LarkText, literal
from edgeinfer_models.tool_formats.schema_reading import (
    Property,
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
from edgeinfer_models.tool_formats.tools import MAX_SCHEMA_DEPTH, Tool

_PLAIN = ("number", "integer", "boolean", "null")
_OBJECT_KEYS = frozenset({"properties", "required", "additionalProperties"})
_ENDS_NAME = frozenset(":{}\n")  # what a property's name cannot have, which stands without quotes
_ARRAY_KEYS = frozenset({"items", "minItems", "maxItems"})


class GemmaSchema:
    """Adds the rules of one tool's arguments to `rules`. Where it cannot hold a schema any value of the
    notation may stand; for a strict tool that is ToolsInvalid."""

    def __init__(self, rules: LarkText, tool: Tool, quote: str, prefix: str) -> None:
        self._rules = rules
        self._tool = tool
        self._quote = quote
        self._prefix = prefix
        self._root = tool.parameters
        self._num_objects = 0
        self._depth = 0
        self._names: dict[str, str] = {}  # schema, as text -> its rule: also what ends a recursion

    def arguments(self) -> str:
        """The name of the rule for the whole `{…}`."""
        return self._value({"type": "object", **self._root}, ())

    def _value(self, schema: Any, path: tuple[str, ...]) -> str:
        self._hold(lost_beside_reference(schema, self._root), path)
        schema = resolve(schema, self._root)
        if not isinstance(schema, Mapping):
            return self._any(path, "any value")
        key = json.dumps(schema, sort_keys=True)
        if key not in self._names:
            if self._depth == MAX_SCHEMA_DEPTH:  # of references: the text is not nested deeper
                return self._any(path, "$ref")
            self._names[key] = f"{self._prefix}_{len(self._names)}"
            self._depth += 1
            self._rules.add(self._names[key], self._body(schema, path))
            self._depth -= 1
        return self._names[key]

    def _body(self, schema: Mapping[str, Any], path: tuple[str, ...]) -> str:
        values = listed_values(schema)
        if values is not None:
            listed = "const" if "const" in schema else "enum"
            self._hold(says_more(schema, frozenset({listed})), path)
            if not all(self._can_write(value) for value in values):
                return self._any(path, listed)
            return " | ".join(self._constant(value) for value in values) or self._any(path, "enum")
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), list) and says_more(schema, frozenset({key})) is None:
                self._hold("type" if "type" in schema else None, path)
                return " | ".join(self._value(each, path) for each in schema[key]) or self._any(
                    path, key
                )
        if "allOf" in schema or "anyOf" in schema or "oneOf" in schema or "not" in schema:
            return self._any(path, next(k for k in ("allOf", "anyOf", "oneOf", "not") if k in schema))
        types = types_of(schema, self._root)
        if "type" not in schema and len(types) > 1:
            return self._any(path, "any value")
        return " | ".join(self._of_type(each, schema, path) for each in sorted(types))

    def _of_type(self, kind: str, schema: Mapping[str, Any], path: tuple[str, ...]) -> str:
        rules = self._rules
        if kind == "string":
            self._hold(says_more(schema), path)
            return self._string()
        if kind in _PLAIN:
            # Numbers and words are those of JSON, bounds included.
            one = {**schema, "type": kind}
            name = f"{self._names[json.dumps(schema, sort_keys=True)]}_{kind}"
            return rules.add(name, f"%json {inner_json(one, self._tool, *path)}")
        if kind == "array":
            self._hold(says_more(schema, _ARRAY_KEYS), path)
            return self._array(schema, path)
        if kind == "object":
            return self._object(schema, path)
        return self._any(path, "type")

    def _array(self, schema: Mapping[str, Any], path: tuple[str, ...]) -> str:
        item = self._value(schema.get("items", True), path)
        least, most = _count(schema.get("minItems")) or 0, _count(schema.get("maxItems"))
        if most == 0:
            return '"[]"'
        upper = "" if most is None else max(most, least) - 1
        some = f'"[" {item} ("," {item}){{{max(least - 1, 0)},{upper}}} "]"'
        return some if least else f'{some} | "[]"'

    def _object(self, schema: Mapping[str, Any], path: tuple[str, ...]) -> str:
        shape = shape_of(
            schema, place(self._tool, *path), strict=self._tool.strict, is_outermost=not path
        )
        # As jinja2's dictsort, which is what the templates use.
        ordered = sorted(shape.properties, key=lambda each: each.name.lower())
        others = shape.others
        if others is not None:
            self._hold("additionalProperties" if ordered else None, path)
            if not ordered:
                return self._map(self._value(others, path))
        return f'"{{" {self._sequence(ordered, path)} "}}"' if ordered else '"{}"'

    def _sequence(self, properties: Sequence[Property], path: tuple[str, ...]) -> str:
        """Properties in order, with commas between those that are there."""
        rules = self._rules
        base = f"{self._prefix}_object_{self._num_objects}"
        self._num_objects += 1
        for index, each in enumerate(properties):
            if not self._is_name(each.name):
                raise unsupported(place(self._tool, *path, each.name), "properties")
            inner = self._value(each.schema, (*path, each.name))
            pair = rules.add(f"{base}_pair_{index}", f"{literal(each.name + ':')} {inner}")
            is_last = index == len(properties) - 1
            later = "" if is_last else f" {base}_later_{index + 1}"
            without = '""' if is_last else f"{base}_first_{index + 1}"
            rules.add(
                f"{base}_first_{index}", f"{pair}{later}" + ("" if each.is_required else f" | {without}")
            )
            further = f'"," {pair}' if each.is_required else f'("," {pair})?'
            rules.add(f"{base}_later_{index}", f"{further}{later}")
        return f"{base}_first_0"

    def _map(self, value: str) -> str:
        key = self._key()
        return f'"{{" ({key} ":" {value} ("," {key} ":" {value})*)? "}}"'

    def _is_name(self, name: str) -> bool:
        """Whether it is read as it is written: not cut, and nothing taken off its ends."""
        plain = name.removeprefix(self._quote).removesuffix(self._quote).strip('" ')
        return name == plain and 0 < len(name) <= 128 and not _ENDS_NAME & set(name)

    def _can_write(self, value: Any) -> bool:
        if isinstance(value, Mapping):
            return all(self._is_name(str(key)) and self._can_write(value[key]) for key in value)
        if isinstance(value, list):
            return all(self._can_write(each) for each in value)
        return not isinstance(value, str) or self._quote not in value

    def _constant(self, value: Any) -> str:
        if isinstance(value, str):
            quote = self._rules.mark(self._quote)
            return f"{quote} {literal(value)} {quote}" if value else f"{quote} {quote}"
        if isinstance(value, Mapping):
            inner = ' "," '.join(
                f"{literal(str(key) + ':')} {self._constant(value[key])}"
                for key in sorted(value, key=lambda key: str(key).lower())
            )
            return f'"{{" {inner} "}}"'
        if isinstance(value, list):
            return '"[" ' + ' "," '.join(self._constant(each) for each in value) + ' "]"'
        return literal(json.dumps(value))

    def _string(self) -> str:
        rules = self._rules
        if not rules.has("gemma_string"):
            rules.add("STRING", ANY_TEXT)
            ended = rules.up_to("gemma_string_rest", "STRING", self._quote)
            rules.add("gemma_string", f"{rules.mark(self._quote)} {ended}")
        return "gemma_string"

    def _key(self) -> str:
        if not self._rules.has("KEY"):
            self._rules.add("KEY", r'/[^:{}<\[\]|," \n]{1,128}/')
        return "KEY"

    def _any(self, path: tuple[str, ...], keyword: str) -> str:
        if self._tool.strict:
            raise unsupported(place(self._tool, *path), keyword)
        rules = self._rules
        if not rules.has("gemma_any"):
            plain = json.dumps({"type": list(_PLAIN), "x-guidance": {"whitespace_flexible": False}})
            rules.add("gemma_plain", f"%json {plain}")
            items = '"[" (gemma_any ("," gemma_any)*)? "]"'
            rules.add(
                "gemma_any", f"{self._string()} | gemma_plain | {items} | {self._map('gemma_any')}"
            )
        return "gemma_any"

    def _hold(self, keyword: str | None, path: tuple[str, ...]) -> None:
        """A keyword this notation is not held to: an error for a strict tool."""
        if keyword and self._tool.strict:
            raise unsupported(place(self._tool, *path), keyword)


def _count(value: Any) -> int | None:
    return max(int(value), 0) if isinstance(value, int | float) and math.isfinite(value) else None
