"""How models are told about tools and how they write their calls, one file for each family.

format = choose_tool_format(template)                 # from the model's chat template
messages, shown = format.prepare(messages, tools, choice)
grammar = format.grammar(tools, choice, parallel=…, tokens=…)
parser = format.parser(tools)                         # feed() and finish() give deltas
"""

from __future__ import annotations

import importlib
import re

from edgeinfer_models.chat_template import TemplateSource
from edgeinfer_models.tool_formats.call_text import (
    ArgumentsDelta,
    CallEnded,
    CallStarted,
    Delta,
    TextDelta,
)
from edgeinfer_models.tool_formats.format import ToolFormat
from edgeinfer_models.tool_formats.parsing import ToolParser
from edgeinfer_models.tool_formats.tools import Tool, ToolChoice, parse_tool_choice, parse_tools

__all__ = [
    "FAMILIES",
    "ArgumentsDelta",
    "CallEnded",
    "CallStarted",
    "Delta",
    "TextDelta",
    "Tool",
    "ToolChoice",
    "ToolFormat",
    "ToolParser",
    "choose_tool_format",
    "parse_tool_choice",
    "parse_tools",
]

# Modules of this package, asked in this order: a template may also show the marks of a later one.
FAMILIES = ("gemma", "mistral", "qwen_coder", "hermes", "llama", "generic")


def choose_tool_format(template: TemplateSource) -> ToolFormat:
    """The family whose marks the template writes; generic if it knows no tools or none of these."""
    knows_tools = re.search(r"\btools\b", template.text) is not None
    for name in FAMILIES if knows_tools else ("generic",):
        found = importlib.import_module(f"{__name__}.{name}").match(template.text)
        if isinstance(found, ToolFormat):
            return found
    raise AssertionError("generic matches every template")
