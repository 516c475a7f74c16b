"""What HTTP adds to a request and to a streamed token, over a scripted model that takes no time.

The request: seconds of a whole answer of one token over a kept connection, less those of the same
request to the client the endpoint is built on, in turns. The token: processor time of the endpoint's
process while it streams to eight readers, less that of a process that reads the same answers from that
client. (What a token of a lone stream costs is said, too: there each is told, and sent, alone.)
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

import psutil

from benchmarks.endpoint import EndpointProcess
from benchmarks.openai_stream import read_all, read_completion
from benchmarks.verdict import Bar, run_bar
from edgeinfer.client import LocalClient, OpenOptions, Request
from edgeinfer.sampling import SamplingParams

MOST_REQUEST_MS = 3.0
MOST_TOKEN_MS = 0.1
STREAMS = 8
STEP_S = 0.04  # slower than text is told at the most, so that a lone stream's tokens are told alone

_DIRECT = """
import sys, time
from edgeinfer.client import LocalClient, OpenOptions, Request
from edgeinfer.sampling import SamplingParams
model, streams, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with LocalClient(OpenOptions(model=model, backend="scripted", sequences=streams)) as client:
    client.load()
    def go():
        asked = Request(prompt="go", max_tokens=tokens, ignore_eos=True,
                        sampling=SamplingParams(temperature=0.0))
        for generation in [client.start(asked) for _ in range(streams)]:
            generation.result()
    go()
    begin = time.process_time()
    go()
    print(time.process_time() - begin)
"""


def script(folder: Path, step_s: float) -> Path:
    path = folder / f"script-{step_s}.json"
    path.write_text(json.dumps({"answers": {"*": "ok"}, "step_s": step_s}))
    return path


def request_ms(bar: Bar, folder: Path) -> float:
    path = script(folder, 0.0)
    direct, served = [], []
    options = OpenOptions(model=str(path), backend="scripted", sequences=STREAMS)
    serve = [str(path), "--backend", "scripted", "--parallel", str(STREAMS)]
    with LocalClient(options) as client, EndpointProcess(serve) as endpoint:
        client.load()
        parts = urlsplit(endpoint.url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        body = json.dumps({"prompt": "go", "max_tokens": 1, "temperature": 0})
        asked = Request(prompt="go", max_tokens=1, sampling=SamplingParams(temperature=0.0))
        for _ in range(bar.options.requests):
            begin = time.perf_counter()
            client.start(asked).result()
            middle = time.perf_counter()
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            read = reply.read()
            end = time.perf_counter()
            if reply.status != 200:
                raise RuntimeError(f"{reply.status}: {read[:200]!r}")
            direct.append(middle - begin)
            served.append(end - middle)
        connection.close()
    bar.details["direct_ms"], bar.details["served_ms"] = (
        1e3 * statistics.median(direct),
        1e3 * statistics.median(served),
    )
    return 1e3 * statistics.median(b - a for a, b in zip(direct, served, strict=True))


def token_ms(bar: Bar, folder: Path, streams: int) -> float:
    path = script(folder, STEP_S)
    tokens = bar.options.tokens
    serve = [str(path), "--backend", "scripted", "--parallel", str(streams)]
    with EndpointProcess(serve) as endpoint:
        tasks = [
            lambda: read_completion(endpoint.url, "go", tokens, body={"ignore_eos": True})
        ] * streams
        read_all(tasks)  # warms up
        process = psutil.Process(endpoint.pid)
        before = process.cpu_times()
        answers = read_all(tasks)
        after = process.cpu_times()
    pieces = sum(len(answer.times) for answer in answers)
    served = after.user + after.system - before.user - before.system
    command = [sys.executable, "-c", _DIRECT, str(path), str(streams), str(tokens)]
    direct = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    each_ms = 1e3 * (served - direct) / (streams * tokens)
    bar.details[f"{streams} streams"] = {"served_s": served, "direct_s": direct, "pieces": pieces}
    bar.say(
        f"  {streams} at once: {streams * tokens} tokens in {pieces} pieces: {served:.3f} s,"
        f" without HTTP {direct:.3f} s, {each_ms:.3f} ms a token"
    )
    return each_ms


def measure(bar: Bar) -> None:
    with tempfile.TemporaryDirectory() as folder:
        request = request_ms(bar, Path(folder))
        bar.require(
            f"a request: {request:.2f} ms more over HTTP <= {MOST_REQUEST_MS}",
            request <= MOST_REQUEST_MS,
        )
        token_ms(bar, Path(folder), 1)
        token = token_ms(bar, Path(folder), STREAMS)
        bar.require(
            f"a token: {token:.3f} ms of processor more <= {MOST_TOKEN_MS}", token <= MOST_TOKEN_MS
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=250, help="of each stream")


if __name__ == "__main__":
    sys.exit(run_bar(__file__, "what HTTP costs", measure, add_options))
