"""The config file: what it may hold, and one line for everything else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeinfer.config import KEYS, MAX_BYTES, Config, ConfigInvalid, config_path, read_config


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def read(path: Path, text: str) -> Config:
    path.write_text(text, encoding="utf-8")
    return read_config(path)


def values(config: Config, *names: str) -> dict[str, object]:
    found = {key: config.lookup(key, names) for key in KEYS}
    return {key: setting.value for key, setting in found.items() if setting is not None}


def test_a_missing_file_is_an_empty_one(path: Path) -> None:
    config = read_config(path)
    assert (config.found, config.path, values(config)) == (False, path, {})


def test_every_key_takes_a_value_of_its_kind(path: Path) -> None:
    written = {
        "whole": "3", "number": "0.5", "text": '"a"', "texts": '["a", "b"]', "count": "4",
        "counts": '"128,512"', "size": '"1G"', "switch": "true",
    }  # fmt: skip
    read_back = {
        "whole": 3, "number": 0.5, "text": "a", "texts": ["a", "b"], "count": "4",
        "counts": "128,512", "size": "1G", "switch": True,
    }  # fmt: skip
    config = read(path, "\n".join(f"{key} = {written[kind]}" for key, kind in KEYS.items()))
    assert config.found
    assert values(config) == {key: read_back[kind] for key, kind in KEYS.items()}


def test_underscores_are_dashes_and_one_stop_string_is_a_list(path: Path) -> None:
    config = read(path, 'kv_type = "q8_0"\nstop = "x"\nthreads = "auto"\ncache-ram = 0\ntemp = 1')
    assert values(config) == {
        "kv-type": "q8_0",
        "stop": ["x"],
        "threads": "auto",
        "cache-ram": "0",
        "temp": 1,
    }


def test_a_models_table_beats_the_flat_keys(path: Path) -> None:
    config = read(
        path,
        "temp = 0.1\nctx = 64\n"
        '[model."a b.gguf"]\ntemp = 0.2\n[model.c]\ntemp = 0.3\n[models.d]\ntemp = 0.4',
    )
    assert values(config) == {"temp": 0.1, "ctx": 64}
    assert values(config, "a b.gguf") == {"temp": 0.2, "ctx": 64}
    assert values(config, "unknown", "c", "d") == {"temp": 0.3, "ctx": 64}
    assert values(config, "d") == {"temp": 0.4, "ctx": 64}
    setting = config.lookup("temp", ["c"])
    assert setting is not None
    assert setting.where == f'{path}: [model."c"] temp'


def test_the_model_to_use_stands_beside_models_tables(path: Path) -> None:
    assert values(read(path, 'model = "c"\n[models.c]\nctx = 64'), "c") == {"model": "c", "ctx": 64}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("temp = \n", "is not valid TOML: Invalid value (at line 1, column 8)"),
        ("temp = 1\ntemp = 2\n", "line 2"),
        ("a" * 100, "is not valid TOML"),
        ("a = " + "[" * 5000, "is not valid TOML: it is nested too deeply"),
        ("tmep = 1", "has an unknown key 'tmep'; did you mean 'temp'?"),
        ("zzzzzz = 1", "has an unknown key 'zzzzzz'; known keys: model, backend, ctx"),
        ('[model."x"]\ntmep = 1', "[model.\"x\"] has an unknown key 'tmep'; did you mean 'temp'?"),
        ('temp = "hot"', "temp must be a number, not 'hot'"),
        ("temp = true", "temp must be a number, not true"),
        ("ctx = 1.5", "ctx must be a whole number, not 1.5"),
        ("ctx = 1" + "0" * 30, "ctx is a number with more digits than any option takes"),
        ("ctx = 1979-05-27", "ctx must be a whole number, not datetime.date"),
        ("system = 3", "system must be text in quotes"),
        ("stop = [1]", "stop must be text in quotes, or a list of them"),
        ("quiet = 1", "quiet must be true or false, not 1"),
        ("threads = 1.5", 'threads must be a whole number or "auto", not 1.5'),
        ("[temp]", "temp must be a number, not a table"),
        ("[model]\nctx = 64", 'model.ctx belongs in a table of one model: [model."NAME"]'),
        ('[model."x"]\nmodel = "y"', "cannot choose another model"),
        ('kv-type = "f16"\nkv_type = "f16"', "has 'kv-type' twice"),
        ('model = "c"\n[model.c]\nctx = 64', 'write the tables as [models."NAME"]'),
        ("# " + "x" * MAX_BYTES, "is longer than 256 KiB"),
    ],
)
def test_what_cannot_be_is_one_line_naming_the_file(path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        read(path, text)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert said in message
    assert "\n" not in message
    assert caught.value.exit_code == 1


def test_bytes_that_are_no_text_name_their_line(path: Path) -> None:
    path.write_bytes(b'ctx = 64\nsystem = "\xff"\n')
    with pytest.raises(ConfigInvalid, match="line 2 is not valid UTF-8"):
        read_config(path)


def test_a_byte_order_mark_is_no_mistake(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbfctx = 64\r\n")
    assert values(read_config(path)) == {"ctx": 64}


def test_a_folder_is_refused_and_the_null_device_is_empty(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="is not a file"):
        read_config(tmp_path)
    assert values(read_config(Path(os.devnull))) == {}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_is_refused_and_not_waited_for(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(ConfigInvalid, match="is not a file"):
        read_config(path)


def test_the_variable_names_the_file(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.setenv("EDGEINFER_CONFIG", str(path))
    assert config_path() == path
    monkeypatch.delenv("EDGEINFER_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(path.parent))
    assert config_path().name == "config.toml"
    assert "edgeinfer" in config_path().parts


@given(st.binary(max_size=300) | st.text(alphabet='[]"=.mode lctx-_1\n', max_size=80).map(str.encode))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(data)
    try:
        read_config(path)
    except ConfigInvalid as error:
        assert "\n" not in str(error)
