"""What an answer is held to, and how it is told apart, where several of these meet in one request."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeinfer.client import local
from edgeinfer.open import OpenOptions, OpenPlan, plan_open
from edgeinfer_models.chat_template import TemplateSource
from tests.server.endpoints import Endpoint, ask, scripted
from tests.server.library_scenarios import TIME, WEATHER

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>'
PERSON = {
    "type": "json_schema",
    "json_schema": {
        "name": "person",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
            "required": ["name", "age"],
            "additionalProperties": False,
        },
    },
}
ADA = '{"name":"Ada","age":36}'
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if enable_thinking is not defined or enable_thinking %}OPEN{% endif %}"
    "{# </think> #}"
)

Serve = Callable[..., Endpoint]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """serve(answer, template, opening, stop): an endpoint whose model answers so where a prompt ends
    with `opening`, and has that chat template with its stop strings."""
    with ExitStack() as stack:

        def start(
            answer: str, template: str | None = None, opening: str = "", stop: tuple[str, ...] = ()
        ) -> Endpoint:
            def plan(options: OpenOptions, *more: Any) -> OpenPlan:
                found = plan_open(options, *more)
                if template is None:
                    return found
                return replace(found, template=TemplateSource(template, "model", "", "", stop=stop))

            monkeypatch.setattr(local, "plan_open", plan)
            script = {"answers": {"*": answer}, "prompt_end": f"<|im_start|>assistant\n{opening}"}
            return stack.enter_context(scripted(tmp_path, script))

        yield start


def message(endpoint: Endpoint, **body: Any) -> dict[str, Any]:
    reply = endpoint.chat(**body)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()["choices"][0]["message"]
    return found


def streamed(endpoint: Endpoint, **body: Any) -> dict[str, str]:
    """The deltas' texts put together, by their name; of a call, its arguments."""
    found: dict[str, str] = {}
    for chunk in endpoint.chunks(**body):
        delta = chunk["choices"][0]["delta"]
        for call in delta.get("tool_calls", ()):
            delta = {**delta, "arguments": call["function"].get("arguments", "")}
        for name in ("content", "reasoning_content", "arguments"):
            found[name] = found.get(name, "") + (delta.get(name) or "")
    return {name: text for name, text in found.items() if text}


def arguments(reply: dict[str, Any]) -> dict[str, Any]:
    (call,) = reply["tool_calls"]
    found: dict[str, Any] = json.loads(call["function"]["arguments"])
    return found


def test_a_format_holds_an_answer_beside_tools(serve: Serve) -> None:
    endpoint = serve(ADA)
    reply = message(endpoint, tools=[WEATHER, TIME], response_format=PERSON)
    assert json.loads(reply["content"]) == {"name": "Ada", "age": 36}
    assert "tool_calls" not in reply


def test_beside_a_format_a_tool_may_still_be_called(serve: Serve) -> None:
    endpoint = serve(CALL)
    reply = message(endpoint, tools=[WEATHER, TIME], response_format=PERSON)
    assert arguments(reply) == {"city": "Paris", "days": 2}
    assert reply["content"] is None
    told = streamed(endpoint, tools=[WEATHER, TIME], response_format=PERSON)
    assert json.loads(told.pop("arguments")) == {"city": "Paris", "days": 2}
    assert told == {}


def test_the_stats_end_for_the_reason_the_choice_ends_for(serve: Serve) -> None:
    endpoint = serve(CALL)
    last = endpoint.chunks(tools=[WEATHER, TIME])[-1]
    assert last["choices"][0]["finish_reason"] == last["edgeinfer"]["finish_reason"] == "tool_calls"


def test_free_text_is_no_answer_beside_tools_and_a_format(serve: Serve) -> None:
    endpoint = serve("Hello there, how are you today?")
    for form in (PERSON, {"type": "json_object"}):
        reply = message(endpoint, tools=[WEATHER], response_format=form, max_tokens=120)
        if "tool_calls" not in reply:
            assert isinstance(json.loads(reply["content"]), dict)


def test_a_tool_that_must_be_called_is_called_whatever_the_format(serve: Serve) -> None:
    endpoint = serve(CALL)
    reply = message(endpoint, tools=[WEATHER], tool_choice="required", response_format=PERSON)
    assert arguments(reply) == {"city": "Paris", "days": 2}


def test_tools_that_must_not_be_called_leave_the_format(serve: Serve) -> None:
    endpoint = serve(CALL)
    reply = message(
        endpoint, tools=[WEATHER], tool_choice="none", response_format=PERSON, max_tokens=120
    )
    assert set(json.loads(reply["content"])) == {"name", "age"}


def test_an_unsupported_schema_is_refused_beside_tools_too(serve: Serve) -> None:
    endpoint = serve(ADA)
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}
    for more in ({}, {"tools": [WEATHER]}):
        reply = endpoint.chat(response_format=form, **more)
        assert reply.status_code == 400
        assert "'not'" in reply.json()["error"]["message"]


def thinking(serve: Serve, answer: str, *, opened: bool) -> Endpoint:
    """thinks either because its template opened the thought, or by itself."""
    opening = "<think>\n" if opened else ""
    return serve(answer if opened else "<think>\n" + answer, THINKS.replace("OPEN", opening), opening)


@pytest.mark.parametrize("opened", [True, False])
def test_a_thought_comes_before_a_format(serve: Serve, opened: bool) -> None:
    thought = "a person {with} an age\n</think>\n\n"
    endpoint = thinking(serve, thought + ADA, opened=opened)
    reply = message(endpoint, response_format=PERSON)
    assert reply["reasoning_content"] == "a person {with} an age"
    assert json.loads(reply["content"]) == {"name": "Ada", "age": 36}
    told = streamed(endpoint, response_format=PERSON)
    assert told == {"reasoning_content": reply["reasoning_content"], "content": reply["content"]}


@pytest.mark.parametrize("opened", [True, False])
def test_a_thought_comes_before_a_call(serve: Serve, opened: bool) -> None:
    thought = "weather, then\n</think>\n\n"
    endpoint = thinking(serve, thought + CALL, opened=opened)
    for choice in ("auto", "required"):
        reply = message(endpoint, tools=[WEATHER], tool_choice=choice)
        assert reply["reasoning_content"] == "weather, then"
        assert arguments(reply) == {"city": "Paris", "days": 2}


def test_who_declines_thoughts_gets_the_format_at_once(serve: Serve) -> None:
    endpoint = serve(ADA, THINKS.replace("OPEN", "<think>\n"))
    declined = {"enable_thinking": False}
    reply = message(endpoint, response_format=PERSON, chat_template_kwargs=declined)
    assert json.loads(reply["content"]) == {"name": "Ada", "age": 36}
    assert "reasoning_content" not in reply


def test_stop_strings_do_not_cut_a_format(serve: Serve) -> None:
    for template in (None, THINKS.replace("OPEN", "")):
        endpoint = serve(ADA, template)
        reply = endpoint.chat(response_format=PERSON, stop=["Ada"]).json()
        assert json.loads(reply["choices"][0]["message"]["content"]) == {"name": "Ada", "age": 36}
        assert any("stop strings" in warning for warning in reply["edgeinfer"]["warnings"])


def test_stop_strings_cut_neither_a_format_beside_tools_nor_a_forced_call(serve: Serve) -> None:
    for template in (None, THINKS.replace("OPEN", "")):
        endpoint = serve(ADA, template)
        reply = endpoint.chat(response_format=PERSON, tools=[WEATHER], stop=["Ada", ","]).json()
        assert json.loads(reply["choices"][0]["message"]["content"]) == {"name": "Ada", "age": 36}
        assert any("stop strings" in warning for warning in reply["edgeinfer"]["warnings"])
    endpoint = serve(CALL)
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        reply = endpoint.chat(tools=[WEATHER], tool_choice=choice, stop=[","]).json()
        assert arguments(reply["choices"][0]["message"]) == {"city": "Paris", "days": 2}
        assert any("stop strings" in warning for warning in reply["edgeinfer"]["warnings"])


@pytest.mark.parametrize("stop", [",", "_", "Paris", "}", "name"])
def test_a_stop_string_ends_free_text_and_no_call_beside_tools(serve: Serve, stop: str) -> None:
    reply = message(serve(f"One {stop} two"), tools=[WEATHER], stop=[stop])
    assert reply["content"] == "One "
    for call in (CALL, CALL[len("<tool_call>\n") : -len("\n</tool_call>")]):
        for answer in (call, "I look: " + call if call is CALL else call):
            reply = message(serve(answer), tools=[WEATHER], stop=[stop])
            assert arguments(reply) == {"city": "Paris", "days": 2}


def test_a_templates_own_stop_strings_cut_no_more_than_others(serve: Serve) -> None:
    template = THINKS.replace("OPEN", "").replace("{# </think> #}", "")
    endpoint = serve(CALL, template, stop=("Paris", "<tool_call>\n{"))
    for choice in ("auto", "required"):
        reply = message(endpoint, tools=[WEATHER], tool_choice=choice)
        assert arguments(reply) == {"city": "Paris", "days": 2}
    reply = message(serve(ADA, template, stop=("Ada",)), tools=[WEATHER], response_format=PERSON)
    assert json.loads(reply["content"]) == {"name": "Ada", "age": 36}
    endpoint = serve("To Paris, then", template, stop=("Paris",))
    assert message(endpoint, tools=[WEATHER])["content"] == "To "


def test_an_older_form_of_tools_is_refused_by_name(serve: Serve) -> None:
    endpoint = serve("Hello")
    for name, value in (("functions", [WEATHER["function"]]), ("function_call", "auto")):
        reply = endpoint.chat(**{name: value})
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == name
        assert "use tool" in reply.json()["error"]["message"]


def test_tools_that_are_too_much_together_are_called_that(serve: Serve) -> None:
    names = {f"property_{number}_{'x' * 500}": {"type": "string"} for number in range(300)}
    many = [
        {"type": "function", "function": {"name": f"t{n}", "parameters": {"properties": names}}}
        for n in range(3)
    ]
    reply = serve("Hello").chat(tools=many)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith("tools: the form of their calls takes more")


def test_schemas_of_tools_are_checked(serve: Serve) -> None:
    endpoint = serve("Hello")
    email = {"type": "string", "pattern": "^(?!\\.)[a-z.]+@[a-z]+$"}  # as zod writes it
    function = {"name": "post", "parameters": {"type": "object", "properties": {"to": email}}}
    assert message(endpoint, tools=[{"type": "function", "function": function}])["content"] == "Hello"
    reply = endpoint.chat(tools=[{"type": "function", "function": {**function, "strict": True}}])
    assert reply.status_code == 400
    assert "tool 'post': the schema keyword 'pattern' at " in reply.json()["error"]["message"]


def test_two_calls_without_tags_are_not_taken_for_one_that_was_held(serve: Serve) -> None:
    call = '{"name": "get_weather", "arguments": {"city": 5}}'
    reply = message(serve(call + call), tools=[WEATHER], parallel_tool_calls=False, max_tokens=150)
    for found in reply.get("tool_calls", []):
        assert isinstance(json.loads(found["function"]["arguments"])["city"], str)
    assert len(reply.get("tool_calls", [])) <= 1


def test_what_is_asked_reaches_the_answer(serve: Serve) -> None:
    endpoint = serve("plain")
    assert message(endpoint, messages=ask("hi"))["content"] == "plain"
