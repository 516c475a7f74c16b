"""`edgeinfer run` over the scripted backend: what is on which stream, and every key of --json."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import CONSOLE_SCRIPT, Console, Invoke, Script

KEYS: dict[str, Any] = {
    "text": str,
    "finish_reason": str,
    "usage": {"prompt_tokens": int, "completion_tokens": int, "cached_tokens": int},
    "timings": {"load_s": float, "ttft_s": float, "prefill_tok_s": float, "decode_tok_s": float},
    "speculation": {
        "mode": str,
        "drafted": int,
        "accepted": int,
        "steps": int,
        "reason": str,
        "speedup": float,
    },
    "kv": {"type_k": str, "type_v": str, "bytes": int, "bytes_per_token": int, "evicted_tokens": int},
    "cache": {"hit": bool, "tier": str, "tokens": int},
    "backend": str,
    "model": str,
    "warnings": list,
}


def assert_has(value: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, dict):
        assert isinstance(value, dict), where
        for key, inner in expected.items():
            assert key in value, f"{where}.{key}"
            assert_has(value[key], inner, f"{where}.{key}")
    else:
        assert type(value) is expected, f"{where}: {value!r}"


def test_text_goes_to_stdout_and_figures_to_stderr(console: Console, script: Script) -> None:
    done = console("run", *script(), "hi")
    assert (done.code, done.out) == (0, "Hello there.\n")
    assert done.err.startswith("[scripted on scripted/cpu: ")
    assert "10 answered" in done.err and done.err.count("\n") == 1


def test_quiet_leaves_stderr_empty(invoke: Invoke, script: Script) -> None:
    for option in ("--quiet", "-q"):
        done = invoke("run", option, *script(), "hi")
        assert (done.out, done.err) == ("Hello there.\n", "")


def test_json_has_every_key_with_its_type(console: Console, script: Script) -> None:
    done = console("run", "--json", *script(), "hi")
    assert (done.code, done.err) == (0, "")
    assert_has(done.json, KEYS)
    assert done.json["text"] == "Hello there."
    assert done.json["finish_reason"] == "stop"
    assert done.json["usage"]["completion_tokens"] == 10
    assert done.json["cache"]["tier"] == "none"
    assert (done.json["backend"], done.json["model"]) == ("scripted", "scripted")


def test_json_is_ascii_whatever_the_answer_is(console: Console, script: Script) -> None:
    done = console("run", "--json", *script(answers={"*": "é😀\x1b[2J\u2028"}), "hi")
    assert done.out.isascii() and "\x1b" not in done.out
    assert done.json["text"] == "é😀\x1b[2J\u2028"


def test_a_dash_reads_the_prompt_from_standard_input(console: Console, script: Script) -> None:
    asked = "zwei\nZeilen, é"
    done = console("run", "-q", *script(answers={asked: "read"}), "-", stdin=asked.encode())
    assert (done.code, done.out) == (0, "read\n")


def test_an_empty_standard_input_is_wrong_usage(console: Console, script: Script) -> None:
    done = console("run", *script(), "-", stdin=b"")
    assert done.code == 2
    assert done.error_line == "standard input is empty; there is nothing to answer"


def test_stop_strings_end_the_answer_and_are_not_in_it(invoke: Invoke, script: Script) -> None:
    done = invoke("run", "--json", "--stop", "zzz", "--stop", " the", *script(), "hi")
    assert (done.json["text"], done.json["finish_reason"]) == ("Hello", "stop")


def test_max_tokens_cuts_and_says_so(invoke: Invoke, script: Script) -> None:
    arguments = (*script(), "--max-tokens", "3", "hi")
    assert invoke("run", "--json", *arguments).json["finish_reason"] == "length"
    done = invoke("run", *arguments)
    assert done.out == "Hel\n"
    assert "cut at its length limit" in done.err


def test_the_same_seed_gives_the_same_text(invoke: Invoke, script: Script) -> None:
    def babble(seed: str) -> dict[str, Any]:
        chosen = ("--seed", seed, "--temp", "2", "--max-tokens", "40")
        return invoke("run", "--json", *chosen, *script(answers={}), "hi").json

    first, second, other = babble("7"), babble("7"), babble("8")
    assert first["text"] == second["text"] != other["text"]
    assert first["seed"] == 7


def test_a_drawn_seed_is_reported_and_repeats_the_text(invoke: Invoke, script: Script) -> None:
    arguments = ("--temp", "2", "--max-tokens", "30", *script(answers={}), "hi")
    drawn = invoke("run", "--json", *arguments).json
    again = invoke("run", "--json", "--seed", str(drawn["seed"]), *arguments).json
    assert again["text"] == drawn["text"]


def test_the_system_message_is_part_of_the_prompt(invoke: Invoke, script: Script) -> None:
    prompt = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    chosen = script(answers={prompt: "seen", "*": "not seen"})
    assert invoke("run", "-q", "--system", "Be brief.", *chosen, "hi").out == "seen\n"
    assert invoke("run", "-q", *chosen, "hi").out == "not seen\n"


def test_raw_sends_the_prompt_as_it_is(invoke: Invoke, script: Script) -> None:
    chosen = script(answers={"Once upon": " a time", "*": "a chat"})
    assert invoke("run", "-q", "--raw", *chosen, "Once upon").out == " a time\n"
    assert invoke("run", "-q", "--no-raw", *chosen, "Once upon a day").out == "a chat\n"
    tokens = [invoke("run", "--json", *raw, *chosen, "Once upon").json for raw in (["--raw"], [])]
    assert tokens[0]["usage"]["prompt_tokens"] < tokens[1]["usage"]["prompt_tokens"]


def test_a_reader_that_leaves_ends_it_quietly(console: Console, script: Script) -> None:
    slow = script(answers={"*": "word " * 500}, step_s=0.002)
    process = console.start("run", *slow, "hi", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(1) == b"w"
    process.stdout.close()
    assert process.wait(60) == 1
    assert process.stderr.read() == b""
    process.stderr.close()
    console.wait_until_nothing_runs()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_full_disk_is_an_error(console: Console, script: Script, options: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        process = console.start(
            "run", "-q", *options, *script(), "hi", stdout=full, stderr=subprocess.PIPE
        )
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"Traceback" not in errors and b"Exception" not in errors
    if not options:
        assert errors == b"edgeinfer: the output cannot be written: No space left on device\n"


def test_closed_streams_are_no_reason_to_fail(console: Console, script: Script) -> None:
    command = '"$0" run "$@" hi'
    for closed in (">&-", "2>&-", "<&-"):
        done = subprocess.run(
            ["sh", "-c", f"{command} {closed}", CONSOLE_SCRIPT, *script()],
            env=console.environment,
            capture_output=True,
            timeout=60,
        )
        assert done.returncode == 0, closed
        assert done.stdout == (b"" if closed == ">&-" else b"Hello there.\n")


def test_any_character_can_be_printed_in_any_locale(console: Console, script: Script) -> None:
    chosen = script(answers={"*": "naïve 😀"})
    done = console("run", "-q", *chosen, "hi", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.code, done.out) == (0, "na?ve ?\n")


def test_debug_says_what_memory_was_predicted_and_taken(invoke: Invoke, script: Script) -> None:
    done = invoke("run", "--debug", *script(), "hi")
    assert done.out == "Hello there.\n"
    lines = [line for line in done.err.splitlines() if line.startswith("edgeinfer: memory: ")]
    assert "edgeinfer: memory: kv cache: 0 MiB predicted, 0 MiB allocated" in lines
    assert "predicted once its context is full" in lines[-1]
    assert "memory" not in invoke("run", *script(), "hi").err
