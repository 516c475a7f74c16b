"""A client that is killed in the middle of a stream frees its place within one step of the model.

The client is a process of its own, killed with SIGKILL: its system ends the connection. The time counts
from the kill to the first look at /metrics that shows nothing running, and is told in steps: the median
time between two pieces of the stream just before. A look takes a few milliseconds itself, so a slow
model (steps of 0.2 s) makes the step what is measured.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.alternate import table
from benchmarks.endpoint import EndpointProcess
from benchmarks.verdict import Bar, run_bar

STEP_S = 0.2
MOST_STEPS = 1.0
PATIENCE_S = 30.0
LOOKS_S = 0.03  # what looking adds: a request to /metrics, and its thread's turn

_CLIENT = """
import http.client, sys
url, route, body = sys.argv[1:4]
connection = http.client.HTTPConnection(url, timeout=60)
connection.request("POST", route, body, {"Content-Type": "application/json"})
reply = connection.getresponse()
while True:
    if reply.readline().startswith(b"data:"):
        print("piece", flush=True)
"""
_WAITING = """
import http.client, sys
url, route, body = sys.argv[1:4]
connection = http.client.HTTPConnection(url, timeout=60)
connection.request("POST", route, body, {"Content-Type": "application/json"})
print("asked", flush=True)
connection.getresponse()
"""

_CHAT = {"messages": [{"role": "user", "content": "go"}], "max_tokens": 3000}
ROUTES = (
    ("chat, streamed", "/v1/chat/completions", {**_CHAT, "stream": True}, _CLIENT),
    ("chat, whole", "/v1/chat/completions", _CHAT, _WAITING),
    (
        "completion, streamed",
        "/v1/completions",
        {"prompt": "go", "max_tokens": 3000, "ignore_eos": True, "stream": True},
        _CLIENT,
    ),
    ("two choices", "/v1/chat/completions", {**_CHAT, "n": 2, "stream": True}, _CLIENT),
    ("an embedding", "/v1/embeddings", {"input": "word " * 1600}, _WAITING),
)


def running(url: str) -> int:
    """Requests in the engine, running or waiting."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    connection.request("GET", "/metrics")
    page = connection.getresponse().read().decode()
    connection.close()
    found = 0
    for line in page.splitlines():
        if line.startswith(("edgeinfer_running_requests ", "edgeinfer_waiting_requests ")):
            found += round(float(line.split()[1]))
    return found


def kill_one(url: str, route: str, body: dict[str, object], client: str) -> float:
    """Seconds from the kill to an idle engine."""
    process = subprocess.Popen(
        [sys.executable, "-c", client, urlsplit(url).netloc, route, json.dumps(body)],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    for _ in range(3 if client is _CLIENT else 1):
        process.stdout.readline()
    deadline = time.monotonic() + PATIENCE_S
    while not running(url):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"{route} was not begun")
        time.sleep(0.01)
    time.sleep(STEP_S * 1.3)  # in the middle of a step
    begin = time.perf_counter()
    process.kill()
    while running(url) and time.monotonic() < deadline:
        time.sleep(0.002)
    taken = time.perf_counter() - begin
    process.wait()
    process.stdout.close()
    return taken


def measure(bar: Bar) -> None:
    rows = [("request", "median s", "most s", "in steps")]
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "script.json"
        script.write_text(json.dumps({"answers": {"*": "x" * 3000}, "step_s": STEP_S}))
        arguments = [str(script), "--backend", "scripted", "--parallel", "2", "--ctx", "8192"]
        with EndpointProcess(arguments) as endpoint:
            for name, route, body, client in ROUTES:
                taken = [kill_one(endpoint.url, route, body, client) for _ in range(bar.options.times)]
                most = max(taken)
                worst = max(worst, most)
                rows.append(
                    (name, f"{statistics.median(taken):.3f}", f"{most:.3f}", f"{most / STEP_S:.2f}")
                )
                bar.details[name] = taken
    bar.say(table(rows))
    most_s = MOST_STEPS * STEP_S + LOOKS_S
    bar.require(
        f"{bar.options.times * len(ROUTES)} clients killed: the last place is free after {worst:.3f} s"
        f" <= {most_s:.3f} (a step of {STEP_S} s, and looking)",
        worst <= most_s,
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--times", type=int, default=10, help="kills of each kind")


if __name__ == "__main__":
    sys.exit(run_bar(__file__, "a client that is killed", measure, add_options))
