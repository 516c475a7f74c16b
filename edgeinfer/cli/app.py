"""The typer application: one file per command, named here."""

from __future__ import annotations

from typing import Annotated

import typer

from edgeinfer import __version__
from edgeinfer.cli import chat, doctor, models, run_command

app = typer.Typer(
    name="edgeinfer",
    help="Run language models on this machine: chat, one-off answers, and what is going on inside.",
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
    """Without a command: chat with the last used model."""
    if context.invoked_subcommand is None:
        context.invoke(chat.chat)


app.command("chat")(chat.chat)
app.command("run")(run_command.run)
app.add_typer(models.app, name="models")
app.command("doctor")(doctor.doctor)


def run(arguments: list[str]) -> int:
    """Exit code of the command line `arguments`."""
    from edgeinfer.cli.errors import exit_code_of

    return exit_code_of(lambda: app(arguments, prog_name="edgeinfer", standalone_mode=True))
