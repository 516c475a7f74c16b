"""The model behind the endpoint: who may ask it now, what became of each request, when it may rest."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from edgeinfer.client import Ended, EngineStatus, Event, LocalClient, ModelInfo, Overflow, Request
from edgeinfer.sampling import SamplingParams
from edgeinfer.server.answers import Answers, Wakes
from edgeinfer.server.dialect import Dialect
from edgeinfer.server.errors import ApiError
from edgeinfer.server.metrics import Metrics, RequestWatch

log = logging.getLogger("edgeinfer.server")

MOST_RETRY_S = 120
IDLE_CHECK_S = 1.0
HANG_CHECK_S = 5.0


@dataclass(frozen=True)
class ServiceSettings:
    """parallel: answers that run at once. queue: requests that may wait for them; more are told to come
    again. timeout_s: longest that a request may take in all; 0: no end. idle_unload_s: after so long
    without a request the model leaves memory; 0: never. accept_s: how long a stream's status waits for
    its request to be found answerable, which takes milliseconds but when the model must be loaded.
    hang_s: where a cancelled request has not ended after so long, the model's process hangs, and is
    ended. (A step of a large model may take a minute where it is slow.)"""

    parallel: int = 4
    queue: int = 64
    timeout_s: float = 3600.0
    idle_unload_s: float = 0.0
    ping_s: float = 10.0
    accept_s: float = 3.0
    hang_s: float = 300.0


class Service:
    """One model. name: what the API calls it; aliases: what else it is found under.

    sampling, max_tokens: for requests that do not say. overflow: what becomes of a full context.
    """

    def __init__(
        self,
        client: LocalClient,
        name: str,
        settings: ServiceSettings,
        *,
        dialect: Dialect,
        aliases: Sequence[str] = (),
        sampling: SamplingParams | None = None,
        max_tokens: int | None = None,
        overflow: Overflow = "stop",
    ) -> None:
        self.client = client
        self.name = name
        self.settings = settings
        self.dialect = dialect
        self.sampling = sampling or SamplingParams()
        self.max_tokens = max_tokens
        self.overflow = overflow
        self.metrics = Metrics()
        self.created = int(time.time())
        self._names = {name, *aliases}
        self._lock = threading.Lock()
        self._num_open = 0  # requests that run or wait
        self._num_using = 0
        self._ending: list[
            tuple[float, Answers]
        ] = []  # cancelled ones, until they are seen to have ended
        self._answer_s = 1.0  # of an answer, lately
        self._last_used = time.monotonic()
        self._wakes: Wakes | None = None  # of the event loop that `start` is called in

    @property
    def info(self) -> ModelInfo | None:
        return self.client.info

    def check_model(self, wanted: str | None) -> None:
        """Raises ApiError for the name of a model that is not here."""
        if wanted and wanted not in self._names:
            raise ApiError(
                404,
                f"there is no model {wanted!r} here; this endpoint serves {self.name!r}",
                "invalid_request_error",
                param="model",
                code="model_not_found",
            )

    # -- requests --------------------------------------------------------------------------------

    def start(self, route: str, requests: Sequence[Request]) -> Answers:
        """Raises ApiError 429 where too many wait already."""
        self._take(route, len(requests))
        self.metrics.taken.labels(route).inc(len(requests))
        watches = [RequestWatch(self.metrics, route) for _ in requests]
        begin = time.monotonic()

        def watch(index: int, event: Event) -> None:
            watches[index].see(event)
            if isinstance(event, Ended):
                self._give_back(time.monotonic() - begin)

        if self._wakes is None:
            self._wakes = Wakes()
            self.client.after_events = self._wakes.call
        return Answers(self.client, requests, watch, self._wakes, self._await_end)

    def _await_end(self, answers: Answers) -> None:
        self._ending.append((time.monotonic(), answers))

    def _take(self, route: str, count: int) -> None:
        most = self.settings.parallel + self.settings.queue
        if count > most:
            raise ApiError(
                400,
                f"{count} answers at once; this endpoint runs and queues {most}",
                "invalid_request_error",
                param="n",
            )
        with self._lock:
            if self._num_open + count <= most:
                self._num_open += count
                return
            waiting = self._num_open + count - self.settings.parallel
            turns = math.ceil(waiting / self.settings.parallel)
            wait = min(MOST_RETRY_S, max(1, math.ceil(turns * self._answer_s / 2)))
        self.metrics.refused.labels(route, "queue_full").inc()
        raise ApiError(
            429,
            f"{most} requests run or wait already, which is the most here; try again in {wait} s,"
            " or raise --queue or --parallel",
            "rate_limit_error",
            code="rate_limit_exceeded",
            headers={"retry-after": str(wait)},
        )

    def has_room(self, count: int) -> bool:
        return self._num_open + count <= self.settings.parallel + self.settings.queue

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The model must not leave memory meanwhile, though no request runs."""
        with self._lock:
            self._num_using += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_using -= 1
                self._last_used = time.monotonic()

    def _give_back(self, seconds: float) -> None:
        with self._lock:
            self._num_open -= 1
            self._answer_s += 0.1 * (seconds - self._answer_s)
            self._last_used = time.monotonic()

    @property
    def num_open(self) -> int:
        return self._num_open

    def status(self) -> EngineStatus | None:
        """None while no model is loaded. May block for some milliseconds."""
        return self.client.status()

    # -- hanging -----------------------------------------------------------------------------------

    async def end_what_hangs(self) -> None:
        """Runs as long as the endpoint: a model's process that obeys no cancel is ended, whose requests
        fail and which is started again."""
        while True:
            await asyncio.sleep(min(HANG_CHECK_S, self.settings.hang_s / 4))
            self._ending = [(since, answers) for since, answers in self._ending if answers.num_running]
            waited = max((time.monotonic() - since for since, _ in self._ending), default=0.0)
            if waited >= self.settings.hang_s:
                log.warning("the model's process did not answer for %.0f s and is ended", waited)
                self._ending.clear()
                self.client.end_hanging_process(waited)

    # -- rest ------------------------------------------------------------------------------------

    async def rest_when_idle(self) -> None:
        """Runs as long as the endpoint: unloads the model when nobody asked for it for a while."""
        limit = self.settings.idle_unload_s
        client = self.client
        while limit:
            await asyncio.sleep(min(IDLE_CHECK_S, limit / 4))
            idle = time.monotonic() - self._last_used
            is_due = (
                not self._num_open and not self._num_using and idle >= limit and client.info is not None
            )
            if is_due and await asyncio.to_thread(client.unload):
                log.info("%s left memory after %.0f s without a request", self.name, idle)


def served_name(client: LocalClient) -> tuple[str, list[str]]:
    """What the API calls a loaded model, and what else it is found under: its name in the catalogue or
    on the hub, its file's name with and without the ending."""
    info = client.info
    assert info is not None
    file = info.name
    stem = file.rsplit(".", 1)[0] if file.endswith((".gguf", ".safetensors")) else file
    spec = client.spec
    is_path = not spec or ("/" in spec and not spec.startswith("hf:")) or "\\" in spec
    name = stem if is_path else spec
    return name, [file, stem, spec] if spec else [file, stem]
