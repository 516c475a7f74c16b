"""`edgeinfer train-exit`: an early exit, by which a model drafts for itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from edgeinfer.cli import options
from edgeinfer.errors import UsageError

Model = Annotated[
    str | None,
    typer.Argument(metavar="[MODEL]", help="A GGUF file or a model's name. Default: the one used last."),
]


def train_exit(
    context: typer.Context,
    model: Model = None,
    output: options.ExitOutput = None,
    minutes: options.ExitMinutes = 30.0,
    layer: options.ExitLayer = "auto",
    text: options.ExitText = None,
    device: options.ExitDevice = "auto",
    export_draft: options.ExportDraft = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
    json_output: options.JsonOutput = False,
    debug: options.Debug = False,
) -> None:
    """Train an early exit: a small layer behind the model's first ones that guesses what the whole model
    will say, from texts that the model writes itself. What it guesses is checked, so answers stay what
    they are. Needs torch. Ctrl+C keeps what is done; the same command goes on from there."""
    from edgeinfer.cli.long_work import Clock
    from edgeinfer.cli.output import StatusLine, emit, emit_json
    from edgeinfer.distill.exit_job import ExitJob, plan_exit, train_exit, work_folder
    from edgeinfer.distill.training import summary
    from edgeinfer.exits import ExitPlace
    from edgeinfer.open import exits_folder
    from edgeinfer_models.exit_file import SUFFIX
    from edgeinfer_models.resolve import resolve_model

    resolved = resolve_model(model)
    if resolved.files.format != "gguf":
        raise UsageError(
            f"{resolved.files.name}: exits are trained for GGUF files; make one with `edgeinfer quantize"
            " MODEL --to gguf`, and its exit fits every type that it is quantized to"
        )
    name = resolved.files.paths[0].name.removesuffix(".gguf")
    if resolved.installed is not None:
        name = resolved.installed.name.rpartition("/")[2].replace(":", "-")
    out = Path(output).expanduser() if output else exits_folder() / f"{name}{SUFFIX}"
    if not out.name.endswith(SUFFIX):
        raise UsageError(f"-o {out.name}: the name of an exit ends in {SUFFIX}")
    job = ExitJob(
        resolved.files.paths[0],
        out,
        minutes,
        None if layer == "auto" else ExitPlace.parse(layer),
        None if text is None else Path(text).expanduser(),
        device,
        None if export_draft is None else Path(export_draft).expanduser(),
        force,
    )
    header, place = plan_exit(job)
    out.parent.mkdir(parents=True, exist_ok=True)
    status = StatusLine(enabled=not quiet)
    clock = Clock(status)

    def told(line: str) -> None:
        if not quiet:
            status.clear()
            sys.stderr.write(f"edgeinfer: {line}\n")

    def progress(what: str, done: float, loss: float) -> None:
        clock.show(what + (f", loss {loss:.3f}" if loss else ""), done)

    try:
        trained = train_exit(job, told, progress)
    except KeyboardInterrupt:
        status.close()
        folder = work_folder(job, header, place)
        if not quiet and any(folder.glob("*")):
            sys.stderr.write(
                f"edgeinfer: what is done is kept in {folder}; the same command goes on from there\n"
            )
        raise
    finally:
        status.close()
    if json_output:
        emit_json(
            {
                "output": str(trained.path),
                "bytes": trained.num_bytes,
                "layer": trained.place.layer,
                "new_layers": trained.place.new_layers,
                "draft": None if job.draft_path is None else str(job.draft_path),
                **trained.figures.as_json(),
            }
        )
        return
    for line in summary(trained.figures):
        emit(line + "\n")
    size = trained.num_bytes / 1e6
    emit(f"{trained.path}: {size:.1f} MB, after layer {trained.place.name}\n")
    if job.draft_path is not None:
        emit(f"{job.draft_path}: a draft model of its own, for any llama.cpp\n")
