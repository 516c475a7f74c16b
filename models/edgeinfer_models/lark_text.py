"""Grammars as text, in llguidance's dialect of Lark, and how a vocabulary's own tokens stand in them.

A control token has no text: `"<tool_call>"` in a grammar never means it, only `<[id]>` does. In another
vocabulary the same words are ordinary text. `tokens` says which are which: text -> id, for the
texts that this vocabulary has as control tokens. Both spellings are always allowed.

Contract with `reasoning.constrained_after_reasoning`: the first rule is `start`, on a line of its own,
and free text that an answer may begin with is the terminal LEAD.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from edgeinfer.errors import ToolsInvalid

# What `edgeinfer.constraint` takes, less what a thought before the answer takes.
MAX_GRAMMAR_BYTES = 255 * 1024
ANY_TEXT = r"/(.|\n)*/"


def literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


class LarkText:
    """A grammar under construction."""

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self._tokens = tokens
        self._rules: dict[str, str] = {}
        self._num_bytes = 0

    def add(self, name: str, body: str) -> str:
        """Defines a rule (lowercase) or terminal (uppercase) and returns its name. ToolsInvalid if they
        are too much together: tools are the only part whose size others set."""
        plain_name = name.partition("[")[0]  # without options such as [lazy]
        assert plain_name not in self._rules, f"{plain_name} is defined twice"  # noqa: S101
        self._rules[plain_name] = f"{name}: {body}"
        self._num_bytes += len(self._rules[plain_name].encode("utf-8", "replace")) + 1
        if self._num_bytes > MAX_GRAMMAR_BYTES:
            raise ToolsInvalid(
                f"tools: the form of their calls takes more than {MAX_GRAMMAR_BYTES:,} bytes; send fewer"
                " tools, or smaller schemas"
            )
        return plain_name

    def has(self, name: str) -> bool:
        return name in self._rules

    def mark(self, text: str) -> str:
        """An expression for `text`, be it one control token or ordinary text."""
        token = self._tokens.get(text)
        return literal(text) if token is None else f"({literal(text)} | <[{token}]>)"

    def up_to(self, name: str, terminal: str, text: str) -> str:
        """Adds the rule `name`: `terminal`, free text, up to and with the first `text`."""
        lazy = self.add(f"{name}_text[lazy]", f"{terminal} {literal(text)}")
        token = self._tokens.get(text)
        return self.add(name, lazy if token is None else f"{lazy} | {terminal} <[{token}]>")

    def grammar(self, start: str) -> str:
        return "\n".join([f"start: {start}", *self._rules.values()]) + "\n"
