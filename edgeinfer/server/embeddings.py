"""/v1/embeddings."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Callable
from typing import Any

from edgeinfer.client import Embedded, Ended, Event, Request, RunStats
from edgeinfer.server.errors import invalid
from edgeinfer.server.openai_replies import with_stats
from edgeinfer.server.openai_requests import EmbeddingRequest
from edgeinfer.server.service import Service


class EmbeddingJob:
    def __init__(self, service: Service, body: EmbeddingRequest, asked_by: str) -> None:
        """Raises ApiError."""
        self._model = service.name
        self._body = body
        inputs = body.inputs
        if not inputs or any(not one for one in inputs):
            raise invalid("input is empty; give a text or a list of texts", "input")
        self.requests = [
            Request(
                prompt=one if isinstance(one, str) else None,
                tokens=None if isinstance(one, str) else one,
                embedding=True,
                asked_by=asked_by,
            )
            for one in inputs
        ]
        self._vectors: dict[int, tuple[float, ...]] = {}
        self._stats: dict[int, RunStats] = {}

    def reader(self, begin: int) -> Callable[[int, Event], None]:
        """Reads the events of the requests from number `begin` on. It raises ApiError where more
        dimensions are asked for than there are."""
        wanted = self._body.dimensions or 0

        def read(index: int, event: Event) -> None:
            if isinstance(event, Embedded):
                if wanted > len(event.vector):
                    raise invalid(
                        f"this model's embeddings have {len(event.vector)} dimensions", "dimensions"
                    )
                self._vectors[begin + index] = event.vector
            elif isinstance(event, Ended):
                self._stats[begin + index] = event.stats

        return read

    def whole(self) -> dict[str, Any]:
        stats = [self._stats[i] for i in range(len(self.requests))]
        tokens = sum(one.usage.prompt_tokens for one in stats)
        found = [
            {"object": "embedding", "index": i, "embedding": self._formed(self._vectors[i])}
            for i in range(len(self.requests))
        ]
        reply = {
            "object": "list",
            "data": found,
            "model": self._model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        return with_stats(reply, stats)

    def _formed(self, vector: tuple[float, ...]) -> list[float] | str:
        wanted = self._body.dimensions
        if wanted is not None and wanted != len(vector):
            # As OpenAI shortens them: the first ones, of length 1 again.
            norm = math.sqrt(math.fsum(x * x for x in vector[:wanted])) or 1.0
            vector = tuple(x / norm for x in vector[:wanted])
        if self._body.encoding_format == "base64":
            return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        return list(vector)
