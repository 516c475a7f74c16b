"""The typer application: one file per command, named here."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from edgeinfer import __version__
from edgeinfer.cli import (
    bench_command,
    cache_command,
    chat,
    doctor,
    eval_command,
    models,
    quantize_command,
    run_command,
    serve,
    train_exit_command,
)
from edgeinfer.cli.command import Command, Group, ParseProblem, RunCommand, report_parse_problem
from edgeinfer.cli.errors import INTERRUPTED
from edgeinfer.cli.options import EPILOG

app = typer.Typer(
    name="edgeinfer",
    cls=Group,
    help="Run language models on this machine. Without a command: chat with the model used last.",
    epilog=EPILOG,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"edgeinfer {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        command = context.command.commands["chat"]  # type: ignore[attr-defined]
        with command.make_context("chat", [], parent=context) as own:  # variables and file count
            command.invoke(own)


app.command("chat", cls=Command, epilog=EPILOG)(chat.chat)
app.command("run", cls=RunCommand, epilog=EPILOG)(run_command.run)
app.command("serve", cls=Command, epilog=EPILOG)(serve.serve)
app.add_typer(models.app, name="models")
app.add_typer(cache_command.app, name="cache")
app.command("quantize", cls=Command, epilog=EPILOG)(quantize_command.quantize)
app.command("train-exit", cls=Command, epilog=EPILOG)(train_exit_command.train_exit)
app.command("bench", cls=Command, epilog=EPILOG)(bench_command.bench)
app.command("eval", cls=Command, epilog=EPILOG)(eval_command.evaluate)
app.command("doctor", cls=Command)(doctor.doctor)


def run(arguments: list[str]) -> int:
    """Exit code of the command line `arguments`."""
    try:
        code = app(arguments, prog_name="edgeinfer", standalone_mode=False)
    except ParseProblem as problem:
        return report_parse_problem(problem, arguments)
    except typer.Abort:  # Ctrl+C or Ctrl+D at a question
        sys.stderr.write("edgeinfer: stopped\n")
        return INTERRUPTED
    return code if isinstance(code, int) else 0
