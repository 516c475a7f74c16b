"""A compiled wheel is reused only where the compiler would make the same one again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from scripts import wheel_key
from scripts.wheel_key import (
    WITHOUT_AMX,
    Ingredients,
    SetupError,
    build_environment,
    check_accel,
    cmake_flags,
    compiler_line,
    cpu_flags,
    gather,
)

SOME = Ingredients(
    version="0.3.36",
    python_tag="cpython311",
    platform="Linux x86_64 glibc 2.36",
    compiler="cc 12.2.0 | c++ 12.2.0",
    cpu_flags="flags: avx2 fma",
    accelerator_tools="",
    build_variables=(("CMAKE_ARGS", "-DGGML_NATIVE=on"),),
)


def test_equal_ingredients_have_the_same_key() -> None:
    assert replace(SOME).key() == SOME.key()


@pytest.mark.parametrize(
    ("ingredient", "other"),
    [
        ("version", "0.3.37"),
        ("python_tag", "cpython312"),
        ("platform", "Linux x86_64 glibc 2.41"),
        ("compiler", "cc 13.1.0 | c++ 13.1.0"),
        ("cpu_flags", "flags: avx2 avx512f fma"),
        ("accelerator_tools", "Cuda compilation tools, release 13.0; 9.0"),
        ("build_variables", (("CMAKE_ARGS", "-DGGML_NATIVE=off"),)),
        ("build_variables", (("CFLAGS", "-DGGML_NATIVE=on"),)),
        ("build_variables", ()),
    ],
)
def test_each_ingredient_changes_the_key(ingredient: str, other: object) -> None:
    assert replace(SOME, **{ingredient: other}).key() != SOME.key()


def test_the_key_of_this_machine_follows_version_and_build_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wheel_key, "compiler_line", lambda environ: "cc | c++")
    environ = {"PATH": "/usr/bin"}
    plain = gather("1.0", "cpu", environ).key()
    assert gather("1.0", "cpu", environ).key() == plain
    others = [
        gather("1.1", "cpu", environ).key(),
        *(gather("1.0", "cpu", {**environ, name: "-O1"}).key() for name in wheel_key.BUILD_VARIABLES),
    ]
    assert len({plain, *others}) == 1 + len(others)


def test_other_variables_do_not_change_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel_key, "compiler_line", lambda environ: "cc | c++")
    assert gather("1.0", "cpu", {"LANG": "C"}) == gather("1.0", "cpu", {"LANG": "de_DE", "HOME": "/x"})


def test_cpu_flags_are_those_of_the_first_core_in_any_order(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("processor : 0\nmodel name : X\nflags : fma avx2\ncpu MHz : 2000\n")
    second.write_text("processor : 0\nmodel name : X\nflags : avx2 fma\ncpu MHz : 3100\nflags : other\n")
    if wheel_key.platform.system() == "Darwin":
        pytest.skip("macOS has no /proc/cpuinfo")
    assert cpu_flags(first) == cpu_flags(second) == "flags: avx2 fma; model name: X"


@pytest.mark.parametrize("variable", ["CC", "CXX"])
def test_a_missing_compiler_is_one_line_that_says_what_to_install(variable: str) -> None:
    with pytest.raises(SetupError) as caught:
        compiler_line({"CC": "true", "CXX": "true", variable: "/nowhere/compiler"})
    message = str(caught.value)
    assert "\n" not in message
    for words in ("/nowhere/compiler", "build-essential", "dnf install", "xcode-select"):
        assert words in message or variable == "CXX"  # `true --version` may print nothing


@pytest.mark.parametrize(
    ("accel", "flags"),
    [
        ("cpu", ()),
        ("cuda", ("-DGGML_CUDA=on",)),
        ("vulkan", ("-DGGML_VULKAN=on",)),
        ("metal", ("-DGGML_METAL=on",)),
    ],
)
def test_each_accelerator_has_its_cmake_flags(accel: str, flags: tuple[str, ...]) -> None:
    assert cmake_flags(accel) == flags


def test_the_users_cmake_arguments_come_last_and_so_win() -> None:
    built = build_environment("vulkan", {"CMAKE_ARGS": "-DGGML_VULKAN=off"})
    assert built["CMAKE_ARGS"] == "-DGGML_VULKAN=on -DGGML_VULKAN=off"
    assert "CMAKE_ARGS" not in build_environment("cpu", {})


def test_a_processor_with_amx_is_compiled_for_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel_key, "cpu_flags", lambda: "flags: amx_int8 avx2; model name: X")
    built = build_environment("cpu", {"CFLAGS": "-O2"})
    assert (built["CFLAGS"], built["CXXFLAGS"]) == (f"-O2 {WITHOUT_AMX}", WITHOUT_AMX)
    monkeypatch.setattr(wheel_key, "cpu_flags", lambda: "flags: avx2; model name: X")
    assert build_environment("cpu", {"CFLAGS": "-O2"}) == {"CFLAGS": "-O2"}


@pytest.mark.parametrize(
    ("given", "system", "chosen"),
    [
        ("", "Linux", "cpu"),
        ("auto", "Linux", "cpu"),
        ("", "Darwin", "metal"),
        (" CUDA ", "Linux", "cuda"),
        ("vulkan", "Linux", "vulkan"),
        ("metal", "Darwin", "metal"),
    ],
)
def test_the_accelerator_is_the_systems_default_or_the_one_named(
    given: str, system: str, chosen: str
) -> None:
    assert check_accel(given, system) == chosen


@pytest.mark.parametrize(
    ("given", "system"),
    [("rocm", "Linux"), ("metal", "Linux"), ("cuda", "Darwin"), ("cpu", "Darwin"), ("; ls", "Linux")],
)
def test_an_accelerator_that_cannot_be_is_one_clear_line(given: str, system: str) -> None:
    with pytest.raises(SetupError) as caught:
        check_accel(given, system)
    assert f"ACCEL={given}" in str(caught.value)
    assert "\n" not in str(caught.value)
