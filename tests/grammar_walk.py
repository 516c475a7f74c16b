"""Answers drawn at random from what a constraint's masks allow, in the scripted backend's vocabulary."""

from __future__ import annotations

import json
import random
from typing import Any

from edgeinfer.constraint import Constraint
from edgeinfer.engine.grammar import Grammars, Matcher
from edgeinfer_backends.scripted_tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
GRAMMARS = Grammars(TOKENIZER, TOKENIZER.vocab_size)


def matcher_of(schema: object) -> Matcher:
    return GRAMMARS.matcher(Constraint("json_schema", json.dumps(schema)))


def allowed(matcher: Matcher) -> list[int]:
    mask = matcher.mask()
    assert len(mask) * 8 >= TOKENIZER.vocab_size
    return [token for token in range(TOKENIZER.vocab_size) if mask[token // 8] >> token % 8 & 1]


def walk(matcher: Matcher, seed: int, most: int = 400) -> str | None:
    """A whole answer of at most `most` tokens; None if there was no end by then."""
    draw = random.Random(seed)
    text = b""
    for left in reversed(range(most)):
        tokens = allowed(matcher)
        # Any byte may be in a string: closing it has to stand a chance.
        closing = [
            t for t in tokens if TOKENIZER.piece(t)[:1] in (b'"', b"}", b"]") or TOKENIZER.is_end(t)
        ]
        token = draw.choice(closing if closing and draw.random() < 0.2 else tokens)
        if TOKENIZER.is_end(token):
            assert matcher.may_end
            return text.decode()
        text += TOKENIZER.piece(matcher.accept(token, left))
        if matcher.is_over:
            return text.decode()
    return None


def takes(schema: object, value: Any) -> bool:
    """Whether an answer may be this value: its text byte by byte."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return takes_text(schema, text)


def takes_text(schema: object, text: str) -> bool:
    matcher = matcher_of(schema)
    for byte in text.encode():
        if matcher.is_over or byte not in allowed(matcher):
            return False
        matcher.accept(byte)
    return matcher.may_end
