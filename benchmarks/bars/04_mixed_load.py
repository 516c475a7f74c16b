"""Ten minutes of everything at once against the endpoint, its model's process killed in the middle.

Clients ask short and long questions, hang up in the middle, send what is malformed, and ask for JSON
under a schema. Questions come from a fixed set whose greedy answers were heard alone before, so that
text of one request in another's answer is seen. One thread, for which answers are bit for bit those
alone.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import http.client
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from benchmarks.endpoint import EndpointProcess
from benchmarks.model_files import starter_q4_0
from benchmarks.verdict import Bar, run_bar

CLIENTS = 16
SETTLE_SHARE = 0.2  # of the time, after which memory may grow no more: two minutes of ten
MOST_GROWTH = 0.03
PATIENCE_S = 120.0  # no answer here takes as long
KEPT_WARM = 20.0

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
MALFORMED = (
    b"{",
    b"null",
    b'{"messages": []}',
    b'{"messages": [{"role": "user", "content": "hi"}], "temperature": "hot"}',
    b'{"messages": [{"role": "user", "content": "hi"}], "response_format": {"type": "json_schema"}}',
    b"[" * 5000,
)


def questions() -> list[tuple[str, int]]:
    """(question, tokens of the answer)"""
    words = random.Random(0)
    topics = [
        "rivers",
        "trains",
        "bread",
        "islands",
        "clocks",
        "music",
        "gardens",
        "letters",
        "bridges",
        "winters",
    ]
    short = [(f"Say something about {topic}.", 24) for topic in topics]
    long = [
        (" ".join(words.choices(topics, k=600)) + f" Now tell me about {topic}.", 48)
        for topic in topics[:5]
    ]
    return short + long


class Load:
    def __init__(self, url: str, expected: dict[str, str]) -> None:
        self._url = urlsplit(url)
        self._expected = expected
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.problems: list[str] = []
        self.stop = threading.Event()
        self.killed = threading.Event()  # the worker was: until it is back, requests may fail
        self.is_back = threading.Event()

    def client(self, number: int) -> None:
        chance = random.Random(number)
        while not self.stop.is_set():
            kind = chance.choices(
                ("short", "long", "hang up", "malformed", "schema"), (40, 15, 20, 10, 15)
            )[0]
            try:
                outcome = getattr(self, "_" + kind.replace(" ", "_"))(chance)
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                outcome = "broken"
                self.problems.append(f"{kind}: {error!r}")
            self.outcomes[f"{kind}: {outcome}"] += 1

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self._url.hostname or "", self._url.port, timeout=PATIENCE_S)

    def _ask(self, body: bytes | dict[str, Any]) -> tuple[int, dict[str, Any]]:
        connection = self._connect()
        try:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request("POST", "/v1/chat/completions", content)
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read())
        finally:
            connection.close()

    def _question(self, chance: random.Random, is_long: bool) -> dict[str, Any]:
        text, tokens = chance.choice([q for q in questions() if (q[1] > 24) == is_long])
        return {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": tokens,
            "temperature": 0,
        }

    def _answered(self, body: dict[str, Any]) -> str:
        status, reply = self._ask(body)
        if status == 429:
            return "told to wait"
        if status == 503 and self.killed.is_set():
            return "failed with the model's process"
        if status != 200:
            self.problems.append(f"{status}: {str(reply)[:200]}")
            return f"status {status}"
        self.is_back.set() if self.killed.is_set() else None
        text = reply["choices"][0]["message"]["content"]
        if text != self._expected[body["messages"][0]["content"]]:
            self.problems.append(f"another text than alone: {text[:100]!r}")
            return "wrong text"
        return "answered"

    def _short(self, chance: random.Random) -> str:
        return self._answered(self._question(chance, is_long=False))

    def _long(self, chance: random.Random) -> str:
        return self._answered(self._question(chance, is_long=True))

    def _hang_up(self, chance: random.Random) -> str:
        body = self._question(chance, chance.random() < 0.5) | {"stream": True}
        connection = self._connect()
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body))
            reply = connection.getresponse()
            for _ in range(chance.randrange(12)):
                if not reply.readline():
                    break
            return "hung up"
        finally:
            connection.close()

    def _malformed(self, chance: random.Random) -> str:
        status, reply = self._ask(chance.choice(MALFORMED))
        if status != 400 or "message" not in reply["error"]:
            self.problems.append(f"malformed: {status} {str(reply)[:200]}")
        return f"status {status}"

    def _schema(self, chance: random.Random) -> str:
        status, reply = self._ask(
            {
                "messages": [{"role": "user", "content": f"Invent a person. {chance.random()}"}],
                "max_tokens": 100,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "p", "schema": SCHEMA},
                },
            }
        )
        if status == 429:
            return "told to wait"
        if status == 503 and self.killed.is_set():
            return "failed with the model's process"
        if status != 200:
            self.problems.append(f"schema: {status} {str(reply)[:200]}")
            return f"status {status}"
        choice = reply["choices"][0]
        if choice["finish_reason"] == "stop":
            found = json.loads(choice["message"]["content"])
            if set(found) != {"name", "age"} or not isinstance(found["age"], int):
                self.problems.append(f"schema: {found}")
        return str(choice["finish_reason"])


def resident(pid: int) -> int:
    """Bytes of the endpoint and its model's process."""
    total = 0
    server = psutil.Process(pid)
    for process in (server, *server.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


def worker_of(pid: int) -> int:
    for process in psutil.Process(pid).children():
        if "edgeinfer.engine.worker" in " ".join(process.cmdline()):
            return process.pid
    raise RuntimeError("the endpoint has no worker")


def hear_alone(load: Load) -> dict[str, str]:
    found = {}
    for text, tokens in questions():
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0}
        status, reply = load._ask(body)
        if status != 200:
            raise RuntimeError(f"{status}: {reply}")
        found[text] = reply["choices"][0]["message"]["content"]
    return found


def measure(bar: Bar) -> None:
    options = bar.options
    model: Path = options.model or starter_q4_0()
    seconds = 60.0 * options.minutes
    serve = [str(model), "--threads", "1", "--parallel", "8", "--ctx", "2048", "--cache-ram", "0"]
    with EndpointProcess(serve) as endpoint:
        expected: dict[str, str] = {}
        load = Load(endpoint.url, expected)
        expected.update(hear_alone(load))
        threads = [
            threading.Thread(target=load.client, args=(number,), daemon=True)
            for number in range(CLIENTS)
        ]
        begin = time.monotonic()
        for thread in threads:
            thread.start()
        marks: dict[str, int] = {}
        settled, kill_at = SETTLE_SHARE * seconds, 0.5 * seconds
        series = []
        while (now := time.monotonic() - begin) < seconds:
            time.sleep(1.0)
            series.append((round(now, 1), resident(endpoint.pid)))
            if now >= settled and "settled" not in marks:
                marks["settled"] = max(size for at, size in series if at > settled - KEPT_WARM)
            if now >= kill_at and not load.killed.is_set():
                load.killed.set()
                os.kill(worker_of(endpoint.pid), signal.SIGKILL)
            if now % 30 < 1:
                requests = sum(load.outcomes.values())
                bar.say(f"  {now:.0f} s: {series[-1][1] / 1e6:.0f} MB, {requests} requests")
        marks["end"] = max(size for at, size in series if at > seconds - KEPT_WARM)
        load.stop.set()
        for thread in threads:
            thread.join(PATIENCE_S + 10)
        stuck = sum(thread.is_alive() for thread in threads)
        healthy = endpoint.is_healthy()
        counted = _metrics(endpoint.url)
    bar.details |= {"memory": series, "outcomes": dict(load.outcomes), "counted": counted}
    for name, count in sorted(load.outcomes.items()):
        bar.say(f"  {count:6} {name}")
    for problem in load.problems[:10]:
        bar.say(f"  problem: {problem}")
    growth = marks["end"] / marks["settled"] - 1
    bar.require(
        f"memory at the end {growth:+.2%} from that after the first fifth <= {MOST_GROWTH:.0%}",
        growth <= MOST_GROWTH,
    )
    bar.require(f"{stuck} clients stuck", stuck == 0)
    bar.require(f"{len(load.problems)} wrong texts, statuses or breaks", not load.problems)
    bar.require("the killed process was replaced and answered again", load.is_back.is_set() and healthy)
    bar.require(f"{counted['open']} requests open at the end", counted["open"] == 0)


def _metrics(url: str) -> dict[str, Any]:
    import urllib.request

    with urllib.request.urlopen(f"{url}/health") as reply:
        health = json.load(reply)
    return {"open": health["open_requests"]}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--model", type=Path, help="a GGUF file instead of the starter's Q4_0")


if __name__ == "__main__":
    sys.exit(run_bar(__file__, "ten minutes of mixed load", measure, add_options))
