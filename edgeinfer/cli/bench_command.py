"""`edgeinfer bench`: how fast a model answers here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from edgeinfer.cli import options
from edgeinfer.cli.errors import INTERRUPTED
from edgeinfer.cli.interrupts import first_interrupt
from edgeinfer.errors import EdgeInferError, UsageError, one_line

if TYPE_CHECKING:
    from edgeinfer.cli.output import StatusLine
    from edgeinfer.client import Client, ModelInfo
    from edgeinfer.measure.bench import BenchPlan, Suite
    from edgeinfer.measure.drafts_bench import DraftsPlan
    from edgeinfer.measure.figures import Figure
    from edgeinfer.measure.report import Report

LATER_SUITES = ("cache",)
# (prompt, new) tokens where none are given
_SIZES: dict[Suite, tuple[str, str]] = {"speed": ("512", "128"), "concurrency": ("64", "64")}
_MIN_CONTEXT = 256
_SUITES = "speed, concurrency and speculation"


def bench(
    context: typer.Context,
    model: options.Model = None,
    suite: options.Suite = "speed",
    prompt_tokens: options.PromptTokens = None,
    new_tokens: options.NewTokens = None,
    streams: options.Streams = "1,2,4",
    repeat: options.Repeat = 5,
    warmup: options.Warmup = 1,
    plot: options.Plot = None,
    draft: options.Draft = None,
    replay: options.Replay = None,
    backend: options.Backend = "auto",
    ctx: options.BenchCtx = None,
    threads: options.Threads = "auto",
    gpu_layers: options.GpuLayers = "auto",
    load_as: options.LoadAs = "auto",
    compile: options.Compile = False,
    kv_type: options.KvType = "auto",
    kv_type_k: options.KvTypeK = None,
    kv_type_v: options.KvTypeV = None,
    quiet: options.Quiet = False,
    json_output: options.JsonOutput = False,
    debug: options.Debug = False,
) -> None:
    """Measure how fast a model reads, answers, and serves several at once, and what drafts bring."""
    from edgeinfer.cli.opening import open_options, puller
    from edgeinfer.cli.output import StatusLine
    from edgeinfer.client import LocalClient
    from edgeinfer.machine.probe import busy_share
    from edgeinfer.measure.report import busy_warning

    typed = context.get_parameter_source("streams")
    if suite != "concurrency" and typed is not None and typed.name == "COMMANDLINE":
        raise UsageError("--streams belongs to --suite concurrency")
    is_of_drafts = suite == "speculation"
    for option, value in (("draft", draft), ("replay", replay)):
        source = context.get_parameter_source(option)
        if value is not None and not is_of_drafts and source and source.name == "COMMANDLINE":
            raise UsageError(f"--{option} belongs to --suite speculation")
    plan = None
    if not is_of_drafts:
        plan = _plan(suite, prompt_tokens, new_tokens, streams, repeat, warmup)
    opened = open_options(
        model,
        backend=backend,
        ctx=ctx if plan is None else _context(ctx, plan),
        threads=threads,
        gpu_layers=gpu_layers,
        load_as=load_as,
        compile=compile,
        kv_type=kv_type,
        kv_type_k=kv_type_k,
        kv_type_v=kv_type_v,
        cache_ram="0",  # nothing of one run may help the next
        # Answers to random tokens say nothing of what drafts bring.
        speculate="auto" if is_of_drafts else "off",
        draft=draft if is_of_drafts else None,
    )
    picture = None if plot is None else _picture(plot)
    if plan is None:
        from edgeinfer.cli.drafts_suite import bench_drafts

        drafts_plan = _drafts_plan(context, new_tokens, repeat, warmup)
        bench_drafts(opened, replay, drafts_plan, picture, quiet=quiet, json_output=json_output)
        return
    opened = replace(opened, sequences=plan.sequences, remember=False)
    status = StatusLine(enabled=not quiet)

    def show(what: str, fraction: float) -> None:
        status.show(f"{what} … {fraction:.0%}")

    with LocalClient(opened, puller(show)) as client:
        try:
            status.show("looking whether the machine is free …")
            busy = busy_share()
            info = client.load(show)
            status.clear()
            warning = busy_warning(busy)
            for line in (*info.warnings, *((warning,) if warning else ())):
                if not quiet:
                    sys.stderr.write(f"edgeinfer: warning: {one_line(line)}\n")
            report = _measure(client, info, plan, busy, status)
        finally:
            status.close()
    _tell(report, picture, json_output=json_output, quiet=quiet)


def _drafts_plan(context: typer.Context, new_tokens: str | None, repeat: int, warmup: int) -> DraftsPlan:
    """Raises UsageError naming the option that cannot be right."""
    from edgeinfer.measure.drafts_bench import DraftsPlan

    source = context.get_parameter_source("prompt_tokens")
    if source is not None and source.name == "COMMANDLINE":
        raise UsageError("--prompt-tokens: --suite speculation asks questions of its own")
    news = options.parse_counts("--new-tokens", "200" if new_tokens is None else new_tokens)
    if len(news) > 1 or news[0] < 2:
        raise UsageError("--new-tokens takes one number, at least 2, with --suite speculation")
    _check_runs(repeat, warmup)
    return DraftsPlan(news[0], repeat, warmup)


def _check_runs(repeat: int, warmup: int) -> None:
    for option, value, least in (("--repeat", repeat, 1), ("--warmup", warmup, 0)):
        if not least <= value <= 1000:
            raise UsageError(f"{option} {value} is outside [{least}, 1000]")


def _plan(
    suite: str, prompt_tokens: str | None, new_tokens: str | None, streams: str, repeat: int, warmup: int
) -> BenchPlan:
    """Raises UsageError naming the option that cannot be right."""
    from edgeinfer.measure.bench import BenchPlan
    from edgeinfer.open import MAX_SEQUENCES

    if suite in LATER_SUITES:
        raise UsageError(f"--suite {suite} comes with a later version; there are {_SUITES}")
    if suite not in ("speed", "concurrency"):
        raise UsageError(f"--suite {suite[:40]!r} does not exist; there are {_SUITES}")
    chosen: Suite = "concurrency" if suite == "concurrency" else "speed"
    default_prompt, default_new = _SIZES[chosen]
    prompts = options.parse_counts(
        "--prompt-tokens", default_prompt if prompt_tokens is None else prompt_tokens
    )
    news = options.parse_counts("--new-tokens", default_new if new_tokens is None else new_tokens)
    many = options.parse_counts("--streams", streams) if suite == "concurrency" else (1,)
    if max(many) > MAX_SEQUENCES:
        raise UsageError(f"--streams {max(many)} is outside [1, {MAX_SEQUENCES}]")
    if suite == "concurrency":
        for option, sizes in (("--prompt-tokens", prompts), ("--new-tokens", news)):
            if len(sizes) > 1:
                raise UsageError(f"{option} takes one number with --suite concurrency")
        if news[0] < 2:
            raise UsageError("--new-tokens must be at least 2: the first comes with the prompt")
    _check_runs(repeat, warmup)
    return BenchPlan(chosen, prompts, news, many, repeat, warmup)


def _context(ctx: int | None, plan: BenchPlan) -> int:
    """The context given, or as much as the sizes need. Raises UsageError if that is less."""
    need = plan.cells_per_sequence
    if ctx is None:
        return max(_MIN_CONTEXT, -(-need // 256) * 256)
    if ctx < need:
        raise UsageError(f"--ctx {ctx} is less than the {need} tokens of the largest run")
    return ctx


def _picture(plot: str) -> Path:
    from edgeinfer.measure.picture import check_picture

    path = Path(plot).expanduser()
    check_picture(path)
    return path


def _measure(
    client: Client, info: ModelInfo, plan: BenchPlan, busy: float, status: StatusLine
) -> Report:
    """Run the plan; Ctrl+C ends it early with what there is."""
    from edgeinfer.measure.bench import Bench, Trial
    from edgeinfer.measure.report import Report

    def show(trial: Trial, number: int, total: int) -> None:
        status.show(f"{trial} … run {number} of {total}")

    running = Bench(client, plan, info.vocab_size, show)
    with first_interrupt(running.stop) as interrupted:
        try:
            running.run()
        except KeyboardInterrupt:  # the second: what was measured is still told
            interrupted.set()
        except EdgeInferError:
            if not interrupted.is_set():  # else it failed on its way to the end that was asked for
                raise
    partial = interrupted.is_set() and not running.is_complete
    return Report(info, plan, running.figures, busy, partial)


def _tell(report: Report, picture: Path | None, *, json_output: bool, quiet: bool) -> None:
    from edgeinfer.cli.output import emit, emit_json

    if report.partial and not report.figures:
        raise KeyboardInterrupt  # nothing to tell but that it was stopped
    if json_output:
        emit_json(report.as_json())
    else:
        emit(f"{one_line(report.title)}\n{_table(report.figures)}")
    if picture is not None:
        from edgeinfer.measure.picture import draw_report

        draw_report(picture, report.title + (" (partial)" if report.partial else ""), report.figures)
        if not quiet:
            sys.stderr.write(f"drawn: {one_line(str(picture))}\n")
    if report.partial:
        sys.stderr.write(
            "edgeinfer: stopped; the figures above are partial: fewer samples, or missing\n"
        )
        raise typer.Exit(INTERRUPTED)


def _table(figures: Sequence[Figure]) -> str:
    from io import StringIO

    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("figure")
    for head in ("median", "unit", "quartiles", "samples"):
        table.add_column(head, justify="left" if head == "unit" else "right", no_wrap=True)
    for figure in figures:
        low, high = figure.quartiles
        digits = 1 if figure.unit == "tok/s" else 3
        table.add_row(
            figure.label,
            f"{figure.median:.{digits}f}",
            figure.unit,
            f"{low:.{digits}f} to {high:.{digits}f}",
            str(len(figure.samples)),
        )
    # Into a string first: a reader that has gone, or a full disk, is then told as everywhere else.
    text = StringIO()
    Console(file=text, width=100, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines() if line.strip()) + "\n"
