"""The chat as a command: run it, give the terminal back, say how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import sys

from edgeinfer.client import Client
from edgeinfer.errors import one_line
from edgeinfer.sampling import SamplingParams
from edgeinfer_tui.app import ChatApp
from edgeinfer_tui.chat import Overflow
from edgeinfer_tui.terminal import TerminalGuard, has_terminal


def run_chat(
    client: Client,
    *,
    system: str | None = None,
    sampling: SamplingParams | None = None,
    max_tokens: int | None = None,
    stop: tuple[str, ...] = (),
    overflow: Overflow = "stream",
    model_label: str = "",
    debug: bool = False,
) -> int:
    """Chat until the user leaves; the exit code. `client` need not be loaded, and is closed after.

    0: the user left. 1: there was no model, or the chat failed; one line on stderr says so (with `debug`
    a traceback too). 2: there is no terminal. 128 + n: ended by signal n.
    The terminal is as it was before, whichever way it ends.
    """
    if not has_terminal():
        client.close()
        return _say("the chat needs a terminal; `edgeinfer run` answers without one", 2)
    app = ChatApp(
        client,
        system=system,
        sampling=sampling,
        max_tokens=max_tokens,
        stop=stop,
        overflow=overflow,
        model_label=model_label,
    )
    crash: Exception | None = None
    with contextlib.closing(client):
        runner = asyncio.Runner()

        def leave(code: int) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: so has the app
                runner.get_loop().call_soon_threadsafe(app.leave, code)

        try:
            with TerminalGuard(leave, client.close), runner:
                runner.run(app.run_async())
        except Exception as error:
            crash = error
    crash = crash or app.crash
    if crash is not None:
        if debug:
            sys.excepthook(type(crash), crash, crash.__traceback__)
        hint = "" if debug else "; --debug shows where"
        return _say(f"the chat ended by an error of its own: {type(crash).__name__}: {crash}{hint}", 1)
    code = app.return_code or 0
    if app.load_error and code == 1:
        return _say(app.load_error, 1)
    return code


def _say(text: str, code: int) -> int:
    with contextlib.suppress(OSError, ValueError):  # stderr may be a terminal that is gone
        print(f"edgeinfer: {one_line(text)}", file=sys.stderr)  # noqa: T201
    return code
