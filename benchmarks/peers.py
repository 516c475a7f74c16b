"""llama.cpp's own programs, built from the source package of the installed llama-cpp-python.

So that a comparison is about edgeinfer and not about two versions of llama.cpp or two sets of compiler
flags. Kept in the user's cache folder under the wheel's key; EDGEINFER_PEERS names a folder that already
holds the programs. `python -m benchmarks.peers llama-bench` builds and prints where they are.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from scripts.setup_environment import pip_environment, read_json
from scripts.wheel_cache import cache_folder, exclusive
from scripts.wheel_key import build_environment, check_accel, gather

PROGRAMS = (
    "llama-bench",
    "llama-cli",
    "llama-quantize",
    "llama-server",
    "llama-perplexity",
    "llama-imatrix",
)
PACKAGE = "llama-cpp-python"


class PeerError(Exception):
    """The peers could not be had. `str(error)` is one line."""


def peer(program: str) -> Path:
    """The path of one of PROGRAMS, built now if it never was. Raises PeerError."""
    return build([program])[program]


def build(programs: Sequence[str] = PROGRAMS) -> dict[str, Path]:
    """The programs' paths. Takes minutes the first time. Raises PeerError."""
    unknown = sorted(set(programs) - set(PROGRAMS))
    if unknown:
        raise PeerError(f"{', '.join(unknown)}: not one of {', '.join(PROGRAMS)}")
    given = os.environ.get("EDGEINFER_PEERS")
    if given:
        found = {name: path for name in programs if (path := _program(Path(given), name)) is not None}
        missing = sorted(set(programs) - found.keys())
        if missing:
            raise PeerError(f"EDGEINFER_PEERS={given} has no {', '.join(missing)}")
        return found
    version = importlib.metadata.version(PACKAGE)
    accel = check_accel(_installed_accel())
    folder = cache_folder() / "peers" / gather(version, accel).key()
    with exclusive(folder.with_suffix(".lock"), lambda: _say("waiting for another build to end")):
        missing = sorted(name for name in programs if not (folder / "built" / name).exists())
        if missing:
            _build(folder, version, accel, missing)
    return {name: folder / "bin" / name for name in programs}


def source_package() -> Path:
    """llama-cpp-python's source package, unpacked, for its examples. Raises PeerError."""
    version = importlib.metadata.version(PACKAGE)
    folder = cache_folder() / "peers" / gather(version, check_accel(_installed_accel())).key()
    with exclusive(folder.with_suffix(".lock"), lambda: _say("waiting for another build to end")):
        folder.mkdir(parents=True, exist_ok=True)
        return _source(folder, version)


def _build(folder: Path, version: str, accel: str, programs: Sequence[str]) -> None:
    """Configure and build; a program counts as built only when its marker was written after it."""
    folder.mkdir(parents=True, exist_ok=True)
    source = _source(folder, version)
    environment = build_environment(accel)
    cmake = _cmake()
    configure = [
        *cmake,
        *("-S", str(source / "vendor" / "llama.cpp"), "-B", str(folder)),
        "-DCMAKE_BUILD_TYPE=Release",
        "-DBUILD_SHARED_LIBS=ON",
        "-DLLAMA_BUILD_TESTS=OFF",
        "-DLLAMA_BUILD_EXAMPLES=OFF",
        "-DLLAMA_BUILD_UI=OFF",
        "-DLLAMA_CURL=OFF",
        "-DLLAMA_OPENSSL=OFF",
        *(["-DGGML_METAL_EMBED_LIBRARY=ON"] if platform.system() == "Darwin" else []),
        # CMake itself does not read CMAKE_ARGS; scikit-build-core passes it on, and so does this.
        *shlex.split(environment.get("CMAKE_ARGS", "")),
    ]
    jobs = environment.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
    log = folder / "build.log"
    _say(f"building {', '.join(programs)} of {PACKAGE} {version}: about 10 minutes (log: {log})")
    with log.open("wb") as output:
        _step(configure, environment, output.fileno(), log)
        _step(
            [*cmake, "--build", str(folder), "--parallel", jobs, "--target", *programs],
            environment,
            output.fileno(),
            log,
        )
    (folder / "built").mkdir(exist_ok=True)
    for name in programs:
        if not (folder / "bin" / name).exists():
            raise PeerError(f"the build ended without {folder / 'bin' / name}; see {log}")
        (folder / "built" / name).touch()


def _source(folder: Path, version: str) -> Path:
    """The unpacked source package of `version`."""
    source = folder / f"llama_cpp_python-{version}"
    if (source / ".complete").exists():
        return source
    _say(f"getting the source package of {PACKAGE} {version}")
    with tempfile.TemporaryDirectory(prefix=".source-", dir=folder) as temporary:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            PACKAGE,
        ]
        done = subprocess.run(
            [*command, "--dest", temporary, f"{PACKAGE}=={version}"],
            env=pip_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
        archives = sorted(Path(temporary).glob("*.tar.gz"))
        if done.returncode != 0 or len(archives) != 1:
            reason = done.stderr.decode(errors="replace").strip().splitlines() or ["no archive"]
            raise PeerError(f"pip could not download {PACKAGE} {version}: {reason[-1]}")
        with tarfile.open(archives[0]) as archive:
            archive.extractall(temporary, filter="data")
        unpacked = Path(temporary) / source.name
        (unpacked / ".complete").touch()
        shutil.rmtree(source, ignore_errors=True)
        unpacked.rename(source)
    return source


def _cmake() -> list[str]:
    """A cmake command: the system's, or one from pip in a folder of its own."""
    if shutil.which("cmake"):
        return ["cmake"]
    tools = cache_folder() / "cmake"
    program = tools / "bin" / "cmake"
    if not program.exists():
        _say("getting cmake")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(tools)], check=True)
        install = [str(tools / "bin" / "python"), "-m", "pip", "install", "--quiet", "cmake"]
        subprocess.run(install, check=True, env=pip_environment())
    return [str(program)]


def _installed_accel() -> str:
    return str(read_json(Path(sys.prefix) / "edgeinfer-setup.json").get("accel", ""))


def _program(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / "bin" / name) if path.is_file()), None)


def _step(command: Sequence[str], environment: dict[str, str], output: int, log: Path) -> None:
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    except OSError as error:
        raise PeerError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        raise PeerError(f"`{' '.join(command[:3])} …` ended with {done.returncode}; see {log}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    try:
        for path in build(sys.argv[1:] or PROGRAMS).values():
            print(path)
    except PeerError as error:
        _say(f"peers: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
