"""Reply shapes, piece by piece."""

from __future__ import annotations

import json

from edgeinfer.client import RunStats, Text, TokenLogprob
from edgeinfer.engine.request import Usage
from edgeinfer.server.completions import _Choice
from edgeinfer.server.openai_replies import Chat, Completion, usage_of
from edgeinfer.server.sse import data

BREAKS = "a\x0b\x0c\r\n\x1c\x1d\x1e\x85\u2028\u2029é\ud800b"


def test_a_chunk_is_one_line_for_every_reader_of_lines() -> None:
    event = Chat("m").text(0, BREAKS)
    assert event.splitlines() == [event[:-2], ""]
    (choice,) = json.loads(event[6:])["choices"]
    assert choice["delta"]["content"] == BREAKS
    assert json.loads(Completion(BREAKS).text(0, "")[6:])["model"] == BREAKS
    sent = data({"error": BREAKS}).decode()
    assert sent.splitlines() == [sent[:-2], ""]
    assert "é" in sent  # no more is escaped than must be


def test_the_prompts_of_several_answers_count_once_each() -> None:
    def stats(prompt: int, cached: int) -> RunStats:
        return RunStats(usage=Usage(prompt, 10, cached))

    found = usage_of([stats(3, 0), stats(3, 2), stats(5, 1), stats(5, 4)], prompts=2)
    assert found["prompt_tokens"] == 8
    assert found["completion_tokens"] == 40
    assert found["prompt_tokens_details"] == {"cached_tokens": 1}
    assert usage_of([stats(3, 0), stats(3, 3)])["prompt_tokens"] == 3
    assert usage_of([stats(3, 0), stats(5, 0)], prompts=2)["prompt_tokens"] == 8


def token(part: bytes) -> TokenLogprob:
    return TokenLogprob(part.decode("utf-8", "replace"), -1.0, tuple(part))


def test_offsets_count_characters_of_tokens_that_are_told_late_or_in_parts() -> None:
    euro = "€".encode()
    tokens = [token(part) for part in (b"a", euro[:1], euro[1:], b"bc", b"d")]
    choice = _Choice(0, "", True)
    events = [
        Text("a", 2, tuple(tokens[:2])),  # of the second there is no text yet
        Text("€", 3, (tokens[2],)),
        Text("", 4, (tokens[3],)),  # held back: it may begin a stop string
        Text("bcd", 5, (tokens[4],)),
    ]
    offsets = []
    for event in events:
        found = choice.add(event)
        assert found is not None
        offsets += found["text_offset"]
    assert offsets == [0, 1, 1, 2, 4]
    choice.stats = RunStats()
    whole = choice.whole()
    assert whole["logprobs"]["text_offset"] == offsets
    assert whole["text"] == "a€bcd"
