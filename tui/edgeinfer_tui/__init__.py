"""The terminal chat. Knows `edgeinfer.client` and the public names, nothing below them.

`run_chat` is what a command calls; `ChatApp` is the app itself, for tests and for embedding.
"""

from __future__ import annotations

from edgeinfer_tui.app import ChatApp
from edgeinfer_tui.run import run_chat

__all__ = ["ChatApp", "run_chat"]
