"""The command line. `main` is the console script; everything heavy is imported inside the commands."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit. Ctrl+C at any moment, even during imports, is one line."""
    try:
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
