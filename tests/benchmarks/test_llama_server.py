"""The driver of the peer's server, against a stand-in that speaks its protocol."""

from __future__ import annotations

import itertools
import stat
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks.llama_server import LlamaServer
from benchmarks.peers import PeerError
from edgeinfer.measure.streams import total_tok_s

STAND_IN = """#!PYTHON
import json, os, signal, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

mode = os.environ.get("STAND_IN", "")
options = dict(zip(sys.argv[1:], sys.argv[2:]))
if mode == "dies":
    print("error: cannot load this model")
    sys.exit(3)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
looks = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def plain(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        global looks
        looks += 1
        ready = looks > 2 and mode != "never"
        self.plain(200 if ready else 503, b"{}")

    def chunk(self, value):
        data = b"data: " + json.dumps(value).encode() + b"\\n\\n"
        self.wfile.write(b"%x\\r\\n%s\\r\\n" % (len(data), data))
        self.wfile.flush()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["ignore_eos"] and body["stream"] and not body["cache_prompt"]
        if mode == "refuses":
            self.plain(400, b'{"error": "no"}')
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        made, prompt = body["n_predict"], len(body["prompt"])
        for number in range(1, made + 1):
            time.sleep(0.005)
            if number % 3 == 2:  # inside a character: comes with the next piece
                continue
            if mode == "breaks" and number > 4:
                self.close_connection = True
                self.connection.close()
                return
            self.chunk({"stop": False, "content": "x", "tokens_predicted": number})
        made -= mode == "short"
        timings = {"cache_n": 5 if mode == "cached" else 0}
        last = {"stop": True, "tokens_predicted": made, "tokens_evaluated": prompt, "timings": timings}
        self.chunk(last)
        self.wfile.write(b"0\\r\\n\\r\\n")


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        pass


Server((options["--host"], int(options["--port"])), Handler).serve_forever()
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "llama-server"
    path.write_text(STAND_IN.replace("PYTHON", sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def server(program: Path, slots: int = 3, start_s: float = 60.0) -> LlamaServer:
    return LlamaServer(
        Path("m.gguf"), threads=2, slots=slots, context=256, program=program, start_s=start_s
    )


def is_running(pid: int | None) -> bool:
    assert pid is not None
    return psutil.pid_exists(pid)


def test_several_answers_are_read_at_once(program: Path) -> None:
    with server(program) as running:
        streams = running.answer_all([(1, 2, 3), (4, 5, 6), (7, 8, 9)], 12)
        pid = running.pid
        assert is_running(pid)
    assert not is_running(pid)
    assert len(streams) == 3
    for stream in streams:
        assert [count for _, count in stream.points] == [1, 3, 4, 6, 7, 9, 10, 12]
        assert stream.ttft_s > 0
    assert total_tok_s(streams) > 0
    # All three ran in the same span of time.
    assert max(s.first for s in streams) < min(s.last for s in streams)


def test_it_is_ended_when_the_caller_fails(program: Path) -> None:
    pid = None
    with pytest.raises(ZeroDivisionError), server(program) as running:
        pid = running.pid
        raise ZeroDivisionError
    assert not is_running(pid)


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("refuses", "answered 400"),
        ("breaks", "broke off|ended early"),
        ("short", "not what was asked for: 2 prompt tokens .0 cached. and 8 answered, not 2 .0. and 9"),
        ("cached", "5 cached"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_an_error(
    program: Path, mode: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", mode)
    with server(program) as running, pytest.raises(PeerError, match=said):
        running.answer_all([(1, 2), (3, 4)], 9)


def test_a_server_that_dies_says_why(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN", "dies")
    with pytest.raises(PeerError, match="ended with 3: error: cannot load this model"):
        server(program).__enter__()


def test_a_server_that_is_never_ready_is_given_up_and_ended(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", "never")
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(PeerError, match="was not ready after 1 s"):
        server(program, start_s=1.0).__enter__()
    assert {child.pid for child in psutil.Process().children()} <= before


def test_a_program_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="No such file"):
        server(tmp_path / "nothing").__enter__()


def test_its_options_are_those_that_were_asked_for(program: Path) -> None:
    command = LlamaServer(
        Path("m.gguf"), threads=3, slots=7, context=512, kv_type_k="q8_0", program=program
    )._command
    options = dict(itertools.pairwise(command))
    assert options["--ctx-size"] == str(7 * 512)
    assert (options["--parallel"], options["--threads"]) == ("7", "3")
    assert (options["--cache-type-k"], options["--cache-type-v"]) == ("q8_0", "f16")
    assert options["--cache-ram"] == "0" and "--no-cache-prompt" in command
    assert command[0] == str(program)


def test_without_a_number_of_threads_the_server_has_its_own(program: Path) -> None:
    command = LlamaServer(Path("m.gguf"), threads=None, slots=1, context=512, program=program)._command
    assert not [option for option in command if option.startswith("--threads") and "http" not in option]
