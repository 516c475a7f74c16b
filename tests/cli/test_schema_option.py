"""`edgeinfer run --schema FILE`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Console, Invoke, Script

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "note": {"type": "string"}},
    "required": ["colour", "note"],
}
ANSWER = '{"colour":"blue","note":"a <|im_end|> b"}'


@pytest.fixture
def schema(tmp_path: Path) -> Path:
    path = tmp_path / "colour.json"
    path.write_text(json.dumps(SCHEMA))
    return path


def test_the_answer_fits_the_schema(console: Console, script: Script, schema: Path) -> None:
    chosen = script(answers={"*": '{"colour":"blue","note":"calm"}'})
    done = console("run", "--schema", schema, *chosen, "which?")
    assert (done.code, done.out) == (0, '{"colour":"blue","note":"calm"}\n')
    assert done.err.startswith("[scripted on scripted/cpu: ") and done.err.count("\n") == 1


def test_it_works_with_json_and_raw(invoke: Invoke, script: Script, schema: Path) -> None:
    chosen = script(answers={"*": '{"colour":"red","note":""}', "raw": '{"colour":"blue","note":"x"}'})
    done = invoke("run", "--json", "--schema", schema, *chosen, "which?")
    assert json.loads(done.json["text"]) == {"colour": "red", "note": ""}
    assert (done.json["finish_reason"], done.json["warnings"]) == ("stop", [])
    done = invoke("run", "-q", "--raw", "--schema", schema, *chosen, "raw")
    assert json.loads(done.out) == {"colour": "blue", "note": "x"}


def test_stop_strings_are_said_to_have_no_effect(invoke: Invoke, script: Script, schema: Path) -> None:
    chosen = script(answers={"*": '{"colour":"red","note":"b"}'})
    done = invoke("run", "--schema", schema, "--stop", "red", *chosen, "which?")
    assert done.out == '{"colour":"red","note":"b"}\n'
    assert "edgeinfer: warning: stop strings do not end an answer that is JSON" in done.err


def test_the_schema_may_come_from_standard_input(console: Console, script: Script) -> None:
    text = json.dumps({"enum": ["yes"]}).encode()
    done = console("run", "-q", "--schema", "-", *script(), "sure?", stdin=text)
    assert (done.code, done.out) == (0, '"yes"\n')


def test_standard_input_cannot_be_both(invoke: Invoke, script: Script) -> None:
    done = invoke("run", "--schema", "-", *script(), "-")
    assert (done.code, done.out) == (2, "")
    assert done.error_line.startswith("standard input can be the prompt or the schema, not both")


def test_a_variable_and_the_config_file_name_it(
    invoke: Invoke, script: Script, config_file: Path, schema: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = script(answers={"*": '{"colour":"red","note":"b"}'})
    config_file.write_text(f"schema = '{schema}'")
    assert invoke("run", "-q", *chosen, "hi").out == '{"colour":"red","note":"b"}\n'
    other = schema.with_name("other.json")
    other.write_text('{"const":1}')
    monkeypatch.setenv("EDGEINFER_SCHEMA", str(other))
    assert invoke("run", "-q", *chosen, "hi").out == "1\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"", "the schema is not JSON"),
        (b"{'a': 1}", "the schema is not JSON"),
        (b"\xff\xfe", "is not valid UTF-8: byte 0xff at offset 0"),
        (
            b'{"properties":{"a":{"not":{}}}}',
            "the schema keyword 'not' at #/properties/a is not supported",
        ),
        (b'{"type":"object","requried":["a"]}', "did you mean 'required'?"),
        (b"[" * 5000, "nested more than 64 levels"),
        (b" " * 300_000, "has more than 256 KiB"),
        (b'{"type":"integer","minimum":3,"maximum":1}', "no JSON fits the schema"),
    ],
)
def test_a_schema_that_cannot_be_used_is_one_line(
    invoke: Invoke, script: Script, tmp_path: Path, text: bytes | None, said: str
) -> None:
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_bytes(text)
    done = invoke("run", "--schema", path, *script(), "hi")
    assert (done.code, done.out) == (1, "")
    assert done.error_line.startswith(f"--schema {path}: ")
    assert said in done.error_line
    done = invoke("run", "--json", "--schema", path, *script(), "hi")
    assert done.json["error"]["type"] == "constraint_invalid"


def test_a_folder_is_no_schema(invoke: Invoke, script: Script, tmp_path: Path) -> None:
    done = invoke("run", "--schema", tmp_path, *script(), "hi")
    assert "cannot be read (Is a directory)" in done.error_line
