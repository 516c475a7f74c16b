"""Messages to a prompt: the model's own template, rendered at arm's length, or a stated fallback."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from edgeinfer.errors import TemplateError
from edgeinfer_models import template_process
from edgeinfer_models.gguf_format import GgufArray, iter_strings
from edgeinfer_models.gguf_header import GgufHeader
from edgeinfer_models.hf_tokenizer import added_token_texts
from edgeinfer_models.template_process import MAX_OUTPUT, MEMORY_LIMIT, read_frame, write_frame
from edgeinfer_models.tokenizer_config import read_tokenizer_config

TIME_LIMIT_S = 5.0
MAX_TEMPLATE = 1 << 20  # characters; real ones have some 20,000
_SEE = "`edgeinfer models show --template` prints it"


@dataclass(frozen=True)
class TemplateSource:
    text: str
    origin: Literal["model", "fallback"]
    bos: str
    eos: str
    name: str = "model"  # "model", or which fallback: "chatml", "gemma", "llama3", "plain"
    stop: tuple[str, ...] = ()  # where an answer ends, for a fallback without an end-of-turn token


def template_of(header: GgufHeader) -> TemplateSource:
    """The template the file brings, or a fallback that suits its vocabulary."""
    tokens = _vocabulary(header)
    bos = _token_text(tokens, header.get_int("tokenizer.ggml.bos_token_id", -1))
    eos = _token_text(tokens, header.get_int("tokenizer.ggml.eos_token_id", -1))
    text = header.get_str("tokenizer.chat_template")
    if text.strip():
        return TemplateSource(text, "model", bos, eos)
    name = _fallback_name(tokens)
    return TemplateSource(FALLBACKS[name], "fallback", bos, eos, name, _FALLBACK_STOPS.get(name, ()))


def template_of_folder(folder: Path) -> TemplateSource:
    """The same for a Hugging Face folder. Raises ModelFileInvalid for one that is damaged."""
    config = read_tokenizer_config(folder)
    if config.chat_template.strip():
        return TemplateSource(config.chat_template, "model", config.bos, config.eos)
    name = _fallback_name([text.encode("utf-8", "replace") for text in added_token_texts(folder)])
    stops = _FALLBACK_STOPS.get(name, ())
    return TemplateSource(FALLBACKS[name], "fallback", config.bos, config.eos, name, stops)


def fallback_template(header: GgufHeader) -> str:
    """A template for a model that brings none: the turns its special tokens suggest, else plain text."""
    return FALLBACKS[_fallback_name(_vocabulary(header))]


class TemplateRenderer:
    """Renders one template in a process of its own, which is kept for the next time. Thread-safe.

    template: jinja2 text in Hugging Face's conventions. bos, eos: the tokens' text.
    """

    def __init__(self, template: str, bos: str, eos: str, *, time_limit_s: float = TIME_LIMIT_S) -> None:
        if len(template) > MAX_TEMPLATE:
            raise TemplateError(
                f"the chat template has {len(template):,} characters where at most {MAX_TEMPLATE:,} are"
                " allowed; use another file of this model"
            )
        self._template = template
        self._tokens = {"bos_token": bos, "eos_token": eos}
        self._time_limit_s = time_limit_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None

    def start(self) -> None:
        """Start the process ahead of time; returns at once. Raises TemplateError if it cannot be."""
        with self._lock:
            self._ensure_process()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. options: any further variables (`enable_thinking` …), over the standard ones.

        Raises TemplateError: the template refused, failed, looped, or needed too much.
        """
        variables: dict[str, Any] = {
            **self._tokens,
            "messages": list(messages),
            "tools": list(tools) if tools else None,
            "documents": list(documents) if documents else None,
            "add_generation_prompt": add_generation_prompt,
            **(options or {}),
        }
        try:
            json.dumps(variables)
        except (TypeError, ValueError, RecursionError) as error:
            raise TemplateError(f"the messages cannot be given to the chat template ({error})") from None
        with self._lock:
            reply = self._ask({"template": self._template, "variables": variables})
        if "text" in reply:
            return str(reply["text"])
        raise TemplateError(_explain(reply))

    @property
    def pid(self) -> int | None:
        """The process's id while there is one."""
        return self._process.pid if self._process is not None else None

    def close(self) -> None:
        """End the process, and a rendering under way with it. Idempotent; a later render starts
        another."""
        process = self._process
        if process is not None and self._lock.locked():
            process.kill()  # or the lock would come with the rendering's time limit only
        with self._lock:
            self._stop()

    def __enter__(self) -> TemplateRenderer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ensure_process(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._stop()
        try:
            self._process = _spawn()
        except OSError as error:
            reason = error.strerror or str(error)
            raise TemplateError(
                f"the chat template's process cannot be started ({reason}); try again"
            ) from None
        self._finalizer = weakref.finalize(self, _end, self._process)
        return self._process

    def _stop(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._finalizer = None

    def _ask(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        process = self._ensure_process()
        ran_out = threading.Event()

        def kill() -> None:
            ran_out.set()
            process.kill()

        timer = threading.Timer(self._time_limit_s, kill)
        timer.daemon = True
        timer.start()
        reply: dict[str, Any] | None = None
        try:
            with contextlib.suppress(OSError, ValueError):  # the process died; said below
                write_frame(cast(BinaryIO, process.stdin), request)
                reply = read_frame(cast(BinaryIO, process.stdout))
        finally:
            timer.cancel()
            if reply is None:  # also when interrupted: the pipes hold half a conversation
                process.kill()
                status = process.wait()
                self._stop()
        if reply is not None:
            return reply
        if ran_out.is_set():
            raise TemplateError(
                f"the chat template did not finish within {self._time_limit_s:g} s and was stopped;"
                f" {_SEE}"
            )
        raise TemplateError(f"the chat template ended its process ({_exit_reason(status)}); {_SEE}")


def _spawn() -> subprocess.Popen[bytes]:
    # A group of its own: Ctrl+C in the terminal is the engine's to handle.
    return subprocess.Popen(
        [sys.executable, "-I", "-S", template_process.__file__, *_library_folders()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        process_group=0 if os.name == "posix" else None,
    )


def _library_folders() -> list[str]:
    """Where jinja2 and markupsafe lie, found without importing them here."""
    folders: list[str] = []
    for name in ("jinja2", "markupsafe"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise TemplateError(f"the package {name} is missing; run `pip install {name}`")
        folder = str(Path(spec.origin).parent.parent)
        if folder not in folders:
            folders.append(folder)
    return folders


def _end(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()
    process.kill()  # it holds nothing worth an orderly end
    process.wait()


def _exit_reason(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"exit code {status}"


def _explain(reply: Mapping[str, Any]) -> str:
    kind, message, line = reply.get("error"), str(reply.get("message", "")), reply.get("line", 0)
    where = f" in line {line}" if line else ""
    if kind == "raised":
        return f"the chat template refused these messages: {message}"
    if kind == "syntax":
        return f"the chat template has a syntax error{where}: {message}; {_SEE}"
    if kind == "forbidden":
        return f"the chat template tried what its sandbox forbids{where}: {message}; {_SEE}"
    if kind == "undefined":
        return f"the chat template uses what is not there{where}: {message}; {_SEE}"
    if kind == "memory":
        return f"the chat template needed more than {MEMORY_LIMIT >> 20} MiB of memory; {_SEE}"
    if kind == "output":
        return f"the chat template made more than {MAX_OUTPUT:,} characters; {_SEE}"
    return f"the chat template failed{where}: {message}; {_SEE}"


def _vocabulary(header: GgufHeader) -> list[bytes]:
    value = header.get("tokenizer.ggml.tokens")
    if isinstance(value, GgufArray):
        is_text = value.element_type == "str"
        return list(iter_strings(value.read_bytes(), value.length)) if is_text else []
    return [str(token).encode() for token in value] if isinstance(value, list) else []


def _token_text(tokens: Sequence[bytes], token: int) -> str:
    return tokens[token].decode("utf-8", "replace") if 0 <= token < len(tokens) else ""


def _fallback_name(tokens: Sequence[bytes]) -> str:
    known = set(tokens)
    for name, marker in (
        ("chatml", b"<|im_start|>"),
        ("gemma", b"<start_of_turn>"),
        ("llama3", b"<|start_header_id|>"),
    ):
        if marker in known:
            return name
    return "plain"


FALLBACKS: Mapping[str, str] = {
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% set lead = namespace(text='') %}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{% set lead.text = message['content'] + '\n\n' %}{% else %}"
        "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
        "{{ lead.text }}{% set lead.text = '' %}{{ message['content'] }}<end_of_turn>\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}"
        "<|end_header_id|>\n\n{{ message['content'] }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "plain": (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
        "{% elif message['role'] == 'assistant' %}Assistant: {{ message['content'] }}\n"
        "{% else %}User: {{ message['content'] }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
}
_FALLBACK_STOPS = {"plain": ("\nUser:",), "llama3": ("<|eot_id|>",), "gemma": ("<end_of_turn>",)}
