"""Conversations that survive their process: what is written, found again, refused and removed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from edgeinfer.backend import RuntimeSettings
from edgeinfer.engine import block_files, disk_cache
from edgeinfer.engine.cache_report import cached_models, clear, verify
from edgeinfer.engine.disk_cache import DiskCache, make_room, stored_blocks
from edgeinfer.engine.engine import Engine
from edgeinfer.engine.window import Window
from edgeinfer_backends.scripted import SCRIPTED_FILES, Script, ScriptedBackend
from tests.engine.test_engine import alone, asked, tokens_of
from tests.engine.test_eviction import PlainModel, Talk, streamed

MIB = 2**20


class Process:
    """An engine with a cache on disk, and its end: as a process, but for the weight of one."""

    def __init__(
        self,
        folder: Path,
        *,
        script: Script | None = None,
        cache_bytes: int = 2**26,
        capacity: int = 2**30,
        size: int = 4096,
        context: int = 4096,
    ) -> None:
        settings = RuntimeSettings(context=context, step_tokens=256)
        runtime = ScriptedBackend(script or Script()).load(SCRIPTED_FILES, settings, lambda _: True)
        self.disk = DiskCache(folder, runtime.identity(), capacity)
        self.engine = Engine(
            runtime,
            model="scripted",
            cache_bytes=cache_bytes,
            disk=self.disk,
            window=Window.of(context, size),
        )
        self.engine._prefill_s_per_token = (
            0.01  # as if it were a large model: everything is worth a file
        )
        self.engine._learn_rate = lambda seconds, tokens: None  # type: ignore[method-assign]
        self.talk = Talk(self.engine)

    def __enter__(self) -> Talk:
        return self.talk

    def __exit__(self, *_: object) -> None:
        self.engine.close(10.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "prompts"


def blocks_in(folder: Path) -> list[Path]:
    return [block.path for block in stored_blocks(folder)]


def only_block(folder: Path) -> Path:
    (path,) = blocks_in(folder)
    return path


# -- a restart -------------------------------------------------------------------------------------


def test_the_next_turn_after_a_restart_reads_only_what_is_new(folder: Path) -> None:
    history = tokens_of(1, 700)
    with Process(folder) as talk:
        history += talk.ask(1, history)
    history += tokens_of(2, 20)
    with Process(folder) as talk:
        answer = talk.ask(1, history)
        assert talk.num_prefilled(1) == 21  # the last token of the answer was never computed
        assert talk.stats(1).cache.tier == "disk"
        assert talk.stats(1).warnings == []
    fresh = Talk(
        Engine(ScriptedBackend().load(SCRIPTED_FILES, RuntimeSettings(), lambda _: True), model="")
    )
    assert fresh.ask(1, history) == answer


def test_a_conversation_that_was_evicted_from_survives_too(folder: Path) -> None:
    plain = PlainModel()
    history: list[int] = []
    for turn in range(30):
        with Process(folder, size=96) as talk:
            new = tokens_of(turn, 18)
            answer = talk.ask(turn, [*history, *new], 16)
            assert answer == plain.ask(new, 16), turn
            if turn:
                assert talk.num_prefilled(turn) == len(new) + 1
                assert talk.stats(turn).cache.tier == "disk"
            history += [*new, *answer]
    assert plain.history[:40] != [plain.history[index] for index in plain.cells[:40]]


def test_another_context_does_not_matter(folder: Path) -> None:
    history = tokens_of(1, 300)
    with Process(folder, context=512, size=512) as talk:
        history += talk.ask(1, history)
    with Process(folder, context=2048) as talk:
        talk.ask(1, [*history, 97])
        assert talk.num_prefilled(1) == 2


def test_two_processes_share_what_they_write(folder: Path) -> None:
    one, other = Process(folder), Process(folder)
    prompt = tokens_of(1, 512)
    with one, other:
        one.talk.ask(1, [*prompt, *tokens_of(2, 9)])
        while one.engine.use_idle():
            pass
        assert one.disk.wait(10)
        time.sleep(0.06)
        other.talk.ask(1, [*prompt, *tokens_of(3, 9)])
        assert other.talk.stats(1).cache.tier == "disk"
        assert other.talk.stats(1).usage.cached_tokens == 512


def test_without_memory_for_it_the_disk_is_enough(folder: Path) -> None:
    history = tokens_of(1, 700)
    with Process(folder, cache_bytes=0) as talk:
        history += talk.ask(1, history)
        while talk.engine.use_idle():
            pass
        talk.ask(2, tokens_of(5, 300))  # which sends the other one away
        disk = talk.engine.conversations.prefixes.disk
        assert disk is not None and disk.wait(10)
        time.sleep(0.06)
        talk.ask(3, [*history, 97])
        assert talk.num_prefilled(3) == 2
        assert talk.stats(3).cache.tier == "disk"
        assert disk.wait(10)
        time.sleep(0.06)
        talk.engine.conversations.prefixes.refresh()
        assert talk.engine.status().cache_bytes == 0


def test_where_nothing_was_measured_a_long_conversation_is_written(folder: Path) -> None:
    for count in (100, 200):
        process = Process(folder)
        process.engine._prefill_s_per_token = 0.0
        with process as talk:
            talk.ask(1, tokens_of(1, count))
        assert bool(blocks_in(folder)) == (count == 200)


def test_what_is_read_faster_than_restored_is_not_written(folder: Path) -> None:
    process = Process(folder)
    process.engine._prefill_s_per_token = 1e-9
    with process as talk:
        talk.ask(1, tokens_of(1, 700))
    assert blocks_in(folder) == []


# -- what it costs ---------------------------------------------------------------------------------


def test_a_turn_writes_only_its_new_blocks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = disk_cache.write_block

    def counted(*arguments: object) -> int:
        sizes.append(real(*arguments))  # type: ignore[arg-type]
        return sizes[-1]

    monkeypatch.setattr(disk_cache, "write_block", counted)
    history: list[int] = []
    after: list[int] = []
    with Process(folder) as talk:
        for turn in range(30):
            history += tokens_of(turn, 60)
            history += talk.ask(turn, history, 40)
            while talk.engine.use_idle():
                pass
            disk = talk.engine.conversations.prefixes.disk
            assert disk is not None and disk.wait(10)
            after.append(sum(sizes))
    block = max(sizes)
    assert all(later - earlier <= block for earlier, later in pairwise(after))
    assert sum(sizes) <= (len(history) // 256 + 1) * block


def test_a_longer_tail_takes_the_place_of_a_shorter_one(folder: Path) -> None:
    history = tokens_of(1, 100)
    for turn in range(4):
        with Process(folder) as talk:
            history += talk.ask(1, history)
            history += tokens_of(turn, 10)
        assert len(blocks_in(folder)) == 1


def test_the_least_recently_used_go_first_and_pinned_ones_never(folder: Path) -> None:
    prompts = [tokens_of(seed, 256) for seed in range(6)]
    with Process(folder) as talk:
        for key, prompt in enumerate(prompts):
            talk.ask(key, [*prompt, 97], 1)
    blocks = stored_blocks(folder)
    full = [block for block in blocks if block.num_bytes > 4000]
    assert len(full) == 6
    for age, block in enumerate(full):
        os.utime(block.path, (1000 + age, 1000 + age))
    full[0].path.with_suffix(".pin").touch()
    total = sum(block.num_bytes for block in blocks)
    make_room(folder, total - full[0].num_bytes)
    left = set(blocks_in(folder))
    assert full[0].path in left
    assert full[1].path not in left
    assert full[-1].path in left


def test_room_is_made_while_blocks_are_written(folder: Path) -> None:
    with Process(folder, capacity=30_000) as talk:
        for key in range(12):
            talk.ask(key, tokens_of(key, 600))
    assert 0 < sum(block.num_bytes for block in stored_blocks(folder)) <= 30_000


# -- faults ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["flip", "truncate", "empty", "foreign", "renamed", "folder"])
def test_a_bad_file_is_a_reported_miss_and_gone(folder: Path, fault: str) -> None:
    prompt = tokens_of(1, 250)
    with Process(folder) as talk:
        expected = talk.ask(1, prompt, 5)
    path = only_block(folder)
    data = path.read_bytes()
    if fault == "flip":
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    elif fault == "truncate":
        path.write_bytes(data[:-1])
    elif fault == "empty":
        path.write_bytes(b"")
    elif fault == "foreign":
        path.write_bytes(data[:8] + bytes(16) + data[24:])
    elif fault == "renamed":
        path = path.rename(path.with_name("00" * 16 + ".kv"))
    else:
        path.unlink()
        path.mkdir()
    with Process(folder) as talk:
        assert talk.ask(1, prompt, 5) == expected
        assert talk.num_prefilled(1) == len(prompt)
        assert talk.stats(1).cache.tier == "none"
        if fault != "folder":
            assert any("prompt cache" in warning for warning in talk.stats(1).warnings)
            assert not path.exists() or read_again(path)


def read_again(path: Path) -> bool:
    """Whether the file is a good one: the answer's own, written since."""
    identity = bytes.fromhex(path.parent.name)
    return block_files.read_block(path, identity)[0].num_bytes > 0


def test_another_kv_types_blocks_are_not_looked_at(folder: Path) -> None:
    with Process(folder) as talk:
        talk.ask(1, tokens_of(1, 300))
    with Process(folder, script=Script(seed=7)) as talk:
        talk.ask(1, tokens_of(1, 300))
        assert talk.num_prefilled(1) == 300
        assert talk.stats(1).warnings == []
    assert len(list(folder.iterdir())) == 2


def test_a_file_that_a_runtime_refuses_is_gone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes are those that were written, and they are no snapshot."""
    prompt = tokens_of(1, 250)
    real = block_files.write_block
    with monkeypatch.context() as patch:
        patch.setattr(disk_cache, "write_block", lambda *given: real(*given[:-1], b"no snapshot"))
        with Process(folder) as talk:
            talk.ask(1, prompt, 5)
    bad = only_block(folder)
    with Process(folder) as talk:
        talk.ask(1, prompt, 5)
        assert any("was not used" in warning for warning in talk.stats(1).warnings)
        assert not bad.exists()


def test_a_full_disk_is_said_once_and_answers_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_cache, "write_block", full)
    with Process(folder) as talk:
        for key in range(4):
            talk.ask(key, tokens_of(key, 300))
        disk = talk.engine.conversations.prefixes.disk
        assert disk is not None and disk.wait(10)
        talk.ask(9, tokens_of(9, 10))
        told = [w for key in (0, 1, 2, 3, 9) for w in talk.stats(key).warnings if "No space left" in w]
        assert len(told) == 1
    assert blocks_in(folder) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_said(folder: Path) -> None:
    folder.mkdir(mode=0o500)
    with Process(folder) as talk:
        talk.ask(1, tokens_of(1, 300))
        assert any("cannot be written" in warning for warning in talk.stats(1).warnings)
    assert list(folder.iterdir()) == []


def test_a_file_where_the_folder_should_be_is_said(folder: Path) -> None:
    folder.write_text("mine")
    with Process(folder) as talk:
        talk.ask(1, tokens_of(1, 10))  # which would not be written
        (warning,) = talk.stats(1).warnings
        assert warning.startswith("the prompt cache on disk cannot be written (File exists)")
        talk.ask(2, tokens_of(2, 300))
        disk = talk.engine.conversations.prefixes.disk
        assert disk is not None and disk.wait(10)
        talk.ask(3, tokens_of(3, 30))
        assert not [*talk.stats(2).warnings, *talk.stats(3).warnings]  # it was said
    assert folder.read_text() == "mine"


def test_what_is_not_named_as_ours_is_left_alone(folder: Path) -> None:
    prompt = tokens_of(1, 250)
    with Process(folder) as talk:
        talk.ask(1, prompt, 5)
    own = only_block(folder).parent
    (own / "notes.kv").write_text("mine")
    (own / "folder.kv").mkdir()
    with Process(folder) as talk:
        talk.ask(1, prompt, 5)
        assert talk.num_prefilled(1) == 1
        (own / "folder.kv").rmdir()
        talk.ask(2, tokens_of(2, 20), 5)
        talk.ask(3, prompt, 5)
        assert talk.stats(3).warnings == []
    assert (own / "notes.kv").read_text() == "mine"


def test_clearing_the_folder_meanwhile_is_a_miss(folder: Path) -> None:
    history = tokens_of(1, 700)
    with Process(folder) as talk:
        history += talk.ask(1, history)
    with Process(folder) as talk:
        talk.engine.conversations.prefixes.refresh()
        for path in blocks_in(folder):
            path.unlink()
        answer = talk.ask(1, [*history, 97])
        assert talk.num_prefilled(1) == len(history) + 1
        assert len(answer) == 12


@pytest.mark.parametrize("seconds", [-(10**9), 10**9])
def test_a_clock_that_jumped_changes_nothing(folder: Path, seconds: int) -> None:
    history = tokens_of(1, 700)
    with Process(folder) as talk:
        history += talk.ask(1, history)
    for path in [*blocks_in(folder), *folder.iterdir()]:
        os.utime(path, (max(0, time.time() + seconds),) * 2)
    with Process(folder) as talk:
        talk.ask(1, [*history, 97])
        assert talk.num_prefilled(1) == 2


def test_what_a_killed_writer_left_goes_in_time(folder: Path) -> None:
    with Process(folder) as talk:
        talk.ask(1, tokens_of(1, 300))
    (own,) = folder.iterdir()
    for name, age in (("edgeinfer-old.part", 10_000), ("edgeinfer-new.part", 10)):
        (own / name).write_bytes(b"half a block")
        os.utime(own / name, (time.time() - age,) * 2)
    make_room(folder, 2**30)
    assert not (own / "edgeinfer-old.part").exists()
    assert (own / "edgeinfer-new.part").exists()


def test_what_is_not_ours_in_a_folder_that_was_chosen_stays(folder: Path) -> None:
    with Process(folder) as talk:
        talk.ask(1, tokens_of(1, 700))
    (own,) = folder.iterdir()
    others = [folder / "a film", own]
    names = ["film.part", "ui.kv", "notes.gap", "edgeinfer.part", f"{'f' * 32}.kv.bak"]
    strange = [place / name for place in others for name in names]
    strange.append(folder / "a film" / f"{'0' * 32}.kv")
    (folder / "a film").mkdir()
    for path in strange:
        path.write_bytes(b"somebody's")
        os.utime(path, (1.0, 1.0))
    make_room(folder, 0)
    assert not [path for path in own.glob("*.kv") if path not in strange]
    assert all(path.exists() for path in strange)
    clear(folder)
    assert all(path.exists() for path in strange)


def test_the_end_of_a_conversation_leaves_the_disk_before_its_beginning(folder: Path) -> None:
    history = tokens_of(1, 700)
    with Process(folder) as talk:
        for turn in range(3):
            history += talk.ask(turn, history)
            history += tokens_of(10 + turn, 300)
    blocks = stored_blocks(folder)
    make_room(folder, sum(block.num_bytes for block in blocks) * 2 // 3)
    left = len(stored_blocks(folder))
    assert 1 < left < len(blocks)
    with Process(folder) as talk:
        talk.ask(1, history)
        assert talk.num_prefilled(1) == len(history) - 256 * left


def test_a_pipe_named_as_a_block_is_not_waited_for(folder: Path) -> None:
    history = tokens_of(1, 700)
    with Process(folder) as talk:
        talk.ask(1, history)
    (own,) = folder.iterdir()
    os.mkfifo(own / f"{'0' * 32}.kv")
    os.mkfifo(own / f"{'0' * 32}.gap")
    (own / "identity.json").unlink()
    os.mkfifo(own / "identity.json")
    assert [model.model for model in cached_models(folder)] == ["unknown"]
    with Process(folder) as talk:
        talk.ask(1, [*history, 97])
        assert talk.num_prefilled(1) < 10
    assert not (own / f"{'0' * 32}.kv").exists()
    verify(folder)


def test_a_block_that_is_larger_than_a_block_can_be_is_not_read(folder: Path) -> None:
    with Process(folder) as talk:
        talk.ask(1, tokens_of(1, 700))
        identity = talk.engine.runtime.identity()
    (own,) = folder.iterdir()
    tokens = (1, 2, 3)
    key = block_files.block_key(b"", tokens)
    block_files.write_block(own, bytes.fromhex(own.name), key, b"", True, tokens, bytes(10_000))
    disk = DiskCache(folder, identity, 2**30, most_block_bytes=9_999)
    assert list(disk.read([key])) == [None]
    assert any("more than a block can have" in problem for problem in disk.take_problems())
    assert not (own / block_files.block_name(key)).exists()


def test_a_conversation_kept_in_a_larger_context_is_read_as_far_as_it_fits(folder: Path) -> None:
    history = tokens_of(1, 900)
    with Process(folder, context=1024) as talk:
        history += talk.ask(1, history)
    with Process(folder, context=512) as talk:
        talk.ask(1, history)
        assert not talk.stats(1).warnings or "not used" not in str(talk.stats(1).warnings)


def test_what_cannot_be_written_is_not_copied_again_and_again(folder: Path) -> None:
    """With no room in memory and a disk that takes nothing."""
    with Process(folder, cache_bytes=0) as talk:
        disk = talk.engine.conversations.prefixes.disk
        assert disk is not None
        disk._paused_until = time.monotonic() + 60
        talk.ask(1, tokens_of(1, 2000))
        steps = 0
        while talk.engine.use_idle():
            steps += 1
            assert steps < 20
        assert len(talk.engine.conversations.prefixes) == 0


def test_memory_stays_within_its_bound_while_blocks_are_read_from_disk(folder: Path) -> None:
    history = tokens_of(1, 3000)
    with Process(folder) as talk:
        talk.ask(1, history)
    size = max(block.num_bytes for block in stored_blocks(folder))
    with Process(folder, cache_bytes=3 * size) as talk:
        prefixes = talk.engine.conversations.prefixes
        prefixes.refresh()
        most = 0
        for found in prefixes.payloads(prefixes.match(history).blocks):
            assert found is not None
            most = max(most, prefixes.num_bytes)
        assert 0 < most <= prefixes.capacity
        prefixes.check_integrity()
        talk.ask(1, [*history, 97])
        assert talk.num_prefilled(1) < 10
        prefixes.check_integrity()


# -- real processes --------------------------------------------------------------------------------

WRITER = """
    import sys, itertools
    from pathlib import Path
    from edgeinfer.engine.block_files import block_key
    from edgeinfer.engine.disk_cache import DiskCache

    disk = DiskCache(Path(sys.argv[1]), {"weights": "x"}, 2**30)
    print("begun", flush=True)
    for n in itertools.count():
        tokens = (n % 40, 1, 2, 3)
        payload = bytes([n % 40]) * 300_000
        disk.write(block_key(b"", tokens), b"", True, tokens, payload)
        disk.wait(10)
        disk.remove(block_key(b"", ((n + 20) % 40, 1, 2, 3)))
"""


@pytest.fixture
def writers(folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two processes that write and remove the same keys as fast as they can."""
    code = textwrap.dedent(WRITER)
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    yield started
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_kill_at_any_moment_leaves_whole_files_only(
    folder: Path, writers: list[subprocess.Popen[bytes]]
) -> None:
    """50 kills, while another process writes the same keys."""
    code = textwrap.dedent(WRITER)
    identity = block_files.identity_digest({"weights": "x"})
    own = folder / identity.hex()
    checked = 0
    for kill in range(50):
        victim = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE)
        assert victim.stdout is not None and victim.stdout.readline() == b"begun\n"
        time.sleep(0.002 * kill)
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
        for path in list(own.glob("*.kv")):
            try:
                header, payload = block_files.read_block(path, identity)
            except FileNotFoundError:  # the other process removed it just now
                continue
            assert payload == bytes([header.tokens[0]]) * 300_000
            checked += 1
    assert checked > 50


def test_streaming_and_stopping_requests_do_not_mix(folder: Path) -> None:
    """A prompt that fits is answered as if alone, whatever was evicted from a longer one before."""
    prompt = tokens_of(1, 60)
    with Process(folder, size=96) as talk:
        talk.submit(1, streamed(prompt, 200))
        talk.run()
    with Process(folder, size=96) as talk:
        talk.submit(1, asked(prompt))
        talk.run()
        assert talk.answer(1) == alone(prompt)
