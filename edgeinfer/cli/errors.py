"""What goes wrong becomes one line on stderr (or one JSON object on stdout) and an exit code."""

from __future__ import annotations

import os
import sys

from edgeinfer.errors import EdgeInferError, one_line

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def report_error(error: Exception, message: str, json_output: bool, *, debug: bool) -> None:
    from edgeinfer.cli.output import OutputFailed

    if debug or os.environ.get("EDGEINFER_DEBUG"):
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, EdgeInferError):
        kind = error.type
    else:
        kind = "io_error" if isinstance(error, OSError) else "internal_error"
    report(kind, message, json_output and not isinstance(error, OutputFailed))


def report(kind: str, message: str, json_output: bool) -> None:
    from edgeinfer.cli.output import OutputFailed, discard_stdout, emit_json

    line = one_line(message)
    if json_output:
        try:
            emit_json({"error": {"type": kind, "message": line}})
            return
        except BrokenPipeError:
            discard_stdout()
            return
        except OutputFailed as error:
            line = f"{line}; {error}"
    sys.stderr.write(f"edgeinfer: {line}\n")
    sys.stderr.flush()
