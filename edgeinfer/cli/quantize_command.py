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
    type_name: options.WeightType = None,
    max_kl: options.MaxKl = None,
    refresh: options.Refresh = False,
    method: options.Method = None,
    imatrix: options.ImatrixFile = None,
    to: options.To = None,
    group_size: options.GroupSize = None,
    scale_type: options.ScaleType = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
    json_output: options.JsonOutput = False,
    debug: options.Debug = False,
) -> None:
    """Write a model's weights in fewer bits, or in another form: safetensors to GGUF and back."""
    from edgeinfer.cli.folder_output import is_folder_type, write_folder
    from edgeinfer.quantize.quantization import TYPES

    rounded = _checked_method(method, imatrix)
    type_name = None if type_name == "auto" else type_name
    is_automatic = type_name is None and to in (None, "gguf")
    if not is_automatic and (refresh or max_kl is not None):
        option = "--refresh" if max_kl is None else "--max-kl"
        raise UsageError(f"{option} is for --type auto, which chooses among the types of GGUF files")
    if is_folder_type(type_name, to, group_size, scale_type):
        path = _found(model)
        write_folder(
            path, type_name, to, output, group_size, scale_type, quiet=quiet, as_json=json_output
        )
        return
    chosen: dict[str, Any] = {}
    if is_automatic:
        from edgeinfer.cli.automatic_type import choose, json_fields

        found = choose(
            _found(model),
            output,
            max_kl,
            imatrix,
            force=force,
            refresh=refresh,
            quiet=quiet,
            json_output=json_output,
        )
        type_name, chosen = found.chosen.type_name, json_fields(found)
    type_name, to = type_name or "f16", to or "gguf"
    if type_name in TYPES:
        if to != "gguf":
            raise UsageError(f"--type {type_name} is a type of GGUF files; leave --to out")
        _quantize(
            model,
            output,
            type_name,
            rounded,
            imatrix,
            chosen,
            force=force,
            quiet=quiet,
            json_output=json_output,
        )
        return
    if method is not None or imatrix is not None:
        given = "--method" if imatrix is None else "--imatrix"
        if not is_automatic:
            raise UsageError(f"{given} is for fewer bits, which --type {type_name[:40]!r} is not")
        typer.echo(f"edgeinfer: {given} changes nothing in {type_name}", err=True)
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


def _checked_method(method: str | None, imatrix: str | None) -> str:
    from edgeinfer.quantize.quantization import METHODS

    found = method or ("rtn" if imatrix is None else "imatrix")
    if found not in METHODS:
        raise UsageError(f"--method {found[:40]!r} is not one of {', '.join(METHODS)}")
    if found == "imatrix" and imatrix is None:
        raise UsageError(
            "--method imatrix needs to know which weights matter: give a file of llama-imatrix with"
            " --imatrix FILE"
        )
    if found == "rtn" and imatrix is not None:
        raise UsageError("--method rtn takes no importance matrix; leave --imatrix out, or --method")
    return found


def _quantize(
    model: str,
    output: str | None,
    type_name: str,
    method: str,
    imatrix: str | None,
    chosen: Mapping[str, Any],
    *,
    force: bool,
    quiet: bool,
    json_output: bool,
) -> None:
    """chosen: what is to be told of the choice of the type."""
    from edgeinfer.cli.output import StatusLine, emit, emit_json
    from edgeinfer.machine.ledger import shown_bytes
    from edgeinfer.quantize.importance import named_imatrix
    from edgeinfer.quantize.quantization import opened, plan_quantization, quantize

    path = _found(model)
    out = None if output is None else Path(output).expanduser()
    named = None if imatrix is None else named_imatrix(Path(imatrix).expanduser())
    plan = plan_quantization(opened(path), path, type_name, out, force=force, imatrix=named)
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
                "method": method,
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
