"""Completions, embeddings, tokens, models, metrics and documents over a real socket."""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeinfer.server.api_keys import ApiKeys
from edgeinfer.server.completions import DEFAULT_MAX_TOKENS
from edgeinfer.server.guard import GuardSettings
from tests.server.endpoints import Endpoint, scripted
from tests.server.test_staying_up import until

LONG = "abcdefghij" * 4


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    script = {"answers": {"*": "Hello there.", "once": " upon a time", "b": "cd", "long": LONG}}
    with scripted(tmp_path_factory.mktemp("endpoint"), script) as found:
        yield found


def post(endpoint: Endpoint, route: str, **body: object) -> tuple[int, dict[str, object]]:
    with endpoint.http() as http:
        reply = http.post(route, json=body)
    return reply.status_code, reply.json()


# -- completions -----------------------------------------------------------------------------------


def test_a_completion_goes_on_from_its_prompt(endpoint: Endpoint) -> None:
    status, reply = post(endpoint, "/v1/completions", prompt="once")
    assert status == 200
    assert reply["object"] == "text_completion"
    assert reply["choices"] == [
        {"index": 0, "text": " upon a time", "logprobs": None, "finish_reason": "stop"}
    ]


def test_prompts_and_choices_are_numbered_prompt_by_prompt(endpoint: Endpoint) -> None:
    _, reply = post(endpoint, "/v1/completions", prompt=["once", "b"], n=2)
    texts = [(choice["index"], choice["text"]) for choice in reply["choices"]]  # type: ignore[attr-defined]
    assert texts == [(0, " upon a time"), (1, " upon a time"), (2, "cd"), (3, "cd")]
    assert reply["usage"]["prompt_tokens"] == len("once") + len("b") + 2  # type: ignore[index]


def test_a_prompt_may_be_tokens(endpoint: Endpoint) -> None:
    _, found = post(endpoint, "/v1/tokenize", text="once", add_special=True)
    _, reply = post(endpoint, "/v1/completions", prompt=found["tokens"])
    assert reply["choices"][0]["text"] == " upon a time"  # type: ignore[index]


def test_echo_gives_the_prompt_back(endpoint: Endpoint) -> None:
    _, reply = post(endpoint, "/v1/completions", prompt="once", echo=True)
    assert reply["choices"][0]["text"] == "once upon a time"  # type: ignore[index]
    chunks = endpoint.chunks("/v1/completions", prompt="once", echo=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "once upon a time"


def test_legacy_log_probabilities_have_offsets(endpoint: Endpoint) -> None:
    _, reply = post(endpoint, "/v1/completions", prompt="once", logprobs=2, max_tokens=5)
    found = reply["choices"][0]["logprobs"]  # type: ignore[index]
    assert found["tokens"] == list(" upon")
    assert found["text_offset"] == [0, 1, 2, 3, 4]
    assert [len(top) for top in found["top_logprobs"]] == [2] * 5


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": [1, 2], "echo": True}, "echo"),
        ({"prompt": "a", "echo": True, "logprobs": 0}, "echo"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens: must be at least 1"),
        ({"prompt": [10**9]}, "vocabulary"),
        ({"prompt": {}}, "prompt"),
    ],
)
def test_completions_refuse_what_they_cannot_do(
    endpoint: Endpoint, body: dict[str, object], word: str
) -> None:
    status, reply = post(endpoint, "/v1/completions", **body)
    assert status == 400, reply
    assert word in reply["error"]["message"]  # type: ignore[index]


def test_a_whole_context_is_answered_where_it_is_asked_for(endpoint: Endpoint) -> None:
    assert len("Hello there.") < DEFAULT_MAX_TOKENS < len(LONG)
    for asked, count in (({}, DEFAULT_MAX_TOKENS), ({"max_tokens": -1}, len(LONG))):
        _, reply = post(endpoint, "/v1/completions", prompt="long", **asked)
        assert len(reply["choices"][0]["text"]) == count  # type: ignore[index]


def test_a_long_list_of_wrong_entries_is_refused_by_its_first(endpoint: Endpoint) -> None:
    status, reply = post(endpoint, "/v1/completions", prompt=[1] * 100_000 + ["x"] * 10)
    assert status == 400
    assert reply["error"]["param"] == "prompt[100000]"  # type: ignore[index]


# -- embeddings ------------------------------------------------------------------------------------


def test_embeddings_come_in_order_and_in_both_encodings(endpoint: Endpoint) -> None:
    texts = [f"text {i}" for i in range(9)]  # more than run at once
    _, reply = post(endpoint, "/v1/embeddings", input=texts)
    data = reply["data"]
    assert [one["index"] for one in data] == list(range(9))  # type: ignore[attr-defined]
    _, packed = post(endpoint, "/v1/embeddings", input=texts[3], encoding_format="base64")
    raw = base64.b64decode(packed["data"][0]["embedding"])  # type: ignore[index]
    vector = struct.unpack(f"<{len(raw) // 4}f", raw)
    assert vector == pytest.approx(data[3]["embedding"], abs=1e-6)  # type: ignore[index]
    assert reply["usage"]["prompt_tokens"] > 9  # type: ignore[index]


def test_embeddings_can_be_shortened(endpoint: Endpoint) -> None:
    _, reply = post(endpoint, "/v1/embeddings", input="a", dimensions=4)
    vector = reply["data"][0]["embedding"]  # type: ignore[index]
    assert len(vector) == 4
    assert sum(x * x for x in vector) == pytest.approx(1.0)
    status, _ = post(endpoint, "/v1/embeddings", input="a", dimensions=10**6)
    assert status == 400


@pytest.mark.parametrize("wrong", ["", [], [""], [[]], None])
def test_nothing_cannot_be_embedded(endpoint: Endpoint, wrong: object) -> None:
    status, _ = post(endpoint, "/v1/embeddings", input=wrong)
    assert status == 400


# -- tokens ----------------------------------------------------------------------------------------


def test_tokens_go_there_and_back(endpoint: Endpoint) -> None:
    _, found = post(endpoint, "/v1/tokenize", text="naïve")
    assert found["count"] == len(found["tokens"])  # type: ignore[arg-type]
    _, back = post(endpoint, "/v1/detokenize", tokens=found["tokens"])
    assert back == {"text": "naïve"}


def test_messages_are_counted_as_their_prompt(endpoint: Endpoint) -> None:
    messages = [{"role": "user", "content": "hi"}]
    _, found = post(endpoint, "/v1/tokenize", messages=messages)
    _, reply = post(endpoint, "/v1/chat/completions", messages=messages)
    assert found["count"] == reply["usage"]["prompt_tokens"]  # type: ignore[index]


def test_wrong_tokens_are_refused(endpoint: Endpoint) -> None:
    for tokens in ([10**9], [-1], ["a"], "a", [2**31]):
        status, _ = post(endpoint, "/v1/detokenize", tokens=tokens)
        assert status == 400


# -- the rest --------------------------------------------------------------------------------------


def test_the_model_is_listed(endpoint: Endpoint) -> None:
    with endpoint.http() as http:
        (model,) = http.get("/v1/models").json()["data"]
        assert model["id"] == endpoint.service.name
        assert model["object"] == "model"
        assert http.get(f"/v1/models/{model['id']}").json() == model
        assert http.get("/v1/models/other").status_code == 404


def test_metrics_count_what_happened(endpoint: Endpoint) -> None:
    post(endpoint, "/v1/completions", prompt="once")
    with endpoint.http() as http:
        page = http.get("/metrics").text
    for name in (
        'edgeinfer_requests_total{outcome="finished",route="completions"}',
        "edgeinfer_time_to_first_token_seconds_bucket",
        "edgeinfer_completion_tokens_total",
        "edgeinfer_kv_used_cells",
        "edgeinfer_running_requests 0.0",
        "edgeinfer_cache_lookups_total",
    ):
        assert name in page, name


def test_more_dimensions_than_there_are_are_refused_after_the_first_text(endpoint: Endpoint) -> None:
    with endpoint.http() as http:
        reply = http.post("/v1/embeddings", json={"input": ["a"] * 100, "dimensions": 10_000})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "dimensions"
    until(lambda: endpoint.service.num_open == 0)  # the texts that were begun beside it end, too


def test_a_long_text_is_not_tokenized_for_the_asking(endpoint: Endpoint) -> None:
    with endpoint.http() as http:
        reply = http.post("/v1/tokenize", json={"text": "x" * (2**20 + 1)})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "text"


def test_a_body_that_is_no_json_is_said_so(endpoint: Endpoint) -> None:
    with endpoint.http() as http:
        error = http.post("/v1/chat/completions", content=b'{"messages": [}').json()["error"]
    assert "no JSON" in error["message"]
    assert error["param"] is None


def test_a_refused_request_has_read_no_prompt(endpoint: Endpoint) -> None:
    def read() -> list[str]:
        with endpoint.http() as http:
            page = http.get("/metrics").text
        return re.findall(r"^edgeinfer_(?:prompt_tokens|cache_lookups)_total.*$", page, re.MULTILINE)

    before = read()
    status, _ = post(endpoint, "/v1/completions", prompt="x" * 9000)
    assert status == 400
    assert before == read() != []


def test_an_unknown_route_and_a_wrong_method_have_openais_error(endpoint: Endpoint) -> None:
    with endpoint.http() as http:
        for reply, status in ((http.get("/nowhere"), 404), (http.get("/v1/chat/completions"), 405)):
            assert reply.status_code == status
            assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_the_openapi_document_names_every_route(endpoint: Endpoint) -> None:
    with endpoint.http() as http:
        document = http.get("/openapi.json").json()
    assert {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/models",
        "/v1/tokenize",
        "/v1/detokenize",
        "/health",
        "/metrics",
    } <= set(document["paths"])


def test_the_documentation_names_the_errors_there_are(endpoint: Endpoint) -> None:
    with endpoint.http() as http:
        document = http.get("/openapi.json").json()
    assert "HTTPValidationError" not in document["components"]["schemas"]
    for operations in document["paths"].values():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            assert "401" in operation["responses"]
    chat = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert {"400", "408", "413", "429", "500", "503", "504", "507"} <= set(chat)
    assert "text/event-stream" in chat["200"]["content"]


def test_the_documentation_needs_no_network_and_no_key(tmp_path: Path) -> None:
    guard = GuardSettings(keys=ApiKeys(["secret"]))
    with scripted(tmp_path, guard=guard) as endpoint, endpoint.http() as http:
        page = http.get("/docs")
        assert page.status_code == 200
        sources = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert sources and not any("//" in source for source in sources)
        for source in sources:
            assert http.get(source).status_code == 200, source
        for path in ("/metrics", "/v1/models", "/static-offline-docs/redoc.standalone.js"):
            assert http.get(path).status_code == 401, path


def test_another_folder_is_not_served(endpoint: Endpoint, tmp_path: Path) -> None:
    with endpoint.http() as http:
        for path in ("/v1/models/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd"):
            assert http.get(path).status_code == 404
