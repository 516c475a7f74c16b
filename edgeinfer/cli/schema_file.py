"""`--schema FILE`: read and checked before a model is loaded."""

from __future__ import annotations

import sys
from pathlib import Path

from edgeinfer.constraint import Constraint, check_constraint
from edgeinfer.constraint.schema_text import MAX_BYTES
from edgeinfer.errors import ConstraintInvalid


def read_constraint(file: str) -> Constraint:
    """file: a path, or "-" for standard input. Raises ConstraintInvalid, naming the file and what in it
    cannot be used."""
    name = "the schema from standard input" if file == "-" else f"--schema {file}"
    constraint = Constraint("json_schema", _read(file, name))
    check_constraint(constraint, name)
    return constraint


def _read(file: str, name: str) -> str:
    try:
        if file == "-":
            data = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            with Path(file).open("rb") as stream:
                data = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConstraintInvalid(f"{name}: cannot be read ({reason})") from None
    if len(data) > MAX_BYTES:
        raise ConstraintInvalid(f"{name}: has more than {MAX_BYTES // 1024} KiB; is it a JSON schema?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConstraintInvalid(
            f"{name}: is not valid UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}"
        ) from None
