"""`edgeinfer eval MODEL --reference OTHER`: how far one model's predictions lie from another's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from edgeinfer.cli.errors import INTERRUPTED
from edgeinfer.cli.interrupts import first_interrupt
from edgeinfer.errors import EdgeInferError, one_line

if TYPE_CHECKING:
    from edgeinfer.open import OpenOptions


def compare(
    options: OpenOptions,
    reference: str,
    text: str,
    tokens: int,
    picture: Path | None,
    *,
    quiet: bool,
    json_output: bool,
) -> None:
    """Raises EdgeInferError; typer.Exit where Ctrl+C ended it after the noise floor."""
    from edgeinfer.cli.opening import puller
    from edgeinfer.cli.output import StatusLine
    from edgeinfer.measure.loss import plan_comparison

    status = StatusLine(enabled=not quiet)

    def show(what: str, fraction: float) -> None:
        status.show(f"{what} … {fraction:.0%}")

    try:
        comparison = plan_comparison(options, reference, puller(show), show)
        status.clear()
        for warning in () if quiet else comparison.warnings:
            sys.stderr.write(f"edgeinfer: warning: {one_line(warning)}\n")
        running = comparison.evaluation(text, tokens, show)
        rows: list[dict[str, Any]] = []
        with first_interrupt(running.stop) as interrupted:
            try:
                rows.extend(running.rows())
            except EdgeInferError:
                if not interrupted.is_set():
                    raise
    finally:
        status.close()
    if len(rows) < 2:  # of two figures one says nothing of the model
        raise KeyboardInterrupt
    _tell(comparison.loss(rows).as_json(), rows, picture, json_output=json_output)
    if interrupted.is_set():
        raise typer.Exit(INTERRUPTED)


def _tell(
    found: dict[str, Any], rows: list[dict[str, Any]], picture: Path | None, *, json_output: bool
) -> None:
    from edgeinfer import __version__
    from edgeinfer.cli.models import print_table
    from edgeinfer.cli.output import emit_json
    from edgeinfer.measure.eval_report import draw_eval, table_of

    if picture is not None:
        draw_eval(picture, f"{found['model']} against {found['reference']}", "reference", rows)
    if json_output:
        emit_json({"suite": "reference", "version": __version__, **found})
        return
    heads, cells = table_of("reference", rows)
    print_table(heads, cells)
