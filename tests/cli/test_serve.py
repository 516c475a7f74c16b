"""`edgeinfer serve` as a user starts it, and `--attach`: what they print, and how they end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.cli.conftest import Console, Invoke, Script

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Running:
    process: subprocess.Popen[bytes]
    url: str
    greeting: str

    def end(self, sent: signal.Signals = signal.SIGINT) -> tuple[int, str]:
        """Its exit code, and what else it wrote on stderr."""
        self.process.send_signal(sent)
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err.decode()


@contextmanager
def serving(console: Console, *arguments: str) -> Iterator[Running]:
    process = console.start("serve", "--port", "0", *arguments, stderr=subprocess.PIPE)
    try:
        assert process.stderr is not None
        line = process.stderr.readline().decode()
        found = re.search(r"http://[0-9.:a-z\[\]]+", line)
        assert found, line
        yield Running(process, found.group(), line)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
        console.wait_until_nothing_runs()


def ask(url: str, **body: object) -> httpx.Response:
    messages = [{"role": "user", "content": "hi"}]
    return httpx.post(f"{url}/v1/chat/completions", json={"messages": messages, **body}, timeout=60)


def test_it_says_where_it_answers_and_answers_there(console: Console, script: Script) -> None:
    with serving(console, *script(), "--parallel", "2", "--ctx", "512") as it:
        assert it.greeting.startswith("edgeinfer: scripted answers at http://127.0.0.1:")
        assert "2 at once" in it.greeting and "512 tokens" in it.greeting
        assert ask(it.url).json()["choices"][0]["message"]["content"] == "Hello there."
        assert ask(it.url, model="scripted").status_code == 200
        assert ask(it.url, model="gpt-4o").status_code == 404
        code, err = it.end()
    assert (code, err) == (0, "")


def test_a_quiet_one_says_nothing(console: Console, script: Script) -> None:
    free = socket.create_server(("127.0.0.1", 0))
    port = free.getsockname()[1]
    free.close()
    process = console.start(
        "serve", "-q", "--port", str(port), *script(), stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    for _ in range(600):
        try:
            assert httpx.get(f"http://127.0.0.1:{port}/health").json()["status"] == "ok"
            break
        except httpx.ConnectError:
            time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, b"", b"")


def test_the_models_settings_are_its_defaults(console: Console, script: Script) -> None:
    with serving(console, *script(), "--max-tokens", "3") as it:
        assert ask(it.url).json()["usage"]["completion_tokens"] == 3
        assert ask(it.url, max_tokens=2).json()["usage"]["completion_tokens"] == 2


def test_a_key_is_needed_where_one_was_set(
    console: Console,
    invoke: Invoke,
    script: Script,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# mine\nfirst-key\nsecond-key\n")
    keys.chmod(0o600)
    with serving(console, *script(), "--api-key-file", str(keys)) as it:
        assert ask(it.url).status_code == 401
        for key, status in (("second-key", 200), ("third-key", 401)):
            headers = {"Authorization": f"Bearer {key}"}
            assert httpx.get(f"{it.url}/v1/models", headers=headers).status_code == status
        done = invoke("run", "--attach", it.url, "--api-key", "first-key", "hi")
        assert (done.code, done.out) == (0, "Hello there.\n")
        monkeypatch.setenv("EDGEINFER_API_KEY", "second-key")
        assert invoke("run", "--attach", it.url, "hi").code == 0
        done = invoke("run", "-q", "--attach", it.url, "--api-key", "wrong", "hi")
        assert done.code == 1
        assert "key" in done.error_line


def test_a_full_stop_lets_answers_end(console: Console, script: Script) -> None:
    with serving(console, *script(answers={"*": "word " * 40}, step_s=0.01)) as it:
        with httpx.stream(
            "POST",
            f"{it.url}/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "hi"}], "stream": True},
            timeout=60,
        ) as reply:
            lines = reply.iter_lines()
            next(lines)
            it.process.send_signal(signal.SIGTERM)
            rest = "\n".join(lines)
        assert rest.rstrip().endswith("data: [DONE]")
        it.process.wait(60)
        assert it.process.returncode == 0


def test_a_second_signal_ends_it_at_once(console: Console, script: Script) -> None:
    with serving(console, *script(answers={"*": "word " * 4000}, step_s=0.05)) as it:
        with httpx.stream(
            "POST",
            f"{it.url}/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "hi"}], "stream": True},
            timeout=60,
        ) as reply:
            lines = reply.iter_lines()  # kept: the reply is closed with it
            next(lines)
            it.process.send_signal(signal.SIGINT)
            time.sleep(0.3)
            assert it.process.poll() is None
            code, err = it.end()
        assert code in (0, 130) and "Traceback" not in err


def test_it_outlives_its_worker(console: Console, script: Script) -> None:
    with serving(console, *script()) as it:
        assert ask(it.url).status_code == 200
        console.worker().kill()
        statuses = [ask(it.url).status_code for _ in range(3)]
        assert statuses[-1] == 200 and set(statuses) <= {200, 503}


def test_killed_it_leaves_nothing_behind(console: Console, script: Script) -> None:
    with serving(console, *script()) as it:
        os.kill(it.process.pid, signal.SIGKILL)
        it.process.wait(60)
        console.wait_until_nothing_runs()


def test_a_port_that_is_taken_is_one_line(console: Console, script: Script) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = console("serve", "-q", "--port", str(port), *script())
    assert done.code == 1
    assert str(port) in done.error_line and "--port" in done.error_line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "99999"], "--port 99999 is outside [0, 65535]"),
        (["--queue", "-1"], "--queue -1 is outside"),
        (["--parallel", "0"], "--parallel 0"),
        (["--timeout", "soon"], "--timeout 'soon' is no time; write for example 90s, 10m or never"),
        (["--idle-unload", "1 week"], "--idle-unload '1 week' is no time"),
        (["--max-tokens", "0"], "--max-tokens 0 must be at least 1"),
        (["--host", "0.0.0.0"], "there is no API key"),
        (["--host", "::"], "there is no API key"),
        (["--host", "no host"], "no host"),
        (["--api-key", "a b"], "an API key is empty, too long or has blanks"),
        (["--api-key-file", "/nowhere/keys"], "/nowhere/keys"),
        (["--allow-origin", "nonsense"], "nonsense"),
        (["--allow-host", "a/b"], "a/b"),
        (["nowhere.gguf"], "nowhere.gguf"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_is_loaded(
    invoke: Invoke, script: Script, arguments: list[str], said: str
) -> None:
    model = () if arguments[0].endswith(".gguf") else script(load_s=30.0)
    done = invoke("serve", *model, *arguments)
    assert done.code in (1, 2)
    assert done.out == ""
    assert said in done.error_line


def test_the_logs_level_may_be_written_in_any_case(
    console: Console, invoke: Invoke, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEINFER_LOG", "loud")
    done = invoke("serve", *script(load_s=30.0))
    assert done.code == 2
    assert "EDGEINFER_LOG 'loud'" in done.error_line
    console.environment["EDGEINFER_LOG"] = "error"
    with serving(console, *script()) as it:
        assert ask(it.url).status_code == 200


@pytest.mark.parametrize("variable", [True, False])
def test_a_model_chosen_for_this_machine_is_not_asked_of_an_endpoint(
    console: Console,
    invoke: Invoke,
    script: Script,
    config_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: bool,
) -> None:
    with serving(console, *script()) as it:
        if variable:
            monkeypatch.setenv("EDGEINFER_MODEL", "smollm2-360m")
        else:
            config_file.parent.mkdir(parents=True, exist_ok=True)
            config_file.write_text('model = "smollm2-360m"\n')
        done = invoke("run", "-q", "--attach", it.url, "hi")
        assert (done.code, done.out) == (0, "Hello there.\n"), done.err


def test_attach_says_what_it_finds(console: Console, invoke: Invoke, script: Script) -> None:
    with serving(console, *script()) as it:
        done = invoke("run", "--json", "--attach", it.url, "hi")
        assert done.json["text"] == "Hello there."
        assert done.json["finish_reason"] == "stop"
        assert done.json["model"] == "scripted"
        for url in (it.url + "/", it.url + "/v1", it.url.removeprefix("http://")):
            assert invoke("run", "-q", "--attach", url, "hi").out == "Hello there.\n", url
        done = invoke("run", "-q", "--attach", it.url, "other", "hi")
        assert done.code == 1 and "other" in done.error_line
    done = invoke("run", "-q", "--attach", it.url, "hi")
    assert done.code == 1
    assert it.url in done.error_line and "edgeinfer serve" in done.error_line


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://a b", "127.0.0.1:notaport", ""])
def test_an_address_that_is_none_is_one_line(invoke: Invoke, url: str) -> None:
    done = invoke("run", "-q", "--attach", url, "hi")
    assert done.code == 2
    assert "--attach" in done.error_line


def test_what_answers_there_may_be_something_else(invoke: Invoke, tmp_path: Path) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        done = invoke("run", "-q", "--attach", f"http://127.0.0.1:{server.server_port}", "hi")
        server.shutdown()
    assert done.code == 1
    assert "<html>" not in done.error_line
