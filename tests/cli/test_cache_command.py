"""`edgeinfer cache`, and what `run` keeps for the next `run`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Console, Invoke, Script

Kept = Callable[..., tuple[str, ...]]
PROMPT = b"Tell me about the sea. " * 40


@pytest.fixture
def kept(script: Script, tmp_path: Path) -> Kept:
    """A scripted model that reads slowly, so that what it read is worth a file; its cache."""

    def arguments() -> tuple[str, ...]:
        return (*script(step_s=0.05), "--cache-dir", str(tmp_path / "cache"))

    return arguments


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.kv"))


def test_the_next_run_starts_where_the_last_one_was(
    console: Console, kept: Kept, tmp_path: Path
) -> None:
    first = console("run", "--json", *kept(), "-", stdin=PROMPT).json
    assert first["cache"]["tier"] == "none"
    again = console("run", "--json", *kept(), "-", stdin=PROMPT).json
    assert again["cache"]["tier"] == "disk"
    assert again["usage"]["prompt_tokens"] - again["usage"]["cached_tokens"] == 1
    assert again["text"] == first["text"]
    assert (tmp_path / "cache" / "prompts").stat().st_mode & 0o077 == 0  # they are conversations


@pytest.mark.parametrize("option", [("--no-cache",), ("--cache-disk", "0")])
def test_nothing_is_kept_where_that_is_wanted(
    console: Console, kept: Kept, tmp_path: Path, option: tuple[str, ...]
) -> None:
    console("run", *option, *kept(), "-", stdin=PROMPT)
    assert files(tmp_path) == []


def test_a_cache_is_listed_verified_and_cleared(console: Console, kept: Kept, tmp_path: Path) -> None:
    folder = ("--cache-dir", str(tmp_path / "cache"))
    assert console("cache", "list", "--json", *folder).json["models"] == []
    console("run", *kept(), "-", stdin=PROMPT)
    (model,) = console("cache", "list", "--json", *folder).json["models"]
    assert model["blocks"] == len(files(tmp_path)) == 4
    assert model["bytes"] == sum(path.stat().st_size for path in files(tmp_path))
    assert "scripted" in console("cache", "list", *folder).out
    assert console("cache", "verify", *folder).out.startswith("4 files checked, 0 removed")
    bad = files(tmp_path)[1]
    bad.write_bytes(bad.read_bytes()[:-1])
    found = console("cache", "verify", "--json", *folder).json
    assert [Path(each["path"]) for each in found["removed"]] == [bad]
    assert not bad.exists()
    others = [tmp_path / "cache" / "prompts" / "mine.txt", bad.parent / "mine.kv"]
    for other in others:
        other.write_text("not yours")
    wrong = console("cache", "clear", "another", *folder)
    assert (wrong.code, "nothing of a model 'another'" in wrong.error_line) == (2, True)
    assert "are free again" in console("cache", "clear", *folder).out
    assert files(tmp_path) == others[1:]
    assert all(other.read_text() == "not yours" for other in others)


def test_a_system_prompt_is_kept_for_good(console: Console, kept: Kept, tmp_path: Path) -> None:
    system = tmp_path / "system.txt"
    system.write_text("Be kind to the sea. " * 30)
    model = kept()[2]
    rest = tuple(word for word in kept() if word != model)
    done = console("cache", "warm", "--json", *rest, str(system), model).json
    assert done["tokens"] > 500
    asked = ("--json", "--system", system.read_text(), *kept(), "Hello")
    found = console("run", *asked).json
    assert found["cache"]["tier"] == "disk"
    assert found["usage"]["cached_tokens"] >= done["tokens"]
    listed = console("cache", "list", "--json", "--cache-dir", str(tmp_path / "cache")).json
    assert listed["models"][0]["pinned"] == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xff\xfe", "not valid UTF-8"),
        (b'{"messages": ', "not valid JSON"),
        (b'{"messages": [1]}', "must hold"),
        (b'{"messages": [{"role": "user"}]}', "must hold"),
        (b'{"tools": {}}', "must hold"),
        (b"{" * 100_000, "not valid JSON"),
    ],
)
def test_a_file_that_cannot_be_warmed_is_one_line(
    invoke: Invoke, tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "system"
    path.write_bytes(content)
    done = invoke("cache", "warm", str(path))
    assert done.code in (1, 2)
    assert message in done.error_line
    missing = invoke("cache", "warm", str(tmp_path / "none"))
    assert "No such file" in missing.error_line


@pytest.mark.parametrize("option", ["--cache-disk x", "--cache-disk -1", "--cache-disk 99999999T"])
def test_sizes_that_cannot_be_are_wrong_usage(invoke: Invoke, script: Script, option: str) -> None:
    done = invoke("run", *script(), *option.split(), "hi")
    assert (done.code, done.out) == (2, "")
    assert "--cache-disk" in done.error_line


def test_a_folder_that_cannot_be_written_costs_a_warning_only(
    console: Console, kept: Kept, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file of the user's")
    done = console("run", "--json", *kept(), "-", stdin=PROMPT)
    assert done.json["text"] == "Hello there."
    assert (tmp_path / "cache").read_text() == "a file of the user's"
