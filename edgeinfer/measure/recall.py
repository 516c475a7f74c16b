"""Whether a model still knows what it was told, by where that is now: in the window, evicted, or in the
part that always stays.

A fact ("The code of the harbour is 4817.") is planted in ordinary text and asked for at its end. Counted
is how much likelier the right code is than the same code where the fact was never said, in nats for each
of its tokens, and how often each of its tokens was the likeliest.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from edgeinfer.backend import Runtime
from edgeinfer.engine.eviction import let_go
from edgeinfer.engine.window import Window
from edgeinfer.measure.long_texts import chunk_through
from edgeinfer.quality.predictions import log_softmax, rows

Place = Literal["in the window", "evicted", "in the sinks"]
PLACES: tuple[Place, ...] = ("in the window", "evicted", "in the sinks")

_THINGS = ("harbour", "library", "garden", "museum", "bridge", "tower", "bakery", "station")
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Recalled:
    """gain: nats for each token of the code, over never having been told. share: of facts recalled
    whole: each token of the code was the likeliest one."""

    place: Place
    facts: int
    gain: float
    share: float


def recall(
    runtime: Runtime,
    filler: Sequence[int],
    window: Window,
    facts: int = 5,
    progress: Progress = lambda _: None,
    within: Window | None = None,
) -> list[Recalled]:
    """filler: tokens of ordinary text, at least three windows of it. within: another window to read
    through than the one that places go by."""
    found = []
    total = len(PLACES) * facts
    done = 0
    for place in PLACES:
        gains: list[float] = []
        whole = 0
        for number in range(facts):
            fact, question, answer = _fact(runtime, number)
            before, after = _around(place, window, len(fact) + len(question) + len(answer), number)
            start = number * 97
            text = [
                *filler[start : start + before],
                *fact,
                *filler[start + before : start + before + after],
            ]
            bare = [*filler[start : start + before + after]]
            kept = len(fact) if place == "in the sinks" else 0
            through = within or window
            told, is_whole = _ask(runtime, [*text, *question], answer, through, kept)
            untold, _ = _ask(runtime, [*bare, *question], answer, through, kept)
            gains.append(told - untold)
            whole += is_whole
            done += 1
            progress(done / total)
        found.append(Recalled(place, facts, sum(gains) / facts, whole / facts))
    return found


def _fact(runtime: Runtime, number: int) -> tuple[list[int], list[int], list[int]]:
    """The tokens of a fact, of the question for it, and of the answer."""
    thing = _THINGS[number % len(_THINGS)]
    code = str(random.Random(number).randint(1000, 9999))  # noqa: S311 (no secret)

    def tokens(text: str) -> list[int]:
        return runtime.tokenizer.encode(text, add_special=False, parse_special=False)

    said = f"\n\nRemember: the secret code of the {thing} is"
    question = tokens(said)
    return tokens(f"{said} {code}.\n\n"), question, tokens(f"{said} {code}")[len(question) :]


def _around(place: Place, window: Window, own: int, number: int) -> tuple[int, int]:
    """Tokens of filler before and after the fact."""
    size = window.size
    if place == "in the sinks":
        return 0, 2 * size + 11 * number
    if place == "evicted":
        return size // 2, 2 * size + 11 * number
    # Between a quarter of the window before its end and its end: where nothing left it yet.
    return 2 * size, max(0, size // 4 - own + 7 * number)


def _ask(
    runtime: Runtime, text: Sequence[int], answer: Sequence[int], window: Window, kept: int
) -> tuple[float, bool]:
    """Mean log-probability of the answer's tokens, and whether each was the likeliest."""
    head = window.head(kept)
    tokens = [*text, *answer]
    first = len(text)  # of the answer
    chunk = chunk_through(runtime, window, head)
    sequence = runtime.open()
    total, whole = 0.0, True
    try:
        at = 0
        while at < len(tokens) - 1:
            size = min(chunk, (first - 1 if at < first - 1 else len(tokens) - 1) - at)
            part = tokens[at : at + size]
            leaving = window.num_leaving(runtime.length(sequence), size, head, ())
            if leaving:
                let_go(runtime, sequence, window, head, leaving)
            logits = rows(runtime, sequence, part)
            if at >= first - 1:
                log_probs = log_softmax(logits)
                for row, token in enumerate(tokens[at + 1 : at + 1 + size]):
                    total += float(log_probs[row, token])
                    whole = whole and int(logits[row].argmax()) == token
            at += size
    finally:
        runtime.free(sequence)
    return total / len(answer), whole
