"""How the texts begin that a model writes to learn from.

A chat begins inside a user's turn: the model writes the question too, as it saw many in its training,
then the answer ("Magpie", Xu et al. 2024, arXiv:2406.08464). A few first words and system prompts make
it ask for what people ask for. Plain texts begin with a few lines of Python's own library and its
documentation, which every machine has that runs this."""

from __future__ import annotations

import os
import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeinfer.errors import EdgeInferError, UnsupportedModel
from edgeinfer.exits import Opening, Turns
from edgeinfer_models.tokenizer import Tokenizer

GROUPS = ("chat", "code", "source", "prose")
_SHARES = (0.50, 0.25, 0.15, 0.10)  # of all texts
_TEMPERATURES = ((0.0, 0.15), (0.5, 0.30), (0.8, 0.35), (1.0, 0.20))
HELD_OUT_TEMPERATURES = (0.8, 0.0)
_HELD_OUT_FILES = 8  # every so-many-th file is for texts that are held out, and for no others
_PLAIN_TOKENS = (32, 96)  # of a plain text's beginning
_MOST_FILES = 800
_MARKS = ("qz7first", "qz7second", "qz7third")
SYSTEM_PROMPTS = (
    "",
    "",
    "You are a helpful assistant.",
    "You are a friendly teacher who explains things step by step.",
    "Answer briefly and to the point.",
    "You are a creative writer.",
    "You help people with their everyday work: e-mails, summaries, plans and lists.",
)
CODE_SYSTEM_PROMPTS = (
    "",
    "You are an expert programmer. Answer with code and a short explanation.",
    "You are a helpful assistant who writes clean Python.",
)
FIRST_WORDS = (
    "What is", "What are the", "How do I", "How can", "Why", "Who was", "When did", "Where", "Can you",
    "Could you explain", "Explain", "Describe", "Tell me about", "Tell me a story about",
    "Write a short", "Write a poem about", "Write an e-mail to", "Write a letter",
    "Summarize the following text:", "Rewrite this paragraph", "Rewrite the following sentence so that",
    "Make this text shorter:", "Correct the grammar:", "Translate", "List five", "List the",
    "Give me a list of", "Give me ten ideas", "Give an example of", "Compare",
    "What's the difference between", "I want to learn", "I need help with", "I have a", "My", "Is it",
    "Do you", "Hi", "Hello, I", "Please", "Create a plan for", "Make a table of", "Suggest", "Help me",
    "Calculate", "If I have", "A train", "Classify", "Extract the names from", "Given the text",
)  # fmt: skip
CODE_FIRST_WORDS = (
    "Write a Python function", "Write a function that", "Write a Python program", "Write a script",
    "Write a class", "Write a JavaScript function", "Write a SQL query", "Write a C++ program",
    "Write a bash script", "Write a regular expression", "Write unit tests for", "Implement",
    "Implement a function in Python that", "How do I", "How can I read a file in Python",
    "Fix this code:\n```python\n", "What does this code do?\n```python\n",
    "Explain this function:\n\ndef ", "Refactor the following code", "Convert this code",
    "Add comments to this code:\n```\n", "I get an error in Python", "Create a HTML page",
    "Sort a list", "Given a list of integers", "def ", "Write a Java method", "Write code",
    "What is the output of", "Debug",
)  # fmt: skip
_UNPROMPTED = 0.3  # of the chats begin without first words
Render = Callable[[Sequence[dict[str, Any]]], str]


@dataclass(frozen=True)
class Begun:
    """group: an index of GROUPS."""

    opening: Opening
    group: int


class ChatFrame:
    """What a chat template writes around what people and the model write.

    render: messages to a prompt, with the beginning of an answer at its end. Raises UnsupportedModel
    where the template does not leave a message as it is."""

    def __init__(self, render: Render, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        first, second, third = _MARKS
        question = {"role": "user", "content": first}
        whole = render(
            [question, {"role": "assistant", "content": second}, {"role": "user", "content": third}]
        )
        places = [whole.find(mark) for mark in _MARKS]
        if -1 in places or places != sorted(places):
            raise UnsupportedModel("its chat template changes messages, so it cannot write both sides")
        after_question = whole[places[0] + len(first) : places[1]]
        after_answer = whole[places[1] + len(second) : places[2]]
        self.turns = Turns(
            self._encoded(after_question), self._encoded(after_answer), self._encoded("\n\n")
        )
        self._render = render
        self._heads: dict[str, str] = {}

    def opening(self, system: str, first_words: str, temperature: float) -> Opening:
        tokens = self._encoded(self._head(system) + first_words)
        bos = self._tokenizer.bos
        if self._tokenizer.adds_bos and bos is not None and tokens[:1] != (bos,):
            tokens = (bos, *tokens)
        return Opening(tokens, True, temperature)

    def _head(self, system: str) -> str:
        if system not in self._heads:
            question = {"role": "user", "content": _MARKS[0]}
            try:
                messages = [{"role": "system", "content": system}, question] if system else [question]
                whole = self._render(messages)
            except EdgeInferError:  # a template that knows no system prompts
                whole = self._render([question])
            self._heads[system] = whole[: whole.find(_MARKS[0])]
        return self._heads[system]

    def _encoded(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special=False, parse_special=True))


class Library:
    """Python's source and documentation, by group."""

    def __init__(self, folder: Path | None = None) -> None:
        """folder: default: where Python's own library is."""
        root = folder or Path(os.__file__).parent
        files = sorted(path for path in root.rglob("*.py") if _is_source(path.relative_to(root)))
        random.Random(0).shuffle(files)
        self._texts: dict[tuple[str, bool], list[str]] = {}
        for path in files[:_MOST_FILES]:
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            is_held_out = zlib.crc32(path.name.encode()) % _HELD_OUT_FILES == 0
            self._put("source", is_held_out, text)
            for documentation in _documentation(text):
                self._put("prose", is_held_out, documentation)

    def drawn(self, group: str, *, held_out: bool, source: random.Random) -> str:
        """Some text from the beginning of a line on; "": there is none."""
        texts = self._texts.get((group, held_out))
        if not texts:
            return ""
        text = source.choice(texts)
        begin = text.rfind("\n", 0, source.randrange(len(text))) + 1
        return text[begin : begin + 8 * _PLAIN_TOKENS[1]]

    def _put(self, group: str, is_held_out: bool, text: str) -> None:
        if len(text) > 400:
            self._texts.setdefault((group, is_held_out), []).append(text)


def begun_texts(
    count: int,
    frame: ChatFrame,
    library: Library,
    tokenizer: Tokenizer,
    *,
    seed: int,
    held_out: bool,
    longest: int,
) -> list[Begun]:
    """longest: tokens an opening may have at most."""
    source = random.Random(seed)
    found = []
    for index in range(count):
        group = source.choices(range(len(GROUPS)), _SHARES)[0]
        choices, weights = zip(*_TEMPERATURES, strict=True)
        temperature = source.choices(choices, weights)[0]
        if held_out:
            temperature = HELD_OUT_TEMPERATURES[index % len(HELD_OUT_TEMPERATURES)]
        opening = None
        if GROUPS[group] in ("source", "prose"):
            text = library.drawn(GROUPS[group], held_out=held_out, source=source)
            opening = _plain(text, tokenizer, temperature, source, longest)
            if opening is None:
                group = 0
        if opening is None:
            opening = _chat(group, frame, temperature, source)
        tokens = opening.tokens[:longest]
        found.append(Begun(Opening(tokens, opening.asks, opening.temperature), group))
    return found


def _chat(group: int, frame: ChatFrame, temperature: float, source: random.Random) -> Opening:
    if GROUPS[group] == "code":
        system, words = source.choice(CODE_SYSTEM_PROMPTS), source.choice(CODE_FIRST_WORDS)
        return frame.opening(system, words, temperature)
    words = "" if source.random() < _UNPROMPTED else source.choice(FIRST_WORDS)
    return frame.opening(source.choice(SYSTEM_PROMPTS), words, temperature)


def _plain(
    text: str, tokenizer: Tokenizer, temperature: float, source: random.Random, longest: int
) -> Opening | None:
    tokens = tokenizer.encode(text, add_special=tokenizer.adds_bos, parse_special=False)
    count = min(source.randint(*_PLAIN_TOKENS), longest)
    return None if len(tokens) < count else Opening(tuple(tokens[:count]), False, temperature)


def _is_source(path: Path) -> bool:
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "encodings"}
    return not skipped.intersection(path.parts)


def _documentation(text: str) -> Iterator[str]:
    for found in re.finditer(r'"""(.{400,}?)"""', text, re.DOTALL):
        yield found[1]
