"""What every surface talks to: a model in a worker process, or (later) an endpoint elsewhere.

with LocalClient(OpenOptions(model="smollm2")) as client:
    client.load(print)
    generation = client.start(Request(messages=(Message("user", "Hello"),)))
    for event in generation.events():
        ...
"""

from __future__ import annotations

from edgeinfer.client.client import (
    PROGRESS_HEADER,
    Client,
    Generation,
    LoadProgress,
    ModelInfo,
    Token,
)
from edgeinfer.client.local import LocalClient
from edgeinfer.engine.request import (
    NO_STOP_STRINGS,
    Embedded,
    Ended,
    EngineStatus,
    Event,
    Message,
    Overflow,
    Prefilled,
    Queued,
    Request,
    RunStats,
    Started,
    Text,
    TokenLogprob,
)
from edgeinfer.open import OpenOptions

__all__ = [
    "NO_STOP_STRINGS",
    "PROGRESS_HEADER",
    "Client",
    "Embedded",
    "Ended",
    "EngineStatus",
    "Event",
    "Generation",
    "LoadProgress",
    "LocalClient",
    "Message",
    "ModelInfo",
    "OpenOptions",
    "Overflow",
    "Prefilled",
    "Queued",
    "Request",
    "RunStats",
    "Started",
    "Text",
    "Token",
    "TokenLogprob",
]
