"""Make `.venv` hold everything that runs here: `python3 -m scripts.setup_environment [--accel cpu]`.

1. A virtual environment with this Python.
2. llama-cpp-python, compiled for this machine, or the wheel an earlier set-up compiled for the very same
   version, compiler, CPU and options (wheel_key.py says what counts, wheel_cache.py keeps them).
3. edgeinfer itself, editable, with its development tools and MLX where there is one, at the versions of
   constraints.txt.

A stamp is written last, so an interrupted set-up goes on where it was, and one that has nothing to do
returns in a fraction of a second. Standard library only: nothing is installed yet when it runs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from scripts.wheel_cache import WheelCache, cache_folder, exclusive
from scripts.wheel_key import (
    Ingredients,
    SetupError,
    build_environment,
    check_accel,
    gather,
)

ROOT = Path(__file__).resolve().parent.parent
MINIMUM_PYTHON = (3, 11)
STAMP = "edgeinfer-setup.json"
INSTALLED_WHEEL = "edgeinfer-llama-cpp.json"
BUILD_CORE_MINUTES = 9  # 4 to 5 minutes on 2 cores, more beside other work
HEARTBEAT_S = 30.0
PACKAGE = "llama-cpp-python"
TORCH_WHEELS = (
    ("Linux", "x86_64"),
    ("Linux", "aarch64"),
    ("Darwin", "arm64"),
    ("Windows", "AMD64"),
)  # of torch 2.13
MLX_GLIBC, MLX_MACOS = "2.35", "14.0"  # the oldest that mlx 0.32's wheels are for


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make setup", description="Make .venv hold everything that runs here."
    )
    parser.add_argument("--accel", default="", help="cpu, cuda, vulkan or metal (default: by system)")
    parser.add_argument("--venv", default=".venv", help="folder of the virtual environment")
    chosen = parser.parse_args(arguments)
    # `kill` and a closed terminal end the compilers too: like Ctrl+C they become an exception here.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        set_up(ROOT, ROOT / chosen.venv, chosen.accel)
    except SetupError as error:
        say(f"setup: {error}", sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("setup: interrupted; run it again to go on", sys.stderr)
        return 130
    except OSError as error:
        say(f"setup: {error}", sys.stderr)
        return 1
    return 0


def set_up(root: Path, venv: Path, accel: str) -> None:
    """Bring `venv` to what `root`'s pyproject.toml and constraints.txt ask for. Raises SetupError."""
    check_python(sys.version_info[:2])
    accel = check_accel(accel)
    version = pinned_version((root / "constraints.txt").read_text(), PACKAGE)
    wanted = inputs_digest(root, venv, accel)
    stamp = read_json(venv / STAMP)
    if stamp.get("inputs") == wanted and venv_python(venv).exists():
        try:
            key = gather(version, accel).key()
        except SetupError:
            return  # what it was built with is gone; what was built still runs
        if stamp.get("wheel") == key:
            return
    ingredients = gather(version, accel)
    started = time.monotonic()
    folder = cache_folder()
    with exclusive(folder / "setup.lock", lambda: say("setup: waiting for another set-up to end")):
        (venv / STAMP).unlink(missing_ok=True)
        make_venv(venv)
        install_llama_cpp(venv, WheelCache(folder / "wheels"), ingredients, accel)
        install_project(root, venv)
        write_json(venv / STAMP, {"inputs": wanted, "wheel": ingredients.key(), "accel": accel})
    say(f"setup: ready after {time.monotonic() - started:.0f} s")


def check_python(version: tuple[int, ...]) -> None:
    if tuple(version) < MINIMUM_PYTHON:
        have = ".".join(map(str, version))
        raise SetupError(
            f"Python {have} at {sys.executable} is too old; edgeinfer needs 3.11 or newer."
            " Name one with `make PYTHON=python3.11 …`"
        )


def pinned_version(constraints: str, package: str) -> str:
    """The version `package` is pinned to. Raises SetupError if it is not."""
    wanted = _normal(package)
    for line in constraints.splitlines():
        name, separator, version = line.partition("#")[0].partition(";")[0].partition("==")
        if separator and _normal(name.strip()) == wanted:
            return version.strip()
    raise SetupError(f"constraints.txt does not pin {package}")


def inputs_digest(root: Path, venv: Path, accel: str) -> str:
    """Everything but the wheel that decides what is installed. The folder counts: scripts in a virtual
    environment carry its absolute path, so a moved checkout is set up anew."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((root / name).read_bytes() + b"\0")
    for text in (accel, str(venv.resolve()), sys.version, sys.base_prefix):
        digest.update(text.encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()


def make_venv(venv: Path) -> None:
    """A virtual environment of this very Python with a working pip; any other is replaced."""
    probe = "import pip, sys; print(sys.version, sys.base_prefix, sep='|')"
    try:
        found = subprocess.run(
            [str(venv_python(venv)), "-I", "-c", probe], capture_output=True, timeout=120, check=True
        ).stdout.decode()
    except (OSError, subprocess.SubprocessError):
        found = ""
    if found.strip() == f"{sys.version}|{sys.base_prefix}":
        return
    say(f"setup: making {venv.name} with Python {platform.python_version()}")
    command = [sys.executable, "-m", "venv", "--clear", str(venv)]
    done = subprocess.run(command, capture_output=True, env=pip_environment())
    if done.returncode != 0:
        detail = (done.stdout + done.stderr).decode(errors="replace")
        if "ensurepip" in detail or "No module named venv" in detail:
            raise SetupError(
                "this Python cannot make virtual environments; Debian/Ubuntu:"
                f" `apt install python3-venv` (Python is {sys.executable})"
            )
        raise SetupError(f"could not make {venv}: {_last_line(detail)}")


def install_llama_cpp(venv: Path, wheels: WheelCache, ingredients: Ingredients, accel: str) -> None:
    """Install the wheel for these ingredients, compiling it if no earlier set-up did."""
    key = ingredients.key()
    installed = read_json(venv / INSTALLED_WHEEL).get("wheel") == key
    if installed and _is_installed(venv, ingredients.version):
        return
    wheel = wheels.find(key)
    if wheel is None:
        with wheels.building() as temporary:
            built = compile_wheel(venv, ingredients.version, accel, temporary)
            wheel = wheels.store(built, ingredients)
    else:
        say(f"setup: {PACKAGE} {ingredients.version} was compiled for this machine before; using that")
    command = ["install", "--quiet", "--no-deps", "--no-index", "--force-reinstall", str(wheel)]
    run_pip(venv, command, f"installing {PACKAGE}")
    write_json(venv / INSTALLED_WHEEL, {"wheel": key})


def compile_wheel(venv: Path, version: str, accel: str, into: Path) -> Path:
    """Compile llama-cpp-python from its source package. Minutes. Returns the wheel inside `into`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    minutes = max(1, round(BUILD_CORE_MINUTES / cores))
    span = f"{minutes} to {minutes + max(1, minutes // 2)}"
    longer = " (a GPU build takes several times as long)" if accel in ("cuda", "vulkan") else ""
    say(
        f"setup: compiling {PACKAGE} {version} for this machine ({accel}), once:"
        f" about {span} min on {cores} cores{longer}"
    )
    environment = build_environment(accel, pip_environment())
    environment.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(_build_jobs(cores)))
    # --no-cache-dir: pip's own cache of built wheels knows neither the compiler nor the CPU.
    command = ["wheel", "--no-cache-dir", "--no-deps", "--no-binary", PACKAGE, "--wheel-dir", str(into)]
    run_pip(venv, [*command, f"{PACKAGE}=={version}"], f"compiling {PACKAGE}", environment)
    found = sorted(into.glob("*.whl"))
    if len(found) != 1:
        raise SetupError(f"pip said it built {PACKAGE} {version} but left {len(found)} wheels")
    return found[0]


def mlx_obstacle(system: str, machine: str, libc: tuple[str, str], macos: str) -> str:
    """Why MLX has no wheel here; "" where it has one."""
    if (system, machine) == ("Darwin", "arm64"):
        return "" if _at_least(macos, MLX_MACOS) else f"macOS {macos} is older than {MLX_MACOS}"
    if system == "Linux" and machine in ("x86_64", "aarch64"):
        name, version = libc
        is_new = name == "glibc" and _at_least(version, MLX_GLIBC)
        return (
            ""
            if is_new
            else f"it needs glibc {MLX_GLIBC}, here is {name or 'another'} {version}".rstrip()
        )
    return f"there is none for {system} on {machine}"


def extras() -> str:
    """What is installed beside edgeinfer itself, as pip writes it."""
    obstacle = mlx_obstacle(
        platform.system(), platform.machine(), platform.libc_ver(), platform.mac_ver()[0]
    )
    wanted = ["dev", "plot"]
    if obstacle:
        say(f"setup: leaving out MLX, and its tests: {obstacle}")
    else:
        wanted.append("mlx")
    system, machine = platform.system(), platform.machine()
    if (system, machine) in TORCH_WHEELS:
        wanted.append("torch")
    else:
        say(f"setup: leaving out torch, and its tests: it has no wheel for {system} on {machine}")
    return ",".join(wanted)


def install_project(root: Path, venv: Path) -> None:
    wanted = extras()
    say("setup: installing edgeinfer and its development tools")
    constraints = str(root / "constraints.txt")
    command = ["install", "--quiet", "--constraint", constraints, "--editable", f"{root}[{wanted}]"]
    run_pip(venv, command, "installing edgeinfer")
    # An illegal instruction or a missing library shows here, not in somebody's first chat.
    check = "import llama_cpp.llama_cpp as api; api.llama_backend_init(); import edgeinfer.cli"
    done = subprocess.run(
        [str(venv_python(venv)), "-I", "-c", check], capture_output=True, cwd=str(venv), timeout=300
    )
    if done.returncode != 0:
        (venv / INSTALLED_WHEEL).unlink(missing_ok=True)
        detail = _last_line(done.stderr.decode(errors="replace"))
        raise SetupError(
            f"what was installed does not start (exit {done.returncode}): {detail};"
            " run `make clean setup`"
        )


def run_pip(
    venv: Path, arguments: Sequence[str], doing: str, environment: Mapping[str, str] | None = None
) -> None:
    """pip with its output in a file, a sign of life every half minute, and one line on failure."""
    command = [str(venv_python(venv)), "-m", "pip", *arguments]
    log = venv / "edgeinfer-setup.log"
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment or pip_environment()),
            start_new_session=True,  # so that the compilers it starts can be ended with it
            close_fds=False,  # it keeps the set-up's lock, so no other one starts beside an orphan
        )
        try:
            while True:
                try:
                    code = process.wait(timeout=HEARTBEAT_S)
                    break
                except subprocess.TimeoutExpired:
                    say(f"setup: still {doing} ({time.monotonic() - started:.0f} s)")
        except BaseException:
            _end_group(process)
            raise
    if code != 0:
        text = log.read_text(errors="replace")
        kept = Path(tempfile.gettempdir()) / f"edgeinfer-setup-{os.getpid()}.log"
        kept.write_text(text)
        raise SetupError(f"{doing} failed: {error_line(text)} (all of it: {kept})")


def error_line(log: str) -> str:
    """The line of a pip log that says what went wrong."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    compiler = next((line for line in lines if re.search(r"(fatal )?error:|CMake Error", line)), "")
    if compiler and not compiler.lower().startswith("error: "):
        return compiler
    errors = [line for line in lines if line.upper().startswith("ERROR:")]
    if any("No matching distribution" in line or "Could not find a version" in line for line in errors):
        return f"{errors[0]}; is there a network, or a package index in pip's configuration?"
    return errors[0] if errors else (lines[-1] if lines else "pip said nothing")


# Settings of the user's that would lead pip away from .venv or from the source package.
_NOT_FOR_PIP = {
    "PIP_CONSTRAINT",
    "PIP_NO_BINARY",
    "PIP_ONLY_BINARY",
    "PIP_PREFIX",
    "PIP_REQUIRE_VIRTUALENV",
    "PIP_ROOT",
    "PIP_TARGET",
    "PYTHONHOME",
    "PYTHONPATH",
    "__PYVENV_LAUNCHER__",
}


def pip_environment() -> dict[str, str]:
    """The user's environment (proxies, index, certificates) without what would lead pip astray."""
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_PIP}
    environment.update(
        PIP_USER="0", PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1", PIP_ROOT_USER_ACTION="ignore"
    )
    return environment


def venv_python(venv: Path) -> Path:
    return venv / "bin" / "python"


def read_json(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: Mapping[str, object]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def say(text: str, stream: TextIO | None = None) -> None:
    print(text, file=stream or sys.stdout, flush=True)


def _is_installed(venv: Path, version: str) -> bool:
    names = (venv / "lib").glob(f"python*/site-packages/llama_cpp_python-{version}.dist-info/METADATA")
    return any(True for _ in names)


def _at_least(version: str, wanted: str) -> bool:
    numbers = [int(part) for part in version.split(".") if part.isdecimal()]
    return numbers >= [int(part) for part in wanted.split(".")]


def _build_jobs(cores: int) -> int:
    """One compiler per core, but no more than one per GB of memory: the larger files need that."""
    try:
        gigabytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 10**9
    except (OSError, ValueError):
        return cores
    return max(1, min(cores, gigabytes))


def _end_group(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=10)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
