"""A model whose backend opens another form: converted once, run from then on, shown, removed."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeinfer.backend import Probe
from edgeinfer.cli.doctor import examine
from edgeinfer.errors import BackendUnavailable, ConversionFailed, UnsupportedModel, UsageError
from edgeinfer.open import OpenOptions, plan_open
from edgeinfer_backends.llamacpp import LlamaCppBackend
from edgeinfer_backends.mlx import MlxBackend
from edgeinfer_models.converted import converted_folder, list_converted
from edgeinfer_models.resolve import resolve_model
from edgeinfer_models.store import record_last_used
from tests.cli.conftest import Console, Done, Invoke
from tests.fixtures_gguf import write_tiny_gguf
from tests.fixtures_hf import write_tiny_folder

FOUND = MlxBackend().probe()
pytest.importorskip("tokenizers", reason="the tiny folder's tokenizer is made by it")
needs_mlx = pytest.mark.skipif(not FOUND.usable, reason=f"mlx: {FOUND.reason}")
ASKED = ("--json", "--temp", "0", "--max-tokens", "8", "--ctx", "256")
GRANITE = {
    "model_type": "granite",
    "architectures": ["GraniteForCausalLM"],
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0625,
    "logits_scaling": 8.0,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_folder(tmp_path / "tiny")


@pytest.fixture
def without_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MlxBackend, "probe", lambda self: Probe(False, "mlx is not installed"))


def converting(told: list[str]) -> Callable[[str, float], None]:
    return lambda what, share: told.append(what)


def said_of_it(done: Done) -> list[str]:
    """The warnings of an answer that are about a conversion; others come and go with the machine."""
    return [warning for warning in done.json["warnings"] if "converted" in warning]


def the_only_conversion() -> str:
    (found,) = list_converted()
    return found.name


# -- run -------------------------------------------------------------------------------------------


def test_a_folder_runs_on_llama_cpp_converted_once(console: Console, folder: Path) -> None:
    first = console("run", *ASKED, "--backend", "llamacpp", folder, "hello")
    assert (first.code, first.err) == (0, "")
    assert (first.json["backend"], first.json["model"]) == ("llamacpp", "tiny")
    assert first.json["usage"]["completion_tokens"] == 8
    name = the_only_conversion()
    assert said_of_it(first) == [
        "tiny was converted to GGUF for llamacpp: F32 weights as they are; 0.4 MB of disk keep it for"
        f" the next time; `edgeinfer models rm {name}` frees them"
    ]
    written = next((converted_folder() / name).glob("*.gguf"))
    before = written.stat().st_mtime_ns
    again = console("run", *ASKED, "--backend", "llamacpp", folder / "model.safetensors", "hello")
    assert again.json["text"] == first.json["text"]
    assert said_of_it(again) == [
        f"tiny runs as converted to GGUF (F32, 0.4 MB of disk; `edgeinfer models rm {name}`)"
    ]
    assert written.stat().st_mtime_ns == before
    console("quantize", folder, "--type", "f32")
    by_hand = console("run", *ASKED, folder.with_name("tiny-f32.gguf"), "hello")
    assert by_hand.json["text"] == first.json["text"]


@needs_mlx
@pytest.mark.slow
@pytest.mark.parametrize("weight_type", ["F16", "Q8_0"])
def test_a_gguf_file_runs_on_mlx_converted_once(
    console: Console, tmp_path: Path, weight_type: Any
) -> None:
    path = write_tiny_gguf(tmp_path / "small.gguf", weight_type=weight_type)
    done = console("run", "--temp", "0", "--max-tokens", "8", "--backend", "mlx", path, "hello")
    assert done.code == 0
    assert done.err.splitlines()[0].startswith("[small on mlx/")
    stays = "F16 weights as they are" if weight_type == "F16" else "Q8_0 to F16"
    assert f"small was converted to safetensors for mlx: {stays}; " in done.err
    again = console("run", *ASKED, "--backend", "mlx", path, "hello")
    assert again.json["text"] == done.out.removesuffix("\n")
    assert said_of_it(again)[0].startswith("small runs as converted to safetensors (F16, ")
    on_llama_cpp = console("run", *ASKED, path, "hello")
    assert said_of_it(on_llama_cpp) == []
    if weight_type == "F16":  # llama.cpp rounds what it multiplies with Q8_0
        assert on_llama_cpp.json["text"] == again.json["text"]


def test_without_mlx_a_folder_is_converted_for_llama_cpp_and_it_is_said_why(
    invoke: Invoke, folder: Path, without_mlx: None
) -> None:
    done = invoke("run", *ASKED, folder, "hello")
    assert (done.code, done.json["backend"]) == (0, "llamacpp")
    said = "tiny was converted to GGUF for llamacpp (mlx: mlx is not installed): "
    assert said_of_it(done)[0].startswith(said)


def test_a_family_that_mlx_does_not_run_is_converted_for_llama_cpp(
    console: Console, tmp_path: Path
) -> None:
    folder = write_tiny_folder(tmp_path / "g", config=GRANITE)
    done = console("run", *ASKED, folder, "hello")
    assert (done.code, done.err) == (0, "")
    assert done.json["backend"] == "llamacpp"
    if FOUND.usable:
        assert "(mlx: runs llama, mistral, qwen2, qwen3, not granite)" in said_of_it(done)[0]


@needs_mlx
def test_weights_that_mlx_does_not_unpack_are_converted_for_llama_cpp(tmp_path: Path) -> None:
    packed = {"quantization_config": {"quant_method": "fp8"}}
    folder = write_tiny_folder(tmp_path / "packed", config=packed)
    plan = plan_open(OpenOptions(model=str(folder)), converting=converting([]))
    assert plan.command.backend == "llamacpp"
    assert "(mlx: does not unpack weights that are packed as fp8)" in plan.warnings[0]
    with pytest.raises(UnsupportedModel, match=r"packed as fp8; leave --backend out"):
        plan_open(OpenOptions(model=str(folder), backend="mlx"), converting=converting([]))


def test_what_the_result_does_otherwise_is_said_every_time(folder: Path, tmp_path: Path) -> None:
    window = {"model_type": "mistral", "sliding_window": 64}
    path = write_tiny_folder(tmp_path / "windowed", config=window)
    options = OpenOptions(model=str(path), backend="llamacpp")
    for _ in range(2):
        warnings = plan_open(options, converting=converting([])).warnings
        assert "sliding window of 64" in warnings[1]


def test_a_changed_folder_answers_anew(console: Console, folder: Path) -> None:
    ask = ("run", *ASKED, "--backend", "llamacpp", folder, "hello")
    before = console(*ask).json["text"]
    shutil.rmtree(folder)
    write_tiny_folder(folder, seed=99)
    done = console(*ask)
    assert " was converted to GGUF " in said_of_it(done)[0]
    assert done.json["text"] != before
    the_only_conversion()


def test_two_runs_at_once_convert_it_once(console: Console, folder: Path) -> None:
    ask = ("run", *ASKED, "--backend", "llamacpp", folder, "hello")
    runs = [console.start(*ask, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    told = []
    for run in runs:
        out, err = run.communicate(timeout=120)
        told.append(Done(run.returncode, out.decode(), err.decode()))
    assert [(done.code, done.err) for done in told] == [(0, "")] * 3
    assert len({done.json["text"] for done in told}) == 1
    the_only_conversion()


# -- what cannot be --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["llamacpp", "auto"])
def test_weights_in_a_mode_that_is_not_unpacked_are_refused_with_the_reason(
    invoke: Invoke, tmp_path: Path, without_mlx: None, backend: str
) -> None:
    quantized = {"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}
    folder = write_tiny_folder(tmp_path / "q", config=quantized)
    done = invoke("run", "--backend", backend, folder, "hello")
    assert done.code == 1
    assert (
        "llamacpp does not open safetensors models, and this one cannot be converted" in done.error_line
    )
    assert "mxfp4" in done.error_line
    assert ("mlx is not installed" in done.error_line) == (backend == "auto")
    assert list_converted() == ()


@needs_mlx
def test_what_the_backend_would_not_run_either_is_not_converted(tmp_path: Path) -> None:
    told: list[str] = []
    path = write_tiny_gguf(tmp_path / "g.gguf", arch="gemma3", tokenizer="spm")
    with pytest.raises(UnsupportedModel, match=r"of the type gemma3_text, and mlx runs llama, mistral"):
        plan_open(OpenOptions(model=str(path), backend="mlx"), converting=converting(told))
    folder = write_tiny_folder(tmp_path / "g", config=GRANITE)
    with pytest.raises(UnsupportedModel, match=r"mlx runs llama, .*, not granite; leave --backend out"):
        plan_open(OpenOptions(model=str(folder), backend="mlx"), converting=converting(told))
    assert list_converted() == ()


def test_a_backend_without_a_form_of_weights_is_wrong_usage(tiny: Path) -> None:
    from edgeinfer.backend_choice import choose_backend

    with pytest.raises(UsageError, match="backend scripted opens scripted models, not gguf"):
        choose_backend("scripted", "gguf", resolve_model(str(tiny)).config)


def test_nothing_usable_here_is_said_of_every_backend(
    folder: Path, without_mlx: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaCppBackend, "probe", lambda self: Probe(False, "not compiled"))
    with pytest.raises(BackendUnavailable, match="mlx: mlx is not installed; llamacpp: not compiled"):
        plan_open(OpenOptions(model=str(folder)), converting=converting([]))


def test_a_backend_that_opens_both_forms_is_given_each_as_it_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaCppBackend, "formats", ("safetensors", "gguf"))
    for path in (folder, write_tiny_gguf(tmp_path / "t.gguf")):
        plan = plan_open(OpenOptions(model=str(path), backend="llamacpp"), converting=converting([]))
        assert plan.warnings == ()
    assert list_converted() == ()


# -- what looks at a model converts nothing --------------------------------------------------------


def test_without_leave_to_convert_it_is_refused_and_a_result_is_found(folder: Path) -> None:
    options = OpenOptions(model=str(folder), backend="llamacpp")
    with pytest.raises(ConversionFailed, match="tiny has to be converted to GGUF for llamacpp first"):
        plan_open(options)
    told: list[str] = []
    plan = plan_open(options, converting=converting(told))
    assert set(told) == {"converting tiny to GGUF (only once)"}
    assert plan_open(options).command.files == plan.command.files
    assert (plan.name, plan.spec) == ("tiny", str(folder))


def test_doctor_and_show_convert_nothing_and_show_what_it_will_take(
    invoke: Invoke, folder: Path, without_mlx: None
) -> None:
    record_last_used(str(folder))
    assert examine()["kv_cache"] is None
    before = json.loads(invoke("models", "show", folder, "--json").out)
    assert (before["converted"], list_converted()) == ([], ())
    assert invoke("run", *ASKED, folder, "hello").code == 0
    after = json.loads(invoke("models", "show", folder, "--json").out)
    name = the_only_conversion()
    assert [each["name"] for each in after["converted"]] == [name]
    assert f"Converted\t{converted_folder() / name}" in invoke("models", "show", folder).out
    assert after["memory"]["bytes"] == pytest.approx(before["memory"]["bytes"], rel=0.01)
    assert [item["name"] for item in after["memory"]["items"]] == [
        item["name"] for item in before["memory"]["items"]
    ]
    assert examine()["kv_cache"]["model"] == "tiny"


# -- models list and rm ----------------------------------------------------------------------------


@pytest.fixture
def conversion(folder: Path) -> str:
    plan_open(OpenOptions(model=str(folder), backend="llamacpp"), converting=converting([]))
    return the_only_conversion()


def row_of(invoke: Invoke, name: str) -> dict[str, Any]:
    rows = json.loads(invoke("models", "list", "--json").out)["models"]
    return next(row for row in rows if row["name"] == name)


def test_list_shows_what_was_converted_of_what(invoke: Invoke, folder: Path, conversion: str) -> None:
    row = row_of(invoke, conversion)
    assert (row["converted_from"], row["installed"]) == (str(folder), False)
    assert row["description"] == f"F32 GGUF of {folder}"
    line = next(line for line in invoke("models", "list").out.splitlines() if conversion in line)
    assert line.split("\t")[1:3] == ["converted", "0.4 MB"]
    shutil.rmtree(folder)
    assert "which is gone; `rm` deletes it" in row_of(invoke, conversion)["description"]


def test_the_name_of_a_conversion_is_no_model(invoke: Invoke, folder: Path, conversion: str) -> None:
    done = invoke("run", conversion, "hello")
    assert (done.code, done.error_line.endswith(f"give the model: {folder}")) == (1, True)


@pytest.mark.parametrize("is_gone", [False, True])
@pytest.mark.parametrize("by", ["its name", "the original's path", "a weights file's path"])
def test_rm_deletes_a_conversion_and_leaves_the_original(
    invoke: Invoke, folder: Path, conversion: str, by: str, is_gone: bool
) -> None:
    if is_gone:
        shutil.rmtree(folder)
    said = {"its name": conversion, "the original's path": folder}.get(by, folder / "model.safetensors")
    refused = invoke("models", "rm", said)
    assert (refused.code, "give --yes" in refused.error_line) == (2, True)
    the_only_conversion()
    done = invoke("models", "rm", said, "--yes", "--json")
    assert done.json["removed_conversions"] == [conversion]
    assert done.json["freed_bytes"] > 400_000
    assert list_converted() == ()
    assert folder.exists() != is_gone
    assert invoke("models", "rm", said, "--yes").code == 1


def test_rm_says_what_went(invoke: Invoke, folder: Path, conversion: str) -> None:
    done = invoke("models", "rm", folder, "--yes")
    assert done.out == (
        f"what {folder} was converted to ({conversion}) is removed; 0.4 MB are free again\n"
    )


def test_rm_deletes_a_damaged_conversion_which_list_tells_of(invoke: Invoke, conversion: str) -> None:
    (converted_folder() / conversion / "about.json").unlink()
    listed = invoke("models", "list")
    assert f"conversion '{conversion}': its files are not as they were written" in listed.err
    assert invoke("models", "rm", conversion, "--yes").code == 0
    assert invoke("models", "list").err == ""


@needs_mlx
def test_rm_of_an_installed_model_deletes_what_it_was_converted_to(
    invoke: Invoke, tmp_path: Path
) -> None:
    from edgeinfer_models.store import Manifest, models_folder, publish, staging_folder

    name = "hf:owner/tiny:t.gguf"
    with staging_folder(name) as staging:
        path = write_tiny_gguf(staging / "t.gguf")
        publish(staging, Manifest(name, "t.gguf", path.stat().st_size, "ab" * 32, "a test", "", "now"))
    plan = plan_open(OpenOptions(model=name, backend="mlx"), converting=converting([]))
    assert (plan.name, plan.spec) == (name, name)
    conversion = the_only_conversion()
    done = invoke("models", "rm", name, "--yes", "--json")
    assert done.json["removed_conversions"] == [conversion]
    assert list_converted() == ()
    assert [path.name for path in models_folder().iterdir() if not path.name.startswith(".")] == []


def test_eval_converts_and_says_so(console: Console, folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The sea is wide, and the sky above it is blue. " * 60)
    options = ("--backend", "llamacpp", "--text", text, "--tokens", "256", "--settings", "bf16")
    done = console("eval", *options, folder)
    assert done.code == 0
    assert done.err.startswith("edgeinfer: warning: tiny was converted to GGUF for llamacpp: ")
    assert console("eval", *options, "--quiet", folder).err == ""
