"""100,000 damaged bodies and `schemathesis` over the OpenAPI document: no 500, no crash, nothing hangs.

The endpoint is a process of its own with a scripted model, which answers at once; requests go over kept
connections. A body is a right one of its route with one to four mutations: bytes changed, cut, repeated,
or values of another type, size or depth put where they do not belong. Every answer must have a status
below 500 and, from 400 on, an error in OpenAI's shape. (A 503 that says that
the endpoint is closing, or a 504, would count too.) Afterwards the endpoint still answers, and the same
processes run.
"""

from __future__ import annotations

import argparse
import copy
import http.client
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from benchmarks.alternate import table
from benchmarks.endpoint import EndpointProcess
from benchmarks.verdict import Bar, run_bar

BODIES = 100_000
CLIENTS = 4
PATIENCE_S = 60.0
EXAMPLES = 100  # of schemathesis, for each operation and phase

_TOOL = {
    "type": "function",
    "function": {
        "name": "get",
        "parameters": {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
    },
}
_SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "string", "pattern": "^[a-z]{1,4}$"},
        "b": {"anyOf": [{"type": "integer", "minimum": 0}, {"$ref": "#/$defs/c"}]},
    },
    "required": ["a"],
    "$defs": {"c": {"enum": ["x", "y"]}},
}
_HELLO = {"role": "user", "content": "Hello"}
_CALLED = [
    _HELLO,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "get", "arguments": '{"a":"b"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "done"},
]
_FORM = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": _SCHEMA}}

RIGHT: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "system", "content": "Be brief."}, _HELLO],
            "max_tokens": 4,
            "temperature": 0.5,
            "top_p": 0.9,
            "seed": 1,
            "stop": ["x"],
            "logprobs": True,
            "top_logprobs": 2,
            "n": 2,
            "logit_bias": {"5": 1.0},
            "stream": False,
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [_HELLO],
            "max_tokens": 4,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": _CALLED,
            "max_tokens": 8,
            "tools": [_TOOL],
            "tool_choice": "required",
            "parallel_tool_calls": False,
        },
    ),
    ("/v1/chat/completions", {"messages": [_HELLO], "max_tokens": 8, "response_format": _FORM}),
    (
        "/v1/completions",
        {"prompt": ["Hello", "there"], "max_tokens": 4, "echo": True, "logprobs": 1, "stop": "x"},
    ),
    ("/v1/completions", {"prompt": [104, 105], "max_tokens": 2, "stream": True}),
    ("/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64"}),
    ("/v1/embeddings", {"input": [[104, 105]], "dimensions": 8}),
    ("/v1/tokenize", {"text": "Hello", "add_special": True}),
    ("/v1/tokenize", {"messages": [_HELLO]}),
    ("/v1/detokenize", {"tokens": [104, 105]}),
)

_STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 1e308, -0.0, 0.5, "", "x", " "),
    *("\x00", "\ud800", "é" * 50, "<|im_end|>", "{{ 7*7 }}", "{% for x in y %}", "../../etc/passwd"),
    *([], {}, [[]], [{}], [None], {"": None}, {"type": "object"}, {"$ref": "#"}, ["a"] * 50, [1] * 300),
    *({"role": "user"}, {"type": "image_url"}, [0.5], "NaN", {"a": {"a": {"a": {}}}}, -(10**400)),
)


def mutate(body: dict[str, Any], chance: random.Random) -> bytes:
    value: Any = json.loads(json.dumps(body))
    for _ in range(chance.randint(0, 3)):
        value = _mutate_value(value, chance)
    try:
        data = json.dumps(value, ensure_ascii=chance.random() < 0.9).encode("utf-8", "surrogatepass")
    except RecursionError:
        data = b"[" * 900 + b"]" * 900
    for _ in range(chance.choice((0, 0, 0, 1, 2))):
        data = _mutate_bytes(data, chance)
    return data


def _mutate_value(value: Any, chance: random.Random) -> Any:
    """One place of it made strange."""
    places: list[Callable[[Any], None]] = []
    pending = [value]
    while pending:
        each = pending.pop()
        if isinstance(each, dict):
            for key in list(each):
                places.append(lambda new, d=each, k=key: d.__setitem__(k, new))
                pending.append(each[key])
            places.append(lambda new, d=each: d.__setitem__(chance.choice(_KEYS), new))
            places.append(lambda _, d=each: d.pop(chance.choice(list(d)), None) if d else None)
        elif isinstance(each, list):
            for index in range(len(each)):
                places.append(lambda new, li=each, i=index: li.__setitem__(i, new))
                pending.append(each[index])
            places.append(lambda new, li=each: li.append(new))
    if not places:
        return copy.deepcopy(chance.choice(_STRANGE))
    new: Any = copy.deepcopy(chance.choice(_STRANGE))  # which later mutations may change
    if chance.random() < 0.1:
        for _ in range(chance.choice((3, 70, 300))):
            new = [new] if chance.random() < 0.5 else {"items": new}
    chance.choice(places)(new)
    return value


_KEYS = (
    *("model", "temperature", "top_k", "min_p", "seed", "stop", "n", "tools", "tool_choice", "logprobs"),
    *("response_format", "stream", "stream_options", "max_tokens", "max_completion_tokens", "user"),
    *("logit_bias", "messages", "chat_template_kwargs", "reasoning_effort", "functions", "best_of"),
    *("suffix", "not", "if", "pattern", "properties", "items", "format", "enum", "$ref", "strict", "x"),
)


def _mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data) + 1)
    kind = chance.randrange(5)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + chance.randbytes(chance.randint(1, 4)) + data[at:]
    if kind == 2:
        return data[:at] + bytes([chance.choice(b'{}[],:"\\0-.e')]) + data[at + 1 :]
    if kind == 3:
        return data[:at] + data[at : at + 40] * chance.randint(2, 30) + data[at:]
    return data[:at] + data[at + chance.randint(1, 20) :]


class Fuzzer:
    def __init__(self, url: str, bodies: int, seed: int) -> None:
        self._address = urlsplit(url)
        self._left = bodies
        self._seed = seed
        self._lock = threading.Lock()
        self.statuses: dict[str, Counter[int]] = {route: Counter() for route, _ in RIGHT}
        self.problems: list[str] = []
        self.slowest = 0.0

    def client(self, number: int) -> None:
        chance = random.Random(f"{self._seed}/{number}")
        connection = self._connect()
        while True:
            with self._lock:
                if not self._left:
                    return
                self._left -= 1
            route, right = chance.choice(RIGHT)
            body = mutate(right, chance)
            begin = time.monotonic()
            try:
                connection.request("POST", route, body)
                reply = connection.getresponse()
                data = reply.read()
            except (OSError, http.client.HTTPException) as error:
                self._problem(f"{route}: {error!r}", body)
                connection.close()
                connection = self._connect()
                continue
            self.slowest = max(self.slowest, time.monotonic() - begin)
            with self._lock:
                self.statuses[route][reply.status] += 1
            fault = fault_of(reply.status, data, reply.getheader("content-type", ""))
            if fault:
                self._problem(f"{route}: {fault}", body)

    def _connect(self) -> http.client.HTTPConnection:
        address = self._address
        return http.client.HTTPConnection(address.hostname or "", address.port, timeout=PATIENCE_S)

    def _problem(self, what: str, body: bytes) -> None:
        with self._lock:
            self.problems.append(f"{what}; body {body[:300]!r}")


def fault_of(status: int, data: bytes, kind: str) -> str:
    """What is wrong with an answer; "" for nothing."""
    if status >= 500:
        return f"status {status}: {data[:200]!r}"
    try:
        if kind.startswith("text/event-stream"):
            events = [line[6:] for line in data.split(b"\n\n") if line.startswith(b"data: ")]
            if events[-1] == b"[DONE]":
                events.pop()
            for event in events:
                found = json.loads(event)
                if "error" in found and found["error"]["type"] == "server_error":
                    return f"the stream ended with {event[:200]!r}"
            return ""
        found = json.loads(data)
        if status >= 400 and set(found["error"]) != {"message", "type", "param", "code"}:
            return f"status {status} in another shape: {data[:200]!r}"
    except (ValueError, KeyError, TypeError, IndexError) as error:
        return f"status {status}, unreadable ({error!r}): {data[:200]!r}"
    return ""


def run_schemathesis(bar: Bar, url: str) -> None:
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--url", url),
        *("--checks", "not_a_server_error", "--max-examples", str(bar.options.examples)),
        *("--seed", str(bar.options.seed), "--no-color", "--request-timeout", str(PATIENCE_S)),
        *("--suppress-health-check", "all", "--continue-on-failure"),
    ]
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "100"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    for line in lines[-25:]:
        bar.say(f"    {line}")
    bar.details["schemathesis"] = lines
    bar.require(
        f"schemathesis over the OpenAPI document ends with {done.returncode} (0: no 500)",
        done.returncode == 0 and any("generated" in line for line in lines),
    )


def processes_of(pid: int) -> set[int]:
    server = psutil.Process(pid)
    return {pid, *(child.pid for child in server.children(recursive=True))}


def measure(bar: Bar) -> None:
    options = bar.options
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "script.json"
        script.write_text(json.dumps({"answers": {"*": "Hello there."}}))
        arguments = [str(script), "--backend", "scripted", "--parallel", "8", "--ctx", "512"]
        with EndpointProcess([*arguments, "--queue", "10000"]) as endpoint:
            before = processes_of(endpoint.pid)
            fuzzer = Fuzzer(endpoint.url, options.bodies, options.seed)
            threads = [
                threading.Thread(target=fuzzer.client, args=(number,)) for number in range(CLIENTS)
            ]
            begin = time.monotonic()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            seconds = time.monotonic() - begin
            bar.require("afterwards it is healthy", endpoint.is_healthy())
            bar.require("the same processes run", processes_of(endpoint.pid) == before)
            _report(bar, fuzzer, seconds)
            if options.examples:
                run_schemathesis(bar, endpoint.url)
                bar.require("and after schemathesis", processes_of(endpoint.pid) == before)


def _report(bar: Bar, fuzzer: Fuzzer, seconds: float) -> None:
    every = sorted({status for counter in fuzzer.statuses.values() for status in counter})
    rows = [("route", *map(str, every))]
    rows += [
        (route, *(str(counter[status]) for status in every))
        for route, counter in fuzzer.statuses.items()
    ]
    bar.say(table(rows))
    total = sum(counter.total() for counter in fuzzer.statuses.values())
    bar.details.update(rows=rows, problems=fuzzer.problems[:100], slowest_s=fuzzer.slowest)
    for problem in fuzzer.problems[:10]:
        bar.say(f"  problem: {problem}")
    bar.say(f"  {total} answers in {seconds:.0f} s; the slowest took {fuzzer.slowest:.1f} s")
    bar.require(
        f"{len(fuzzer.problems)} of {bar.options.bodies} bodies got a 5xx, no answer or one in another"
        " shape (none may)",
        not fuzzer.problems and total == bar.options.bodies,
    )
    taken = sum(counter[200] for counter in fuzzer.statuses.values())
    bar.require(f"{taken} were taken, {total - taken} refused: both occur", 0 < taken < total)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bodies", type=int, default=BODIES)
    parser.add_argument(
        "--examples", type=int, default=EXAMPLES, help="of schemathesis; 0: leave it out"
    )
    parser.add_argument("--seed", type=int, default=4)


if __name__ == "__main__":
    sys.exit(run_bar(__file__, "damaged bodies", measure, add_options))
