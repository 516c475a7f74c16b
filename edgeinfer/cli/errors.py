"""What goes wrong becomes one line on stderr (or one JSON object on stdout) and an exit code."""

from __future__ import annotations

import os
import sys

from edgeinfer.errors import EdgeInferError, one_line

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def report_error(error: Exception, message: str, json_output: bool, *, debug: bool) -> None:
    if debug or os.environ.get("EDGEINFER_DEBUG"):
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, EdgeInferError):
        kind = error.type
    else:
        kind = "io_error" if isinstance(error, OSError) else "internal_error"
    report(kind, message, json_output)


def report(kind: str, message: str, json_output: bool) -> None:
    line = one_line(message)
    if json_output:
        from edgeinfer.cli.output import emit_json

        try:
            emit_json({"error": {"type": kind, "message": line}})
        except OSError:  # nobody reads, or the disk is full: there is no better place to say it
            discard_stdout()
    else:
        sys.stderr.write(f"edgeinfer: {line}\n")
        sys.stderr.flush()


def discard_stdout() -> None:
    """After a write that failed: what is still buffered would be tried, and complained about, again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
