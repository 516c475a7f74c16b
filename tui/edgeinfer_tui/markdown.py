"""Markdown as chat models write it."""

from __future__ import annotations

from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore


def chat_parser() -> MarkdownIt:
    """GitHub's Markdown, with two differences.

    HTML is plain text: Textual shows no HTML block at all, and an answer must not lose lines. A single
    newline breaks the line: models mean it (addresses, verse, menus).
    """
    parser = MarkdownIt("gfm-like", {"html": False})
    parser.core.ruler.push("keep_line_breaks", _keep_line_breaks)
    return parser


def _keep_line_breaks(state: StateCore) -> None:
    for token in state.tokens:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
