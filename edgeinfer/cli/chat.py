"""`edgeinfer chat`: the Textual chat."""

from __future__ import annotations

import sys

import typer

from edgeinfer.cli import options
from edgeinfer.errors import UsageError


def chat(
    context: typer.Context,
    model: options.Model = None,
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
    overflow: options.Overflow = "stream",
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
    debug: options.Debug = False,
) -> None:
    """Chat in the terminal."""
    from edgeinfer.cli.opening import attached, checked_overflow, open_options, puller
    from edgeinfer.client import Client, LocalClient
    from edgeinfer.sampling import SamplingParams

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
    wanted_overflow = checked_overflow(overflow)
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"--max-tokens {max_tokens} must be at least 1")
    for option, text in (("--system", system), *(("--stop", text) for text in stop or ())):
        options.check_text(option, text)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("chat needs a terminal; for pipes and scripts there is `edgeinfer run`")
    from edgeinfer_tui.run import run_chat

    progress = LoadMessages()
    client: Client
    if attach is not None:
        client = attached(context, attach, api_key)
    else:
        client = LocalClient(opened, puller(progress.show))
    progress.client = client
    code = run_chat(
        client,
        system=system,
        sampling=sampling,
        max_tokens=max_tokens,
        stop=tuple(stop or ()),
        overflow=wanted_overflow,
        model_label=model or "" if attach is None else "",
    )
    raise typer.Exit(code)


class LoadMessages:
    """Passes a download's progress into the load's: the chat shows both in one bar, and leaving it ends
    both."""

    client: object = None

    def show(self, what: str, fraction: float) -> None:
        from edgeinfer.client import LocalClient
        from edgeinfer.errors import LoadFailed

        if isinstance(self.client, LocalClient):
            if self.client.is_load_cancelled:
                raise LoadFailed("loading was cancelled; a download goes on where it was next time")
            self.client.report_progress(what, fraction)
