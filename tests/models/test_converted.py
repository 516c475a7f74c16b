"""Models that were converted for a backend: kept once, used while they are right, never half."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeinfer.errors import ConversionFailed, ModelFileInvalid, UnsupportedModel
from edgeinfer_models import converted
from edgeinfer_models.conversion.conversion import Container, kept_dtype
from edgeinfer_models.converted import (
    ConvertedModel,
    converted_folder,
    converted_of,
    damaged_converted,
    find_converted,
    has_converted,
    list_converted,
    make_converted,
    remove_converted,
    source_of,
)
from edgeinfer_models.gguf_model import read_gguf_model
from edgeinfer_models.model_files import ModelFiles
from edgeinfer_models.resolve import resolve_model
from edgeinfer_models.safetensors_header import read_safetensors_folder
from edgeinfer_models.store import data_folder
from tests.fixtures_gguf import write_tiny_gguf
from tests.fixtures_hf import write_tiny_folder

pytest.importorskip("tokenizers", reason="the tiny folder's tokenizer is made by it")


def files_of(path: Path) -> ModelFiles:
    return resolve_model(str(path)).files


def never_waits() -> None:
    raise AssertionError("nobody else has it")


def made(
    path: Path,
    to: Container = "gguf",
    progress: Callable[[float], None] = lambda _: None,
    on_wait: Callable[[], None] = never_waits,
) -> ConvertedModel:
    files = files_of(path)
    return make_converted(source_of(files), files, to, progress, on_wait)


def left() -> list[str]:
    """What is in the folder of conversions, but for locks, which are empty."""
    if not converted_folder().exists():
        return []
    return sorted(path.name for path in converted_folder().iterdir() if path.suffix != ".lock")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_folder(tmp_path / "tiny")


def test_a_folder_is_converted_once_and_found_from_then_on(folder: Path) -> None:
    assert find_converted(files_of(folder), "gguf") is None
    shares: list[float] = []
    found = made(folder, progress=shares.append)
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert found.path.parent.parent == data_folder() / "converted"
    assert (found.to, found.dtype, found.source_type, found.notes) == ("gguf", "F32", "F32", ())
    assert found.source == str(folder.resolve())
    assert found.num_bytes == found.path.stat().st_size
    assert {tensor.type_name for tensor in read_gguf_model(found.path).tensors} == {"F32"}
    assert find_converted(files_of(folder), "gguf") == found
    assert find_converted(files_of(folder / "model.safetensors"), "gguf") == found
    assert list_converted() == (found,)
    again: list[float] = []
    assert made(folder, progress=again.append) == found and again == []


@pytest.mark.parametrize("weight_type", ["F32", "F16", "Q8_0"])
def test_a_gguf_file_becomes_a_folder_of_one_type(tmp_path: Path, weight_type: Any) -> None:
    path = write_tiny_gguf(tmp_path / "t.gguf", weight_type=weight_type)
    found = made(path, "safetensors")
    dtype = "F32" if weight_type == "F32" else "F16"
    assert (found.dtype, found.source_type) == (dtype, weight_type)
    assert {tensor.dtype for tensor in read_safetensors_folder(found.path).tensors} == {dtype}
    assert resolve_model(str(found.path)).files.format == "safetensors"


@pytest.mark.parametrize(
    ("types", "kept"),
    [
        ({"BF16": 100}, "BF16"),
        ({"F16": 100, "F32": 1}, "F16"),
        ({"F32": 100, "BF16": 1}, "F32"),
        ({"F64": 100}, "F32"),
        ({"Q4_K": 100, "Q6_K": 40, "F32": 1}, "F16"),
        ({"BF16": 100, "Q8_0": 90}, "F16"),  # BF16 would round what Q8_0 still has
        ({"F8_E4M3": 100, "BF16": 20}, "F16"),
        ({"I32": 100, "F16": 20}, "F16"),
        ({}, "F16"),
    ],
)
def test_weights_keep_their_type_and_those_of_fewer_bits_become_f16(
    types: dict[str, int], kept: str
) -> None:
    assert kept_dtype(types.items()) == kept


def test_a_changed_original_is_converted_anew_and_the_old_result_goes(folder: Path) -> None:
    first = made(folder)
    before = first.path.read_bytes()
    shutil.rmtree(folder)
    write_tiny_folder(folder, seed=5)
    assert find_converted(files_of(folder), "gguf") is None
    second = made(folder)
    assert second.path == first.path and second.path.read_bytes() != before
    assert left() == [second.name]
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rope_theta": 5e5}))
    assert find_converted(files_of(folder), "gguf") is None


def test_another_converter_version_does_not_use_what_an_older_one_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(folder)
    monkeypatch.setattr(converted, "CONVERTER_VERSION", 10**6)
    assert find_converted(files_of(folder), "gguf") is None


def flip_a_byte(found: ConvertedModel) -> None:
    time.sleep(0.02)  # file systems tell times by the kernel's tick
    data = bytearray(found.path.read_bytes())
    data[len(data) // 2] ^= 1
    found.path.write_bytes(data)


DAMAGES: dict[str, Callable[[ConvertedModel], object]] = {
    "a changed byte": flip_a_byte,
    "cut off": lambda found: os.truncate(found.path, 1000),
    "gone": lambda found: found.path.unlink(),
    "no description": lambda found: (found.path.parent / "about.json").unlink(),
    "another description": lambda found: (found.path.parent / "about.json").write_text('{"to": 3}'),
    "no JSON": lambda found: (found.path.parent / "about.json").write_text("[" * 10**5),
    "a path out of the folder": lambda found: (found.path.parent / "about.json").write_text(
        (found.path.parent / "about.json").read_text().replace('"content": "', '"content": "../')
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_result_is_told_never_used_and_replaced(folder: Path, damage: str) -> None:
    found = made(folder)
    whole = found.path.read_bytes()
    DAMAGES[damage](found)
    assert find_converted(files_of(folder), "gguf") is None
    assert list_converted() == ()
    (line,) = damaged_converted()
    assert f"`edgeinfer models rm {found.name}`" in line
    assert made(folder).path.read_bytes() == whole
    assert damaged_converted() == ()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_result_can_be_removed(folder: Path, damage: str) -> None:
    found = made(folder)
    DAMAGES[damage](found)
    assert has_converted(found.name)
    remove_converted(found.name)
    assert left() == []


def test_two_folders_of_one_name_have_results_of_their_own(tmp_path: Path) -> None:
    one = write_tiny_folder(tmp_path / "a" / "tiny")
    other = write_tiny_folder(tmp_path / "b" / "tiny", seed=7)
    assert made(one).path.read_bytes() != made(other).path.read_bytes()
    assert find_converted(files_of(one), "gguf") is not None
    assert [each.source for each in converted_of([other])] == [str(other.resolve())]


def test_results_are_found_by_the_paths_of_an_original_that_is_gone(folder: Path) -> None:
    found = made(folder)
    assert not found.is_orphan
    shutil.rmtree(folder)
    assert found.is_orphan
    for path in (folder, folder / "model.safetensors"):
        assert converted_of([path]) == (found,)
    assert converted_of([folder.parent / "other", Path("a\0b")]) == ()
    assert remove_converted(found.name) > found.num_bytes
    assert left() == []


def test_of_an_installed_model_the_digest_counts_and_not_the_time(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "t.gguf")
    files = replace(files_of(path), digest="ab")
    found = make_converted(source_of(files), files, "safetensors", lambda _: None, never_waits)
    os.utime(path, ns=(1, 1))
    assert find_converted(files, "safetensors") == found
    assert find_converted(replace(files, digest="cd"), "safetensors") is None


# -- what can happen on the way --------------------------------------------------------------------


@pytest.mark.parametrize("kind", [KeyboardInterrupt, UnsupportedModel])
def test_whoever_is_told_the_progress_can_end_it_and_nothing_is_left(
    folder: Path, kind: type[BaseException]
) -> None:
    def stop(share: float) -> None:
        raise kind("enough")

    with pytest.raises(kind):
        made(folder, progress=stop)
    assert left() == []
    assert made(folder).path.exists()


def in_process(path: Path, then: str = "") -> subprocess.Popen[bytes]:
    """A conversion to GGUF elsewhere, which says `writing` and goes on when it may read a line."""
    code = f"""
        import sys
        from edgeinfer_models.converted import make_converted, source_of
        from edgeinfer_models.resolve import resolve_model
        {then}
        files = resolve_model({str(path)!r}).files
        told = []
        def progress(share):
            if not told:
                told.append(share)
                print("writing", flush=True)
                sys.stdin.readline()
        try:
            make_converted(source_of(files), files, "gguf", progress, lambda: None)
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:
            print(f"{{type(error).__name__}}: {{error}}", flush=True)
            sys.exit(1)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"writing\n"
    return process


def end(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    out, _ = process.communicate(timeout=60)
    return process.returncode, out.decode()


def test_ctrl_c_leaves_nothing(folder: Path) -> None:
    process = in_process(folder)
    process.send_signal(signal.SIGINT)
    assert end(process)[0] == 130
    assert left() == []


def test_what_a_kill_leaves_is_never_used_and_goes_with_the_next_conversion(
    folder: Path, tmp_path: Path
) -> None:
    process = in_process(folder)
    process.send_signal(signal.SIGKILL)
    end(process)
    assert [name[0] for name in left()] == ["."]
    assert find_converted(files_of(folder), "gguf") is None
    assert (list_converted(), damaged_converted()) == ((), ())
    other = made(write_tiny_folder(tmp_path / "other"))
    assert left() == [other.name]


def test_two_processes_convert_a_model_once(folder: Path) -> None:
    process = in_process(folder)
    waited, shares = threading.Event(), list[float]()

    def on_wait() -> None:
        if not waited.is_set():
            waited.set()
            assert process.stdin is not None
            process.stdin.write(b"go on\n")
            process.stdin.flush()

    found = made(folder, progress=shares.append, on_wait=on_wait)
    assert end(process) == (0, "")
    assert waited.is_set() and shares == []  # it was the other one that wrote it
    assert left() == [found.name]


def test_what_is_being_made_is_not_removed(folder: Path) -> None:
    found = made(folder)
    os.utime(folder / "model.safetensors", ns=(1, 1))  # it has to be made anew
    process = in_process(folder)
    with pytest.raises(ConversionFailed, match="another edgeinfer is making it"):
        remove_converted(found.name)
    assert process.stdin is not None
    process.stdin.write(b"go on\n")
    assert end(process) == (0, "")
    assert left() == [found.name]


def test_a_disk_without_room_is_one_line_before_anything_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(ConversionFailed, match=r"needs .* where the disk has .* EDGEINFER_DATA_DIR"):
        made(folder)
    assert left() == []


def test_a_disk_that_takes_no_more_leaves_nothing(folder: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    process = in_process(folder, limit)
    assert process.stdin is not None
    process.stdin.write(b"go on\n")
    code, out = end(process)
    assert (code, out.count("\n")) == (1, 1)
    assert out.startswith("ConversionFailed: tiny: the disk took no more while it was converted")
    assert left() == []


def test_a_data_folder_that_cannot_be_written_to_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEINFER_DATA_DIR", str(folder / "config.json" / "data"))
    with pytest.raises(ConversionFailed, match=f"{os.strerror(errno.ENOTDIR)}.*EDGEINFER_DATA_DIR"):
        made(folder)


def test_an_original_that_changes_meanwhile_is_not_taken(folder: Path) -> None:
    with pytest.raises(ModelFileInvalid, match="changed while it was converted"):
        made(folder, progress=lambda _: os.utime(folder / "model.safetensors", ns=(1, time.time_ns())))
    assert left() == []


def test_a_model_that_cannot_be_converted_says_why(tmp_path: Path) -> None:
    folder = write_tiny_folder(
        tmp_path / "packed", config={"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}
    )
    with pytest.raises(UnsupportedModel, match="weights that MLX quantized in the mode 'mxfp4'"):
        source_of(files_of(folder))
