"""`edgeinfer serve`, killed with SIGKILL at 20 moments, loses no stored file and starts clean.

The moments lie evenly between its first tenth of a second and an idle endpoint that has answered: it
loads, reads prompts, streams, answers under a schema, embeds, measures while nobody asks. After each
kill its processes are gone, the model's files and what else is stored are whole, and the clients have
learnt that their answers broke off. The next start answers, without a warning.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from benchmarks.alternate import table
from benchmarks.endpoint import EndpointProcess
from benchmarks.model_files import own_cache_folder, starter
from benchmarks.verdict import Bar, run_bar

MOMENTS = 20
FIRST_S, LAST_S = 0.1, 14.0
GONE_S = 5.0  # in which the processes of a killed server must have ended
PATIENCE_S = 60.0

_HELLO = [{"role": "user", "content": "Tell me about rivers."}]
_SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 30}}, "required": ["a"]}
_FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA}}
WORK: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/chat/completions", {"messages": _HELLO, "max_tokens": 60, "stream": True}),
    ("/v1/chat/completions", {"messages": _HELLO, "max_tokens": 30, "response_format": _FORM}),
    ("/v1/completions", {"prompt": "river stone winter " * 80, "max_tokens": 8}),
    ("/v1/embeddings", {"input": "river stone winter " * 60}),
)
WORK_S = 6.0  # of asking; then nobody asks, and the rest of its life is spent idle


class Clients:
    """One for each kind of work, until told to stop or the endpoint is gone."""

    def __init__(self, url: str) -> None:
        self._address = urlsplit(url)
        self._end = time.monotonic() + WORK_S
        self.answered = 0
        self.broken = 0
        self._threads = [threading.Thread(target=self._ask, args=work, daemon=True) for work in WORK]
        for thread in self._threads:
            thread.start()

    def _ask(self, route: str, body: dict[str, Any]) -> None:
        while time.monotonic() < self._end:
            connection = http.client.HTTPConnection(
                self._address.hostname or "", self._address.port, timeout=PATIENCE_S
            )
            try:
                connection.request("POST", route, json.dumps(body))
                data = connection.getresponse().read()
                if body.get("stream") and b"[DONE]" not in data:
                    raise http.client.IncompleteRead(data)
                self.answered += 1
            except (OSError, http.client.HTTPException):
                self.broken += 1
                return
            finally:
                connection.close()

    def num_stuck(self) -> int:
        """Clients that still wait, long after the kill."""
        for thread in self._threads:
            thread.join(GONE_S)
        return sum(thread.is_alive() for thread in self._threads)


def digests(folder: Path) -> dict[str, str]:
    """What is stored: a digest for each file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def damaged(folder: Path) -> list[str]:
    """Stored JSON files that cannot be read."""
    found = []
    for path in folder.rglob("*.json"):
        try:
            json.loads(path.read_text())
        except ValueError as error:
            found.append(f"{path.name}: {error}")
    return found


def left_running(pids: list[int]) -> list[int]:
    deadline = time.monotonic() + GONE_S
    while any(map(_is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [pid for pid in pids if _is_running(pid)]


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill_at(moment_s: float) -> dict[str, Any]:
    """Start a server, give it work once it answers, and kill it `moment_s` after its start."""
    begin = time.monotonic()
    server = EndpointProcess(["smollm2", "--parallel", "4", "--ctx", "2048"])
    server.spawn()
    clients: Clients | None = None
    while (left := begin + moment_s - time.monotonic()) > 0:
        if server.url and clients is None:
            clients = Clients(server.url)
        time.sleep(min(left, 0.02))
    children = [child.pid for child in psutil.Process(server.pid).children(recursive=True)]
    os.kill(server.pid, signal.SIGKILL)
    running = left_running(children)
    server.close()
    return {
        "answered": clients.answered if clients else 0,
        "broken": clients.broken if clients else 0,
        "stuck": clients.num_stuck() if clients else 0,
        "children": len(children),
        "left": len(running),
    }


def status_of(url: str) -> int:
    """Of a short chat."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=PATIENCE_S)
    try:
        connection.request(
            "POST", "/v1/chat/completions", json.dumps({"messages": _HELLO, "max_tokens": 4})
        )
        return connection.getresponse().status
    finally:
        connection.close()


def measure(bar: Bar) -> None:
    source = starter().parent
    with own_cache_folder() as cache:
        data = Path(os.environ["EDGEINFER_DATA_DIR"])
        shutil.copytree(source, data / "models" / source.name)
        with EndpointProcess(["smollm2"]):  # what is remembered is there before the first kill
            pass
        before = digests(data)
        rows = [("killed after s", "answered", "broken off", "stuck", "processes", "left")]
        lost: list[str] = []
        totals = dict.fromkeys(("answered", "broken", "stuck", "left"), 0)
        for number in range(bar.options.moments):
            share = number / max(1, bar.options.moments - 1)
            moment = FIRST_S + share * (LAST_S - FIRST_S)
            found = kill_at(moment)
            rows.append((f"{moment:.1f}", *(str(found[k]) for k in ("answered", "broken", "stuck")),
                         str(found["children"]), str(found["left"])))  # fmt: skip
            for key in totals:
                totals[key] += found[key]
            if (now := digests(data)) != before:
                changed = sorted(set(before.items()) ^ set(now.items()))
                lost.append(f"after {moment:.1f} s: {changed}")
            lost += [f"after {moment:.1f} s: {what}" for what in damaged(cache)]
        bar.say(table(rows))
        bar.details |= {"rows": rows, "lost": lost}
        for what in lost[:10]:
            bar.say(f"  {what}")
        count = bar.options.moments
        bar.require(f"{len(before)} stored files are as before after each of {count} kills", not lost)
        bar.require(f"{totals['left']} processes outlived their server", totals["left"] == 0)
        bar.require(
            f"{totals['broken']} answers broke off at once, {totals['stuck']} clients kept waiting,"
            f" {totals['answered']} were answered before",
            totals["stuck"] == 0 < totals["broken"] and totals["answered"] > 0,
        )
        with EndpointProcess(["smollm2"]) as server:
            status = status_of(server.url)
            said = [line for line in server.said if "warning" in line.lower() or "Traceback" in line]
        bar.require(
            f"the next start answers with {status} and no warning {said}", status == 200 and not said
        )
        left = [str(path.relative_to(cache)) for path in cache.rglob("*.part")]
        bar.say(f"  files that were being written at a kill: {left} (later ones clean up)")
        verify = subprocess.run(
            [
                sys.executable,
                "-c",
                "from edgeinfer.cli import main; main()",
                "models",
                "pull",
                "smollm2",
            ],
            capture_output=True,
            text=True,
        )
        bar.require(
            f"the model's checksum: {verify.stdout.strip() or verify.stderr.strip()[:100]}",
            verify.returncode == 0 and digests(data) == before,
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--moments", type=int, default=MOMENTS)


if __name__ == "__main__":
    sys.exit(run_bar(__file__, "a server that is killed", measure, add_options))
