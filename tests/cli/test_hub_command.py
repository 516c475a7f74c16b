"""The real command against a stand-in of the hub: killed, interrupted, out of space, and as used."""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import time
from pathlib import Path

import pytest

from benchmarks.hub_stand_in import HubStandIn
from benchmarks.killed_pull import COMMAND, bytes_kept, kill_pull_at
from edgeinfer.cli.chat import LoadMessages
from edgeinfer.cli.opening import Pace, puller
from edgeinfer.client import LocalClient, OpenOptions
from edgeinfer.errors import LoadFailed
from tests.cli.conftest import Console, Invoke
from tests.cli.test_interrupts import Session

FILE = "tiny-Q4_K_M.gguf"
NAME = f"hf:owner/tiny:{FILE}"


@pytest.fixture
def console(hub: HubStandIn) -> Console:
    """Started after the hub: it takes the variables as they are."""
    return Console()


@pytest.fixture
def repo(hub: HubStandIn, tiny: Path) -> HubStandIn:
    hub.add("owner/tiny", {FILE: tiny.read_bytes(), "tiny-Q8_0.gguf": tiny.read_bytes() + bytes(64)})
    return hub


def data_folder() -> Path:
    return Path(os.environ["EDGEINFER_DATA_DIR"])


def digest_of_installed() -> str:
    (path,) = data_folder().glob("models/hf--*/*.gguf")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "times", [1, pytest.param(10, marks=pytest.mark.slow)], ids=["once", "ten times"]
)
def test_a_killed_pull_goes_on_where_it_was(
    console: Console, hub: HubStandIn, tiny: Path, times: int
) -> None:
    content = tiny.read_bytes() * 8
    hub.add("owner/tiny", {FILE: content})
    points = [len(content) * (2 * i + 1) // (2 * times) for i in range(times)]
    for point in points:
        assert kill_pull_at(hub, "hf:owner/tiny", data_folder(), point) == point
        assert not list(data_folder().glob("models/hf--*")), "nothing is taken for a model"
    listed = console("models", "list")
    assert f"{NAME}\t{points[-1] / len(content):.0%} pulled\t" in listed.out
    assert console("run", NAME, "hi", HF_HUB_OFFLINE="1").error_line.startswith(f"{NAME}: is not here")
    assert console("models", "pull", "hf:owner/tiny").out.startswith(f"{NAME} is installed and verified")
    assert digest_of_installed() == hashlib.sha256(content).hexdigest()
    assert [asked.start for asked in hub.downloads] == [0, *points]
    assert "pulled" not in console("models", "list").out.replace("can be pulled", "")


@pytest.mark.parametrize(
    "arguments",
    [("models", "pull", "hf:owner/tiny:q4_k_m"), ("run", "hf:owner/tiny:q4_k_m", "hi")],
    ids=["pull", "run"],
)
def test_ctrl_c_keeps_what_came_and_says_so(
    console: Console, repo: HubStandIn, tiny: Path, arguments: tuple[str, ...]
) -> None:
    half = tiny.stat().st_size // 2
    repo.faults.hold_at = half
    session = Session(console, *arguments)
    try:
        session.until(lambda: bytes_kept(data_folder()) == half)
        time.sleep(0.2)
        session.interrupt()
        assert session.end() == 130
    finally:
        session.close()
    assert b"Traceback" not in session.err
    console.wait_until_nothing_runs()
    assert session.last_words[-1].endswith(
        f"edgeinfer: stopped; 0.1 of 0.2 MB of {NAME} are kept, and the same command goes on from there"
    )
    repo.release()
    assert console("models", "pull", "hf:owner/tiny:q4_k_m").code == 0
    assert repo.downloads[-1].start == half


def test_a_file_that_cannot_grow_is_one_line_and_the_next_pull_goes_on(
    console: Console, repo: HubStandIn, tiny: Path
) -> None:
    """The system's own refusal in mid-download, as of a full disk: a limit on the size of a file."""
    most = 100 * 1024
    done = subprocess.run(
        [*COMMAND, "hf:owner/tiny:q4_k_m"],
        env=console.environment,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "cannot be written to" in done.stderr and "What came is kept" in done.stderr
    assert bytes_kept(data_folder()) == most
    assert console("models", "pull", "hf:owner/tiny:q4_k_m").code == 0
    assert repo.downloads[-1].start == most
    assert digest_of_installed() == hashlib.sha256(tiny.read_bytes()).hexdigest()


def test_run_fetches_a_missing_model_once_and_answers(console: Console, repo: HubStandIn) -> None:
    first = console("run", "hf:owner/tiny", "hi", "--max-tokens", "2", "--temp", "0")
    assert first.code == 0, first.err
    assert first.err.splitlines()[0] == (
        "edgeinfer: hf:owner/tiny has 2 models; taking Q4_K_M (others: Q8_0)."
        " To choose: hf:owner/tiny:Q8_0"
    )
    assert first.err.splitlines()[1].startswith(f"[{NAME} on llamacpp/")
    asked = len(repo.requests)
    again = console("run", "hf:owner/tiny", "hi", "--max-tokens", "2", "--temp", "0")
    assert (again.code, again.out) == (0, first.out)
    assert len(again.err.splitlines()) == 1
    # The one used last, and without a network.
    offline = console("run", "hi", "--max-tokens", "2", "--temp", "0", HF_HUB_OFFLINE="1")
    assert (offline.code, offline.out) == (0, first.out)
    assert len(repo.requests) == asked, "what is here is run without asking the hub"


def test_a_download_shows_bytes_speed_and_time_left(
    console: Console, hub: HubStandIn, tiny: Path
) -> None:
    hub.add("owner/tiny", {FILE: tiny.read_bytes() * 2})
    hub.faults.bytes_per_s = 160_000
    session = Session(console, "run", "hf:owner/tiny", "hi", "--max-tokens", "2")
    try:
        session.end()
    finally:
        session.close()
    shown = session.err.decode()
    assert "fetching hf:owner/tiny (only once), 0." in shown
    assert " of 0.5 MB, 0." in shown and " MB/s, " in shown and " s left … " in shown


def test_list_show_and_rm_take_the_names_that_are_shown(invoke: Invoke, repo: HubStandIn) -> None:
    assert invoke("models", "pull", "hf:owner/tiny").code == 0
    assert invoke("models", "pull", "hf:owner/tiny:q8_0").code == 0
    names = [line.split("\t")[0] for line in invoke("models", "list").out.splitlines()]
    assert names == [NAME, "hf:owner/tiny:tiny-Q8_0.gguf", "smollm2"]
    facts = invoke("models", "show", NAME, "--json").json
    assert facts["repo"] == "owner/tiny"
    assert facts["revision"] == repo.repos["owner/tiny"].commit
    assert len(facts["sha256"]) == 64
    assert "Hugging Face hub, owner/tiny at" in invoke("models", "show", NAME).out
    assert "could be 2 models" in invoke("models", "rm", "hf:owner/tiny", "--yes").error_line
    assert invoke("models", "rm", NAME, "--yes").out.startswith(f"{NAME} is removed; ")
    assert invoke("models", "rm", "hf:owner/tiny", "--yes").out.startswith("hf:owner/tiny:tiny-Q8_0")
    assert "is not installed" in invoke("models", "rm", "hf:owner/tiny", "--yes").error_line


def test_rm_deletes_what_an_interrupted_pull_left(invoke: Invoke, repo: HubStandIn) -> None:
    kill_pull_at(repo, "hf:owner/tiny", data_folder(), 70_000)
    (row,) = [m for m in invoke("models", "list", "--json").json["models"] if m["name"] == NAME]
    assert (row["installed"], row["partial_bytes"]) == (False, 70_000)
    assert invoke("models", "rm", "hf:owner/tiny").code == 2, "it asks first"
    assert invoke("models", "rm", "hf:owner/tiny", "--yes").out == (
        f"{NAME} is removed; 0.1 MB are free again\n"
    )
    assert bytes_kept(data_folder()) == 0


def test_pull_json_is_one_object_with_the_choice_in_it(invoke: Invoke, repo: HubStandIn) -> None:
    pulled = invoke("models", "pull", "hf:owner/tiny", "--json")
    assert pulled.err == ""
    assert pulled.json["name"] == NAME
    assert pulled.json["revision"] == repo.repos["owner/tiny"].commit
    assert "taking Q4_K_M (others: Q8_0)" in pulled.json["notes"][0]
    assert invoke("models", "pull", NAME, "--json").json["already_installed"] is True
    failed = invoke("models", "pull", "hf:owner/none", "--json")
    assert (failed.code, failed.json["error"]["type"]) == (1, "model_not_found")


def test_a_published_file_that_cannot_be_run_is_said_at_once(invoke: Invoke, hub: HubStandIn) -> None:
    hub.add("owner/odd", {"odd-Q4_0.gguf": b"not a GGUF at all"})
    done = invoke("models", "pull", "hf:owner/odd")
    assert done.code == 0
    assert "it is here as it was published, but it cannot be run: " in done.err


def test_the_token_is_never_printed(console: Console, repo: HubStandIn) -> None:
    repo.repos["owner/tiny"].private = True
    for token in (repo.TOKEN, repo.TOKEN + "x", repo.TOKEN + "\x7f", repo.TOKEN + " ü"):
        for more in ((), ("--debug",), ("--json",)):
            done = console("models", "pull", "hf:owner/tiny", "--force", *more, HF_TOKEN=token)
            assert done.code == (0 if token == repo.TOKEN else 1)
            assert repo.TOKEN not in done.out + done.err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("run", "hf:owner/tiny"), 2, "is a model, and run needs a prompt after it"),
        (("hf:owner/tiny",), 2, "to chat with that model: edgeinfer chat hf:owner/tiny"),
        (("models", "pull", "hf:owner/tiny", "--from", "x.gguf"), 2, "to run a file: edgeinfer run"),
        (("models", "pull", "hf:tiny"), 1, "write hf:owner/repo[@revision][:file]"),
        (("models", "show", "hf:owner/tiny"), 1, "run `edgeinfer models pull hf:owner/tiny`"),
        (("models", "rm", "hf:owner/tiny"), 1, "'hf:owner/tiny' is not installed"),
        (("models", "rm", "hf:tiny"), 1, "write hf:owner/repo"),
        (("run", "hf:owner/none", "hi"), 1, "no such repository on the hub"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_that_says_what_to_do(
    invoke: Invoke, repo: HubStandIn, arguments: tuple[str, ...], code: int, said: str
) -> None:
    done = invoke(*arguments)
    assert done.code == code
    assert said in done.error_line


def test_a_table_of_the_config_file_may_name_the_repository(
    console: Console, repo: HubStandIn, config_file: Path
) -> None:
    config_file.write_text('[models."hf:owner/tiny"]\nmax-tokens = 1\ntemp = 0\n')
    for name in ("hf:owner/tiny", NAME):
        done = console("run", name, "hi", "--json")
        assert done.json["usage"]["completion_tokens"] == 1


def test_leaving_the_chat_ends_a_download_that_goes_on_next_time(repo: HubStandIn, tiny: Path) -> None:
    half = tiny.stat().st_size // 2
    repo.faults.bytes_per_s = 100_000
    messages = LoadMessages()
    seen: list[str] = []
    with LocalClient(OpenOptions(model=NAME), puller(messages.show)) as client:
        messages.client = client

        def note(what: str, fraction: float) -> None:
            seen.append(what)
            if "fetching" in what and fraction > 0.4:
                client.cancel_load()

        with pytest.raises(LoadFailed, match="a download goes on where it was next time"):
            client.load(note)
    assert 0 < bytes_kept(data_folder()) <= half + 64 * 1024
    assert any(f"fetching {NAME} (only once), 0.1 of 0.2 MB" in what for what in seen)


def test_speed_and_time_left_are_of_what_came_now_and_not_of_what_was_there() -> None:
    now = 0.0
    pace = Pace(lambda: now)
    assert pace.told(900_000_000, 1_000_000_000) == "900.0 of 1,000.0 MB"
    now = 2.0
    assert pace.told(920_000_000, 1_000_000_000) == "920.0 of 1,000.0 MB, 10.0 MB/s, 8 s left"
    now = 60.0
    assert pace.told(0, 1_000_000_000) == "0.0 of 1,000.0 MB", "it began again"
    now = 62.0
    assert pace.told(2_000_000, 10_000_000_000).endswith("1.0 MB/s, 2 h 47 min left")
