"""What bodies become, and how little it takes to refuse one."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from edgeinfer.server.openai_requests import (
    MAX_BIASES,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
)

ASK = [{"role": "user", "content": "hi"}]
MANY = 100_000


def errors(kind: type[BaseModel], **body: Any) -> list[Any]:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    return caught.value.errors()


@pytest.mark.parametrize(
    ("kind", "body", "where"),
    [
        (CompletionRequest, {"prompt": [1] * MANY + ["x"]}, ("prompt", MANY)),
        (CompletionRequest, {"prompt": [1.5] * MANY}, ("prompt", 0)),
        (CompletionRequest, {"prompt": [None] * 64}, ("prompt", 0)),
        (CompletionRequest, {"prompt": ["x"] * MANY}, ("prompt",)),
        (CompletionRequest, {"prompt": [[1, 2], ["x"] * MANY]}, ("prompt", 1, 0)),
        (CompletionRequest, {"prompt": [[1], "x"]}, ("prompt", 1)),
        (CompletionRequest, {"prompt": {}}, ("prompt",)),
        (CompletionRequest, {"prompt": [-1]}, ("prompt", 0)),
        (CompletionRequest, {"prompt": [0] * (2**20 + 1)}, ("prompt",)),
        (CompletionRequest, {"prompt": "a", "stop": [1] * MANY}, ("stop",)),
        (CompletionRequest, {"prompt": "a", "stop": [1] * 16}, ("stop", 0)),
        (CompletionRequest, {"prompt": "a", "stop": 1}, ("stop",)),
        (EmbeddingRequest, {"input": [1] * MANY + ["x"]}, ("input", MANY)),
        (EmbeddingRequest, {"input": ["x"] * MANY}, ("input",)),
        (DetokenizeRequest, {"tokens": ["x"] * MANY}, ("tokens", 0)),
        (ChatRequest, {"messages": [1] * MANY}, ("messages", 0)),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": [1] * MANY}]},
            ("messages", 0, "content"),
        ),
        (ChatRequest, {"messages": [{"role": "user", "content": [1]}]}, ("messages", 0, "content", 0)),
        (ChatRequest, {"messages": [{"role": "user", "content": 1}]}, ("messages", 0, "content")),
        (ChatRequest, {"messages": ASK, "tools": [1] * MANY}, ("tools", 0)),
        (ChatRequest, {"messages": ASK, "modalities": [1] * MANY}, ("modalities", 0)),
        (ChatRequest, {"messages": ASK, "modalities": ["text"] * MANY}, ("modalities",)),
        (
            ChatRequest,
            {"messages": ASK, "logit_bias": {str(i): "x" for i in range(MAX_BIASES + 1)}},
            ("logit_bias",),
        ),
    ],
)
def test_a_body_full_of_wrong_entries_has_one_error_that_names_its_place(
    kind: type[BaseModel], body: dict[str, Any], where: tuple[object, ...]
) -> None:
    (found,) = errors(kind, **body)
    assert found["loc"] == where


def test_texts_and_tokens_are_told_apart() -> None:
    for prompt, expected in (
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [(1, 2)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
        ([], []),
    ):
        assert CompletionRequest.model_validate({"prompt": prompt}).prompts == expected
        assert EmbeddingRequest.model_validate({"input": prompt}).inputs == expected


def test_the_document_still_says_what_a_prompt_may_be() -> None:
    properties = CompletionRequest.model_json_schema()["properties"]
    kinds = [one["type"] for one in properties["prompt"]["anyOf"]]
    assert kinds == ["string", "array", "array", "array"]
    assert [one["type"] for one in properties["stop"]["anyOf"]] == ["string", "array", "null"]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_length_of_none_at_all_is_refused_by_name(name: str) -> None:
    (found,) = errors(ChatRequest, messages=ASK, **{name: 0})
    assert found["loc"] == (name,)
    assert "at least 1" in found["msg"]


def test_the_default_length_counts_only_for_requests_that_do_not_say() -> None:
    def most(**body: Any) -> int | None:
        return ChatRequest.model_validate({"messages": ASK, **body}).most_tokens(7)

    assert most() == most(max_tokens=None) == 7
    assert most(max_tokens=-1) is None
    assert most(max_tokens=3) == 3
    assert most(max_tokens=3, max_completion_tokens=-1) is None
    assert CompletionRequest.model_validate({"prompt": "a", "max_tokens": -1}).most_tokens(7) is None


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 2, "logprobs": False}, "top_logprobs"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"modalities": []}, "modalities"),
        ({"audio": {"voice": "alloy"}}, "audio"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(body: dict[str, Any], where: str) -> None:
    (found,) = errors(ChatRequest, messages=ASK, **body)
    assert found["loc"] == (where,)


def test_what_asks_for_nothing_more_is_taken() -> None:
    for body in ({"top_logprobs": 2, "logprobs": True}, {"modalities": ["text"]}, {"audio": None}):
        ChatRequest.model_validate({"messages": ASK, **body})


def test_a_body_of_a_million_unknown_fields_names_a_few() -> None:
    body = ChatRequest.model_validate({"messages": ASK, **{f"x{i}": 0 for i in range(1000)}})
    assert len(body.unknown) == 20
