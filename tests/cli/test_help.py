"""What a new user reads first, and what a wrong command line answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edgeinfer.config import KEYS
from tests.cli.conftest import Console, Invoke, Script

COMMANDS = [
    *("chat", "run", "bench", "eval", "doctor"),
    *("models", "models list", "models pull", "models show", "models rm"),
    *("cache", "cache list", "cache verify", "cache clear", "cache warm"),
]
HEAVY = {"gguf", "jinja2", "llama_cpp", "matplotlib", "numpy", "rich", "textual", "torch"}


@pytest.mark.parametrize("arguments", [[], ["run"], ["chat"], ["bench"], ["models"], ["doctor"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from edgeinfer.cli.app import run\n"
        f"assert run({[*arguments, '--help']!r}) == 0\n"
        "sys.stderr.write(' '.join({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: edgeinfer")
    assert set(done.stderr.split()) & HEAVY == set()


@pytest.mark.parametrize("command", ["", *COMMANDS])
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_every_command_has_help(invoke: Invoke, command: str, option: str) -> None:
    done = invoke(*command.split(), option)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"Usage: edgeinfer {command}".rstrip())
    assert max(map(len, done.out.splitlines())) <= 80


def test_the_first_help_names_the_commands_and_the_config_file(console: Console) -> None:
    done = console("--help")
    assert (done.code, done.err) == (0, "")
    for word in ("chat", "run", "doctor", "models", "config file", "EDGEINFER_TOP_P"):
        assert word in done.out


def test_the_help_of_run_is_in_groups(invoke: Invoke) -> None:
    text = invoke("run", "--help").out
    assert text.startswith("Usage: edgeinfer run [OPTIONS] [MODEL] PROMPT\n")
    headings = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["Arguments:", "Model and memory:", "Choosing tokens:", "Answer:", "Options:"]


def test_every_key_of_the_config_file_is_in_the_help(invoke: Invoke) -> None:
    text = "".join(
        invoke(command, "--help").out for command in ("run", "chat", "serve", "bench", "eval")
    )
    for key in KEYS:
        assert f"--{key} " in text or key == "model", key


def test_version_is_one_line(console: Console) -> None:
    done = console("--version")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("edgeinfer 0.")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rnu"], "there is no command 'rnu'; did you mean 'run'?"),
        (
            ["zzz"],
            "there are chat, run, serve, quantize, train-exit, bench, eval, doctor, models, cache;"
            " see `edgeinfer --help`",
        ),
        (["my.gguf"], "to chat with that model: edgeinfer chat my.gguf"),
        (["smollm2"], "to chat with that model: edgeinfer chat smollm2"),
        (["why is the sky blue?"], 'edgeinfer run "…"'),
        (["--temp", "1"], "options come after the command: edgeinfer chat --temp"),
        (["--wat"], "no such option: --wat; see `edgeinfer --help`"),
        (["run"], "run needs a prompt"),
        (["run", "smollm2"], "'smollm2' is a model, and run needs a prompt after it"),
        (["run", "a", "b", "c"], "put quotes around a prompt with spaces"),
        (["run", ""], "the prompt is empty"),
        (["run", " \n"], "the prompt is empty"),
        (["run", "--tmep", "1", "x"], "no such option: --tmep; did you mean --temp?"),
        (["run", "x", "--ctx"], "option '--ctx' requires an argument; see `edgeinfer run --help`"),
        (["run", "-5 + 3"], "put -- before a prompt that begins with -"),
        (["run", "--temp", "warm", "x"], "--temp: 'warm' is not a number; see `edgeinfer run --help`"),
        (["run", "--ctx", "1.5", "x"], "--ctx: '1.5' is not a whole number"),
        (["chat"], "chat needs a terminal; for pipes and scripts there is `edgeinfer run`"),
        ([], "chat needs a terminal"),
        (["models", "lst"], "there is no command 'lst'; did you mean 'list'?"),
        (["models", "pull"], "edgeinfer models pull needs NAME; see `edgeinfer models pull --help`"),
    ],
)
def test_wrong_usage_is_one_line_that_says_what_to_write(
    invoke: Invoke, arguments: list[str], said: str
) -> None:
    done = invoke(*arguments)
    assert (done.code, done.out) == (2, "")
    assert said in done.error_line


@pytest.mark.parametrize(
    "arguments", [["a", "b", "c"], [""], ["--temp", "warm", "x"], ["--wat", "x"], ["--temp", "-1", "x"]]
)
def test_wrong_usage_with_json_is_one_object(invoke: Invoke, arguments: list[str]) -> None:
    done = invoke("run", "--json", *arguments)
    assert (done.code, done.err) == (2, "")
    assert done.json["error"]["type"] == "usage_error"


def test_options_may_stand_anywhere(invoke: Invoke, script: Script) -> None:
    backend, name, model = script()
    for arguments in (
        ["--quiet", backend, name, model, "hi"],
        [model, "--quiet", "hi", backend, name],
        [model, "hi", backend, name, "-q"],
        [backend, name, "-q", "--", model, "hi"],
    ):
        assert invoke("run", *arguments).out == "Hello there.\n"


def test_a_prompt_may_begin_with_a_dash_after_two(invoke: Invoke, script: Script) -> None:
    assert invoke("run", "-q", *script(answers={"-5 + 3": "-2"}), "--", "-5 + 3").out == "-2\n"


def test_doctor_says_what_is_here(console: Console, config_file: Path) -> None:
    shown = console("doctor")
    assert (shown.code, shown.err) == (0, "")
    for word in ("machine", "memory", "backend    llamacpp", "models", "config", "versions"):
        assert word in shown.out
    assert f"{config_file} (none there)" in shown.out
    assert "           built with " in shown.out
    found = console("doctor", "--json").json
    assert {"stalled_share", "level", "swap_used_bytes", "is_high"} == set(found["machine"]["pressure"])
    assert {"machine", "backends", "models", "config", "versions"} <= set(found)
    assert found["config"] == {"path": str(config_file), "found": False, "error": None}


def test_memory_pressure_is_a_finding_of_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeinfer.cli.doctor import examine, render
    from edgeinfer.machine import pressure

    monkeypatch.setattr(pressure, "read_pressure", lambda: pressure.MemoryPressure(0.4))
    shown = render(examine())
    assert "; waited for 40% of the last 10 s" in shown
    assert "finding    memory is short: waited for 40%" in shown


def test_a_build_is_shown_by_what_it_has() -> None:
    from edgeinfer.cli.doctor import build_features

    build = "llama-cpp-python 0.3.36; CPU : SSE3 = 1 | AVX2 = 1 | AMX = 0 | CUDA : ARCHS = 890 | "
    assert build_features(build) == ["SSE3", "AVX2", "ARCHS"]
    assert build_features("mlx 0.32.4, mlx-lm 0.32.2, Linux x86_64") == []


def test_a_card_that_the_build_cannot_use_is_a_finding_of_doctor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from edgeinfer.backend import Device, Probe
    from edgeinfer.cli.doctor import examine, render
    from edgeinfer.machine import gpus
    from edgeinfer_backends.torch import TorchBackend

    monkeypatch.setattr(gpus, "find_gpus", lambda: (gpus.Gpu("NVIDIA H200", "cuda", True),))
    # That torch could use it helps nobody who did not ask for torch.
    card = Device("NVIDIA H200", "gpu", 2**37, 2**37)
    monkeypatch.setattr(TorchBackend, "probe", lambda _: Probe(True, version="2", devices=(card,)))
    findings = examine()
    assert findings["machine"]["gpus"] == ["NVIDIA H200"]
    has_gpu = any(
        device["kind"] == "gpu"
        for backend in findings["backends"]
        if backend["name"] != "torch"
        for device in backend.get("devices", ())
    )
    assert has_gpu or "make setup ACCEL=cuda" in render(findings)
