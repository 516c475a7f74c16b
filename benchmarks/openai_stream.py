"""An OpenAI endpoint as its client sees it: when each piece of a streamed answer came."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from benchmarks.peers import PeerError


@dataclass(frozen=True)
class Pieces:
    """times: of each piece of text, perf_counter(). num_tokens: of the whole answer, as asked for."""

    asked: float
    times: tuple[float, ...]
    num_tokens: int

    @property
    def ttft_s(self) -> float:
        return self.times[0] - self.asked

    @property
    def end(self) -> float:
        return self.times[-1]

    @property
    def decode_tok_s(self) -> float:
        return (self.num_tokens - 1) / (self.times[-1] - self.times[0])

    def gaps(self, start: float, stop: float) -> list[float]:
        """Between two pieces, of those that ended inside [start, stop]. Tokens that came together are
        one piece: a burst does not count as so many short waits."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return [after - before for before, after in pairs if start <= after and before <= stop]


def read_completion(
    url: str,
    prompt: str,
    new_tokens: int,
    *,
    body: dict[str, Any] | None = None,
    on_piece: Callable[[float, int], None] = lambda _time, _pieces: None,
    timeout_s: float = 600.0,
) -> Pieces:
    """/v1/completions, streamed; exactly `new_tokens` must come of it. Raises PeerError."""
    asked_for = {
        "prompt": prompt,
        "max_tokens": new_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **(body or {}),
    }
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        connection.connect()
        asked = time.perf_counter()
        connection.request(
            "POST", "/v1/completions", json.dumps(asked_for), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        if response.status != 200:
            raise PeerError(f"{url} answered {response.status}: {response.read(300)!r}")
        times: list[float] = []
        usage: dict[str, Any] = {}
        while line := response.readline():
            now = time.perf_counter()
            if not line.startswith(b"data:") or b"[DONE]" in line:
                continue
            chunk = json.loads(line[5:])
            if "error" in chunk:
                raise PeerError(f"{url}: {chunk['error']}")
            usage = chunk.get("usage") or usage
            if any(choice.get("text") for choice in chunk["choices"]):
                times.append(now)
                on_piece(now, len(times))
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        raise PeerError(f"{url}: the answer broke off: {error!r}") from None
    finally:
        connection.close()
    told = usage.get("completion_tokens", new_tokens)  # one peer tells no usage in streams
    if told != new_tokens or not times:
        raise PeerError(f"{url}: {told} tokens came where {new_tokens} were asked for")
    return Pieces(asked, tuple(times), new_tokens)


def read_all(tasks: Sequence[Callable[[], Pieces]]) -> list[Pieces]:
    """All at once. Raises the first PeerError."""
    found: list[Pieces | BaseException | None] = [None] * len(tasks)

    def read(index: int) -> None:
        try:
            found[index] = tasks[index]()
        except BaseException as error:
            found[index] = error

    threads = [threading.Thread(target=read, args=(index,), daemon=True) for index in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return [one for one in found if isinstance(one, Pieces)]
