"""Chat templates: Hugging Face's conventions, and what a hostile one cannot do."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from edgeinfer.errors import TemplateError
from edgeinfer_models import template_process
from edgeinfer_models.chat_template import FALLBACKS, TemplateRenderer, fallback_template, template_of
from edgeinfer_models.gguf_model import read_gguf_model
from tests.fixtures_gguf import CHATML, write_tiny_gguf

HELLO = [{"role": "user", "content": "Hello"}]


def render(template: str, messages: Any = HELLO, time_limit_s: float = 5.0, **arguments: Any) -> str:
    with TemplateRenderer(template, "<s>", "</s>", time_limit_s=time_limit_s) as renderer:
        return renderer.render(messages, **arguments)


@pytest.fixture(scope="module")
def renderer() -> Iterator[TemplateRenderer]:
    with TemplateRenderer(CHATML, "<s>", "</s>") as shared:
        yield shared


def test_messages_become_a_prompt(renderer: TemplateRenderer) -> None:
    assert renderer.render(HELLO) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert renderer.render(HELLO, add_generation_prompt=False) == "<|im_start|>user\nHello<|im_end|>\n"


def test_any_text_passes_through_unchanged(renderer: TemplateRenderer) -> None:
    text = "é 😀 \x00 \u2028 \ud800 {{ 7*7 }} {% raw %} <|im_end|>"
    assert text in renderer.render([{"role": "user", "content": text}])


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos_token }}{{ eos_token }}", "<s></s>"),
        ("{{ tools }} {{ documents }}", "None None"),
        ("{{ {'a': 'é<>', 'b': [1, none, true]} | tojson }}", '{"a": "é<>", "b": [1, null, true]}'),
        ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "13"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("a\n  {% if true %}\nb\n  {% endif %}\nc", "a\nb\nc"),
        ("{% generation %}x{% endgeneration %}y", "xy"),
        (
            "{% set n = namespace(v=0) %}{% for m in messages %}{% set n.v = n.v + 1 %}{% endfor %}"
            "{{ n.v }}",
            "1",
        ),
        ("{{ strftime_now('%Y') }}", str(datetime.now().year)),
        ("{{ messages[0].content | trim | upper }}", "HELLO"),
        ("{{ messages[0]['content'].split('l')[0] }}", "He"),
    ],
)
def test_the_hugging_face_conventions_hold(template: str, expected: str) -> None:
    assert render(template) == expected


def test_tools_documents_and_options_reach_the_template() -> None:
    template = "{{ tools[0].name }} {{ documents[0].text }} {{ enable_thinking }} {{ bos_token }}"
    prompt = render(
        template,
        tools=[{"name": "search"}],
        documents=[{"text": "page"}],
        options={"enable_thinking": False, "bos_token": "B"},
    )
    assert prompt == "search page False B"


REFUSED = {
    "it raises": (
        "{{ raise_exception('roles must alternate') }}",
        "refused these messages: roles must alternate",
    ),
    "syntax": ("a\n{% for %}", "syntax error in line 2"),
    "unclosed": ("{% if true %}", "syntax error"),
    "undefined": ("\n\n{{ messages[0].name.first }}", "not there in line 3"),
    "division": ("\n{{ 1 / 0 }}", "failed in line 2: ZeroDivisionError"),
    "the class of a string": (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "sandbox forbids in line 1",
    ),
    "a function's globals": ("{{ raise_exception.__globals__.os }}", "sandbox forbids"),
    "format string": ("{{ '{0.__class__.__mro__}'.format('') }}", "sandbox forbids"),
    "attr filter": ("{{ (''|attr('__class__')).__mro__ }}", "sandbox forbids"),
    "cycler": ("{{ cycler.__init__.__globals__.os.system('true') }}", "sandbox forbids"),
    "changing the messages": ("{{ messages.append(1) }}", "sandbox forbids"),
    "include": ("{% include '/etc/passwd' %}", "no loader"),
    "import": ("{% import 'os' as os %}", "no loader"),
    "extends": ("{% extends '/etc/passwd' %}", "no loader"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "deep nesting": ("{{" + "(" * 20_000 + "1" + ")" * 20_000 + "}}", "RecursionError"),
    "huge range": ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    "memory bomb": ("{{ 'a' * 10**10 }}", "needed more than 1024 MiB"),
    "endless output": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' * 9999 }}{% endfor %}{% endfor %}",
        "made more than 67,108,864 characters",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_template_is_one_line(name: str) -> None:
    template, expected = REFUSED[name]
    with pytest.raises(TemplateError) as caught:
        render(template)
    assert expected in str(caught.value)
    assert str(caught.value).startswith("the chat template ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 2 ** (10 ** 9) }}",
    ],
)
def test_a_template_that_does_not_end_is_stopped(template: str) -> None:
    with TemplateRenderer(template, "", "", time_limit_s=0.5) as renderer:
        with pytest.raises(TemplateError, match=r"did not finish within 0.5 s and was stopped"):
            renderer.render(HELLO)
        assert renderer.pid is None, "the process must be gone"


def test_the_renderer_works_again_after_a_bad_render() -> None:
    template = (
        "{% if messages|length > 1 %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    )
    template += "{% endfor %}{% endif %}ok"
    with TemplateRenderer(template, "", "", time_limit_s=0.7) as renderer:
        assert renderer.render(HELLO) == "ok"
        with pytest.raises(TemplateError, match="did not finish"):
            renderer.render(HELLO * 2)
        assert renderer.render(HELLO) == "ok"


def test_the_process_is_started_ahead_kept_and_replaced_when_it_dies() -> None:
    with TemplateRenderer(CHATML, "", "") as renderer:
        assert renderer.pid is None
        renderer.start()
        first = renderer.pid
        assert first is not None
        renderer.render(HELLO)
        renderer.render(HELLO)
        assert renderer.pid == first
        psutil.Process(first).kill()
        psutil.Process(first).wait(5) if psutil.pid_exists(first) else None
        assert "Hello" in renderer.render(HELLO)
        assert renderer.pid != first
        second = renderer.pid
    assert second is not None
    assert not psutil.pid_exists(second)


def test_ctrl_c_does_not_reach_the_process() -> None:
    with TemplateRenderer(CHATML, "", "") as renderer:
        renderer.render(HELLO)
        assert renderer.pid is not None
        psutil.Process(renderer.pid).send_signal(signal.SIGINT)
        before = renderer.pid
        renderer.render(HELLO)
        assert renderer.pid == before


def test_the_process_ends_with_its_parent() -> None:
    code = (
        "import os, sys; from edgeinfer_models.chat_template import TemplateRenderer;"
        "r = TemplateRenderer('x', '', ''); r.render([]); print(r.pid, flush=True);"
        " os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not psutil.pid_exists(pid)


def test_many_threads_share_a_renderer(renderer: TemplateRenderer) -> None:
    results: list[str] = []

    def work(number: int) -> None:
        for turn in range(10):
            results.append(renderer.render([{"role": "user", "content": f"{number}-{turn}"}]))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {prompt.split("\n")[1].removesuffix("<|im_end|>") for prompt in results}
    assert found == {f"{n}-{t}" for n in range(4) for t in range(10)}


def test_values_that_are_no_json_are_refused(renderer: TemplateRenderer) -> None:
    loop: list[Any] = []
    loop.append(loop)
    for content in (object(), b"bytes", loop):
        with pytest.raises(TemplateError, match="cannot be given to the chat template"):
            renderer.render([{"role": "user", "content": content}])


def test_an_absurdly_long_template_is_refused() -> None:
    with pytest.raises(TemplateError, match="at most 1,048,576"):
        TemplateRenderer("x" * 2_000_000, "", "")


def test_the_process_loads_little() -> None:
    """It must start quickly and stay small: jinja2 and nothing of ours or numpy."""
    code = (
        f"import runpy, sys, io; sys.argv = ['x']; m = runpy.run_path({template_process.__file__!r});"
        "m['_environment'](); print([n for n in ('numpy', 'edgeinfer', 'edgeinfer_models') if n in"
        " sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- where templates come from -----------------------------------------------------------------------


def test_a_models_own_template_is_used(tiny: Path) -> None:
    source = template_of(read_gguf_model(tiny))
    assert (source.text, source.origin, source.bos, source.eos) == (
        CHATML,
        "model",
        "<|im_start|>",
        "<|im_end|>",
    )


def test_a_model_without_template_gets_the_one_its_vocabulary_suggests(tmp_path: Path) -> None:
    header = read_gguf_model(write_tiny_gguf(tmp_path / "m.gguf", template=None))
    source = template_of(header)
    assert (source.origin, source.name) == ("fallback", "chatml")
    assert fallback_template(header) == source.text == FALLBACKS["chatml"]


def test_a_plain_vocabulary_gets_plain_turns(tmp_path: Path) -> None:
    tokens = [f"t{i}" for i in range(295)]
    path = write_tiny_gguf(
        tmp_path / "m.gguf", template=None, metadata={"tokenizer.ggml.tokens": tokens}
    )
    source = template_of(read_gguf_model(path))
    assert (source.name, source.stop) == ("plain", ("\nUser:",))
    turns = [
        {"role": "system", "content": "Be brief."},
        *HELLO,
        {"role": "assistant", "content": "Hi."},
        *HELLO,
    ]
    assert (
        render(source.text, turns) == "Be brief.\n\nUser: Hello\nAssistant: Hi.\nUser: Hello\nAssistant:"
    )


@pytest.mark.parametrize("name", FALLBACKS)
def test_every_fallback_renders_a_conversation(name: str) -> None:
    turns = [{"role": "system", "content": "S"}, *HELLO, {"role": "assistant", "content": "A"}, *HELLO]
    prompt = render(FALLBACKS[name], turns)
    assert prompt.count("Hello") == 2
    assert prompt.index("S") < prompt.index("Hello") < prompt.index("A", prompt.index("Hello"))


@pytest.mark.model
def test_the_starters_template_puts_its_own_system_prompt(starter_model: Path) -> None:
    source = template_of(read_gguf_model(starter_model))
    prompt = render(source.text)
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert prompt.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
