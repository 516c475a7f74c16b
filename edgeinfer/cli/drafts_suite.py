"""`edgeinfer bench --suite speculation`."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from edgeinfer.cli.errors import INTERRUPTED
from edgeinfer.cli.interrupts import first_interrupt
from edgeinfer.errors import EdgeInferError, UsageError, one_line

if TYPE_CHECKING:
    from edgeinfer.client import ModelInfo
    from edgeinfer.measure.drafts_bench import Costs, DraftsBench, DraftsPlan
    from edgeinfer.open import OpenOptions

_QUESTION_TOKENS = 512  # more than any question has


def bench_drafts(
    opened: OpenOptions,
    replayed: str | None,
    plan: DraftsPlan,
    picture: Path | None,
    *,
    quiet: bool,
    json_output: bool,
) -> None:
    """replayed: the model whose answers are said. Raises UsageError."""
    from edgeinfer.cli.opening import puller
    from edgeinfer.cli.output import StatusLine
    from edgeinfer.client import LocalClient
    from edgeinfer.machine.probe import busy_share
    from edgeinfer.measure.drafts_bench import DraftsBench, recorder
    from edgeinfer.measure.report import busy_warning

    if replayed is not None and opened.draft is not None:
        raise UsageError("--replay says another model's answers, which --draft's model cannot guess")
    status = StatusLine(enabled=not quiet)

    def show(what: str, fraction: float) -> None:
        status.show(f"{what} … {fraction:.0%}")

    def on_trial(what: str, number: int, total: int) -> None:
        status.show(f"{what} … answer {number} of {total}")

    context = opened.context or plan.new_tokens + _QUESTION_TOKENS
    opened = replace(opened, context=context, sequences=1, remember=False, measures_drafts=True)
    with ExitStack() as stack:
        stack.callback(status.close)
        status.show("looking whether the machine is free …")
        busy = busy_share()
        client = LocalClient(opened, puller(show))
        stack.enter_context(client)
        info = client.load(show)
        recorded = None
        if replayed is not None:
            source = replace(opened, model=replayed, draft=None, speculate="off", measures_drafts=False)
            other = LocalClient(source, puller(show))
            stack.enter_context(other)
            recorded = recorder(other, plan.new_tokens)
        status.clear()
        warning = busy_warning(busy)
        for line in (*info.warnings, *((warning,) if warning else ())):
            if not quiet:
                sys.stderr.write(f"edgeinfer: warning: {one_line(line)}\n")
        bench = DraftsBench(client, plan, on_trial, recorded)
        interrupted = _run(bench)
        costs = bench.costs() if bench.outcomes else None
    status.close()
    if costs is None:
        raise KeyboardInterrupt  # nothing to tell but that it was stopped
    title = _title(info, replayed)
    _tell(bench, costs, info, title, busy, picture, json_output=json_output, quiet=quiet)
    if interrupted:
        sys.stderr.write("edgeinfer: stopped; the figures above are of fewer rounds\n")
        raise typer.Exit(INTERRUPTED)


def _run(bench: DraftsBench) -> bool:
    """Whether it was ended early."""
    with first_interrupt(bench.stop) as interrupted:
        try:
            bench.run()
        except KeyboardInterrupt:
            interrupted.set()
        except EdgeInferError:
            if not interrupted.is_set():
                raise
    return interrupted.is_set() and not bench.is_complete


def _title(info: ModelInfo, replayed: str | None) -> str:
    from edgeinfer.measure.report import threads_line

    said = "" if replayed is None else f", saying what {Path(replayed).name} answered (a replay)"
    return f"{info.name} on {info.backend}/{info.device}, {threads_line(info)}{said}"


def _tell(
    bench: DraftsBench,
    costs: Costs,
    info: ModelInfo,
    title: str,
    busy: float,
    picture: Path | None,
    *,
    json_output: bool,
    quiet: bool,
) -> None:
    from edgeinfer import __version__
    from edgeinfer.cli.output import emit, emit_json
    from edgeinfer.measure.drafts_bench import cost_lines, costs_json, figures_json

    if json_output:
        emit_json(
            {
                "suite": "speculation",
                "model": info.name,
                "backend": info.backend,
                "device": info.device,
                "version": __version__,
                "title": title,
                "partial": not bench.is_complete,
                "busy": busy,
                "new_tokens": bench.plan.new_tokens,
                "rounds": bench.rounds,
                "figures": figures_json(bench.outcomes),
                "costs": costs_json(costs),
                "warnings": list(info.warnings),
            }
        )
    else:
        emit(f"{one_line(title)}\n{_table(figures_json(bench.outcomes))}")
        emit("".join(f"{line}\n" for line in cost_lines(costs)))
    if picture is not None:
        from edgeinfer.measure.drafts_picture import draw_drafts

        draw_drafts(picture, title, bench.outcomes, costs)
        if not quiet:
            sys.stderr.write(f"drawn: {one_line(str(picture))}\n")


def _table(figures: list[dict[str, Any]]) -> str:
    from io import StringIO

    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("work", "drafts"):
        table.add_column(head, no_wrap=True)
    for head in ("tok/s", "of plain", "quartiles", "accepted", "by position"):
        table.add_column(head, justify="right", no_wrap=head != "by position")
    for figure in figures:
        low, high = figure["of_plain_quartiles"]
        drafted = figure["drafted"]
        shares = [f"{right / checked:.0%}" for checked, right in figure["by_position"][:6] if checked]
        is_plain = figure["mode"] == "plain"
        table.add_row(
            figure["work"],
            figure["mode"],
            f"{figure['tok_s']:.1f}",
            "" if is_plain else f"{figure['of_plain']:.2f}",
            "" if is_plain else f"{low:.2f} to {high:.2f}",
            f"{figure['accepted']} of {drafted}" if drafted else "",
            " ".join(shares),
        )
    # Into a string first: a reader that has gone, or a full disk, is then told as everywhere else.
    text = StringIO()
    Console(file=text, width=100, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines() if line.strip()) + "\n"
