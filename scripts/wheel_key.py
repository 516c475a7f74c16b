"""What a compiled llama-cpp-python depends on, and the key made of it.

Runs with the system's python3 and its standard library only: it is needed before anything is installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

ACCELERATORS = ("cpu", "cuda", "vulkan", "metal")

# llama.cpp's AMX kernels, on the processors that have them, are left out. GCC before 12.4 and 13.3 drops
# the stores that set the tiles up (GCC bug 114098), and the first step ends with an illegal instruction;
# and they keep a copy of all weights that `predict_memory` does not know.
WITHOUT_AMX = "-U__AMX_INT8__"

# What CMake, scikit-build-core and the compilers read from the environment.
BUILD_VARIABLES = (
    "CMAKE_ARGS",
    "CFLAGS",
    "CXXFLAGS",
    "LDFLAGS",
    "CUDAFLAGS",
    "CUDAARCHS",
    "CMAKE_BUILD_TYPE",
    "SKBUILD_CMAKE_ARGS",
    "SKBUILD_CMAKE_DEFINE",
    "SKBUILD_CMAKE_BUILD_TYPE",
)


class SetupError(Exception):
    """Something the user must do first. `str(error)` is one line."""


@dataclass(frozen=True)
class Ingredients:
    """Everything that changes what the compiler produces. Equal ingredients: the same wheel will do."""

    version: str
    python_tag: str
    platform: str
    compiler: str
    cpu_flags: str
    accelerator_tools: str
    build_variables: tuple[tuple[str, str], ...]

    def key(self) -> str:
        """32 hex digits, the same for equal ingredients on every run and Python version."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def gather(version: str, accel: str, environ: Mapping[str, str] | None = None) -> Ingredients:
    """The ingredients on this machine.

    accel: one of ACCELERATORS. Raises SetupError when no compiler is found.
    """
    environ = os.environ if environ is None else environ
    build = build_environment(accel, environ)
    return Ingredients(
        version=version,
        python_tag=python_tag(),
        platform=f"{platform.system()} {platform.machine()} {_c_library()}",
        compiler=compiler_line(environ),
        cpu_flags=cpu_flags(),
        accelerator_tools=_accelerator_tools(accel, build),
        build_variables=tuple((name, build[name]) for name in BUILD_VARIABLES if build.get(name)),
    )


def default_accel(system: str | None = None) -> str:
    return "metal" if (system or platform.system()) == "Darwin" else "cpu"


def check_accel(accel: str, system: str | None = None) -> str:
    """`accel` in lower case; empty or "auto" is this system's default. Raises SetupError."""
    system = system or platform.system()
    accel = accel.strip().lower()
    if accel in ("", "auto"):
        return default_accel(system)
    if accel not in ACCELERATORS:
        raise SetupError(f"ACCEL={accel} is not known; use one of {', '.join(ACCELERATORS)}")
    if accel == "metal" and system != "Darwin":
        raise SetupError("ACCEL=metal needs macOS; on this system use cpu, cuda or vulkan")
    if accel == "cpu" and system == "Darwin":
        # Its CMakeLists.txt sets GGML_METAL by force (0.3.36).
        raise SetupError(
            "ACCEL=cpu: llama-cpp-python always builds Metal on macOS; set up without ACCEL, and run"
            " with `--gpu-layers 0` to stay on the CPU"
        )
    if accel == "cuda" and system == "Darwin":
        raise SetupError("ACCEL=cuda does not exist on macOS; use metal (the default)")
    return accel


def cmake_flags(accel: str) -> tuple[str, ...]:
    """llama.cpp's CMake options for an accelerator; the CPU is what it builds anyway."""
    return () if accel == "cpu" else (f"-DGGML_{accel.upper()}=on",)


def build_environment(accel: str, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment a native build runs in: the user's, with the accelerator's CMake options first,
    so that a CMAKE_ARGS of the user's own has the last word."""
    environ = os.environ if environ is None else environ
    result = dict(environ)
    if "amx_int8" in cpu_flags().split():
        for name in ("CFLAGS", "CXXFLAGS"):
            result[name] = f"{environ.get(name, '')} {WITHOUT_AMX}".strip()
    arguments = " ".join([*cmake_flags(accel), environ.get("CMAKE_ARGS", "")]).strip()
    if arguments:
        result["CMAKE_ARGS"] = arguments
    nvcc = find_nvcc(environ) if accel == "cuda" else None
    if nvcc and "CUDACXX" not in environ:
        result["CUDACXX"] = nvcc
    return result


def compiler_line(environ: Mapping[str, str] | None = None) -> str:
    """First lines of `cc --version` and `c++ --version`, as CMake will choose them.

    Raises SetupError when one of them is missing.
    """
    environ = os.environ if environ is None else environ
    lines = []
    for variable, names in (("CC", ("cc", "gcc", "clang")), ("CXX", ("c++", "g++", "clang++"))):
        chosen = environ.get(variable)
        candidates = [shlex.split(chosen)] if chosen else [[name] for name in names]
        line = next(filter(None, (_first_line([*command, "--version"]) for command in candidates)), "")
        if not line:
            kind = "C" if variable == "CC" else "C++"
            raise SetupError(
                f"no {kind} compiler (looked for {chosen or ', '.join(names)}); install one:"
                " Debian/Ubuntu `apt install build-essential`, Fedora `dnf install gcc gcc-c++ make`,"
                " macOS `xcode-select --install`"
            )
        lines.append(line)
    return " | ".join(lines)


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What `-march=native` depends on: /proc/cpuinfo's flags, or sysctl's on macOS."""
    if platform.system() == "Darwin":
        return _output(["sysctl", "machdep.cpu.brand_string", "hw.optional"])
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        return platform.processor()
    kept = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        name = name.strip()
        # Of several kinds of cores the first stands for all, as it does for the compiler.
        if name in ("flags", "Features", "model name", "CPU part", "isa") and name not in kept:
            kept[name] = " ".join(sorted(set(value.split())))
    return "; ".join(f"{name}: {value}" for name, value in sorted(kept.items()))


def python_tag() -> str:
    return f"{sys.implementation.name}{sys.version_info[0]}{sys.version_info[1]}"


def find_nvcc(environ: Mapping[str, str] | None = None) -> str | None:
    environ = os.environ if environ is None else environ
    candidates = [environ.get("CUDACXX"), shutil.which("nvcc", path=environ.get("PATH"))]
    for home in (environ.get("CUDA_HOME"), environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home:
            candidates.append(str(Path(home) / "bin" / "nvcc"))
    return next((path for path in candidates if path and Path(path).is_file()), None)


def _accelerator_tools(accel: str, environ: Mapping[str, str]) -> str:
    if accel == "cuda":
        nvcc = find_nvcc(environ)
        if nvcc is None:
            raise SetupError(
                "ACCEL=cuda needs the CUDA toolkit: nvcc is neither on PATH nor in CUDA_HOME;"
                " install it, or set CUDA_HOME"
            )
        # llama.cpp compiles for the GPUs it finds ("native"), so they belong to the key.
        gpus = _output(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
        return f"{_output([nvcc, '--version'])}; {' '.join(sorted(set(gpus.split())))}"
    if accel == "vulkan":
        if shutil.which("glslc", path=environ.get("PATH")) is None:
            raise SetupError(
                "ACCEL=vulkan needs the Vulkan headers and glslc: Debian/Ubuntu"
                " `apt install libvulkan-dev glslc`, Fedora `dnf install vulkan-devel glslc`"
            )
        return _output(["glslc", "--version"])
    return ""


def _c_library() -> str:
    return " ".join(platform.libc_ver()).strip()


def _first_line(command: list[str]) -> str:
    return _output(command).partition("\n")[0].strip()


def _output(command: list[str]) -> str:
    """Standard output, or "" if the program is missing or fails."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=30,
            check=True,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode(errors="replace").strip()
