"""A reader that goes away ends what it asked for, on routes that answer in one piece."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

Result = TypeVar("Result")


async def unless_gone(
    http: HttpRequest, on_gone: Callable[[], None], work: Coroutine[Any, Any, Result]
) -> Result:
    """The result of `work`. on_gone is called when the reader disconnects meanwhile, and has to make
    `work` end soon."""
    watch = asyncio.create_task(_watch(http, on_gone))
    try:
        return await work
    finally:
        watch.cancel()


async def _watch(http: HttpRequest, on_gone: Callable[[], None]) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
    on_gone()
