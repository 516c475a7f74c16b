"""`edgeinfer run`: one answer, streamed to stdout; what it took, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from edgeinfer.cli import options
from edgeinfer.cli.configured import FileDefaults, is_model_name
from edgeinfer.cli.errors import INTERRUPTED
from edgeinfer.cli.interrupts import first_interrupt
from edgeinfer.errors import EdgeInferError, RequestFailed, UsageError, error_from_wire, one_line

if TYPE_CHECKING:
    from edgeinfer.cli.output import StatusLine
    from edgeinfer.client import Client, Ended, Generation, ModelInfo, Request, RunStats

MAX_STDIN_BYTES = 64 * 2**20


def run(
    context: typer.Context,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] PROMPT",
            help="MODEL as `edgeinfer chat` takes it. A PROMPT of - reads standard input.",
            is_eager=True,  # the model's table in the config file counts for the options
        ),
    ] = None,
    attach: options.Attach = None,
    api_key: options.AttachKey = None,
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
    system: options.System = None,
    stop: options.Stop = None,
    schema: options.Schema = None,
    raw: options.Raw = False,
    quiet: options.Quiet = False,
    json_output: options.JsonOutput = False,
    debug: options.Debug = False,
) -> None:
    """Answer one prompt: the text on stdout, everything else on stderr."""
    from edgeinfer.cli.opening import attached, checked_overflow, open_options, puller
    from edgeinfer.cli.output import StatusLine
    from edgeinfer.cli.schema_file import read_constraint
    from edgeinfer.client import LocalClient, Message, Request
    from edgeinfer.sampling import SamplingParams

    if not arguments:
        raise UsageError('run needs a prompt: edgeinfer run "…", or - to read it from standard input')
    model = _model_of(context, arguments)
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
    if schema == "-" and arguments[-1] == "-":
        raise UsageError("standard input can be the prompt or the schema, not both; put one into a file")
    constraint = None if schema is None else read_constraint(schema)
    prompt = _read_prompt(arguments[-1], raw=raw)
    options.check_text("--system", system)
    for text in stop or ():
        options.check_text("--stop", text)
    messages = [Message("user", prompt)]
    if system is not None:
        messages.insert(0, Message("system", system))
    request = Request(
        messages=None if raw else tuple(messages),
        prompt=prompt if raw else None,
        sampling=sampling,
        max_tokens=max_tokens,
        stop=tuple(stop or ()),
        overflow=checked_overflow(overflow),
        constraint=constraint,
    )
    status = StatusLine(enabled=not quiet)

    def show(what: str, fraction: float) -> None:
        status.show(f"{what} … {fraction:.0%}")

    def say(note: str) -> None:
        status.clear()
        if not quiet:
            sys.stderr.write(f"edgeinfer: {one_line(note)}\n")

    chosen: Client
    if attach is not None:
        chosen = attached(context, attach, api_key)
    else:
        chosen = LocalClient(opened, puller(show, say))
    with chosen as client:
        try:
            info = client.load(show)
            status.clear()
            if debug:
                sys.stderr.writelines(f"edgeinfer: {line}\n" for line in memory_lines(info))
            _answer(client, info, request, status, quiet=quiet, json_output=json_output)
        finally:
            status.close()


def memory_lines(info: ModelInfo) -> list[str]:
    """What the model was to take and what it took, item by item."""
    from edgeinfer.machine.ledger import shown_bytes

    return [
        *(f"memory: {use}" for use in info.memory),
        f"memory: {shown_bytes(info.predicted_bytes)} predicted once its context is full,"
        f" {shown_bytes(info.resident_bytes)} resident after the load;"
        f" the prompt cache may take {shown_bytes(info.cache_bytes)} more",
    ]


def _model_of(context: typer.Context, arguments: list[str]) -> str | None:
    """MODEL, or what a variable or the config file has for it. Raises UsageError."""
    if len(arguments) > 2:
        raise UsageError("run takes at most MODEL and PROMPT; put quotes around a prompt with spaces")
    if len(arguments) == 1 and is_model_name(arguments[0]):
        raise UsageError(
            f"'{arguments[0]}' is a model, and run needs a prompt after it; to talk with it:"
            f" edgeinfer chat {arguments[0]}"
        )
    chosen = FileDefaults.of(context).chosen_model()
    return None if chosen is None else str(chosen.value)


def _answer(
    client: Client,
    info: ModelInfo,
    request: Request,
    status: StatusLine,
    *,
    quiet: bool,
    json_output: bool,
) -> None:
    from edgeinfer.cli.output import emit, emit_json, printable

    on_terminal = sys.stdout.isatty()

    def show(text: str) -> None:
        if not json_output:
            emit(printable(text) if on_terminal else text)

    generation = client.start(request)
    with first_interrupt(generation.cancel) as interrupted:
        ended = _follow(generation, status, show)
    status.clear()
    if ended.outcome == "failed":
        if not json_output and ended.stats.text:
            emit("\n")
        if interrupted.is_set():  # it failed on its way to the end that was asked for
            raise KeyboardInterrupt
        raise _failure(ended)
    if json_output:
        emit_json(ended.stats.as_json())
    else:
        emit("\n")
        if not quiet:
            sys.stderr.write(one_line(summary(ended.stats, info)) + "\n")
            for warning in ended.stats.warnings:
                sys.stderr.write(f"edgeinfer: warning: {one_line(warning)}\n")
    if interrupted.is_set():
        raise typer.Exit(INTERRUPTED)


def _follow(generation: Generation, status: StatusLine, show: Callable[[str], None]) -> Ended:
    """Show an answer as it comes; its last event."""
    from edgeinfer.client import Ended, Prefilled, Text

    for event in generation.events():
        if isinstance(event, Prefilled):
            status.show(f"reading the prompt … {event.done / event.total:.0%}")
        elif isinstance(event, Text):
            status.clear()
            show(event.text)
        elif isinstance(event, Ended):
            return event
    raise RequestFailed("the answer broke off without an end")


def _failure(ended: Ended) -> EdgeInferError:
    return error_from_wire(ended.error_type, ended.error)


def summary(stats: RunStats, info: ModelInfo) -> str:
    """The one line of figures after an answer."""
    usage, timings = stats.usage, stats.timings
    cached = f", {usage.cached_tokens} of them cached" if usage.cached_tokens else ""
    rates = f"first token after {timings.ttft_s:.2f} s" if timings.ttft_s else "no token"
    if timings.decode_tok_s:
        rates += f", then {timings.decode_tok_s:.0f} tok/s"
    if stats.speculation.steps:
        rates += f" ({stats.speculation.speedup:.1f}x by {stats.speculation.mode})"
    ending = {"stop": "", "length": "; cut at its length limit", "cancelled": "; stopped"}
    return (
        f"[{stats.model} on {stats.backend}/{info.device}: {usage.prompt_tokens} prompt tokens{cached},"
        f" {usage.completion_tokens} answered; {rates}{ending.get(stats.finish_reason, '')}]"
    )


def _read_prompt(argument: str, *, raw: bool) -> str:
    """The prompt, from standard input for "-". Raises EdgeInferError where it is not text,
    UsageError where there is none."""
    if argument == "-":
        prompt, source = _read_stdin(), "standard input"
    else:
        prompt, source = argument, "the prompt"
        options.check_text(source, prompt)
    if not (prompt if raw else prompt.strip()):  # blanks are something to go on from, but no question
        raise UsageError(f"{source} is empty; there is nothing to answer")
    return prompt


def _read_stdin() -> str:
    if sys.stdin.isatty():
        sys.stderr.write("Type the prompt; Ctrl+D on a line of its own ends it.\n")
    data = sys.stdin.buffer.read(MAX_STDIN_BYTES + 1)
    if len(data) > MAX_STDIN_BYTES:
        raise EdgeInferError(f"standard input is longer than {MAX_STDIN_BYTES // 2**20} MiB")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise EdgeInferError(
            f"standard input is not valid UTF-8: byte 0x{data[error.start]:02x} at offset"
            f" {error.start}; convert it first (iconv -t utf-8)"
        ) from None
