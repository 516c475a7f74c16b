"""Cache files that are damaged, foreign or cannot be written: never another answer, never a crash.

A tiny model of random weights, real files, real engines. 10,000 flipped bytes, each time looked up anew
and now and then answered with; truncated files; those of another model and of another KV type under the
right name; a file system that is full and one that is read-only (mounted, which needs root); kill -9 at
50 moments of writing beside a process that writes the same keys; a clock that jumps.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.verdict import Bar, run_bar
from edgeinfer.backend import RuntimeSettings
from edgeinfer.engine import disk_cache
from edgeinfer.engine.block_files import BlockInvalid, block_name, read_block
from edgeinfer.engine.disk_cache import DiskCache
from edgeinfer.engine.engine import Engine
from edgeinfer.engine.prefix_cache import PrefixCache
from edgeinfer.engine.request import CacheStats, Ended, Request
from edgeinfer.measure.streams import GREEDY
from edgeinfer.registry import get_backend
from edgeinfer_models.resolve import resolve_model
from tests.fixtures_gguf import write_tiny_gguf

FLIPS, ANSWERED_EVERY, KILLS = 10_000, 250, 50
PROMPT = tuple(random.Random(1).choices(range(3, 250), k=400))  # both its blocks are needed


class Model:
    """A tiny model; each `engine` is as a process that has just started."""

    def __init__(self, path: Path, kv_type: str = "f16") -> None:
        self._files = resolve_model(str(path)).files
        self._kv_type = kv_type

    @contextmanager
    def engine(self, folder: Path) -> Iterator[Engine]:
        settings = RuntimeSettings(
            context=512, threads=1, threads_batch=1, kv_type_k=self._kv_type, kv_type_v=self._kv_type
        )
        runtime = get_backend("llamacpp").load(self._files, settings, lambda _: True)
        disk = DiskCache(folder, runtime.identity(), 2**30)
        engine = Engine(runtime, model="tiny", cache_bytes=2**28, disk=disk)
        engine._prefill_s_per_token = 0.01  # everything is worth a file
        engine._learn_rate = lambda seconds, tokens: None  # type: ignore[method-assign]
        yield engine
        engine.close(10.0)

    def identity(self, folder: Path) -> bytes:
        with self.engine(folder) as engine:
            disk = engine.conversations.prefixes.disk
            assert disk is not None
            return disk._identity


def answer(engine: Engine) -> tuple[str, CacheStats, list[str]]:
    request = Request(tokens=PROMPT, max_tokens=16, sampling=GREEDY, ignore_eos=True)
    engine.submit(1, request, PROMPT)
    while engine.has_work:
        for _, event in engine.step():
            if isinstance(event, Ended):
                assert event.outcome == "finished", event.error
                return event.stats.text, event.stats.cache, event.stats.warnings
    raise AssertionError("no answer")


def measure(bar: Bar) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        model = Model(write_tiny_gguf(root / "tiny.gguf", seed=1))
        folder = root / "prompts"
        with model.engine(folder) as engine:
            expected, _, _ = answer(engine)
        with model.engine(folder) as engine:
            again, cache, _ = answer(engine)
        bar.require(f"known from {cache.tier}, and the same answer", again == expected and cache.hit)
        _flips(bar, model, folder, expected)
        _truncated(bar, model, folder, expected)
        _foreign(bar, root, model, folder, expected)
        _clock(bar, model, folder, expected)
        _unwritable(bar, root, model, expected)
        _kills(bar, root)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.kv"))


def _damaged(model: Model, good: Path, expected: str, what: str) -> str:
    """One answer with a folder that is damaged; what was wrong with it, or ""."""
    before = set(_files(good))
    with model.engine(good) as engine:
        text, cache, warnings = answer(engine)
    if text != expected:
        return f"{what}: another answer"
    if cache.tokens > 256 or not any("prompt cache" in warning for warning in warnings):
        return f"{what}: used, or not reported: {cache} {warnings} {len(before)}"
    return ""


def _flips(bar: Bar, model: Model, folder: Path, expected: str) -> None:
    rng = random.Random(2)
    identity = model.identity(folder)
    originals = {path.name: path.read_bytes() for path in _files(folder)}
    payloads = {path.name: read_block(path, identity)[1] for path in _files(folder)}
    own = _files(folder)[0].parent
    wrong: list[str] = []
    used = kept = 0
    for trial in range(bar.options.flips):
        name = rng.choice(list(originals))
        data = bytearray(originals[name])
        at = rng.randrange(1400) if trial % 2 else rng.randrange(len(data))  # the header as often
        data[at % len(data)] ^= rng.randrange(1, 256)
        (own / name).write_bytes(data)
        if trial % ANSWERED_EVERY == 0:
            if problem := _damaged(model, folder, expected, f"flip at {at}"):
                wrong.append(problem)
        else:
            found = _looked_up(folder, identity)
            used += sum(payload != payloads[key] for key, payload in found.items())
            kept += (own / name).exists()
        for each, original in originals.items():
            (own / each).write_bytes(original)
    bar.require(f"{bar.options.flips} flipped bytes: {used} used, {kept} files kept", used + kept == 0)
    bar.require(f"answers with them: {len(wrong)} wrong {wrong[:1]}", not wrong)


def _looked_up(folder: Path, identity: bytes) -> dict[str, bytes]:
    """What a cache that has just started hands out for the prompt, by file."""
    disk = DiskCache(folder, {}, 2**30)
    disk._identity, disk._folder = identity, folder / identity.hex()
    cache = PrefixCache(2**28, disk)
    cache.refresh()
    found = {}
    match = cache.match(PROMPT)
    for payload, block in zip(cache.payloads(match.blocks), match.blocks, strict=False):
        if payload is not None:
            found[block_name(block.key)] = payload[0]
    disk.close(0)
    return found


def _truncated(bar: Bar, model: Model, folder: Path, expected: str) -> None:
    rng = random.Random(3)
    wrong = []
    originals = {path: path.read_bytes() for path in _files(folder)}
    for _ in range(20):
        for path, data in originals.items():
            path.write_bytes(data)
        path = rng.choice(list(originals))
        path.write_bytes(originals[path][: rng.randrange(len(originals[path]))])
        if problem := _damaged(model, folder, expected, "truncated"):
            wrong.append(problem)
    for path, data in originals.items():
        path.write_bytes(data)
    bar.require(f"20 truncated files: {len(wrong)} wrong {wrong[:1]}", not wrong)


def _foreign(bar: Bar, root: Path, model: Model, folder: Path, expected: str) -> None:
    """Files of another model, and of another KV type, in the place of this one's."""
    own = _files(folder)[0].parent
    for what, other in (
        ("another model", Model(write_tiny_gguf(root / "other.gguf", seed=9))),
        ("another KV type", Model(root / "tiny.gguf", kv_type="q8_0")),
    ):
        elsewhere = root / f"of {what}"
        with other.engine(elsewhere) as engine:
            answer(engine)
        originals = {path: path.read_bytes() for path in _files(folder)}
        copied = 0
        for path in originals:  # the first one has the prompt only, and so the same name
            for found in elsewhere.rglob(path.name):
                shutil.copy(found, own / path.name)
                copied += 1
        assert copied
        problem = _damaged(model, folder, expected, what)
        for path, data in originals.items():
            path.write_bytes(data)
        bar.require(f"files of {what} under the right names: {problem or 'refused'}", not problem)


def _clock(bar: Bar, model: Model, folder: Path, expected: str) -> None:
    hits = []
    for moment in (0.0, time.time() - 10**9, time.time() + 10**9):
        for path in [*_files(folder), *folder.iterdir()]:
            os.utime(path, (moment, moment))
        with model.engine(folder) as engine:
            text, cache, _ = answer(engine)
        hits.append(text == expected and cache.hit)
    bar.require(f"a clock that jumped: {sum(hits)} of {len(hits)} used as before", all(hits))


def _unwritable(bar: Bar, root: Path, model: Model, expected: str) -> None:
    disk_cache.SPARE_BYTES = 0  # else the smallest disk counts as full before it is
    for what, options in (("full", "size=64k"), ("read-only", "size=1m,ro")):
        place = root / what
        place.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if subprocess.run(mount, capture_output=True).returncode:
            bar.require(f"a {what} file system cannot be mounted here (it needs root)", False)
            continue
        try:
            with model.engine(place / "prompts") as engine:
                text, _, warnings = answer(engine)
                while engine.use_idle():
                    pass
                disk = engine.conversations.prefixes.disk
                assert disk is not None
                disk.wait(10)
                again, _, more = answer(engine)
            told = sum("cannot be written" in warning for warning in (*warnings, *more)) == 1
            left = _files(place)
            bar.require(
                f"a {what} file system: said {told}, {len(left)} files",
                text == again == expected and told and not left,
            )
        finally:
            subprocess.run(["umount", str(place)], check=True)


_WRITER = """
import sys, itertools
from pathlib import Path
from edgeinfer.engine.block_files import block_key
from edgeinfer.engine.disk_cache import DiskCache
disk = DiskCache(Path(sys.argv[1]), {"weights": "x"}, 2**30)
print("begun", flush=True)
for n in itertools.count():
    tokens = (n % 40, 1, 2, 3)
    disk.write(block_key(b"", tokens), b"", True, tokens, bytes([n % 40]) * 1_000_000)
    disk.wait(10)
    disk.remove(block_key(b"", ((n + 20) % 40, 1, 2, 3)))
"""


def _kills(bar: Bar, root: Path) -> None:
    folder = root / "written by two"
    command = [sys.executable, "-c", _WRITER, str(folder)]
    checked = wrong = 0
    beside = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        for kill in range(KILLS):
            victim = subprocess.Popen(command, stdout=subprocess.PIPE)
            assert victim.stdout is not None and victim.stdout.readline()
            time.sleep(0.003 * kill)
            victim.send_signal(signal.SIGKILL)
            victim.communicate()
            for path in _files(folder):
                with suppress(FileNotFoundError):  # the other one removed it just now
                    try:
                        header, payload = read_block(path, bytes.fromhex(path.parent.name))
                        wrong += payload != bytes([header.tokens[0]]) * 1_000_000
                    except BlockInvalid:
                        wrong += 1
                    checked += 1
    finally:
        beside.kill()
        beside.communicate()
    bar.require(f"{KILLS} kills: {checked} files read, {wrong} not whole", checked > KILLS and not wrong)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--flips", type=int, default=FLIPS)


if __name__ == "__main__":
    sys.exit(run_bar(__file__, str(__doc__), measure, add_options))
