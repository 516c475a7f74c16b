"""`edgeinfer serve`: the HTTP endpoint."""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edgeinfer.cli import options
from edgeinfer.errors import UsageError, one_line

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from edgeinfer.client import LocalClient
    from edgeinfer.engine.request import Overflow
    from edgeinfer.sampling import SamplingParams
    from edgeinfer.server.binding import Address
    from edgeinfer.server.guard import GuardSettings
    from edgeinfer.server.service import Service, ServiceSettings

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
MAX_QUEUE = 10_000


def serve(
    model: options.Model = None,
    host: options.Host = "127.0.0.1",
    port: options.Port = 11435,
    api_key: options.ApiKey = None,
    api_key_file: options.ApiKeyFile = None,
    no_api_key: options.NoApiKey = False,
    allow_origin: options.AllowOrigin = None,
    allow_host: options.AllowHost = None,
    parallel: options.Parallel = 4,
    queue: options.Queue = 64,
    timeout: options.Timeout = "1h",
    idle_unload: options.IdleUnload = "never",
    backend: options.Backend = "auto",
    ctx: options.Ctx = None,
    threads: options.Threads = "auto",
    gpu_layers: options.GpuLayers = "auto",
    kv_type: options.KvType = "auto",
    kv_type_k: options.KvTypeK = None,
    kv_type_v: options.KvTypeV = None,
    window: options.Window = None,
    sinks: options.Sinks = 4,
    eviction: options.Eviction = "streaming",
    speculate: options.Speculate = "auto",
    draft: options.Draft = None,
    load_as: options.LoadAs = "auto",
    compile: options.Compile = False,
    overflow: options.Overflow = "stop",
    cache_ram: options.CacheRam = "1G",
    cache_disk: options.CacheDisk = "4G",
    cache_dir: options.CacheDir = None,
    no_cache: options.NoCache = False,
    seed: options.Seed = None,
    temp: options.Temp = 0.7,
    top_p: options.TopP = 0.95,
    top_k: options.TopK = 40,
    min_p: options.MinP = 0.05,
    typical_p: options.TypicalP = 1.0,
    repeat_penalty: options.RepeatPenalty = 1.0,
    presence_penalty: options.PresencePenalty = 0.0,
    frequency_penalty: options.FrequencyPenalty = 0.0,
    dry_multiplier: options.DryMultiplier = 0.0,
    max_tokens: options.MaxTokens = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Answer OpenAI's API over HTTP, for the programs you already have."""
    from contextlib import ExitStack
    from dataclasses import replace

    from edgeinfer.cli.opening import checked_overflow, open_options, puller
    from edgeinfer.cli.output import StatusLine
    from edgeinfer.client import LocalClient
    from edgeinfer.sampling import SamplingParams
    from edgeinfer.server.api_keys import check_binding, read_api_keys
    from edgeinfer.server.binding import listen
    from edgeinfer.server.guard import GuardSettings, check_names
    from edgeinfer.server.service import ServiceSettings

    sampling = SamplingParams(
        temperature=temp,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        typical_p=typical_p,
        repeat_penalty=repeat_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        dry_multiplier=dry_multiplier,
        seed=seed,
    )
    opened = open_options(
        model,
        backend=backend,
        ctx=ctx,
        threads=threads,
        gpu_layers=gpu_layers,
        kv_type=kv_type,
        kv_type_k=kv_type_k,
        kv_type_v=kv_type_v,
        window=window,
        sinks=sinks,
        eviction=eviction,
        speculate=speculate,
        draft=draft,
        load_as=load_as,
        compile=compile,
        cache_ram=cache_ram,
        cache_disk=cache_disk,
        cache_dir=cache_dir,
        no_cache=no_cache,
    )
    if not 0 <= port <= 65535:
        raise UsageError(f"--port {port} is outside [0, 65535]")
    if not 0 <= queue <= MAX_QUEUE:
        raise UsageError(f"--queue {queue} is outside [0, {MAX_QUEUE}]")
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"--max-tokens {max_tokens} must be at least 1")
    wanted_overflow = checked_overflow(overflow)
    settings = ServiceSettings(
        parallel=parallel,
        queue=queue,
        timeout_s=parse_duration("--timeout", timeout),
        idle_unload_s=parse_duration("--idle-unload", idle_unload),
    )
    keys, notes = read_api_keys(
        [api_key] if api_key is not None else [], Path(api_key_file) if api_key_file else None
    )
    guard = GuardSettings(
        keys=keys, allow_origins=tuple(allow_origin or ()), allow_hosts=tuple(allow_host or ())
    )
    check_binding(host, keys, no_api_key, guard.allow_origins)
    check_names(guard)
    logging.basicConfig(stream=sys.stderr, level=_log_level())
    status = StatusLine(enabled=not quiet)

    def show(what: str, fraction: float) -> None:
        status.show(f"{what} … {fraction:.0%}")

    def say(note: str) -> None:
        status.clear()
        if not quiet:
            sys.stderr.write(f"edgeinfer: {one_line(note)}\n")

    for note in notes:
        say(f"warning: {note}")
    client = LocalClient(replace(opened, sequences=parallel), puller(show, say))
    with client, ExitStack() as sockets:
        listening = listen(host, port)  # a port that is taken is not worth loading a model for
        for each in listening[1]:
            sockets.callback(each.close)
        try:
            info = client.load(show)
        finally:
            status.close()
        for warning in info.warnings:
            say(f"warning: {warning}")
        _run(client, settings, sampling, max_tokens, wanted_overflow, guard, listening, say)


def _log_level() -> str:
    """Of the environment, which the model's process inherits: it is left as logging reads it. Raises
    UsageError."""
    found = os.environ.get("EDGEINFER_LOG", "").strip()
    if not found:
        os.environ.pop("EDGEINFER_LOG", None)
        return "WARNING"
    if found.upper() not in logging.getLevelNamesMapping():
        raise UsageError(
            f"EDGEINFER_LOG {one_line(found, 40)!r} is no level; use debug, info, warning or error"
        )
    os.environ["EDGEINFER_LOG"] = level = found.upper()
    return level


def _run(
    client: LocalClient,
    settings: ServiceSettings,
    sampling: SamplingParams,
    max_tokens: int | None,
    overflow: Overflow,
    guard: GuardSettings,
    listening: tuple[Address, list[socket.socket]],
    say: Callable[[str], None],
) -> None:
    from edgeinfer.server.app import create_app
    from edgeinfer.server.dialect import dialect_of
    from edgeinfer.server.guard import Guard
    from edgeinfer.server.service import Service, served_name
    from edgeinfer.server.serving import serve as run_server

    name, aliases = served_name(client)
    service = Service(
        client,
        name,
        settings,
        dialect=dialect_of(client),
        aliases=aliases,
        sampling=sampling,
        max_tokens=max_tokens,
        overflow=overflow,
    )
    app = Guard(create_app(service, on_close=client.close), guard)
    run_server(app, None, lambda address: _greet(address.url, service, say), listening=listening)


def _greet(url: str, service: Service, say: Callable[[str], None]) -> None:
    info = service.info
    most = f"{service.settings.parallel} at once"
    if info:
        most += f", {info.context:,} tokens of context each"
    say(f"{service.name} answers at {url}/v1 ({most}); Ctrl+C ends it")


def parse_duration(option: str, text: str) -> float:
    """ "90", "90s", "10m", "1h" -> seconds; "never" and "0" -> 0. Raises UsageError."""
    word = text.strip().lower()
    if word == "never":
        return 0.0
    match = re.fullmatch(r"([0-9]{1,7}(?:\.[0-9]{1,3})?)\s*([smh]?)", word)
    if match is None:
        raise UsageError(f"{option} {text[:40]!r} is no time; write for example 90s, 10m or never")
    return float(match[1]) * _UNITS[match[2]]
