"""`edgeinfer quantize`: a model's weights in another form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeinfer.cli import options
from edgeinfer.errors import ModelNotFound, UsageError

FORMS = ("gguf", "mlx", "safetensors")
Source = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A folder of safetensors, a .safetensors or .gguf file, or a model's name."
    ),
]


def quantize(
    context: typer.Context,
    model: Source,
    output: options.Output = None,
    type_name: options.WeightType = None,
    method: options.Method = None,
    calibration: options.Calibration = None,
    calibration_tokens: options.CalibrationTokens = None,
    imatrix: options.ImatrixFile = None,
    save_imatrix: options.SaveImatrix = None,
    budget: options.Budget = None,
    minutes: options.Minutes = None,
    max_kl: options.MaxKl = None,
    report: options.Report = None,
    report_tokens: options.ReportTokens = None,
    no_report: options.NoReport = False,
    refresh: options.Refresh = False,
    to: options.To = None,
    group_size: options.GroupSize = None,
    scale_type: options.ScaleType = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
    json_output: options.JsonOutput = False,
    debug: options.Debug = False,
) -> None:
    """Write a model's weights in fewer bits, and say what that cost; or in another form: safetensors to
    GGUF and back."""
    from edgeinfer.cli.folder_output import is_folder_type, write_folder
    from edgeinfer.cli.quantized_file import OF_FOLDERS, FileOptions, write_file
    from edgeinfer.quantize.conversion import TYPES, check_type

    if type_name is not None:
        check_type(type_name)
    if to is not None and to not in FORMS:
        raise UsageError(f"--to {to[:40]!r} is not one of {', '.join(FORMS)}")
    type_name = None if type_name == "auto" else type_name
    wanted = FileOptions(
        method or "auto",
        calibration,
        calibration_tokens,
        imatrix,
        save_imatrix,
        budget,
        minutes,
        max_kl,
        report,
        report_tokens,
        measures=not no_report,
        refreshes=refresh,
        force=force,
        quiet=quiet,
        as_json=json_output,
    ).fitting(_typed(context), type_name)
    is_file = to in (None, "gguf") and (type_name is None or type_name in TYPES)
    if is_file and group_size is None and scale_type is None:
        path, beside = _found(model)
        write_file(path, beside, output, type_name, wanted)
        return
    is_folder = is_folder_type(type_name, to, group_size, scale_type)
    if is_folder:
        wanted = wanted.fitting_folder(_typed(context), type_name)
    for option in wanted.given(folder=is_folder):
        if option not in _typed(context):
            continue  # a default of the user's, for what it fits
        what = f"--type {type_name}" if type_name else f"--to {to}"
        own = "files and folders of fewer bits" if option in OF_FOLDERS else "GGUF files of fewer bits"
        raise UsageError(f"{option} is for {own}, which {what} is not")
    path, beside = _found(model)
    if is_folder:
        write_folder(path, beside, type_name, to, output, group_size, scale_type, wanted)
        return
    if type_name in TYPES:
        raise UsageError(f"--type {type_name} is a type of GGUF files; leave --to out")
    _convert(
        path,
        beside,
        output,
        type_name or "f16",
        to or "gguf",
        force=force,
        quiet=quiet,
        json_output=json_output,
    )


def _typed(context: typer.Context) -> frozenset[str]:
    """Options of the command line; others are defaults that the user set."""
    from edgeinfer.cli.configured import typed_options

    return typed_options(context)


def _convert(
    path: Path,
    beside: Path,
    output: str | None,
    type_name: str,
    to: str,
    *,
    force: bool,
    quiet: bool,
    json_output: bool,
) -> None:
    """Unquantized, in another form."""
    from edgeinfer.cli.output import StatusLine, emit, emit_json
    from edgeinfer.machine.ledger import shown_bytes
    from edgeinfer.quantize.conversion import CONTAINERS, convert, plan_conversion
    from edgeinfer_models.conversion.model import source_of_folder, source_of_gguf

    container = next(name for name in CONTAINERS if name == to)
    source = source_of_folder(path) if path.is_dir() else source_of_gguf(path)
    out = None if output is None else Path(output).expanduser()
    plan = plan_conversion(source, beside, container, type_name, out, force=force)
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
            }
        )
        return
    emit(f"{plan.out}: {shown_bytes(plan.num_bytes)} of weights in {plan.dtype.lower()}\n")


def _found(spec: str) -> tuple[Path, Path]:
    """A folder of safetensors or a GGUF file; and what the result lies beside: that, or, of a model that
    was named and lies where users do not look, the current folder."""
    from edgeinfer_models.resolve import resolve_model

    path = Path(spec).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        return path, path
    if path.is_file() and path.name.endswith((".safetensors", ".safetensors.index.json")):
        if not (path.parent / "config.json").is_file():
            raise ModelNotFound(
                f"{path}: are weights without the config.json that says what they are; give the model's"
                " whole folder"
            )
        return path.parent, path.parent
    try:
        resolved = resolve_model(spec)
    except ModelNotFound as error:
        raise (_told_of_folder(path) or error) from None
    file = resolved.files.paths[0]
    return file, file if resolved.installed is None else Path.cwd() / file.name


def _told_of_folder(path: Path) -> ModelNotFound | None:
    if not path.is_dir():
        return None
    if next(path.glob("*.safetensors"), None) is not None:
        return ModelNotFound(
            f"{path}: has .safetensors files, and no config.json that says what they are; give the"
            " model's whole folder"
        )
    if next(path.glob("*.gguf"), None) is not None:
        return None
    return ModelNotFound(
        f"{path}: has neither a .gguf file nor safetensors with a config.json; give a model's file or"
        " folder"
    )
