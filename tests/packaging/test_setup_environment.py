"""The set-up does nothing when nothing changed, and says in one line what stops it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import setup_environment as setup
from scripts.wheel_cache import WheelCache
from scripts.wheel_key import Ingredients, SetupError

SOME = Ingredients("0.3.36", "cpython311", "Linux", "cc", "avx2", "", ())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "constraints.txt").write_text(
        "# comment\nnumpy==2.3.5\nllama_cpp_python==0.3.36  # here\n"
    )
    return tmp_path


class Steps:
    """Stands in for the slow steps and remembers which were taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.taken: list[str] = []
        self.ingredients = SOME
        self.fail_in: str | None = None
        monkeypatch.setattr(setup, "gather", lambda version, accel: self.ingredients)
        monkeypatch.setattr(setup, "cache_folder", lambda: folder)
        for name in ("make_venv", "install_llama_cpp", "install_project"):
            monkeypatch.setattr(setup, name, self._step(name))

    def _step(self, name: str) -> object:
        def step(*arguments: object) -> None:
            self.taken.append(name)
            if name == self.fail_in:
                raise SetupError("no network")
            if name == "make_venv":
                venv = arguments[0]
                assert isinstance(venv, Path)
                (venv / "bin").mkdir(parents=True, exist_ok=True)
                (venv / "bin" / "python").touch()

        return step


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Steps:
    return Steps(monkeypatch, tmp_path / "cache")


ALL = ["make_venv", "install_llama_cpp", "install_project"]


def test_a_second_set_up_takes_no_step(root: Path, steps: Steps) -> None:
    setup.set_up(root, root / ".venv", "cpu")
    assert steps.taken == ALL
    setup.set_up(root, root / ".venv", "cpu")
    assert steps.taken == ALL


@pytest.mark.parametrize(
    "change", ["pyproject", "constraints", "accel", "compiler", "moved", "no python"]
)
def test_what_changed_is_set_up_again(
    root: Path, steps: Steps, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "check_accel", lambda accel: accel)
    venv, accel = root / ".venv", "cpu"
    setup.set_up(root, venv, accel)
    if change == "pyproject":
        (root / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    elif change == "constraints":
        (root / "constraints.txt").write_text("llama-cpp-python==0.3.37\n")
    elif change == "accel":
        accel = "vulkan"
    elif change == "compiler":
        steps.ingredients = Ingredients("0.3.36", "cpython311", "Linux", "cc 13", "avx2", "", ())
    elif change == "moved":
        venv = venv.rename(root / "elsewhere")
    else:
        (venv / "bin" / "python").unlink()
    setup.set_up(root, venv, accel)
    assert steps.taken == ALL * 2


@pytest.mark.parametrize("step", ALL)
def test_an_interrupted_set_up_is_not_taken_for_a_finished_one(
    root: Path, steps: Steps, step: str
) -> None:
    steps.fail_in = step
    with pytest.raises(SetupError):
        setup.set_up(root, root / ".venv", "cpu")
    steps.fail_in = None
    steps.taken.clear()
    setup.set_up(root, root / ".venv", "cpu")
    assert steps.taken == ALL


def test_a_failed_renewal_is_not_taken_for_the_finished_one_before_it(root: Path, steps: Steps) -> None:
    setup.set_up(root, root / ".venv", "cpu")
    pyproject = (root / "pyproject.toml").read_text()
    (root / "pyproject.toml").write_text(pyproject + "# new\n")
    steps.fail_in = "install_project"
    with pytest.raises(SetupError):
        setup.set_up(root, root / ".venv", "cpu")
    (root / "pyproject.toml").write_text(pyproject)
    steps.fail_in = None
    steps.taken.clear()
    setup.set_up(root, root / ".venv", "cpu")
    assert steps.taken == ALL


def test_a_compiler_that_went_away_does_not_stop_what_is_installed(
    root: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup.set_up(root, root / ".venv", "cpu")

    def no_compiler(version: str, accel: str) -> Ingredients:
        raise SetupError("no C++ compiler")

    monkeypatch.setattr(setup, "gather", no_compiler)
    setup.set_up(root, root / ".venv", "cpu")
    assert steps.taken == ALL


class Pip:
    """Stands in for pip: "compiles" a wheel and counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.compiled = 0
        self.installed: list[str] = []
        monkeypatch.setattr(setup, "run_pip", self)

    def __call__(self, venv: Path, arguments: list[str], doing: str, environment: object = None) -> None:
        if arguments[0] == "wheel":
            import zipfile

            self.compiled += 1
            into = Path(arguments[arguments.index("--wheel-dir") + 1])
            with zipfile.ZipFile(into / "llama_cpp_python-0.3.36-py3-none-any.whl", "w") as archive:
                archive.writestr("x", f"build {self.compiled}")
        else:
            self.installed.append(arguments[-1])
            info = venv / "lib/python3.11/site-packages/llama_cpp_python-0.3.36.dist-info"
            info.mkdir(parents=True, exist_ok=True)
            (info / "METADATA").touch()


def test_the_wheel_is_compiled_once_and_then_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip, wheels = Pip(monkeypatch), WheelCache(tmp_path / "wheels")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        setup.install_llama_cpp(tmp_path / name, wheels, SOME, "cpu")
    assert pip.compiled == 1
    assert len(pip.installed) == 2
    setup.install_llama_cpp(tmp_path / "two", wheels, SOME, "cpu")
    assert len(pip.installed) == 2


def test_a_damaged_cached_wheel_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip, wheels = Pip(monkeypatch), WheelCache(tmp_path / "wheels")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    setup.install_llama_cpp(tmp_path / "one", wheels, SOME, "cpu")
    wheel = wheels.find(SOME.key())
    assert wheel is not None
    wheel.write_bytes(wheel.read_bytes()[:-1])
    setup.install_llama_cpp(tmp_path / "two", wheels, SOME, "cpu")
    assert pip.compiled == 2


def test_other_ingredients_replace_the_installed_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip, wheels = Pip(monkeypatch), WheelCache(tmp_path / "wheels")
    setup.install_llama_cpp(tmp_path, wheels, SOME, "cpu")
    other = Ingredients("0.3.36", "cpython311", "Linux", "cc", "avx512f", "", ())
    setup.install_llama_cpp(tmp_path, wheels, other, "cpu")
    assert pip.compiled == 2
    assert len(set(pip.installed)) == 2


def test_an_old_python_is_told_which_one_is_needed() -> None:
    with pytest.raises(SetupError, match=r"Python 3\.10 .* needs 3\.11 or newer.*make PYTHON="):
        setup.check_python((3, 10))
    setup.check_python((3, 11))


def test_the_pinned_version_is_read_however_the_name_is_written() -> None:
    for line in ("llama-cpp-python==1.2", "llama_cpp_python == 1.2 # x", "Llama.Cpp.Python==1.2 ; x"):
        assert setup.pinned_version(f"numpy==1\n{line}\n", "llama-cpp-python") == "1.2"
    with pytest.raises(SetupError, match="does not pin"):
        setup.pinned_version("llama-cpp-python>=1\n", "llama-cpp-python")


def test_the_line_shown_of_a_pip_log_is_the_one_that_says_why() -> None:
    compiler = "building\n/src/ggml.c:12:3: error: unknown type name 'x'\nERROR: Failed building wheel\n"
    assert setup.error_line(compiler) == "/src/ggml.c:12:3: error: unknown type name 'x'"
    network = "WARNING: Retrying\nERROR: No matching distribution found for x==1\n"
    assert "is there a network" in setup.error_line(network)
    assert setup.error_line("") == "pip said nothing"


def test_a_failing_pip_is_one_line_with_the_rest_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "venv_python", lambda venv: Path(sys.executable))
    monkeypatch.setattr(setup.tempfile, "gettempdir", lambda: str(tmp_path))
    with pytest.raises(SetupError) as caught:
        setup.run_pip(tmp_path, ["no-such-command"], "trying")
    message = str(caught.value)
    assert message.startswith("trying failed: ERROR")
    assert "\n" not in message
    assert list(tmp_path.glob("edgeinfer-setup-*.log"))


def test_the_users_pip_settings_that_lead_elsewhere_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("PIP_TARGET", "PIP_PREFIX", "PYTHONPATH", "PIP_NO_BINARY"):
        monkeypatch.setenv(name, "elsewhere")
    monkeypatch.setenv("PIP_USER", "1")
    monkeypatch.setenv("PIP_PROXY", "kept")
    environment = setup.pip_environment()
    assert not {"PIP_TARGET", "PIP_PREFIX", "PYTHONPATH", "PIP_NO_BINARY"} & environment.keys()
    assert environment["PIP_USER"] == "0"
    assert environment["PIP_PROXY"] == "kept"


def test_an_unknown_accelerator_ends_the_command_with_one_line() -> None:
    command = [sys.executable, "-m", "scripts.setup_environment", "--accel", "abacus"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=setup.ROOT, env=dict(os.environ))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "ACCEL=abacus" in done.stderr


@pytest.mark.parametrize(
    ("here", "expected"),
    [
        (("Linux", "x86_64", ("glibc", "2.36"), ""), ""),
        (("Linux", "aarch64", ("glibc", "2.35"), ""), ""),
        (("Darwin", "arm64", ("", ""), "15.1"), ""),
        (("Darwin", "arm64", ("", ""), "13.6"), "macOS 13.6 is older"),
        (("Darwin", "x86_64", ("", ""), "15.1"), "none for Darwin on x86_64"),
        (("Linux", "x86_64", ("glibc", "2.31"), ""), "needs glibc 2.35, here is glibc 2.31"),
        (("Linux", "x86_64", ("", ""), ""), "here is another"),
        (("Linux", "riscv64", ("glibc", "2.39"), ""), "none for Linux on riscv64"),
    ],
)
def test_mlx_is_installed_where_it_has_wheels(
    here: tuple[str, str, tuple[str, str], str], expected: str
) -> None:
    found = setup.mlx_obstacle(*here)
    assert (expected in found) if expected else found == ""


@pytest.mark.parametrize("system", ["Linux", "Plan9"])
def test_what_is_left_out_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], system: str
) -> None:
    monkeypatch.setattr(setup.platform, "system", lambda: system)
    monkeypatch.setattr(setup.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(setup.platform, "libc_ver", lambda: ("glibc", "2.40"))
    assert setup.extras() == ("dev,plot,mlx,torch" if system == "Linux" else "dev,plot")
    said = capsys.readouterr().out
    assert ("leaving out MLX, and its tests" in said) == (system != "Linux")
    assert ("leaving out torch, and its tests" in said) == (system != "Linux")
