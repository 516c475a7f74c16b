"""The tools of a request and how they may be used, checked. What a client sends is untrusted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from edgeinfer.errors import ToolsInvalid
from edgeinfer_models.tool_formats.held_schema import SchemaCheck, held_json

MAX_TOOLS = 128
MAX_SCHEMA_DEPTH = 64
MAX_SCHEMA_PARTS = 30_000  # of all tools together: it bounds the work of checking them
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


@dataclass(frozen=True)
class Tool:
    """parameters: a JSON schema whose type is object. strict: keywords the grammar cannot hold are an
    error; otherwise they are left out of it. check: see `held_schema`."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    strict: bool = False
    check: SchemaCheck | None = field(default=None, repr=False, compare=False)

    def for_template(self) -> dict[str, Any]:
        """The form chat templates expect."""
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": dict(self.parameters),
        }
        return {"type": "function", "function": function}

    def verify(self) -> None:
        """Raises ConstraintInvalid for a strict schema that no form of calls can be held to."""
        if self.strict:
            self.arguments_json()

    def arguments_json(self) -> str:
        """What a grammar's `%json` holds the arguments to. Raises ConstraintInvalid if strict.

        Properties that the schema does not name are left out where it says nothing about them: a small
        model fills them with anything.
        """
        schema = dict(self.parameters)
        schema.setdefault("type", "object")
        open_ended = {
            "additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames",
            "minProperties", "anyOf", "oneOf", "allOf", "$ref", "if", "dependentSchemas",
        }  # fmt: skip
        required = schema.get("required", ())
        if not open_ended & schema.keys() and set(required) <= set(schema.get("properties", {})):
            schema["additionalProperties"] = False
        return held_json(schema, f"tool '{self.name}'", strict=self.strict, check=self.check)


@dataclass(frozen=True)
class ToolChoice:
    """Whether the answer may, must or must not be a call. `name` for kind "named" only."""

    kind: Literal["none", "auto", "required", "named"]
    name: str = ""

    def select(self, tools: Sequence[Tool]) -> tuple[Tool, ...]:
        """The tools that may be called."""
        if self.kind == "none":
            return ()
        return tuple(tool for tool in tools if self.kind != "named" or tool.name == self.name)


def parse_tools(value: Any, check: SchemaCheck | None = None) -> tuple[Tool, ...]:
    """OpenAI's `tools`. check: for their schemas, when a grammar is made. Raises ToolsInvalid."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ToolsInvalid("tools: must be a list")
    if len(value) > MAX_TOOLS:
        raise ToolsInvalid(f"tools: {len(value):,} tools where at most {MAX_TOOLS} are allowed")
    tools = []
    num_parts = 0
    for index, item in enumerate(value):
        tools.append(_parse_tool(item, f"tools[{index}]", check))
        num_parts += _num_parts(
            tools[-1].parameters, f"tools[{index}]: the parameters of '{tools[-1].name}'"
        )
        if num_parts > MAX_SCHEMA_PARTS:
            raise ToolsInvalid(f"tools: their schemas have more than {MAX_SCHEMA_PARTS:,} parts in all")
    names: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.name in names:
            raise ToolsInvalid(f"tools[{index}]: the name '{tool.name}' is taken; names must differ")
        names.add(tool.name)
    return tuple(tools)


def parse_tool_choice(value: Any, tools: Sequence[Tool]) -> ToolChoice:
    """OpenAI's `tool_choice`; left out it is auto where there are tools. Raises ToolsInvalid."""
    if value is None:
        return ToolChoice("auto" if tools else "none")
    if value == "none":
        return ToolChoice("none")
    if value in ("auto", "required"):
        if not tools and value == "required":
            raise ToolsInvalid("tool_choice: 'required' needs tools to choose from")
        return ToolChoice("required" if value == "required" else "auto") if tools else ToolChoice("none")
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or value.get("type", "function") != "function":
        raise ToolsInvalid(
            "tool_choice: must be 'none', 'auto', 'required' or"
            ' {"type": "function", "function": {"name": …}}'
        )
    if all(tool.name != name for tool in tools):
        raise ToolsInvalid(f"tool_choice: there is no tool named '{name}'")
    return ToolChoice("named", name)


def _parse_tool(value: Any, where: str, check: SchemaCheck | None) -> Tool:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(value, dict) or value.get("type") != "function" or not isinstance(function, dict):
        raise ToolsInvalid(f'{where}: must be {{"type": "function", "function": {{…}}}}')
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ToolsInvalid(f"{where}: its name must be 1 to 64 letters, digits, '_', '-' or '.'")
    if description is not None and not isinstance(description, str):
        raise ToolsInvalid(f"{where}: the description of '{name}' must be text")
    strict = function.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise ToolsInvalid(f"{where}: strict of '{name}' must be true or false")
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if isinstance(parameters, dict):  # clients send null for what they leave out
        parameters = {
            key: found
            for key, found in parameters.items()
            if found is not None or key not in ("properties", "required")
        }
    _check_parameters(parameters, f"{where}: the parameters of '{name}'")
    return Tool(name, description or "", parameters, bool(strict), check)


def _check_parameters(schema: Any, where: str) -> None:
    if not isinstance(schema, dict):
        raise ToolsInvalid(f"{where} must be a JSON schema object")
    if schema.get("type", "object") != "object":
        raise ToolsInvalid(f"{where} must have the type 'object'")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict):
        raise ToolsInvalid(f"{where}: 'properties' must be an object")
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise ToolsInvalid(f"{where}: 'required' must be a list of names")


def _num_parts(schema: Any, where: str) -> int:
    # Not recursive: this is what bounds the depth for everything that is.
    pending, num_parts = [(schema, 1)], 0
    while pending:
        part, depth = pending.pop()
        num_parts += 1
        if depth > MAX_SCHEMA_DEPTH:
            raise ToolsInvalid(f"{where} are nested deeper than {MAX_SCHEMA_DEPTH} levels")
        if num_parts > MAX_SCHEMA_PARTS:
            return num_parts
        inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        pending.extend((each, depth + 1) for each in inner)
    return num_parts
