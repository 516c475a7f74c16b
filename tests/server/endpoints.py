"""Real endpoints for tests: a worker process with a script or a model, the app, its guard, a socket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from edgeinfer.client import LocalClient, OpenOptions
from edgeinfer.sampling import SamplingParams
from edgeinfer.server.app import create_app
from edgeinfer.server.dialect import dialect_of
from edgeinfer.server.guard import Guard, GuardSettings
from edgeinfer.server.service import Service, ServiceSettings, served_name
from edgeinfer.server.serving import ServerThread, ServeSettings

GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True)
class Endpoint:
    url: str
    service: Service
    client: LocalClient

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60.0, **options)

    def chat(self, **body: Any) -> httpx.Response:
        with self.http() as http:
            return http.post("/v1/chat/completions", json={"messages": ask("hi"), **body})

    def chunks(self, route: str = "/v1/chat/completions", **body: Any) -> list[dict[str, Any]]:
        """Of a streamed reply; its end is checked."""
        with self.http() as http:
            if "prompt" not in body:
                body.setdefault("messages", ask("hi"))
            reply = http.post(route, json={"stream": True, **body})
        assert reply.status_code == 200, reply.text
        assert reply.headers["content-type"].startswith("text/event-stream")
        events = [line for line in reply.text.split("\n\n") if line and not line.startswith(":")]
        assert all(event.startswith("data: ") for event in events)
        assert events[-1] == "data: [DONE]"
        return [json.loads(event[6:]) for event in events[:-1]]


def ask(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


@contextmanager
def running(
    options: OpenOptions,
    settings: ServiceSettings | None = None,
    guard: GuardSettings | None = None,
    serve: ServeSettings | None = None,
) -> Iterator[Endpoint]:
    settings = settings or ServiceSettings(parallel=options.sequences)
    with LocalClient(options) as client:
        client.load()
        name, aliases = served_name(client)
        service = Service(
            client, name, settings, dialect=dialect_of(client), aliases=aliases, sampling=GREEDY
        )
        app = Guard(create_app(service, on_close=client.close), guard or GuardSettings())
        with ServerThread(app, serve) as server:
            yield Endpoint(server.url, service, client)


@contextmanager
def scripted(
    folder: Path,
    script: dict[str, Any] | None = None,
    *,
    sequences: int = 2,
    context: int = 4096,
    **more: Any,
) -> Iterator[Endpoint]:
    path = folder / "script.json"
    path.write_text(json.dumps(script or {"answers": {"*": "Hello there."}}))
    options = OpenOptions(model=str(path), backend="scripted", sequences=sequences, context=context)
    with running(options, **more) as endpoint:
        yield endpoint
