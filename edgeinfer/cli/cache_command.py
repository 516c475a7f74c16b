"""`edgeinfer cache`: the prompt cache on disk."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeinfer.cli import options
from edgeinfer.cli.command import Command, Group
from edgeinfer.cli.models import print_table
from edgeinfer.cli.output import StatusLine, emit, emit_json
from edgeinfer.errors import EdgeInferError, RequestFailed, UsageError, one_line

if TYPE_CHECKING:
    from edgeinfer.client import Request

app = typer.Typer(
    cls=Group, no_args_is_help=True, help="Conversations on disk, which start at once the next time."
)

MAX_WARM_BYTES = 16 * 2**20


@app.command("list", cls=Command)
def list_command(
    cache_dir: options.CacheDir = None,
    json_output: options.JsonOutput = False,
    debug: options.Debug = False,
) -> None:
    """What is kept, by model and KV type."""
    from edgeinfer.engine.cache_report import cached_models
    from edgeinfer.engine.disk_cache import prompts_folder
    from edgeinfer.machine.ledger import shown_bytes

    folder = prompts_folder(cache_dir)
    models = cached_models(folder)
    total = sum(model.num_bytes for model in models)
    if json_output:
        rows = [{**asdict(model), "bytes": model.num_bytes} for model in models]
        for row in rows:
            del row["num_bytes"]
        emit_json({"folder": str(folder), "bytes": total, "models": rows})
        return
    print_table(
        ("Model", "KV type", "Blocks", "Tokens", "Size", "Pinned", "Last used"),
        [
            (
                model.model,
                model.kv_types,
                f"{model.blocks:,}",
                f"{model.tokens:,}",
                shown_bytes(model.num_bytes),
                str(model.pinned),
                _ago(model.used),
            )
            for model in models
        ],
    )
    typer.echo(f"{shown_bytes(total)} in {folder}", err=True)


@app.command("verify", cls=Command)
def verify_command(
    cache_dir: options.CacheDir = None,
    json_output: options.JsonOutput = False,
    debug: options.Debug = False,
) -> None:
    """Read every file, and remove those that are damaged."""
    from edgeinfer.engine.cache_report import verify
    from edgeinfer.engine.disk_cache import prompts_folder
    from edgeinfer.machine.ledger import shown_bytes

    status = StatusLine()
    try:
        found = verify(prompts_folder(cache_dir), lambda done: status.show(f"checking … {done:.0%}"))
    finally:
        status.close()
    if json_output:
        removed = [{"path": str(path), "reason": reason} for path, reason in found.removed]
        emit_json({"checked": found.checked, "bytes": found.num_bytes, "removed": removed})
        return
    for path, reason in found.removed:
        typer.echo(f"removed {path}: {reason}", err=True)
    emit(
        f"{found.checked} file{'s' * (found.checked != 1)} checked, {len(found.removed)} removed;"
        f" {shown_bytes(found.num_bytes)} are good\n"
    )


@app.command("clear", cls=Command)
def clear_command(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A model's name as `cache list` shows it; else all."),
    ] = None,
    cache_dir: options.CacheDir = None,
    json_output: options.JsonOutput = False,
    debug: options.Debug = False,
) -> None:
    """Remove what is kept, pinned or not. It will be read again when it is needed."""
    from edgeinfer.engine.cache_report import cached_models, clear
    from edgeinfer.engine.disk_cache import prompts_folder
    from edgeinfer.machine.ledger import shown_bytes

    folder = prompts_folder(cache_dir)
    if model is not None and model not in {
        name for m in cached_models(folder) for name in (m.model, m.identity)
    }:
        raise UsageError(
            f"nothing of a model {model[:80]!r} is kept; `edgeinfer cache list` shows what is"
        )
    freed = clear(folder, model)
    if json_output:
        emit_json({"freed_bytes": freed})
    else:
        emit(f"{shown_bytes(freed)} are free again\n")


@app.command("warm", cls=Command)
def warm_command(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help='A system prompt as text, or JSON: {"messages": […], "tools": […]}; - reads standard'
            " input.",
        ),
    ],
    model: options.Model = None,
    backend: options.Backend = "auto",
    ctx: options.Ctx = None,
    threads: options.Threads = "auto",
    gpu_layers: options.GpuLayers = "auto",
    kv_type: options.KvType = "auto",
    kv_type_k: options.KvTypeK = None,
    kv_type_v: options.KvTypeV = None,
    cache_disk: options.CacheDisk = "4G",
    cache_dir: options.CacheDir = None,
    json_output: options.JsonOutput = False,
    debug: options.Debug = False,
) -> None:
    """Read a system prompt and tools once, and keep them on disk for good."""
    from edgeinfer.cli.opening import open_options, puller
    from edgeinfer.client import LocalClient

    request = _warm_request(file)
    opened = open_options(
        model,
        backend=backend,
        ctx=ctx,
        threads=threads,
        gpu_layers=gpu_layers,
        kv_type=kv_type,
        kv_type_k=kv_type_k,
        kv_type_v=kv_type_v,
        cache_ram="256M",
        cache_disk=cache_disk,
        cache_dir=cache_dir,
    )
    if not opened.cache_disk_bytes:
        raise UsageError("--cache-disk 0 keeps nothing; give it a size")
    status = StatusLine()

    def show(what: str, fraction: float) -> None:
        status.show(f"{what} … {fraction:.0%}")

    client = LocalClient(opened, puller(show))
    with client:
        try:
            client.load(show)
            ended = client.start(client.rendered_beginning(request)).result()
        finally:
            status.close()
    tokens, pinned = ended.stats.usage.prompt_tokens, ended.stats.cache.pinned_tokens
    if pinned < tokens:
        why = "; ".join(ended.stats.warnings) or "the disk took no more"
        raise RequestFailed(f"{pinned} of {tokens} tokens are kept: {why}")
    if json_output:
        emit_json({"model": ended.stats.model, "tokens": tokens})
    else:
        emit(f"{tokens} tokens are kept for {ended.stats.model}\n")


def _warm_request(file: str) -> Request:
    """Raises UsageError, EdgeInferError."""
    from edgeinfer.client import Message, Request

    try:
        source = sys.stdin.buffer if file == "-" else Path(file).open("rb")  # noqa: SIM115
        with source:
            data = source.read(MAX_WARM_BYTES + 1)
    except OSError as error:
        raise EdgeInferError(f"{file}: cannot be read ({error.strerror or error})") from None
    if len(data) > MAX_WARM_BYTES:
        raise EdgeInferError(f"{file}: is longer than {MAX_WARM_BYTES // 2**20} MiB")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EdgeInferError(f"{file}: is not valid UTF-8: byte at offset {error.start}") from None
    if not text.strip():
        raise UsageError(f"{file}: is empty; write a system prompt into it")
    if not text.lstrip().startswith("{"):
        return Request(messages=(Message("system", text),))
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file}: is not valid JSON: {one_line(str(error), 120)}") from None
    messages, tools = found.get("messages", []), found.get("tools", [])
    is_right = isinstance(messages, list) and isinstance(tools, list)
    is_right = is_right and all(isinstance(each, dict) for each in [*messages, *tools])
    if not is_right or not all(
        isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        raise UsageError(
            f'{file}: must hold {{"messages": [{{"role": …, "content": …}}], "tools": […]}}, as a chat'
            " request does"
        )
    return Request(
        messages=tuple(Message(m["role"], m["content"]) for m in messages), tools=tuple(tools)
    )


def _ago(used: float) -> str:
    seconds = time.time() - used
    if seconds < 90:
        return "just now"
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size or name == "min":
            return f"{seconds / size:.0f} {name} ago"
    return "unknown"
