"""A flag beats the variable, the variable the file; what is wrong names where it is from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import typer

from edgeinfer.cli.app import app
from edgeinfer.config import KEYS
from tests.cli.conftest import Console, Invoke, Script


def options_of(*names: str) -> dict[str, Any]:
    """Long option -> parameter of some commands, without what is no setting."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    params = [param for name in names for param in commands[name].params]
    found = {option[2:]: param for param in params for option in param.opts if option.startswith("--")}
    return {key: param for key, param in found.items() if key != "help"}


def test_every_option_is_a_key_and_every_key_an_option() -> None:
    assert set(options_of("run", "chat", "serve", "bench", "eval")) | {"model"} == set(KEYS)


def test_every_option_has_its_variable() -> None:
    for key, param in options_of("run", "chat", "serve", "bench").items():
        expected = None if key == "stop" else "EDGEINFER_" + key.upper().replace("-", "_")
        assert param.envvar == expected


def test_a_flag_beats_the_variable_and_the_variable_the_file(
    invoke: Invoke, script: Script, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("run", "-q", *script(), "hi")
    config_file.write_text("max-tokens = 2")
    assert invoke(*arguments).out == "He\n"
    monkeypatch.setenv("EDGEINFER_MAX_TOKENS", "3")
    assert invoke(*arguments).out == "Hel\n"
    assert invoke(*arguments, "--max-tokens", "4").out == "Hell\n"


def test_a_switch_of_the_file_can_be_turned_off(
    invoke: Invoke, script: Script, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_file.write_text("quiet = true")
    assert invoke("run", *script(), "hi").err == ""
    assert invoke("run", "--no-quiet", *script(), "hi").err != ""
    monkeypatch.setenv("EDGEINFER_QUIET", "0")
    assert invoke("run", *script(), "hi").err != ""


def test_the_model_may_come_from_a_variable_or_the_file(
    invoke: Invoke, script: Script, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *backend, path = script()
    config_file.write_text(f'model = "{path}"\nbackend = "scripted"\nquiet = true')
    assert invoke("run", "hi").out == "Hello there.\n"
    monkeypatch.setenv("EDGEINFER_MODEL", "/not/there.json")
    done = invoke("run", "hi")
    assert done.code == 1
    assert "/not/there.json" in done.error_line
    assert invoke("run", path, "hi").out == "Hello there.\n"
    assert invoke("run", *backend, path, "hi").out == "Hello there.\n"


def test_a_model_that_is_not_there_names_who_chose_it(
    invoke: Invoke, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_file.write_text('model = "nope"')
    assert f"(the model comes from {config_file}: model)" in invoke("run", "hi").error_line
    monkeypatch.setenv("EDGEINFER_MODEL", "nil")
    assert "(the model comes from EDGEINFER_MODEL)" in invoke("run", "hi").error_line
    assert "comes from" not in invoke("run", "void", "hi").error_line


@pytest.mark.parametrize("name", ["scripted", "scripted.json", "{path}"])
@pytest.mark.parametrize("chosen_by", ["argument", "variable"])
def test_a_table_counts_for_its_model_alone(
    invoke: Invoke,
    script: Script,
    config_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    chosen_by: str,
) -> None:
    *backend, path = script()
    table = name.format(path=path)
    config_file.write_text(f'max-tokens = 2\n[model."{table}"]\nmax-tokens = 5\n[model.x]\nctx = 40')
    model = [path]
    if chosen_by == "variable":
        monkeypatch.setenv("EDGEINFER_MODEL", path)
        model = []
    assert invoke("run", "-q", *backend, *model, "hi").out == "Hello\n"
    other = Path(path).with_name("other.json")
    other.write_text(Path(path).read_text())
    assert invoke("run", "-q", *backend, str(other), "hi").out == "He\n"


def test_stop_strings_of_a_variable_and_of_the_file_keep_their_blanks(
    invoke: Invoke, script: Script, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("run", "-q", *script(answers={"*": "one two three four"}), "hi")
    config_file.write_text('stop = ["e f", "zzz"]')
    assert invoke(*arguments).out == "one two thre\n"
    monkeypatch.setenv("EDGEINFER_STOP", " th")
    assert invoke(*arguments).out == "one two\n"
    assert invoke(*arguments, "--stop", " two").out == "one\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("temp = 500", "temp 500.0 is outside [0, 100]"),
        ("top_p = 0.0", "top_p 0.0 is outside (0, 1]"),
        ("ctx = 1", "ctx 1 is outside"),
        ("threads = 0", "threads 0 is outside [1, 1024]"),
        ('threads = "some"', "threads 'some' is neither a number nor 'auto'"),
        ('cache-ram = "much"', "cache-ram 'much' is not a size"),
        ('kv-type = "q9"', "kv-type 'q9' is not a KV cache type"),
        ('kv-type-k = "q9"', "kv-type-k 'q9' is not a KV cache type"),
        ("max-tokens = 0", "max-tokens 0 must be at least 1"),
        ("seed = -1", "seed -1 is outside"),
        ("tmep = 1", "has an unknown key 'tmep'; did you mean 'temp'?"),
        ('temp = "hot"', "temp must be a number, not 'hot'"),
        ("temp", "is not valid TOML"),
    ],
)
def test_a_bad_value_of_the_file_names_the_file(
    invoke: Invoke, script: Script, config_file: Path, line: str, said: str
) -> None:
    config_file.write_text(line)
    done = invoke("run", *script(), "hi")
    assert (done.code, done.out) == (1, "")
    assert done.error_line.startswith(f"{config_file}: {said}")
    assert invoke("run", "--json", *script(), "hi").json["error"]["type"] == "config_invalid"


def test_a_bad_value_of_a_table_names_the_table(
    invoke: Invoke, script: Script, config_file: Path
) -> None:
    config_file.write_text("[model.scripted]\ntemp = 500")
    done = invoke("run", *script(), "hi")
    assert done.error_line == f'{config_file}: [model."scripted"] temp 500.0 is outside [0, 100]'


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("EDGEINFER_TEMP", "500", "EDGEINFER_TEMP 500.0 is outside [0, 100]"),
        ("EDGEINFER_TEMP", "hot", "EDGEINFER_TEMP: 'hot' is not a number; see `edgeinfer run --help`"),
        ("EDGEINFER_CTX", "4k", "EDGEINFER_CTX: '4k' is not a whole number"),
        ("EDGEINFER_QUIET", "perhaps", "EDGEINFER_QUIET: 'perhaps' is not true or false"),
        ("EDGEINFER_KV_TYPE_V", "q9", "EDGEINFER_KV_TYPE_V 'q9' is not a KV cache type"),
        ("EDGEINFER_MAX_TOKENS", "0", "EDGEINFER_MAX_TOKENS 0 must be at least 1"),
    ],
)
def test_a_bad_value_of_a_variable_names_the_variable(
    invoke: Invoke,
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    said: str,
) -> None:
    monkeypatch.setenv(variable, value)
    done = invoke("run", *script(), "hi")
    assert (done.code, done.out) == (2, "")
    assert done.error_line.startswith(said)


def test_what_is_typed_is_never_blamed_on_the_file(
    invoke: Invoke, script: Script, config_file: Path
) -> None:
    config_file.write_text("temp = 0.5")
    done = invoke("run", "--temp", "500", *script(), "hi")
    assert done.code == 2
    assert done.error_line == "--temp 500.0 is outside [0, 100]"


def test_a_broken_file_stops_neither_help_nor_doctor(invoke: Invoke, config_file: Path) -> None:
    config_file.write_text("temp = ")
    assert invoke("--help").code == invoke("run", "--help").code == 0
    assert invoke("models", "list").code == 0
    shown = invoke("doctor")
    assert (shown.code, shown.err) == (0, "")
    assert f"config     {config_file}: is not valid TOML" in shown.out
    assert "not valid TOML" in invoke("doctor", "--json").json["config"]["error"]


def test_doctor_says_that_the_file_was_read(invoke: Invoke, config_file: Path) -> None:
    config_file.write_text("temp = 0.5")
    assert f"{config_file} (read)" in invoke("doctor").out


def test_the_help_shows_the_defaults_that_count_here(invoke: Invoke, config_file: Path) -> None:
    assert "[default: 40]" in invoke("run", "--help").out
    config_file.write_text("top-k = 7")
    assert "[default: 7]" in invoke("run", "--help").out


def test_without_a_command_the_file_and_the_variables_count_too(
    console: Console, config_file: Path
) -> None:
    config_file.write_text("temp = 500")
    assert f"{config_file}: temp 500.0 is outside" in console().error_line
    assert "EDGEINFER_TEMP 600.0 is outside" in console(EDGEINFER_TEMP="600").error_line
    assert os.environ.get("EDGEINFER_TEMP") is None
