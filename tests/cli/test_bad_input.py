"""Whatever is wrong with the input: one line, a non-zero exit code, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Console, Invoke, Script
from tests.fixtures_gguf import write_tiny_gguf

LOOP = "{% for a in range(9999) %}" * 3 + "{% endfor %}" * 3
ESCAPE = "{{ ''.__class__.__mro__[1].__subclasses__() }}"

Make = Callable[[Path, bytes], object]


def sparse(path: Path, _: bytes) -> None:
    """A file whose header and size agree on a terabyte that is not there."""
    import gguf
    import numpy as np

    write_tiny_gguf(path.with_suffix(".small"))
    small = gguf.GGUFReader(path.with_suffix(".small"))
    writer = gguf.GGUFWriter(path, "llama")
    for field in small.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = field.contents()
        writer.add_key_value(field.name, value, field.types[0], *field.types[1:])
    rows = 2**40 // 256
    for tensor in small.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if tensor.name.endswith("ffn_up.weight"):
            shape = (rows, shape[1])
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, path.stat().st_size + 2 * rows * 256 + 2**21)


FILES: dict[str, tuple[Make, str]] = {
    "truncated": (lambda path, tiny: path.write_bytes(tiny[: len(tiny) // 2]), "are missing at its end"),
    "cut in its header": (lambda path, tiny: path.write_bytes(tiny[:100]), "in a file of 100 bytes"),
    "wrong magic": (lambda path, tiny: path.write_bytes(b"GGML" + tiny[4:]), "not a GGUF"),
    "text": (lambda path, _: path.write_text("Once upon a time\n" * 50), "not a GGUF"),
    "empty": (lambda path, _: path.write_bytes(b""), "empty"),
    "a folder": (lambda path, _: path.mkdir(), "no .gguf model in it"),
    "terabytes": (
        lambda path, tiny: path.write_bytes(tiny[:8] + (2**40).to_bytes(8, "little") + tiny[16:]),
        "claims 1,099,511,627,776 tensors",
    ),
    "a web page": (lambda path, _: path.write_text("<!doctype html><html>404</html>"), "not a GGUF"),
    "larger than memory": (sparse, "memory is free"),
    "unknown architecture": (
        lambda path, _: write_tiny_gguf(path, metadata={"general.architecture": "frobnicator"}),
        "frobnicator",
    ),
}


@pytest.mark.parametrize("what", FILES)
def test_a_bad_model_file_is_one_line(console: Console, tiny: Path, tmp_path: Path, what: str) -> None:
    make, said = FILES[what]
    path = tmp_path / "bad.gguf"
    make(path, tiny.read_bytes())
    done = console("run", path, "hi")
    assert (done.code, done.out) == (1, "")
    assert "bad" in done.error_line
    assert said in done.error_line
    failed = console("run", "--json", path, "hi")
    assert (failed.code, failed.err) == (1, "")
    assert failed.json["error"]["message"] == done.error_line
    assert not Path(os.environ["EDGEINFER_DATA_DIR"]).exists()


def test_a_missing_file_is_one_line(console: Console) -> None:
    done = console("run", "/not/there.gguf", "hi")
    assert done.code == 1
    assert done.error_line == "/not/there.gguf: no such file or folder; check the path"


def test_a_name_that_cannot_be_a_path_is_one_line(console: Console) -> None:
    for name in ("x" * 5000, "\n\x1b[2J", b"\xff.gguf", "~nobody-of-that-name/x.gguf", "/dev/null", ""):
        done = console("run", name, "hi")
        assert done.code == 1
        assert done.error_line.isprintable()


def test_a_model_larger_than_memory_says_the_arithmetic(console: Console, tmp_path: Path) -> None:
    # 512 KiB of KV cache for each of 16 million tokens
    path = write_tiny_gguf(tmp_path / "wide.gguf", layers=32, heads=32, kv_heads=32, head_dim=128)
    done = console("run", "--ctx", str(2**24), path, "hi")
    assert done.code == 1
    assert "KV cache 8192 GiB for 16777216 tokens + compute" in done.error_line
    assert "memory is free; --ctx" in done.error_line
    assert "would fit" in done.error_line


def test_a_corrupted_download_is_refused_and_not_kept(console: Console, tiny: Path) -> None:
    done = console("models", "pull", "smollm2", "--from", tiny)
    assert (done.code, done.out) == (1, "")
    assert done.error_line
    listed = console("models", "list", "--json").json["models"]
    assert [model["installed"] for model in listed] == [False]
    models = Path(os.environ["EDGEINFER_DATA_DIR"]) / "models"
    assert not models.exists() or list(models.iterdir()) == []


def test_a_damaged_model_of_the_store_is_one_line(console: Console, tiny: Path) -> None:
    folder = Path(os.environ["EDGEINFER_DATA_DIR"]) / "models" / "mine"
    folder.mkdir(parents=True)
    (folder / "mine.gguf").write_bytes(tiny.read_bytes()[:-1000])
    manifest = {
        "name": "mine", "file": "mine.gguf", "num_bytes": tiny.stat().st_size, "sha256": "0" * 64,
        "source": "", "licence": "", "pulled_at": "",
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    done = console("run", "mine", "hi")
    assert done.code == 1
    assert "model 'mine': mine.gguf has" in done.error_line
    (folder / "manifest.json").write_text("{")
    assert "its manifest is damaged" in console("run", "mine", "hi").error_line


def test_a_prompt_longer_than_the_context_says_both_numbers(console: Console, script: Script) -> None:
    done = console("run", "--ctx", "64", *script(), "-", stdin=b"x" * 500)
    assert (done.code, done.out) == (1, "")
    assert "the prompt has 519 tokens and this model's maximum context length is 64" in done.error_line
    failed = console("run", "--json", "--ctx", "64", *script(), "-", stdin=b"x" * 500)
    assert failed.json["error"]["type"] == "prompt_too_long"


@pytest.mark.parametrize(
    "option",
    [
        "--ctx 0", "--ctx -1", "--ctx 31", "--ctx 99999999999", "--ctx 1e4", "--ctx x",
        "--threads 0", "--threads -1", "--threads 99999", "--threads 1.5", "--threads x",
        "--gpu-layers -1", "--gpu-layers 99999", "--gpu-layers x",
        "--kv-type x", "--kv-type-k x", "--kv-type-v x", "--kv-type Q8_0",
        "--window 0", "--window 31", "--window x", "--window 99999999999", "--sinks -1", "--sinks x",
        "--sinks 99999999999", "--overflow x", "--overflow STREAM",
        "--cache-ram -1", "--cache-ram x", "--cache-ram 99999999T", "--cache-ram 1e99",
        "--cache-ram " + "9" * 500, "--seed -1", "--seed 4294967295", "--seed " + "9" * 6000, "--seed x",
        "--temp -1", "--temp nan", "--temp inf", "--temp 101", "--temp x",
        "--top-p 0", "--top-p 1.1", "--top-p -1", "--top-p nan", "--top-k -1", "--top-k 99999999999",
        "--min-p -1", "--min-p 2", "--typical-p 0", "--typical-p 2", "--repeat-penalty 0",
        "--repeat-penalty 11", "--presence-penalty 11", "--frequency-penalty -11",
        "--dry-multiplier -1", "--dry-multiplier inf",
        "--max-tokens 0", "--max-tokens -1", "--max-tokens 99999999999", "--max-tokens x",
    ],
)  # fmt: skip
def test_an_option_that_cannot_be_right_is_wrong_usage(
    invoke: Invoke, script: Script, option: str
) -> None:
    name, value = option.split()
    done = invoke("run", *script(), name, value, "hi")
    assert (done.code, done.out) == (2, "")
    assert done.error_line.startswith(name)
    assert len(done.error_line) < 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--window 512 --ctx 256", "--window 512 is more than --ctx 256"),
        ("--window 64 --sinks 64", "--window 64 is not larger than --sinks 64"),
        ("--ctx 64 --sinks 100", "--ctx 64 is not larger than --sinks 100"),
    ],
)
def test_a_window_that_cannot_be_is_wrong_usage(
    invoke: Invoke, script: Script, options: str, message: str
) -> None:
    done = invoke("run", *script(), *options.split(), "hi")
    assert (done.code, done.out) == (2, "")
    assert message in done.error_line


def test_a_window_limits_the_prompt_and_says_which_option_raises_it(
    console: Console, script: Script
) -> None:
    done = console("run", "--window", "64", "--ctx", "256", *script(), "-", stdin=b"x" * 100)
    assert (done.code, done.out) == (1, "")
    assert "maximum context length is 64 here" in done.error_line
    assert done.error_line.endswith("raise --window")


def test_what_left_a_full_context_is_said(console: Console, script: Script) -> None:
    options = ("--window", "64", "--overflow", "stream", "--sinks", "0")
    done = console("run", *options, *script(), "-", stdin=b"x" * 500)
    assert (done.code, done.out) == (0, "Hello there.\n")
    assert "--sinks 0: once old tokens leave" in done.err
    assert "oldest tokens left the context of 64: the model no longer sees them" in done.err
    kv = console("run", "--json", *options, *script(), "-", stdin=b"x" * 500).json["kv"]
    assert kv["evicted_tokens"] == kv["newly_evicted"] > 400


def test_an_answer_that_may_not_reach_the_end_fails_there(console: Console, script: Script) -> None:
    options = ("--ctx", "64", "--overflow", "error")
    done = console("run", *options, *script(answers={"*": "abc " * 50}), "hi")
    assert done.code == 1
    assert "the answer filled the context of 64 tokens" in done.err
    assert "abc" in done.out


@pytest.mark.parametrize("stop", [[""], ["x" * 5000], [str(n) for n in range(20)]])
def test_stop_strings_that_cannot_be_right_are_wrong_usage(
    invoke: Invoke, script: Script, stop: list[str]
) -> None:
    done = invoke("run", *script(), *(word for text in stop for word in ("--stop", text)), "hi")
    assert (done.code, done.out) == (2, "")
    assert "--stop: " in done.error_line


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{{ raise_exception('roles must alternate') }}",
            "refused these messages: roles must alternate",
        ),
        (LOOP, "did not finish within 5 s"),
        (ESCAPE, "what its sandbox forbids"),
        ("{% if", "syntax error in line 1"),
        ("{{ nothing.at.all }}", "uses what is not there"),
        ("{{ 'x' * 10**9 }}", "chat template"),
    ],
)
def test_a_bad_template_is_one_line(console: Console, tmp_path: Path, template: str, said: str) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", template=template)
    done = console("run", path, "hi")
    assert (done.code, done.out) == (1, "")
    assert said in done.error_line


@pytest.mark.parametrize("data", [b"\xff", b"fine\nso far \xe2\x82", b"\xed\xa0\x80"])
def test_bytes_on_standard_input_that_are_no_text_are_refused(
    console: Console, script: Script, data: bytes
) -> None:
    done = console("run", *script(), "-", stdin=data)
    assert (done.code, done.out) == (1, "")
    assert "standard input is not valid UTF-8: byte 0x" in done.error_line


def test_zero_bytes_on_standard_input_are_text(console: Console, script: Script) -> None:
    assert console("run", "-q", *script(), "-", stdin=b"\x00a\x00").out == "Hello there.\n"


@pytest.mark.parametrize("where", ["hi", "--system", "--stop"])
def test_bytes_of_the_command_line_that_are_no_text_are_refused(
    console: Console, script: Script, where: str
) -> None:
    words: list[str | bytes] = [b"a\xff"] if where == "hi" else [where, b"a\xff", "hi"]
    done = console("run", *script(), *words)
    assert done.code == 2
    assert "is not valid UTF-8" in done.error_line


def test_a_load_that_fails_is_one_line(console: Console, script: Script) -> None:
    done = console("run", *script(load_error="out of luck"), "hi")
    assert (done.code, done.out) == (1, "")
    assert "out of luck" in done.error_line


@pytest.mark.parametrize("script_file", ["", "[]", '{"answer": {}}', '{"step_s": -1}'])
def test_a_script_that_cannot_be_right_is_one_line(
    console: Console, tmp_path: Path, script_file: str
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(script_file)
    done = console("run", "--backend", "scripted", path, "hi")
    assert done.code == 1
    assert "bad.json" in done.error_line


def test_a_worker_that_dies_while_loading_is_one_line(console: Console, script: Script) -> None:
    process = console.start(
        "run", *script(load_s=60), "hi", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    console.worker().kill()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, b"")
    assert err.startswith(b"edgeinfer: the model's process was killed by SIGKILL")
    assert b"while it loaded scripted" in err
    assert err.count(b"\n") == 1
    console.wait_until_nothing_runs()


@pytest.mark.parametrize("step", [1, 5])
def test_a_worker_that_dies_while_it_answers_is_one_line(
    console: Console, script: Script, step: int
) -> None:
    done = console("run", *script(die_at_step=step), "hi")
    assert done.code == 1
    assert "the model's process ended with exit code 9" in done.error_line
    assert "Hello there.\n".startswith(done.out.rstrip("\n"))
    failed = console("run", "--json", *script(die_at_step=step), "hi")
    assert (failed.code, failed.json["error"]["type"]) == (1, "worker_died")


def test_a_step_that_fails_is_one_line(console: Console, script: Script) -> None:
    done = console("run", *script(fail_at_step=3), "hi")
    assert done.code == 1
    assert done.error_line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
@pytest.mark.parametrize("when", ["loading", "answering"])
def test_a_killed_command_leaves_no_process_behind(
    console: Console, script: Script, number: signal.Signals, when: str
) -> None:
    slow = script(answers={"*": "word " * 500}, step_s=0.05, load_s=60 if when == "loading" else 0)
    process = console.start("run", *slow, "hi", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    console.worker()
    if when == "answering":
        assert process.stdout.read(1) == b"w"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -number
    assert err == b""
    console.wait_until_nothing_runs()
