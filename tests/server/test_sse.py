"""An event stream's end, and what must not come after it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from edgeinfer.server.sse import PING, EventStream


def test_a_ping_that_waits_for_its_reader_does_not_come_after_the_end() -> None:
    sent: list[bytes] = []

    async def scenario() -> None:
        pinging, may_go_on = asyncio.Event(), asyncio.Event()

        async def send(message: Any) -> None:
            if message.get("body") == PING:
                pinging.set()
                await may_go_on.wait()
            sent.append(message.get("body", b""))
            if message["type"] == "http.response.body" and not message["more_body"]:
                may_go_on.set()
                await asyncio.sleep(0.01)

        async def receive() -> Any:
            await asyncio.Event().wait()

        async def chunks() -> AsyncIterator[bytes]:
            await pinging.wait()
            yield b"x"

        await EventStream(chunks(), lambda: None, 0.01)({"type": "http"}, receive, send)

    asyncio.run(scenario())
    assert sent == [b"", b"", b"x", b""]
