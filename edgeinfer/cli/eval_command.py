"""`edgeinfer eval`: what an approximation costs."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from edgeinfer.cli import options
from edgeinfer.cli.errors import INTERRUPTED
from edgeinfer.cli.interrupts import first_interrupt
from edgeinfer.errors import EdgeInferError, UsageError, one_line

Rows = list[dict[str, Any]]

MOST_TOKENS = 2**20
LEAST_TOKENS = 256


def evaluate(
    context: typer.Context,
    model: options.Model = None,
    reference: options.Reference = None,
    suite: options.EvalSuite = "kv",
    settings: options.EvalSettings = None,
    text: options.Text = None,
    tokens: options.Tokens = None,
    plot: options.Plot = None,
    backend: options.Backend = "auto",
    threads: options.Threads = "auto",
    gpu_layers: options.GpuLayers = "auto",
    load_as: options.LoadAs = "auto",
    quiet: options.Quiet = False,
    json_output: options.JsonOutput = False,
    debug: options.Debug = False,
) -> None:
    """Measure what a quantized KV cache, a window or quantized weights cost in quality."""
    from edgeinfer.cli.comparison import compare
    from edgeinfer.cli.opening import KV_TYPES, open_options, puller
    from edgeinfer.cli.output import StatusLine
    from edgeinfer.measure.eval_report import check_eval_picture
    from edgeinfer.measure.evaluation import (
        DEFAULT_SETTINGS,
        DEFAULT_TOKENS,
        SUITES,
        EvalPlan,
        Evaluation,
        parse_settings,
    )
    from edgeinfer.measure.texts import measured_text
    from edgeinfer.open import check_choices, plan_open

    if tokens is not None and not LEAST_TOKENS <= tokens <= MOST_TOKENS:
        raise UsageError(f"--tokens {tokens} is outside [{LEAST_TOKENS}, {MOST_TOKENS}]")
    picture = None if plot is None else Path(plot).expanduser()
    if picture is not None:
        check_eval_picture(picture)
    opened = open_options(
        model,
        backend=backend,
        ctx=None,
        threads=threads,
        gpu_layers=gpu_layers,
        load_as=load_as,
        kv_type="f16",
        kv_type_k=None,
        kv_type_v=None,
        cache_ram="0",
    )
    if reference is not None:
        for name in ("suite", "settings"):
            source = context.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE":
                raise UsageError(f"--{name} does not go with --reference: two models are compared")
        compare(
            opened,
            reference,
            measured_text(text),
            tokens or DEFAULT_TOKENS["reference"],
            picture,
            quiet=quiet,
            json_output=json_output,
        )
        return
    chosen = next((name for name in SUITES if name == suite), None)
    if chosen is None:
        raise UsageError(f"--suite {suite[:40]!r} does not exist; there are {', '.join(SUITES)}")
    wanted = parse_settings(chosen, settings or DEFAULT_SETTINGS[chosen], KV_TYPES[1:])
    plan = EvalPlan(chosen, wanted, tokens or DEFAULT_TOKENS[chosen], measured_text(text))
    status = StatusLine(enabled=not quiet)

    def show(what: str, fraction: float) -> None:
        status.show(f"{what} … {fraction:.0%}")

    try:
        opening = plan_open(replace(opened, remember=False), puller(show), show)
        status.clear()
        for warning in () if quiet else opening.warnings:
            sys.stderr.write(f"edgeinfer: warning: {one_line(warning)}\n")
        for each in wanted:
            kinds = (each.kv_type_k, each.kv_type_v)
            check_choices(opening.command.backend, kinds, eviction=each.eviction)
        running = Evaluation(opening.command, plan, show)
        rows: Rows = []
        with first_interrupt(running.stop) as interrupted:
            try:
                rows.extend(running.rows())
            except KeyboardInterrupt:  # the second: what was measured is still told
                interrupted.set()
            except EdgeInferError:
                if not interrupted.is_set():
                    raise
        is_partial = interrupted.is_set() and len(rows) < _num_rows(plan.suite, len(wanted))
    finally:
        status.close()
    _tell(opening.name, suite, rows, picture, is_partial=is_partial, json_output=json_output)
    if is_partial:
        if not rows:
            raise KeyboardInterrupt
        raise typer.Exit(INTERRUPTED)


def _num_rows(suite: str, num_settings: int) -> int:
    return num_settings + (suite == "kv")  # and the noise floor


def _tell(
    name: str, suite: str, rows: Rows, picture: Path | None, *, is_partial: bool, json_output: bool
) -> None:
    from edgeinfer import __version__
    from edgeinfer.cli.models import print_table
    from edgeinfer.cli.output import emit_json
    from edgeinfer.measure.eval_report import draw_eval, table_of

    if picture is not None and rows:
        draw_eval(picture, f"{name}: {suite}", suite, rows)
    if json_output:
        emit_json(
            {
                "suite": suite,
                "model": name,
                "version": __version__,
                "partial": is_partial,
                "rows": rows,
            }
        )
        return
    if rows:
        heads, cells = table_of(suite, rows)
        print_table(heads, cells)
    if is_partial:
        sys.stderr.write("edgeinfer: stopped; what was measured so far is above\n")
