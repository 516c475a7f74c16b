"""The command line. `main` is the console script; everything heavy is imported inside the commands."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line and exit. Ctrl+C at any moment, even during imports, is one line."""
    code = 1
    try:
        _prepare_streams()
        from edgeinfer.cli.app import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        sys.stderr.write("\nedgeinfer: stopped\n")
        code = 130
    finally:
        import signal

        # From here on only the interpreter's own shutdown runs; a Ctrl+C in it would print a traceback.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


def _prepare_streams() -> None:
    """Standard streams that exist and can take any character, whatever we were started with."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed (`>&-`): the next file opened, a worker's pipe, would take its place
            os.open(os.devnull, os.O_RDWR)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
