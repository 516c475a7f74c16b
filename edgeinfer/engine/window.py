"""What a full context keeps: sinks, the system prompt, and what was said last. Integers only.

The first few positions draw much of the attention whatever they hold (attention sinks); a model that
loses them soon writes nonsense, one that keeps them goes on as if nothing had happened (StreamingLLM,
Xiao et al. 2024, arXiv:2309.17453). So the oldest tokens after them leave, many at a time: moving the
rest down re-rotates their keys, which for a quantized cache means rounding them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edgeinfer_models.tokenizer import Tokenizer

DEFAULT_SINKS = 4
# What leaves a full context: the oldest tokens after the head (StreamingLLM), or of all but the most
# recent half those that got the least attention, in each head of the model by itself (H2O).
Eviction = Literal["streaming", "h2o"]
EVICTIONS: tuple[Eviction, ...] = ("streaming", "h2o")


@dataclass(frozen=True)
class Window:
    """size: positions that the model sees at once. sinks: of those, the first ones, which stay."""

    size: int
    sinks: int = DEFAULT_SINKS
    eviction: Eviction = "streaming"

    def __post_init__(self) -> None:
        if not 0 <= self.sinks < self.size:
            raise ValueError(f"a window of {self.size} tokens has no room for {self.sinks} sinks")

    @classmethod
    def of(
        cls,
        context: int,
        size: int | None = None,
        sinks: int = DEFAULT_SINKS,
        eviction: Eviction = "streaming",
    ) -> Window:
        """As asked for, as far as the context there is allows."""
        size = min(size or context, context)
        return cls(size, min(sinks, size - 1), eviction)

    def head(self, kept: int) -> int:
        """Positions at the beginning that stay. kept: of the system prompt; it stays whole if it leaves
        a quarter of the window to the conversation, else only the sinks do."""
        return kept if self.sinks < kept <= self.size - self.size // 4 else self.sinks

    def chunk(self, head: int) -> int:
        """Tokens that leave at a time."""
        return max(1, (self.size - head) // 4)

    def num_leaving(self, length: int, more: int, head: int, turns: Sequence[int]) -> int:
        """How many of the positions after `head` leave so that `more` fit behind the `length` there are.

        turns: where turns begin, ascending. The cut is at one of them if one is near: between what must
        leave and one chunk more than would otherwise. Needs head + more <= size.
        """
        least = length + more - self.size
        if least <= 0:
            return 0
        most = max(length - head, 0)
        wanted = min(max(least, self.chunk(head)), most)
        farthest = min(wanted + self.chunk(head), most)
        ends = [turn - head for turn in turns if least <= turn - head <= farthest]
        return min(ends, key=lambda end: (abs(end - wanted), -end), default=wanted)

    def cut(self, length: int, head: int, answer: int | None, turns: Sequence[int]) -> int:
        """Where the tail of a text of `length` tokens begins, if only the `head` and the tail are read.

        Room is left for `answer` tokens (None: of any length), at most a chunk. The tail begins with a
        turn, if that costs no more than half of it. Returns `head` if all of it fits.
        """
        room = self.chunk(head) if answer is None else min(answer, self.chunk(head))
        tail = max(self.size - head - room, 1)
        first = length - tail
        if first <= head:
            return head
        return next((turn for turn in turns if first <= turn <= first + tail // 2), first)


def turn_starts(tokens: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Positions at which a turn of a chat begins: after one that ended and the blanks behind it."""
    starts = []
    is_after_end = False
    for position, token in enumerate(tokens):
        if tokenizer.is_end(token):
            is_after_end = True
        elif is_after_end and (tokenizer.is_control(token) or tokenizer.piece(token).strip()):
            starts.append(position)
            is_after_end = False
    return starts
