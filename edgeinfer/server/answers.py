"""Running requests seen from the event loop: their events in order, their end, their cancel."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import partial

from edgeinfer.client import Client, Ended, Event, Request
from edgeinfer.errors import EdgeInferError, RequestFailed, error_from_wire

Watch = Callable[[int, Event], None]


class Wakes:
    """Wakes tasks of an event loop from other threads: all that are due with one call into it.

    Each call is a write to a pipe, and a step's tokens of all streams come at once. Made in the loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._due: deque[asyncio.Event] = deque()

    def add(self, event: asyncio.Event) -> None:
        self._due.append(event)

    def call(self) -> None:
        if self._due:
            with suppress(RuntimeError):  # the loop has ended, and nobody reads any more
                self._loop.call_soon_threadsafe(self._wake_all)

    def _wake_all(self) -> None:
        while self._due:
            self._due.popleft().set()


class Answers:
    """One or more requests that one HTTP request asks for. Made and read in the event loop; events come
    from the client's thread.

    watch(index, event): called in that thread for every event, before the reader sees it. wakes: called
    by the client after its events. on_cancel(self): called when their end is asked for, the first time.
    """

    def __init__(
        self,
        client: Client,
        requests: Sequence[Request],
        watch: Watch,
        wakes: Wakes,
        on_cancel: Callable[[Answers], None] = lambda _: None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._wakes = wakes
        self._watch = watch
        self._on_cancel = on_cancel
        self._arrived: deque[tuple[int, Event]] = deque()
        self._wake = asyncio.Event()
        self._is_woken = False
        self._heard = [False] * len(requests)  # whether anything came of it yet
        self._left = len(requests)  # whose end was not read yet
        self.num_running = len(requests)  # that did not end yet
        self.is_cancelled = False
        self._generations = [
            client.start(request, partial(self._on_event, index))
            for index, request in enumerate(requests)
        ]

    def _on_event(self, index: int, event: Event) -> None:
        self._watch(index, event)
        self.num_running -= isinstance(event, Ended)
        self._arrived.append((index, event))
        if not self._is_woken:
            self._is_woken = True
            self._wakes.add(self._wake)

    def cancel(self) -> None:
        """Ask for the end of all; `events` goes on to it."""
        if not self.is_cancelled:
            self.is_cancelled = True
            self._on_cancel(self)
        for generation in self._generations:
            generation.cancel()

    def leave(self) -> None:
        """To be called by whoever reads no further: what still runs is ended."""
        if self._left:
            self.cancel()

    async def accepted(self, timeout_s: float) -> None:
        """Wait until each request is known to be answerable, or `timeout_s` is over. Raises the error of
        one that was refused; the others are cancelled."""
        deadline = self._loop.time() + timeout_s
        while True:
            for index, event in tuple(self._arrived):  # which the client's thread goes on filling
                self._heard[index] = True
                if isinstance(event, Ended) and event.outcome == "failed":
                    self.cancel()
                    raise failure(event)
            if all(self._heard):
                return
            try:
                async with asyncio.timeout_at(deadline):
                    await self._wait()
            except TimeoutError:
                return

    async def events(self) -> AsyncIterator[list[tuple[int, Event]]]:
        """(index, event) as they come, several at once when they came together; ends with the last
        `Ended`. One reader at a time; another may take over where it stopped."""
        while self._left:
            while not self._arrived:
                await self._wait()
            batch = []
            while self._arrived:
                batch.append(self._arrived.popleft())
            self._left -= sum(isinstance(event, Ended) for _, event in batch)
            yield batch

    async def _wait(self) -> None:
        await self._wake.wait()
        self._wake.clear()
        self._is_woken = False  # before what arrived is looked at: what comes after wakes again


def failure(event: Ended) -> EdgeInferError:
    return error_from_wire(event.error_type or RequestFailed.__name__, event.error)
