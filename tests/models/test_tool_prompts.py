"""Conversations with tools, rendered through templates like each family's (written for these tests)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgeinfer_models.chat_template import FALLBACKS, TemplateRenderer, TemplateSource, template_of
from edgeinfer_models.gguf_model import read_gguf_model
from edgeinfer_models.tool_formats import ToolChoice, choose_tool_format
from edgeinfer_models.tool_formats.gemma import Gemma
from edgeinfer_models.tool_formats.mistral import Mistral
from tests.models.tool_answers import TEMPLATES, TOOLS, format_of, parse

AUTO, NONE = ToolChoice("auto"), ToolChoice("none")

HERMES = """\
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}Tools:
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
Answer with <tool_call></tool_call>.<|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% elif m.role != 'system' %}<|im_start|>{{ m.role }}
{{ m.content }}
{%- for call in m.tool_calls %}
{{- '\n<tool_call>' }}
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA = """\
{{ bos_token }}{% if tools %}<|start_header_id|>system<|end_header_id|>

Answer with {"name": the name, "parameters": {…}}.
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|eot_id|>{% endif %}
{%- for m in messages %}
{%- if m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set call = m.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>

{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|eot_id|>
{%- else %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>

{{ m.content }}<|eot_id|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
MISTRAL = """\
{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{%- if m.tool_call_id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif -%}
[TOOL_RESULTS]{"content": {{ m.content | tojson }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]
{%- elif m.tool_calls %}[TOOL_CALLS][
{%- for call in m.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif -%}
{{ (call.function | tojson)[:-1] }}, "id": "{{ call.id }}"}{{ ',' if not loop.last }}
{%- endfor %}]{{ eos_token }}
{%- elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}
{%- else %}[INST] {{ m.content }}[/INST]
{%- endif %}
{%- endfor %}"""
QWEN_CODER = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}<function><name>{{ tool.function.name }}</name></function>{% endfor %}
Answer with <tool_call><function=name><parameter=p>…<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}
{%- for call in m.tool_calls %}
<tool_call>
<function={{ call.function.name }}>
{% for key, value in call.function.arguments | items %}<parameter={{ key }}>
{{ value if value is string else value | tojson }}
</parameter>
{% endfor %}</function>
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
GEMMA = """\
{{ bos_token }}{% if tools %}<start_of_turn>developer
{% for tool in tools %}<start_function_declaration>declaration:{{ tool.function.name }}<end_function_declaration>
{% endfor %}<end_of_turn>
{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}<start_function_response>response:{{ m.name }}{value:<escape>{{ m.content }}<escape>}<end_function_response>
{%- elif m.tool_calls %}<start_of_turn>model
{% for call in m.tool_calls %}<start_function_call>call:{{ call.function.name }}{
{%- for key, value in call.function.arguments | dictsort %}{{ ',' if not loop.first }}{{ key }}:
{%- if value is string %}<escape>{{ value }}<escape>{% else %}{{ value }}{% endif %}
{%- endfor %}}<end_function_call>{% endfor %}
{%- else %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content }}<end_of_turn>
{% endif %}
{%- endfor %}"""  # noqa: E501
NO_TOOLS = """\
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
STRICT_TURNS = """\
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif -%}
<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content }}<end_of_turn>
{% endfor %}"""


def call(id: str, name: str, arguments: Any) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather in Paris and all of it?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            call("call_abc", "get", '{"city": "Paris", "days": 2}'),
            call("call_def", "get_all", "{}"),
        ],
    },
    {"role": "tool", "tool_call_id": "call_abc", "content": "rain"},
    {"role": "tool", "tool_call_id": "call_def", "content": [{"type": "text", "text": "42 places"}]},
    {"role": "user", "content": "Thanks."},
]


def prompt(template: str, messages: Any = CONVERSATION, choice: ToolChoice = AUTO) -> str:
    given = json.dumps(messages)
    prepared, tools = format_of(template).prepare(messages, TOOLS, choice)
    assert json.dumps(messages) == given, "the caller's messages were changed"
    with TemplateRenderer(template, "<s>", "</s>") as renderer:
        return renderer.render(prepared, tools=tools)


FAMILIES = [
    *((TEMPLATES[name], name) for name in ("hermes", "qwen_coder", "llama", "generic")),
    *((TEMPLATES[name], "mistral") for name in ("mistral_list", "mistral_id", "mistral_name")),
    *((TEMPLATES[name], "gemma") for name in ("functiongemma", "gemma4")),
    (HERMES, "hermes"),
    (LLAMA, "llama"),
    (MISTRAL, "mistral"),
    (QWEN_CODER, "qwen_coder"),
    (GEMMA, "gemma"),
    (NO_TOOLS, "generic"),
    (STRICT_TURNS, "generic"),
    ("{{ tools }} in a way we do not know", "generic"),
    ("nothing of the kind, though a <tool_call> in its text", "generic"),
    *((text, "generic") for text in FALLBACKS.values()),
]


@pytest.mark.parametrize(("template", "name"), FAMILIES)
def test_a_family_is_known_by_its_template(template: str, name: str) -> None:
    assert format_of(template).name == name


def test_forms_inside_a_family_are_told_apart() -> None:
    forms = [format_of(TEMPLATES[name]) for name in ("mistral_list", "mistral_id", "mistral_name")]
    assert [form.form for form in forms if isinstance(form, Mistral)] == ["list", "id", "name"]
    marks = [format_of(TEMPLATES[name]) for name in ("functiongemma", "gemma4")]
    assert [form.marks.quote for form in marks if isinstance(form, Gemma)] == ["<escape>", '<|"|>']


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            HERMES,
            '<tool_call>\n{"name": "get", "arguments": {"city": "Paris", "days": '
            '2}}\n</tool_call>\n<tool_call>\n'
            '{"name": "get_all", "arguments": {}}\n</tool_call><|im_end|>\n<|im_start|>user\n<tool_'
            'response>\nrain\n',
        ),
        (
            LLAMA,
            '{"name": "get", "parameters": {"city": "Paris", "days": 2}}<|eot_id|><|start_header_id'
            '|>ipython'
            '<|end_header_id|>\n\nrain<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{"'
            'name": "get_all"',
        ),
        (MISTRAL, '[TOOL_CALLS][{"name": "get", "arguments": {"city": "Paris", "days": 2}, "id": "'),
        (QWEN_CODER, "<function=get>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n2\n<"
                     "/parameter>"),
        (
            GEMMA,
            "<start_function_call>call:get{city:<escape>Paris<escape>,days:2}<end_function_call><st"
            "art_function_call>"
            "call:get_all{}<end_function_call><start_function_response>response:get{value:<escape>r"
            "ain<escape>}",
        ),
        (NO_TOOLS, '<tool_call>\n{"name": "get", "arguments": {"city": "Paris", "days": '
                   '2}}\n</tool_call>\n<tool_call>'),
        (STRICT_TURNS, "<tool_response>\nrain\n</tool_response>\n<tool_response>\n42 "
                       "places\n</tool_response>\nThanks."),
    ],
)  # fmt: skip
def test_calls_and_results_of_a_conversation_reach_the_prompt(template: str, expected: str) -> None:
    text = prompt(template)
    assert expected in text
    for needed in ("rain", "42 places", "Thanks.", "get_all"):
        assert needed in text


@pytest.mark.parametrize("template", [HERMES, LLAMA, MISTRAL, QWEN_CODER, GEMMA, NO_TOOLS])
def test_what_is_rendered_as_a_call_is_read_as_one(template: str) -> None:
    """The form we show a model is the form we understand."""
    text = prompt(template, CONVERSATION[:2])
    answer = text[text.index("Paris and all of it?") + 20 :]
    found = parse(format_of(template).parser(TOOLS), [answer[_call_begin(answer) :]])
    assert found.read[0] == ("get", {"city": "Paris", "days": 2})


def _call_begin(text: str) -> int:
    marks = ("<tool_call>", "[TOOL_CALLS]", "<start_function_call>", '{"name"')
    return min(text.index(mark) for mark in marks if mark in text)


def test_foreign_ids_become_nine_letters_and_digits_for_mistral_the_same_every_time() -> None:
    first, _ = format_of(MISTRAL).prepare(CONVERSATION, TOOLS, AUTO)
    again, _ = format_of(MISTRAL).prepare(CONVERSATION, TOOLS, AUTO)
    assert first == again
    ids = [each["id"] for each in first[1]["tool_calls"]]
    assert [message["tool_call_id"] for message in first[2:4]] == ids
    assert all(len(id) == 9 and id.isalnum() for id in ids)
    assert len(set(ids)) == 2
    kept, _ = format_of(MISTRAL).prepare(
        [{"role": "assistant", "tool_calls": [call("9Ae3bDc2F", "get_all", {})]}], TOOLS, AUTO
    )
    assert kept[0]["tool_calls"][0]["id"] == "9Ae3bDc2F"


def test_arguments_that_are_no_object_are_shown_and_break_nothing() -> None:
    for arguments in ('{"city": "Par', "[1]", "NaN", '{"a": NaN}', "[" * 100_000, 7):
        messages = [{"role": "assistant", "tool_calls": [call("c", "get", arguments)]}]
        for template in (HERMES, LLAMA, MISTRAL, QWEN_CODER, GEMMA, NO_TOOLS):
            assert "invalid_arguments" in prompt(template, [CONVERSATION[0], *messages])


def test_odd_messages_are_prepared_without_a_crash() -> None:
    odd: list[dict[str, Any]] = [
        {"role": "tool"},
        {"role": "assistant", "tool_calls": [None, {}, {"function": "x"}, {"function": {"name": 3}}]},
        {"role": "tool", "tool_call_id": 7, "content": [None, {"type": "image_url"}, {"text": "a"}]},
        {"content": 3, "tool_calls": "x"},
    ]
    for template in TEMPLATES.values():
        prepared, _ = format_of(template).prepare(odd, TOOLS, AUTO)
        assert all(isinstance(message["content"], str) for message in prepared)


def test_without_a_choice_the_template_is_told_of_no_tools() -> None:
    for template in TEMPLATES.values():
        _, tools = format_of(template).prepare(CONVERSATION, TOOLS, NONE)
        assert tools is None
    assert "at your disposal" not in prompt(NO_TOOLS, choice=NONE)
    assert "rain" in prompt(NO_TOOLS, choice=NONE)


def test_our_own_words_join_the_system_message_or_make_one() -> None:
    system = {"role": "system", "content": "Be brief."}
    text = prompt(NO_TOOLS, [system, *CONVERSATION])
    assert text.startswith("<|im_start|>system\nBe brief.\nThese tools are at your disposal")
    assert text.count("<|im_start|>system") == 1
    assert prompt(NO_TOOLS).startswith("<|im_start|>system\nThese tools")
    for tool in TOOLS:
        assert json.dumps(tool.for_template()["function"]) in text


def test_a_template_without_a_system_role_gets_our_words_in_the_first_turn() -> None:
    text = prompt(STRICT_TURNS)
    assert text.startswith("<start_of_turn>user\nThese tools")
    assert "as usual.\nWeather in Paris" in text


@pytest.mark.model
def test_the_starters_template_takes_a_conversation_with_tools(starter_model: Path) -> None:
    source = template_of(read_gguf_model(starter_model))
    form = choose_tool_format(source)
    assert form.name == "generic"
    messages, tools = form.prepare(CONVERSATION, TOOLS, AUTO)
    with TemplateRenderer(source.text, source.bos, source.eos) as renderer:
        text = renderer.render(messages, tools=tools)
    assert '{"name": "get", "arguments": {"city": "Paris", "days": 2}}' in text
    assert "rain" in text
    assert text.endswith("<|im_start|>assistant\n")


def test_a_source_is_chosen_by_its_text_alone() -> None:
    assert choose_tool_format(TemplateSource(HERMES, "fallback", "", "")).name == "hermes"
