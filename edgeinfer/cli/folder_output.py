"""`edgeinfer quantize` where the result is a folder of quantized weights, for mlx-lm or for torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from edgeinfer.errors import UsageError

if TYPE_CHECKING:
    from edgeinfer.cli.quantized_file import FileOptions
    from edgeinfer.quantize.folders import FolderPlan


def is_folder_type(
    type_name: str | None, to: str | None, group_size: int | None, scale_type: str | None
) -> bool:
    """Raises UsageError for options that no other form has."""
    from edgeinfer.quantize.folders import FOLDER_TYPES, is_folder_type

    found = is_folder_type(type_name, to)
    if not found and (group_size is not None or scale_type is not None):
        option = "--scale-type" if group_size is None else "--group-size"
        raise UsageError(f"{option} is for --type {', '.join(FOLDER_TYPES)}")
    return found


def write_folder(
    path: Path,
    beside: Path,
    type_name: str | None,
    to: str | None,
    output: str | None,
    group_size: int | None,
    scale_type: str | None,
    wanted: FileOptions,
) -> None:
    """path: of the model. beside: where the result lies if `output` does not say. wanted: of it what
    folders have."""
    from edgeinfer.cli.long_work import Clock, long_work
    from edgeinfer.cli.output import StatusLine
    from edgeinfer.quantize.fitted_folder import method_of_folder
    from edgeinfer.quantize.folders import FolderOptions, plan_folder
    from edgeinfer_models.conversion.model import source_of_folder, source_of_gguf

    wanted.check(type_name)
    source = source_of_folder(path) if path.is_dir() else source_of_gguf(path)
    out = None if output is None else Path(output).expanduser()
    options = FolderOptions(group_size, scale_type)
    plan = plan_folder(source, beside, type_name, to, out, options)
    text = None if wanted.calibration is None else Path(wanted.calibration).expanduser()
    method, notes = method_of_folder(plan, wanted.method, text)
    status = StatusLine(enabled=not wanted.quiet)

    def say(line: str) -> None:
        if not wanted.quiet:
            status.clear()
            typer.echo(f"edgeinfer: {line}", err=True)

    with long_work(plan.out, status, quiet=wanted.quiet):
        notes += _made(plan, method, text, wanted.calibration_tokens, Clock(status).show, say)
    _tell(plan, method, (*plan.notes, *notes), wanted)


def _made(
    plan: FolderPlan,
    method: str | None,
    text: Path | None,
    tokens: int | None,
    show: Callable[[str, float], None],
    say: Callable[[str], None],
) -> tuple[str, ...]:
    """What there is to tell of it."""
    from edgeinfer.quantize.calibrated import CORRECTING, work_folder
    from edgeinfer.quantize.calibration import DEFAULT_TOKENS
    from edgeinfer.quantize.finished_tensors import kept_apart
    from edgeinfer.quantize.fitted_folder import fit_folder
    from edgeinfer.quantize.folders import write

    def progress(done: float) -> None:
        show(f"writing {plan.out.name}", done)

    if method not in CORRECTING:
        write(plan, progress)
        return ()
    with kept_apart(work_folder(plan.out)):
        fitted = fit_folder(plan, method, text, tokens or DEFAULT_TOKENS, show, say)
        write(fitted.plan, progress)
        fitted.finished.remove()
        return fitted.notes


def _tell(plan: FolderPlan, method: str | None, notes: tuple[str, ...], wanted: FileOptions) -> None:
    from edgeinfer.cli.output import emit, emit_json
    from edgeinfer.machine.ledger import shown_bytes

    for note in notes:
        typer.echo(f"edgeinfer: {note}", err=True)
    if wanted.as_json:
        emit_json(
            {
                "output": str(plan.out),
                "type": plan.type_name,
                "method": method,
                "bytes": plan.num_bytes,
                "bits_per_weight": plan.bits_per_weight,
                "notes": list(notes),
            }
        )
        return
    size = f"{shown_bytes(plan.num_bytes)} of weights, {plan.bits_per_weight:.2f} bits each"
    emit(f"{plan.out}: {size}{f', {method}' if method else ''}\n")
