"""`edgeinfer run` on a real terminal."""

from __future__ import annotations

from pathlib import Path

import pexpect
import pytest

from tests.cli.conftest import CONSOLE_SCRIPT, Console, Script

HOSTILE = "a\x1b]0;owned\x07b\x1b[2Jc\x1b]52;c;aGk=\x07d\x9b31me\rf\x08g\x7fh\ti\nj"
HARMLESS = "a]0;ownedb[2Jc]52;c;aGk=d31mefgh\ti\nj"


def on_terminal(console: Console, *arguments: str) -> tuple[int, str]:
    """Exit code and everything the terminal was sent."""
    child = pexpect.spawn(
        CONSOLE_SCRIPT, list(arguments), env=console.environment, encoding="utf-8", timeout=60
    )
    child.expect(pexpect.EOF)
    child.close()
    return child.exitstatus, str(child.before)


def test_an_answer_cannot_control_the_terminal(console: Console, script: Script) -> None:
    code, seen = on_terminal(console, "run", "-q", *script(answers={"*": HOSTILE}), "hi")
    assert code == 0
    assert seen.replace("\r\n", "\n") == HARMLESS + "\n"


def test_a_pipe_gets_the_answer_as_it_is(console: Console, script: Script) -> None:
    done = console("run", "-q", *script(answers={"*": HOSTILE}), "hi")
    assert done.out == HOSTILE + "\n"


def test_the_status_line_is_gone_in_the_end(console: Console, script: Script) -> None:
    code, seen = on_terminal(console, "run", *script(load_s=0.3), "hi")
    assert code == 0
    assert "loading scripted … " in seen
    lines = [line.rpartition("\r")[2] for line in seen.replace("\r\n", "\n").split("\n")]
    assert lines[0] == "Hello there."
    assert lines[1].startswith("[scripted on ") and lines[2:] == [""]


def test_a_models_name_cannot_control_the_terminal(console: Console, script: Script) -> None:
    *backend, path = script(load_s=0.3)
    hostile = Path(path).rename(Path(path).with_name("x\x1b]0;owned\x07.json"))
    code, seen = on_terminal(console, "run", *backend, str(hostile), "hi")
    assert code == 0
    assert "owned" in seen and "\x1b" not in seen and "\x07" not in seen


def test_typing_the_prompt_is_explained(console: Console, script: Script) -> None:
    child = pexpect.spawn(
        CONSOLE_SCRIPT,
        ["run", "-q", *script(), "-"],
        env=console.environment,
        encoding="utf-8",
        timeout=60,
    )
    child.expect("Ctrl\\+D")
    child.send("hi\r\x04")
    child.expect("Hello there.")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_ctrl_c_at_the_keyboard_prompt_is_one_line(
    console: Console, script: Script, options: list[str]
) -> None:
    child = pexpect.spawn(
        CONSOLE_SCRIPT, ["run", *options, *script(), "-"], env=console.environment, encoding="utf-8"
    )
    child.expect("Ctrl\\+D[^\n]*\n", timeout=60)
    child.sendintr()
    child.expect(pexpect.EOF, timeout=60)
    child.close()
    assert child.exitstatus == 130
    said = str(child.before).replace("^C", "").strip().splitlines()
    assert len(said) == 1 and "stopped" in said[0]
