"""`edgeinfer quantize`: a model's weights in another form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeinfer.cli import options
from edgeinfer.errors import ModelNotFound, UsageError

Source = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A folder of safetensors, a .safetensors or .gguf file, or a model's name."
    ),
]


def quantize(
    model: Source,
    output: options.Output = None,
    type_name: options.WeightType = "auto",
    to: options.To = "gguf",
    max_kl: options.MaxKl = None,
    refresh: options.Refresh = False,
    force: options.Force = False,
    quiet: options.Quiet = False,
    json_output: options.JsonOutput = False,
    debug: options.Debug = False,
) -> None:
    """Write a model's weights in fewer bits, or in another form: safetensors to GGUF and back."""
    from edgeinfer.quantize.quantization import TYPES

    chosen: dict[str, Any] = {}
    if type_name == "auto" and to == "gguf":
        from edgeinfer.cli.automatic_type import choose, json_fields

        found = choose(
            _found(model),
            output,
            max_kl,
            force=force,
            refresh=refresh,
            quiet=quiet,
            json_output=json_output,
        )
        type_name, chosen = found.chosen.type_name, json_fields(found)
    elif type_name == "auto":
        type_name = "f16"  # what a folder of safetensors has
    if type_name in TYPES:
        if to != "gguf":
            raise UsageError(f"--type {type_name} is a type of GGUF files; leave --to out")
        _quantize(model, output, type_name, chosen, force=force, quiet=quiet, json_output=json_output)
        return
    from edgeinfer.cli.output import StatusLine, emit, emit_json
    from edgeinfer.machine.ledger import shown_bytes
    from edgeinfer.quantize.conversion import CONTAINERS, convert, plan_conversion
    from edgeinfer_models.conversion.model import source_of_folder, source_of_gguf

    container = next((name for name in CONTAINERS if name == to), None)
    if container is None:
        raise UsageError(f"--to {to[:40]!r} is not one of {', '.join(CONTAINERS)}")
    path = _found(model)
    source = source_of_folder(path) if path.is_dir() else source_of_gguf(path)
    out = None if output is None else Path(output).expanduser()
    plan = plan_conversion(source, path, container, type_name, out, force=force)
    status = StatusLine(enabled=not quiet)
    try:
        convert(plan, lambda done: status.show(f"writing {plan.out.name} … {done:.0%}"))
    finally:
        status.close()
    for note in plan.notes:
        typer.echo(f"edgeinfer: {note}", err=True)
    if json_output:
        emit_json(
            {
                "output": str(plan.out),
                "type": plan.dtype.lower(),
                "family": source.family.name,
                "bytes": plan.num_bytes,
                "notes": list(plan.notes),
                **chosen,
            }
        )
        return
    emit(f"{plan.out}: {shown_bytes(plan.num_bytes)} of weights in {plan.dtype.lower()}\n")


def _quantize(
    model: str,
    output: str | None,
    type_name: str,
    chosen: Mapping[str, Any],
    *,
    force: bool,
    quiet: bool,
    json_output: bool,
) -> None:
    """chosen: what is to be told of the choice of the type."""
    from edgeinfer.cli.output import StatusLine, emit, emit_json
    from edgeinfer.machine.ledger import shown_bytes
    from edgeinfer.quantize.quantization import opened, plan_quantization, quantize

    path = _found(model)
    out = None if output is None else Path(output).expanduser()
    plan = plan_quantization(opened(path), path, type_name, out, force=force)
    status = StatusLine(enabled=not quiet)
    try:
        quantize(plan, lambda done: status.show(f"writing {plan.out.name} … {done:.0%}"))
    finally:
        status.close()
    for note in plan.notes:
        typer.echo(f"edgeinfer: {note}", err=True)
    shares = plan.bytes_by_type()
    if json_output:
        emit_json(
            {
                "output": str(plan.out),
                "type": type_name,
                "method": "rtn",
                "bytes": plan.num_bytes,
                "bits_per_weight": plan.bits_per_weight,
                "bytes_by_type": shares,
                "notes": list(plan.notes),
                **chosen,
            }
        )
        return
    told = ", ".join(
        f"{shown_bytes(size)} in {name}" for name, size in shares.items() if 100 * size >= plan.num_bytes
    )
    emit(
        f"{plan.out}: {shown_bytes(plan.num_bytes)} of weights, {plan.bits_per_weight:.2f} bits each"
        f" ({told})\n"
    )


def _found(spec: str) -> Path:
    """A folder of safetensors or a GGUF file."""
    from edgeinfer_models.resolve import resolve_model

    path = Path(spec).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        return path
    if path.is_file() and path.name.endswith((".safetensors", ".safetensors.index.json")):
        if not (path.parent / "config.json").is_file():
            raise ModelNotFound(
                f"{path}: are weights without the config.json that says what they are; give the model's"
                " whole folder"
            )
        return path.parent
    return resolve_model(spec).files.paths[0]
