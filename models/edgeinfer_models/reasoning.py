"""What a model thinks before it answers, told apart from the answer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from edgeinfer_models.chat_template import TemplateSource
from edgeinfer_models.lark_text import ANY_TEXT, LarkText, literal

_REGEX_SYNTAX = re.compile(r"([\\/.^$|?*+()\[\]{}&~#-])")


@dataclass(frozen=True)
class ReasoningTags:
    """open, close: around the reasoning. label: stands directly behind `open` and is no reasoning."""

    open: str
    close: str
    label: str = ""

    @property
    def visible_tokens(self) -> tuple[str, ...]:
        """Texts the detokenizer must give out even where they are control tokens."""
        return (self.open, self.close)

    def opened_by(self, prompt: str) -> bool:
        """Whether the rendered prompt has opened the reasoning, so that the answer begins in it."""
        return prompt.rstrip().endswith(self.open + self.label)


_KNOWN = (
    ReasoningTags("<think>", "</think>"),
    ReasoningTags("[THINK]", "[/THINK]"),
    ReasoningTags("<|channel>", "<channel|>", "thought"),
)


def reasoning_tags(template: TemplateSource) -> ReasoningTags | None:
    """The tags this template writes or looks for, or None for a model that answers at once."""
    return next(
        (tags for tags in _KNOWN if tags.close in template.text or tags.open in template.text), None
    )


@dataclass(frozen=True)
class ReasoningDelta:
    text: str


@dataclass(frozen=True)
class ContentDelta:
    text: str


class ReasoningParser:
    """One answer's text, split as it comes. Only what could be a tag's beginning is held back.

    opened: the prompt ended inside the reasoning (`ReasoningTags.opened_by`). Otherwise reasoning is
    what an answer begins with, if that is the opening tag; a tag further on is content. White space
    around the reasoning belongs to the tags and is left out. Text is never lost: an answer that ends
    without the closing tag was all reasoning.
    """

    def __init__(self, tags: ReasoningTags, *, opened: bool) -> None:
        self._opening = tags.open + tags.label
        self._close = tags.close
        self._place = "reasoning" if opened else "before"
        self._held = ""
        self._at_edge = opened  # nothing but white space so far in this part

    def feed(self, text: str) -> list[ReasoningDelta | ContentDelta]:
        self._held += text
        return self._decide(ended=False)

    def finish(self) -> list[ReasoningDelta | ContentDelta]:
        return self._decide(ended=True)

    @property
    def is_reasoning(self) -> bool:
        """Whether the answer is inside its reasoning now."""
        return self._place == "reasoning"

    def _decide(self, *, ended: bool) -> list[ReasoningDelta | ContentDelta]:
        out: list[ReasoningDelta | ContentDelta] = []
        if self._place == "before":
            begun = self._held.lstrip()
            if begun.startswith(self._opening):
                self._held = begun[len(self._opening) :]
                self._place, self._at_edge = "reasoning", True
            elif ended or not self._opening.startswith(begun):
                self._place = "content"
        if self._place == "reasoning":
            self._reason(out, ended)
        if self._place == "content":
            if self._at_edge:
                self._held = self._held.lstrip()
                self._at_edge = not self._held
            if self._held:
                out.append(ContentDelta(self._held))
                self._held = ""
        return out

    def _reason(self, out: list[ReasoningDelta | ContentDelta], ended: bool) -> None:
        if self._at_edge:
            self._held = self._held.lstrip()
            self._at_edge = not self._held
        end = self._held.find(self._close)
        if end >= 0:
            text, self._held = self._held[:end].rstrip(), self._held[end + len(self._close) :]
            self._place, self._at_edge = "content", True
        else:
            keep = 0 if ended else _beginning(self._held, self._close)
            text = self._held[: len(self._held) - keep]
            if not ended:
                text = text.rstrip()
            self._held = self._held[len(text) :]
        if text:
            out.append(ReasoningDelta(text))


def _beginning(text: str, tag: str) -> int:
    """Length of the longest end of `text` that `tag` begins with."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0)


def constrained_after_reasoning(
    grammar: str, tags: ReasoningTags, *, opened: bool, tokens: Mapping[str, int]
) -> str:
    """`grammar` for a model that may think first: free text between the tags, then `grammar`.

    grammar: as `lark_text` describes; also `start: %json {…}`. tokens: control tokens by text (see
    there).
    """
    rules = LarkText(tokens)
    thought = rules.up_to("thought", "THOUGHT", tags.close)
    rules.add("THOUGHT", ANY_TEXT)
    rules.add("AFTER_THOUGHT", r"/[ \t\r\n]{0,8}/")
    if opened:
        start = f"{thought} AFTER_THOUGHT answer"
    else:
        label = f"{literal(tags.label)} " if tags.label else ""
        start = f"answer | {rules.mark(tags.open)} {label}{thought} AFTER_THOUGHT answer"
        opening = _REGEX_SYNTAX.sub(r"\\\1", tags.open)
        # Or an answer that begins with the tag would be both free text and reasoning.
        lead = rf"/(.|\n)*/ & ~/[ \t\r\n]*{opening}(.|\n)*/"
        grammar = re.sub(r"(?m)^LEAD: .*$", lambda _: f"LEAD: {lead}", grammar)
    return rules.grammar(start) + re.sub(r"\Astart:", "answer:", grammar)
