"""The program that renders chat templates: a small process of its own that may be killed.

A template comes with a model, so it is somebody else's code. jinja2's immutable sandbox keeps it from
Python; this process keeps a template that loops or eats memory from taking the engine with it.

Run by path with `-I -S` and the folders of jinja2 and markupsafe as arguments: it imports nothing of
ours. Frames on both pipes: 4 bytes of length, big-endian, then JSON.

    request   {"template": str, "variables": {…}}
    reply     {"text": str} or {"error": kind, "message": str, "line": int}
              kind: raised | syntax | forbidden | undefined | memory | output | failed

It ends at end of file. Memory and processor time are limited where the system can.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

if TYPE_CHECKING:
    from jinja2 import Environment, Template

MAX_OUTPUT = 64 << 20  # characters
MAX_FRAME = 512 << 20  # bytes; JSON escapes grow a text up to sixfold
MEMORY_LIMIT = 1 << 30
CPU_SECONDS = 10  # per template; ends a process whose parent is gone and cannot kill it


def main() -> None:
    sys.path.extend(sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    # Nothing a template or library prints may get between the frames.
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    _limit_memory()
    environment = _environment()
    compiled: tuple[str, Template] | None = None
    while (request := read_frame(requests)) is not None:
        _allow_cpu_seconds(CPU_SECONDS)
        source = str(request["template"])
        try:
            if compiled is None or compiled[0] != source:
                compiled = (source, environment.from_string(source))
            reply: dict[str, Any] = {"text": _render(compiled[1], request["variables"])}
        except Exception as error:
            reply = _describe(error)
        try:
            write_frame(replies, reply)
        except MemoryError:
            write_frame(replies, {"error": "memory", "message": "", "line": 0})


def read_frame(stream: BinaryIO) -> dict[str, Any] | None:
    """The next frame, or None at the end of the stream (also in the middle of a frame)."""
    head = stream.read(4)
    length = int.from_bytes(head, "big")
    if len(head) < 4 or length > MAX_FRAME:
        return None
    body = stream.read(length)
    if len(body) < length:
        return None
    value = json.loads(body)
    return value if isinstance(value, dict) else None


def write_frame(stream: BinaryIO, value: Mapping[str, Any]) -> None:
    body = json.dumps(value).encode("ascii")  # ASCII carries lone surrogates too
    stream.write(len(body).to_bytes(4, "big"))
    stream.write(body)
    stream.flush()


class RaisedByTemplate(Exception):
    """raise_exception(message) was called."""


class OutputTooLong(Exception):
    pass


def _render(template: Template, variables: Mapping[str, Any]) -> str:
    pieces: list[str] = []
    length = 0
    for piece in template.generate(**variables):
        length += len(piece)
        if length > MAX_OUTPUT:
            raise OutputTooLong
        pieces.append(piece)
    return "".join(pieces)


def _environment() -> Environment:
    """What Hugging Face's `apply_chat_template` gives a template."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the assistant wrote, for training; here it only passes on."""

        tags = {"generation"}  # noqa: RUF012 (declared so by jinja2)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_pass_on"), [], [], body).set_lineno(line)

        def _pass_on(self, caller: Any) -> Any:
            return caller()

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes for HTML, which a prompt is not.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: Any) -> NoReturn:
    raise RaisedByTemplate(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _describe(error: Exception) -> dict[str, Any]:
    from jinja2 import TemplateSyntaxError, UndefinedError
    from jinja2.exceptions import SecurityError

    kinds: tuple[tuple[type[Exception], str], ...] = (
        (RaisedByTemplate, "raised"),
        (TemplateSyntaxError, "syntax"),
        (SecurityError, "forbidden"),
        (UndefinedError, "undefined"),
        (MemoryError, "memory"),
        (OutputTooLong, "output"),
    )
    kind = next((name for cls, name in kinds if isinstance(error, cls)), "failed")
    message = str(error)[:2000]
    if kind == "failed":
        message = f"{type(error).__name__}: {message}" if message else type(error).__name__
    line = getattr(error, "lineno", None) or _template_line(error)
    return {"error": kind, "message": message, "line": line}


def _template_line(error: Exception) -> int:
    """The template's line: jinja2 rewrites tracebacks to speak of `<template>`."""
    line, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _limit_memory() -> None:
    try:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = MEMORY_LIMIT if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):
        return  # Windows, and macOS for address space: the time limit remains


def _allow_cpu_seconds(seconds: int) -> None:
    try:
        import resource

        usage = resource.getrusage(resource.RUSAGE_SELF)
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        until = int(usage.ru_utime + usage.ru_stime) + seconds
        if hard != resource.RLIM_INFINITY:
            until = min(until, hard)
        resource.setrlimit(resource.RLIMIT_CPU, (until, hard))
    except (ImportError, ValueError, OSError):
        return


if __name__ == "__main__":
    main()
