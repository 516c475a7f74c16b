"""Prompts of a known size, and none that a prefix cache could know from the one before."""

from __future__ import annotations

import random
from itertools import count

from edgeinfer.client import Client, Message, Request
from edgeinfer.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0)

_TEXT = (
    "the river carries sand from the hills to the sea and every spring it leaves a little more of it on"
    " the fields where people have grown wheat and beans since before anybody wrote down who owned them"
    " one year the water came late so they dug a channel and the channel is still there"
)
_WORDS = tuple(_TEXT.split())


def random_tokens(vocab_size: int, count: int, seed: int) -> tuple[int, ...]:
    """As llama-bench makes them: drawn from the whole vocabulary."""
    draw = random.Random(seed)
    return tuple(draw.randrange(vocab_size) for _ in range(count))


def long_chat(client: Client, num_tokens: int, seed: int, question: str) -> tuple[Message, ...]:
    """A chat of one user message whose whole prompt has about `num_tokens` tokens (within 2 %)."""
    draw = random.Random(seed)
    words = [f"{seed}"] + [draw.choice(_WORDS) for _ in range(num_tokens)]
    for _ in count():
        messages = (Message("user", " ".join(words) + ". " + question),)
        have = client.count_tokens(Request(messages=messages))
        if abs(have - num_tokens) <= num_tokens // 50:
            return messages
        change = round((num_tokens - have) * len(words) / have) or (1 if have < num_tokens else -1)
        if change < 0:
            del words[change:]
        else:
            words += [draw.choice(_WORDS) for _ in range(change)]
    raise AssertionError
