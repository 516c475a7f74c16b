"""`edgeinfer quantize` where the result is a folder of quantized weights, for mlx-lm or for torch."""

from __future__ import annotations

from pathlib import Path

import typer

from edgeinfer.errors import UsageError


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
    type_name: str | None,
    to: str | None,
    output: str | None,
    group_size: int | None,
    scale_type: str | None,
    *,
    quiet: bool,
    as_json: bool,
) -> None:
    """path: of the model."""
    from edgeinfer.cli.output import StatusLine, emit, emit_json
    from edgeinfer.machine.ledger import shown_bytes
    from edgeinfer.quantize.folders import FLOAT_TYPES, FolderOptions, plan_folder, write
    from edgeinfer_models.conversion.model import source_of_folder, source_of_gguf

    source = source_of_folder(path) if path.is_dir() else source_of_gguf(path)
    out = None if output is None else Path(output).expanduser()
    options = FolderOptions(group_size, scale_type)
    plan = plan_folder(source, path, type_name, to, out, options)
    status = StatusLine(enabled=not quiet)
    try:
        write(plan, lambda done: status.show(f"writing {plan.out.name} … {done:.0%}"))
    finally:
        status.close()
    for note in plan.notes:
        typer.echo(f"edgeinfer: {note}", err=True)
    if as_json:
        emit_json(
            {
                "output": str(plan.out),
                "type": plan.type_name,
                "method": None if plan.type_name in FLOAT_TYPES else "rtn",
                "bytes": plan.num_bytes,
                "bits_per_weight": plan.bits_per_weight,
                "notes": list(plan.notes),
            }
        )
        return
    emit(f"{plan.out}: {shown_bytes(plan.num_bytes)} of weights, {plan.bits_per_weight:.2f} bits each\n")
