"""A text of any length in windows, each read from an empty cache: so every model can read it, and two
that did had the same before each token."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeinfer.backend import Runtime
from edgeinfer.errors import MeasureFailed
from edgeinfer.quality.predictions import rows

if TYPE_CHECKING:
    from edgeinfer.quality.predictions import Logits

SIZE = 512
MIN_TOKENS = 128


@dataclass(frozen=True)
class Windows:
    """size: tokens of a window. begin: stands for the first token of each (a model's bos: many predict
    badly without), as llama-perplexity has it. first: of the positions in a window, the first whose
    prediction counts; those before have little to go by."""

    tokens: tuple[int, ...]
    size: int = SIZE
    begin: int | None = None
    first: int = 0

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.tokens), self.size):
            window = list(self.tokens[start : start + self.size])
            if len(window) < self.first + 2:
                return
            if self.begin is not None:
                window[0] = self.begin
            yield window

    @property
    def counts(self) -> list[int]:
        """Predictions of each window: of all its tokens that have a next one, from `first` on."""
        return [len(window) - 1 - self.first for window in self]

    @property
    def digest(self) -> str:
        """Of everything that decides what is predicted."""
        about = [list(self.tokens), self.size, self.begin, self.first]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def beginning(self, num_windows: int) -> Windows:
        return Windows(self.tokens[: num_windows * self.size], self.size, self.begin, self.first)


def windows_of(
    runtime: Runtime, text: str, num_tokens: int, size: int = SIZE, first: int = 0
) -> Windows:
    """The beginning of a text, as a model reads it. Raises MeasureFailed if there is too little."""
    tokenizer = runtime.tokenizer
    # No token stands for more than a few dozen characters: a book need not be read for its beginning.
    beginning = text[: 64 * num_tokens]
    tokens = tokenizer.encode(beginning, add_special=False, parse_special=False)[:num_tokens]
    if len(tokens) < max(MIN_TOKENS, first + 2):
        least = max(MIN_TOKENS, first + 2)
        raise MeasureFailed(f"the text has {len(tokens)} tokens; it needs {least} at least")
    begin = tokenizer.bos if tokenizer.adds_bos else None
    return Windows(tuple(tokens), min(size, runtime.facts.context), begin, first)


def predictions(
    runtime: Runtime, window: list[int], first: int, chunk: int
) -> Iterator[tuple[Logits, list[int]]]:
    """(logits, the tokens that came next) of the positions that count, `chunk` at a time or fewer. The
    steps go by the window and not by `first`: what is predicted does not depend on what counts."""
    read = window[:-1]
    sequence = runtime.open()
    try:
        for start in range(0, len(read), chunk):
            part = read[start : start + chunk]
            logits = rows(runtime, sequence, part)
            skipped = max(0, first - start)
            if skipped < len(part):
                yield logits[skipped:], window[start + 1 + skipped : start + 1 + len(part)]
    finally:
        runtime.free(sequence)
