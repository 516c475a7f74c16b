"""Events that cross from the client's thread into the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from edgeinfer.client import Ended, Event, Generation, Queued, Request, RunStats, Text
from edgeinfer.server.answers import Answers, Wakes


class TalkativeClient:
    """Tells thousands of events from a thread of its own, without a pause."""

    EVENTS = 20_000

    def __init__(self, wakes: Wakes) -> None:
        self._wakes = wakes
        self.threads: list[threading.Thread] = []

    def start(self, request: Request, on_event: Callable[[Event], None] | None = None) -> Generation:
        assert on_event is not None
        thread = threading.Thread(target=self._tell, args=(on_event,))
        self.threads.append(thread)
        thread.start()
        return Generation(lambda: None)

    def _tell(self, on_event: Callable[[Event], None]) -> None:
        for number in range(self.EVENTS):
            on_event(Text("x", number, ()))
            self._wakes.call()
        on_event(Queued(1))
        on_event(Ended("finished", RunStats()))
        self._wakes.call()


async def test_events_may_come_while_a_request_is_looked_at() -> None:
    wakes = Wakes()
    client = TalkativeClient(wakes)
    answers = Answers(client, [Request(prompt="x")] * 2, lambda _index, _event: None, wakes)  # type: ignore[arg-type]
    found = 0
    async with asyncio.timeout(60):
        while any(thread.is_alive() for thread in client.threads):
            await answers.accepted(0.0)
        async for batch in answers.events():
            found += len(batch)
    assert found == 2 * (client.EVENTS + 2)
    for thread in client.threads:
        thread.join()
