"""Driving the chat without a terminal."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from chat_driver import Drive, Driver
from fake_client import FakeClient

from edgeinfer_tui import ChatApp


@pytest.fixture
def drive() -> Drive:
    """`async with drive(client, size=…, **options) as driver:` runs the app."""

    @asynccontextmanager
    async def run(
        client: FakeClient, *, size: tuple[int, int] = (100, 30), **options: Any
    ) -> AsyncIterator[Driver]:
        app = ChatApp(client, model_label="smollm2", **options)
        async with app.run_test(size=size) as pilot:
            yield Driver(app, pilot)

    return run
