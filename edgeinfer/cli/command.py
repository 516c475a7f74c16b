"""What every command does around its own work: defaults from the config file, errors, help in groups."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, cast

import typer
from typer.core import TyperCommand, TyperGroup

from edgeinfer.cli.configured import FileDefaults, is_model_name, source_of
from edgeinfer.cli.errors import INTERRUPTED, report, report_error
from edgeinfer.cli.output import discard_stdout
from edgeinfer.config import ConfigInvalid
from edgeinfer.errors import EdgeInferError, ModelError, UsageError

# Any: newer typers carry a private copy of click, older ones use the installed one.
Context = Any
Formatter = Any
Problem = Any

# The base of all complaints about a command line, in either copy.
ParseProblem = cast(type[Exception], typer.BadParameter.__base__)


class Command(TyperCommand):
    """Exit codes: 0, 1 an error, 2 wrong usage, 130 interrupted. Every error is one line on stderr, or
    with --json one object on stdout; --debug adds a traceback."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: Context = None, **extra: Any
    ) -> Context:
        written = list(args)
        try:
            return super().make_context(info_name, args, parent, **extra)
        except ParseProblem as problem:
            path = f"{parent.command_path} {info_name}" if parent is not None else str(info_name)
            report("usage_error", _complaint(problem, written, path), wants_json(written))
            raise typer.Exit(2) from None
        except EdgeInferError as error:  # the config file
            report_error(error, str(error), wants_json(written), debug="--debug" in written)
            raise typer.Exit(error.exit_code) from None

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        ctx.default_map = FileDefaults(ctx)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Context) -> Any:
        json_output, debug = bool(ctx.params.get("json_output")), bool(ctx.params.get("debug"))
        try:
            return super().invoke(ctx)
        except EdgeInferError as error:
            error = _with_source(error, ctx)
            report_error(error, str(error), json_output, debug=debug)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt as interrupt:  # a pull says what it keeps
            report("interrupted", str(interrupt) or "stopped", json_output)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # whoever read our output has gone
            discard_stdout()
            raise typer.Exit(1) from None
        except (typer.Exit, typer.Abort):
            raise
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            report_error(error, f"{where}{error.strerror or error}", json_output, debug=debug)
            raise typer.Exit(1) from None
        except Exception as error:
            report_error(
                error,
                f"something failed inside edgeinfer ({type(error).__name__}: {error});"
                " run it again with --debug and report what it prints",
                json_output,
                debug=debug,
            )
            raise typer.Exit(1) from None

    def format_options(self, ctx: Context, formatter: Formatter) -> None:
        """Options under the headings their `rich_help_panel` names, without importing rich."""
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": []}
        others: list[tuple[str, str]] = []
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            panel = getattr(param, "rich_help_panel", None)
            if param.param_type_name == "argument":
                # The name alone: typer adds the Python type.
                groups["Arguments"].append((param.metavar or param.name.upper(), record[1]))
            elif panel:
                groups.setdefault(str(panel), []).append(record)
            else:
                others.append(record)
        for heading, records in (*groups.items(), ("Options", others)):
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


class RunCommand(Command):
    """`run [MODEL] PROMPT`: an optional argument before the required one, which click cannot say."""

    def collect_usage_pieces(self, ctx: Context) -> list[str]:
        return ["[OPTIONS]", "[MODEL] PROMPT"]


class Group(TyperGroup):
    """Says what to write where the first word is no command, and that it was stopped where Ctrl+C comes
    before a command runs."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: Context = None, **extra: Any
    ) -> Context:
        with _one_line_if_interrupted():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Context) -> Any:
        with _one_line_if_interrupted():
            return super().invoke(ctx)

    def resolve_command(self, ctx: Context, args: list[str]) -> Any:
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            ctx.fail(_no_such_command(name, self.list_commands(ctx), is_root=ctx.parent is None))
        return super().resolve_command(ctx, args)


@contextmanager
def _one_line_if_interrupted() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        report("interrupted", "stopped", json_output=False)
        raise typer.Exit(INTERRUPTED) from None


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether --json was asked for, of a command line that could not be parsed."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return "--json" in options


def report_parse_problem(problem: Exception, arguments: Sequence[str]) -> int:
    """The exit code, after one line about a command line that names no command."""
    if type(problem).__name__ == "NoArgsIsHelpError":
        cast(Any, problem).show()
    else:
        report("usage_error", _complaint(problem, arguments, "edgeinfer"), wants_json(arguments))
    return 2


def _complaint(problem: Problem, arguments: Sequence[str], called: str) -> str:
    """One line: what is wrong, and where help is. called: the command as it was reached."""
    ctx = problem.ctx
    param = getattr(problem, "param", None)
    option = getattr(problem, "option_name", None)
    if type(problem).__name__ == "MissingParameter" and param is not None:
        said = f"{called} needs {param.metavar or param.name.upper()}"
    elif param is not None and ctx is not None:
        said = f"{_where(ctx, param)}: {_type_complaint(problem)}"
    else:
        said = problem.message.rstrip(".")
        said = said[:1].lower() + said[1:]
    if option and ctx is not None:
        said += _hint_for_option(option, ctx, arguments)
    if ctx is not None:
        called = str(ctx.command_path)
    return said if said.endswith("?") else f"{said}; see `{called} --help`"


def _where(ctx: Context, param: Any) -> str:
    option = max(param.opts, key=len) if param.param_type_name == "option" else param.metavar
    return source_of(ctx, param) or str(option or param.name.upper())


def _type_complaint(problem: Problem) -> str:
    found = re.match(r"Input should be an? valid (\w+)", problem.message)
    if found is None:
        return str(problem.message)
    kind = {"integer": "a whole number", "boolean": "true or false"}.get(found[1], f"a {found[1]}")
    errors: list[dict[str, object]] = getattr(problem.__cause__, "errors", list)()
    value = repr(errors[0]["input"])[:60] + " " if errors else ""
    return f"{value}is not {kind}"


def _hint_for_option(option: str, ctx: Context, arguments: Sequence[str]) -> str:
    if ctx.parent is None:
        for name, command in getattr(ctx.command, "commands", {}).items():
            if any(option in param.opts for param in command.params):
                return f"; options come after the command: edgeinfer {name} {option}"
    elif any(word.startswith("-") and " " in word for word in arguments):
        return "; put -- before a prompt that begins with -"
    near = get_close_matches(option, [o for param in ctx.command.params for o in param.opts], n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _no_such_command(name: str, commands: Sequence[str], *, is_root: bool) -> str:
    near = get_close_matches(name, commands, n=1)
    if near:
        return f"there is no command {name!r}; did you mean '{near[0]}'?"
    if is_root and (name.lower().endswith(".gguf") or "/" in name or is_model_name(name)):
        return f"there is no command {name!r}; to chat with that model: edgeinfer chat {name}"
    if is_root and " " in name:
        return 'a question needs a command before it: edgeinfer run "…"'
    return f"there is no command {name!r}; there are {', '.join(commands)}"


def _with_source(error: EdgeInferError, ctx: Context) -> EdgeInferError:
    """The error, naming the variable or the place in the config file if the user did not type it."""
    message = str(error)
    named = re.match(r"--[a-z-]+", message)
    for param in ctx.command.params if named else ():
        if named is not None and named[0] in param.opts:
            source = source_of(ctx, param)
            if source is not None:
                kind = UsageError if source.startswith("EDGEINFER_") else ConfigInvalid
                return kind(source + message[named.end() :]).with_traceback(error.__traceback__)
    if isinstance(error, ModelError):
        chosen = FileDefaults.of(ctx).chosen_model()
        if chosen is not None and chosen.where:
            error.args = (f"{message} (the model comes from {chosen.where})",)
    return error
