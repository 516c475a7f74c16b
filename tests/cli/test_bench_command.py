"""`edgeinfer bench`: table, JSON, picture, and one line for what cannot be."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from edgeinfer.machine import probe
from tests.cli.conftest import Console, Invoke, Script
from tests.cli.test_run import assert_has

SMALL = ("--prompt-tokens", "8,16", "--new-tokens", "4", "--repeat", "2", "--warmup", "0")
KEYS: dict[str, Any] = {
    "suite": str,
    "model": str,
    "backend": str,
    "device": str,
    "version": str,
    "partial": bool,
    "cached_tokens": int,
    "machine": {
        "system": str,
        "processor": str,
        "physical_cores": int,
        "logical_cores": int,
        "total_bytes": int,
        "busy": float,
        "time": str,
    },
    "settings": {
        "ctx": int,
        "threads": {"decode": int, "prefill": int},
        "kv_type_k": str,
        "kv_type_v": str,
        "prompt_tokens": list,
        "new_tokens": list,
        "streams": list,
        "repeat": int,
        "warmup": int,
    },
    "figures": list,
    "warnings": list,
}
FIGURE_KEYS: dict[str, Any] = {
    "metric": str,
    "unit": str,
    "prompt_tokens": int,
    "new_tokens": int,
    "streams": int,
    "median": float,
    "low_quartile": float,
    "high_quartile": float,
    "samples": list,
}


@pytest.fixture(autouse=True)
def _a_quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "busy_share", lambda: 0.0)


def test_the_table_has_every_figure_and_the_settings(invoke: Invoke, script: Script) -> None:
    done = invoke("bench", *script(), *SMALL)
    assert (done.code, done.err) == (0, "")
    title, head, rule, *rows = done.out.splitlines()
    assert title.startswith("scripted on scripted/cpu, ") and title.endswith("no prompt cache")
    assert "thread" in title and "f16 KV cache" in title
    assert head.split() == ["figure", "median", "unit", "quartiles", "samples"]
    assert set(rule.strip()) == {"─"}
    assert [row.split("  ")[0].strip() for row in rows] == [
        "prefill, 8 tokens",
        "first token, prompt of 8",
        "prefill, 16 tokens",
        "first token, prompt of 16",
        "decode, 4 tokens",
    ]


def test_json_has_every_key_with_its_type(console: Console, script: Script) -> None:
    done = console("bench", "--json", "-q", *script(), *SMALL)
    assert (done.code, done.err) == (0, "")
    assert_has(done.json, KEYS)
    for figure in done.json["figures"]:
        assert_has(figure, FIGURE_KEYS)
        assert len(figure["samples"]) == 2
        assert figure["low_quartile"] <= figure["median"] <= figure["high_quartile"]
    assert (done.json["partial"], done.json["cached_tokens"]) == (False, 0)
    assert done.json["settings"]["prompt_tokens"] == [8, 16]


def test_concurrency_measures_each_number_of_streams(invoke: Invoke, script: Script) -> None:
    sizes = ("--streams", "1,3", "--prompt-tokens", "8", "--new-tokens", "24", "--repeat", "1")
    done = invoke("bench", "--json", "--suite", "concurrency", *script(step_s=0.002), *sizes)
    assert done.code == 0
    found = [(f["metric"], f["streams"]) for f in done.json["figures"]]
    assert found == [("total", 1), ("worst_ttft", 1), ("total", 3), ("worst_ttft", 3)]


@pytest.mark.parametrize("suffix", [".svg", ".png", ".SVG"])
def test_the_picture_is_a_picture(invoke: Invoke, script: Script, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"speed{suffix}"
    done = invoke("bench", *script(), *SMALL, "--plot", path)
    assert (done.code, done.err) == (0, f"drawn: {path}\n")
    if suffix == ".png":
        assert path.read_bytes().startswith(b"\x89PNG\r\n")
    else:
        assert ElementTree.fromstring(path.read_text()).tag.endswith("svg")
    assert [entry.name for entry in tmp_path.iterdir() if "speed" in entry.name] == [path.name]


def test_a_busy_machine_is_told(invoke: Invoke, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "busy_share", lambda: 1.0)
    done = invoke("bench", *script(), *SMALL)
    assert done.error_line.startswith("warning: other programs use")
    assert invoke("bench", "-q", *script(), *SMALL).err == ""


def test_what_was_measured_is_not_the_model_used_last(
    invoke: Invoke, tiny: Path, script: Script
) -> None:
    from edgeinfer_models.store import last_used

    done = invoke("bench", tiny, *SMALL)
    assert done.code == 0, done.err
    assert last_used() is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--suite", "cache"], "--suite cache comes with a later version"),
        (
            ["--suite", "fast"],
            "--suite 'fast' does not exist; there are speed, concurrency and speculation",
        ),
        (["--streams", "2"], "--streams belongs to --suite concurrency"),
        (["--suite", "concurrency", "--streams", "0"], "--streams '0' is no list of numbers"),
        (["--suite", "concurrency", "--streams", "65"], "--streams 65 is outside [1, 64]"),
        (["--suite", "concurrency", "--new-tokens", "8,9"], "--new-tokens takes one number"),
        (["--suite", "concurrency", "--new-tokens", "1"], "--new-tokens must be at least 2"),
        (["--prompt-tokens", "many"], "--prompt-tokens 'many' is no list of numbers"),
        (["--prompt-tokens", "8,8"], "has a number twice"),
        (["--prompt-tokens", ""], "--prompt-tokens '' is no list of numbers"),
        (["--repeat", "0"], "--repeat 0 is outside [1, 1000]"),
        (["--warmup", "-1"], "--warmup -1 is outside [0, 1000]"),
        (["--ctx", "100"], "--ctx 100 is less than the 513 tokens of the largest run"),
        (["--threads", "0"], "--threads 0 is outside"),
        (["--kv-type", "q9"], "is not a KV cache type"),
        (["--plot", "speed.pdf"], "--plot 'speed.pdf' must end in .svg or .png"),
        (["--plot", "/nowhere/at/all.svg"], "cannot be written; name a file in a folder of yours"),
    ],
)
def test_a_wrong_option_is_one_line(
    invoke: Invoke, script: Script, arguments: list[str], said: str
) -> None:
    done = invoke("bench", *script(), *arguments)
    assert (done.code, done.out) == (2, "")
    assert said in done.error_line


def test_without_matplotlib_the_line_says_how_to_get_it(
    invoke: Invoke, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> Any:
        return None if name == "matplotlib" else really(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    done = invoke("bench", *script(), "--plot", tmp_path / "speed.svg")
    assert (done.code, done.out) == (1, "")
    assert done.error_line.endswith("pip install 'edgeinfer[plot]'")


def test_a_failing_model_is_one_line(invoke: Invoke, script: Script) -> None:
    done = invoke("bench", "--json", *script(fail_at_step=2), *SMALL)
    assert done.code == 1
    assert done.json["error"]["type"] == "step_failed"


def test_sizes_may_come_from_the_config_file(invoke: Invoke, script: Script, config_file: Path) -> None:
    config_file.write_text(
        'prompt-tokens = 8\nnew-tokens = "4,5"\nrepeat = 1\nwarmup = 0\nstreams = "1,2"'
    )
    done = invoke("bench", "--json", *script())
    assert done.code == 0, done.out
    settings = done.json["settings"]
    assert (settings["prompt_tokens"], settings["new_tokens"]) == ([8], [4, 5])
    assert (settings["repeat"], settings["streams"]) == (1, [1])
