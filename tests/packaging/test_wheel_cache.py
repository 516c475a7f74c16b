"""The cache of compiled wheels gives back what was stored, whole, or nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from scripts.wheel_cache import RECORD, WheelCache, cache_folder, exclusive
from scripts.wheel_key import Ingredients

ROOT = Path(__file__).resolve().parents[2]
NAME = "llama_cpp_python-0.3.36-py3-none-any.whl"
SOME = Ingredients("0.3.36", "cpython311", "Linux", "cc", "avx2", "", ())


def a_wheel(folder: Path, text: str = "library") -> Path:
    path = folder / NAME
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llama_cpp/lib/libllama.so", text * 1000)
    return path


@pytest.fixture
def cache(tmp_path: Path) -> WheelCache:
    return WheelCache(tmp_path / "wheels")


def store(cache: WheelCache, text: str = "library") -> Path:
    with cache.building() as folder:
        return cache.store(a_wheel(folder, text), SOME)


def test_a_stored_wheel_is_found_under_its_key_only(cache: WheelCache) -> None:
    stored = store(cache)
    assert cache.find(SOME.key()) == stored
    assert stored.name == NAME
    assert cache.find("0" * 32) is None


def test_the_record_tells_what_the_wheel_was_made_of(cache: WheelCache) -> None:
    record = json.loads((store(cache).parent / RECORD).read_text())
    assert record["ingredients"]["compiler"] == "cc"
    assert record["file"] == NAME


def test_nothing_but_the_entry_is_left_behind(cache: WheelCache) -> None:
    store(cache)
    assert os.listdir(cache.folder) == [SOME.key()]  # noqa: PTH208
    assert sorted(os.listdir(cache.folder / SOME.key())) == [NAME, RECORD]  # noqa: PTH208


def test_a_build_that_fails_leaves_nothing(cache: WheelCache) -> None:
    with pytest.raises(RuntimeError), cache.building() as folder:
        a_wheel(folder)
        raise RuntimeError("the compiler crashed")
    assert list(cache.folder.iterdir()) == []


@pytest.mark.parametrize("kind", ["flipped byte", "truncated", "empty", "gone"])
def test_a_damaged_wheel_is_never_given_out_and_can_be_stored_again(
    cache: WheelCache, kind: str
) -> None:
    wheel = store(cache)
    data = bytearray(wheel.read_bytes())
    data[len(data) // 2] ^= 1
    if kind == "flipped byte":
        wheel.write_bytes(data)
    elif kind == "truncated":
        wheel.write_bytes(data[:-10])
    elif kind == "empty":
        wheel.write_bytes(b"")
    else:
        wheel.unlink()
    assert cache.find(SOME.key()) is None
    assert store(cache) == wheel
    assert cache.find(SOME.key()) == wheel


@pytest.mark.parametrize(
    "record", ["", "[]", "{}", '{"file": "../x.whl"}', '{"file": 3}', "not json", "\x00\x01"]
)
def test_a_damaged_record_counts_as_no_wheel(cache: WheelCache, record: str) -> None:
    wheel = store(cache)
    (wheel.parent / RECORD).write_text(record)
    assert cache.find(SOME.key()) is None


def test_a_wheel_that_is_not_a_sound_archive_is_refused(cache: WheelCache) -> None:
    with cache.building() as folder:
        wheel = a_wheel(folder)
        data = bytearray(wheel.read_bytes())
        data[60] ^= 0xFF  # inside the compressed member
        wheel.write_bytes(data)
        with pytest.raises((ValueError, zipfile.BadZipFile)):
            cache.store(wheel, SOME)
    assert cache.find(SOME.key()) is None


def test_storing_a_key_that_is_there_keeps_a_sound_wheel(cache: WheelCache) -> None:
    first = store(cache, "one")
    assert store(cache, "two") == first
    assert cache.find(SOME.key()) == first


def test_a_half_written_entry_without_its_name_is_ignored(cache: WheelCache) -> None:
    leftover = cache.folder / ".building-killed" / "entry"
    leftover.mkdir(parents=True)
    a_wheel(leftover)
    assert cache.find(SOME.key()) is None
    assert store(cache).exists()


def test_the_cache_follows_xdg_then_home(tmp_path: Path) -> None:
    xdg = {"XDG_CACHE_HOME": str(tmp_path / "x"), "HOME": str(tmp_path)}
    assert cache_folder(xdg, "Linux") == tmp_path / "x" / "edgeinfer"
    assert cache_folder({"HOME": str(tmp_path)}, "Linux") == tmp_path / ".cache" / "edgeinfer"
    mac = cache_folder({"HOME": str(tmp_path)}, "Darwin")
    assert mac == tmp_path / "Library" / "Caches" / "edgeinfer"


def test_an_unusable_home_still_gives_a_folder_of_ones_own(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    folder = cache_folder({"HOME": str(blocked)}, "Linux")
    assert folder.is_dir()
    assert folder.stat().st_uid == os.getuid()


def hold(path: Path, log: Path, number: int) -> None:
    with exclusive(path):
        for _ in range(50):
            with log.open("a") as file:
                file.write(f"{number}\n")


def test_the_lock_lets_one_process_in_at_a_time(tmp_path: Path) -> None:
    log = tmp_path / "log"
    context = multiprocessing.get_context("spawn")
    arguments = [(tmp_path / "locks" / "lock", log, number) for number in range(3)]
    processes = [context.Process(target=hold, args=given) for given in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    lines = log.read_text().split()
    blocks = [line for i, line in enumerate(lines) if i == 0 or lines[i - 1] != line]
    assert len(lines) == 150
    assert sorted(blocks) == ["0", "1", "2"]


def test_an_orphaned_child_keeps_the_lock_of_a_killed_holder(tmp_path: Path) -> None:
    holder = (
        "import os, signal, subprocess, sys, pathlib\n"
        "from scripts.wheel_cache import exclusive\n"
        "with exclusive(pathlib.Path(sys.argv[1])):\n"
        "    child = subprocess.Popen(['cat'], stdin=0, stdout=subprocess.DEVNULL, close_fds=False)\n"
        "    print('ready', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    lock = tmp_path / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    ) as killed:
        assert killed.stdin is not None and killed.stdout is not None
        assert killed.stdout.readline() == b"ready\n"
        killed.wait(30)
        end_of_child = killed.stdin.close
        told: list[str] = []

        def wait() -> None:
            told.append("waiting")
            end_of_child()

        with exclusive(lock, wait):
            assert told == ["waiting"]


def test_who_must_wait_for_the_lock_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=hold, args=(tmp_path / "lock", tmp_path / "log", 1))
    with exclusive(tmp_path / "lock", lambda: told.append("me")):
        child.start()
        child.join(1.0)
        assert child.is_alive()
        assert not (tmp_path / "log").exists()
    child.join(60)
    assert (tmp_path / "log").exists()
    assert told == []
