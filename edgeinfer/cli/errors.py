"""What goes wrong becomes one line on stderr (or one JSON object on stdout) and an exit code."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import typer

from edgeinfer.errors import EdgeInferError, one_line

P = ParamSpec("P")
R = TypeVar("R")

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def guard(command: Callable[P, R]) -> Callable[P, R]:
    """Decorator under `@app.command()`: maps errors for a command with `json_output` and `debug`
    options. Exit codes: 1 an error, 2 wrong usage, 130 interrupted."""

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        json_output = bool(kwargs.get("json_output"))
        debug = bool(kwargs.get("debug")) or bool(os.environ.get("EDGEINFER_DEBUG"))
        try:
            return command(*args, **kwargs)
        except EdgeInferError as error:
            if debug:
                raise
            report(error.type, str(error), json_output)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            report("interrupted", "stopped", json_output)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # Whoever read our output has gone; Python would complain again at shutdown.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if debug:
                raise
            report(
                "internal_error",
                f"something failed inside edgeinfer ({type(error).__name__}: {error});"
                " run it again with --debug and report what it prints",
                json_output,
            )
            raise typer.Exit(1) from None

    return guarded


def report(kind: str, message: str, json_output: bool) -> None:
    if json_output:
        from edgeinfer.cli.output import emit_json

        emit_json({"error": {"type": kind, "message": message}})
    else:
        sys.stderr.write(f"edgeinfer: {one_line(message)}\n")
        sys.stderr.flush()


def exit_code_of(application: Callable[[], Any]) -> int:
    """Run a typer application; its exit code."""
    try:
        application()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0
