"""Ten minutes of everything at once against the endpoint, its model's process killed in the middle.

Clients ask short and long questions, hang up in the middle, send what is malformed, and ask for JSON
under a schema. Greedy answers were heard alone before. Short texts, which begin differently and so share
no cached prefix, must be answered letter by letter as alone (one thread, where that holds). Long ones
share prefixes, and cells that another chunk size computed differ in their last bits, so words may too;
but no answer may have 32 characters in a row of another question's answer that its own has not. JSON
answers carry a mark that only their own request knows.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import http.client
import json
import os
import random
import re
import signal
import sys
import threading
import time
import urllib.request
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

OVERLAP = 32  # characters


def schema_of(mark: str) -> dict[str, Any]:
    """JSON that must carry a mark."""
    properties = {
        "mark": {"const": mark},
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer"},
    }
    return {"type": "object", "properties": properties, "required": list(properties)}


MALFORMED = (
    b"{",
    b"null",
    b'{"messages": []}',
    b'{"messages": [{"role": "user", "content": "hi"}], "temperature": "hot"}',
    b'{"messages": [{"role": "user", "content": "hi"}], "response_format": {"type": "json_schema"}}',
    b"[" * 5000,
)


TOPICS = (
    *("Rivers", "Trains", "Bread", "Islands", "Clocks"),
    *("Music", "Gardens", "Letters", "Bridges", "Winters"),
)


def short_questions() -> dict[str, dict[str, Any]]:
    """What is asked -> the body. Each begins with another token."""
    asked = {f"{topic} are known for": 24 for topic in TOPICS}
    return {
        text: {"prompt": text, "max_tokens": tokens, "temperature": 0} for text, tokens in asked.items()
    }


def long_questions() -> dict[str, dict[str, Any]]:
    words = random.Random(0)
    bodies = {}
    for topic in TOPICS[:5]:
        text = " ".join(words.choices(TOPICS, k=600)) + f" Now tell me about {topic}."
        messages = [{"role": "user", "content": text}]
        bodies[text] = {"messages": messages, "max_tokens": 48, "temperature": 0}
    return bodies


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

    def ask(self, body: bytes | dict[str, Any]) -> tuple[int, dict[str, Any]]:
        route = "completions" if isinstance(body, dict) and "prompt" in body else "chat/completions"
        connection = self._connect()
        try:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request("POST", f"/v1/{route}", content)
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read())
        finally:
            connection.close()

    def _answered(self, question: str, body: dict[str, Any]) -> str:
        status, reply = self.ask(body)
        if (refused := self._refused(status, reply)) is not None:
            return refused
        self.is_back.set() if self.killed.is_set() else None
        text = text_of(reply)
        if text == self._expected[question]:
            return "answered"
        if "messages" in body and not self._is_foreign(text, question):
            return "answered in other words"
        self.problems.append(f"another text than alone: {text[:100]!r}")
        return "wrong text"

    def _refused(self, status: int, reply: dict[str, Any]) -> str | None:
        if status == 429:
            return "told to wait"
        if status == 503 and self.killed.is_set():
            return "failed with the model's process"
        if status != 200:
            self.problems.append(f"{status}: {str(reply)[:200]}")
            return f"status {status}"
        return None

    def _is_foreign(self, text: str, question: str) -> bool:
        own = self._expected[question]
        parts = {text[i : i + OVERLAP] for i in range(len(text) - OVERLAP + 1)}
        others = [answer for asked, answer in self._expected.items() if asked != question]
        return any(part not in own and any(part in other for other in others) for part in parts)

    def _short(self, chance: random.Random) -> str:
        return self._answered(*chance.choice(list(short_questions().items())))

    def _long(self, chance: random.Random) -> str:
        return self._answered(*chance.choice(list(long_questions().items())))

    def _hang_up(self, chance: random.Random) -> str:
        bodies = [*short_questions().values(), *long_questions().values()]
        body = chance.choice(bodies) | {"stream": True}
        route = "completions" if "prompt" in body else "chat/completions"
        connection = self._connect()
        try:
            connection.request("POST", f"/v1/{route}", json.dumps(body))
            reply = connection.getresponse()
            for _ in range(chance.randrange(12)):
                if not reply.readline():
                    break
            return "hung up"
        finally:
            connection.close()

    def _malformed(self, chance: random.Random) -> str:
        status, reply = self.ask(chance.choice(MALFORMED))
        if status != 400 or "message" not in reply["error"]:
            self.problems.append(f"malformed: {status} {str(reply)[:200]}")
        return f"status {status}"

    def _schema(self, chance: random.Random) -> str:
        mark = f"m{chance.randrange(10**9)}"
        form = {"type": "json_schema", "json_schema": {"name": "p", "schema": schema_of(mark)}}
        messages = [{"role": "user", "content": f"Invent a person, {mark}."}]
        status, reply = self.ask({"messages": messages, "max_tokens": 100, "response_format": form})
        if (refused := self._refused(status, reply)) is not None:
            return refused
        text, reason = text_of(reply), str(reply["choices"][0]["finish_reason"])
        found = json.loads(text) if reason == "stop" else {}
        if mark not in text or (reason == "stop" and set(found) != {"mark", "name", "age"}):
            self.problems.append(f"schema: {text}")
        return reason


def text_of(reply: dict[str, Any]) -> str:
    choice = reply["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


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
    for question, body in (short_questions() | long_questions()).items():
        status, reply = load.ask(body)
        if status != 200:
            raise RuntimeError(f"{status}: {reply}")
        found[question] = text_of(reply)
    return found


def measure(bar: Bar) -> None:
    options = bar.options
    model: Path = options.model or starter_q4_0()
    seconds = 60.0 * options.minutes
    serve = [str(model), "--threads", "1", "--parallel", "8", "--ctx", "2048", "--cache-ram", "0"]
    serve += ["--kv-type", "f16"]
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
    taken, ended = counted["taken"], counted["ended"]
    bar.require(
        f"{taken} requests taken, {ended} ended with one outcome each: {counted['outcomes']}",
        taken == ended > 0,
    )
    bar.require(f"{counted['open']} requests open at the end", counted["open"] == 0)


def _metrics(url: str) -> dict[str, Any]:
    """What the endpoint itself counted."""
    with urllib.request.urlopen(f"{url}/health") as reply:
        health = json.load(reply)
    with urllib.request.urlopen(f"{url}/metrics") as reply:
        page = reply.read().decode()
    taken = 0
    outcomes: collections.Counter[str] = collections.Counter()
    for line in page.splitlines():
        if line.startswith("edgeinfer_taken_requests_total{"):
            taken += round(float(line.rsplit(" ", 1)[1]))
        elif found := re.match(r'edgeinfer_requests_total\{outcome="(\w+)".*\} (\S+)', line):
            outcomes[found[1]] += round(float(found[2]))
    return {
        "open": health["open_requests"],
        "taken": taken,
        "ended": outcomes.total(),
        "outcomes": dict(outcomes),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--model", type=Path, help="a GGUF file instead of the starter's Q4_0")


if __name__ == "__main__":
    sys.exit(run_bar(__file__, "ten minutes of mixed load", measure, add_options))
