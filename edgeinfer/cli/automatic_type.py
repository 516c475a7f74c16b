"""`quantize --type auto`: measures, tells the table, and says which type is taken and why."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeinfer.errors import UsageError

if TYPE_CHECKING:
    from edgeinfer.quantize.choice import TypeChoice, TypeRow


def choose(
    path: Path,
    output: str | None,
    max_kl: float | None,
    imatrix: str | None,
    *,
    force: bool,
    refresh: bool,
    quiet: bool,
    json_output: bool,
) -> TypeChoice:
    """path: a folder of safetensors or a GGUF file. imatrix: a file that weighs rounding. Tells nothing
    on stdout where that is to be JSON."""
    from edgeinfer.cli.output import StatusLine
    from edgeinfer.machine.cost_store import costs_folder
    from edgeinfer.measure.texts import measured_text
    from edgeinfer.measure.type_loss import TypeLoss
    from edgeinfer.quantize.auto import choose_automatically, type_table
    from edgeinfer.quantize.choice import NoTypeFits
    from edgeinfer.quantize.importance import named_imatrix
    from edgeinfer.quantize.quantization import opened
    from edgeinfer_models.conversion.new_file import require_place

    if max_kl is not None and not 0.0 <= max_kl <= 100.0:
        raise UsageError(f"--max-kl {max_kl:g} is outside [0, 100]; 0.05 is the default")
    out = None if output is None else Path(output).expanduser()
    if out is not None:
        require_place(out, path, force=force)  # now, and not when all was measured
    named = None if imatrix is None else named_imatrix(Path(imatrix).expanduser())
    status = StatusLine(enabled=not quiet)

    def show(what: str, done: float) -> None:
        status.show(f"{what} … {done:.0%}")

    try:
        source = opened(path)
        table = type_table(
            source, path, out, costs_folder(), imatrix=named, refresh=refresh, progress=show
        )
        with TypeLoss(source, path, measured_text(None), show, imatrix=named) as measure_kl:
            found = choose_automatically(table, measure_kl, max_kl)
    except NoTypeFits as error:
        status.close()
        if not json_output:
            _tell(error.table)
        raise
    finally:
        status.close()
    for note in () if quiet else table.notes:
        sys.stderr.write(f"edgeinfer: {note}\n")
    if not json_output:
        _tell(found.table)
    if found.chosen.is_original:
        raise UsageError(f"--type auto: the model stays as it is. {found.reason}")
    if not json_output:
        sys.stdout.write(f"{found.reason}\n")
    return found


def json_fields(found: TypeChoice) -> dict[str, Any]:
    """What the command's JSON says beside the file that was written."""
    rows = [
        {
            **asdict(row),
            "answer_s": row.answer_s,
            # JSON has no infinity
            "kl": row.kl if row.kl is not None and math.isfinite(row.kl) else None,
        }
        for row in found.table
    ]
    return {"table": rows, "reason": found.reason}


def _tell(rows: Sequence[TypeRow]) -> None:
    from edgeinfer.cli.models import print_table
    from edgeinfer.quantize.auto import shown_table

    print_table(*shown_table(rows), has_heads=True)
