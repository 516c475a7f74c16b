"""What a user types becomes a checked model, or one line saying why not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from edgeinfer.errors import ModelError, ModelFileInvalid, ModelNotFound, UnsupportedModel
from edgeinfer_models import catalogue, store
from edgeinfer_models.pull import pull
from edgeinfer_models.resolve import resolve_model
from tests.fixtures_gguf import write_tiny_gguf
from tests.models.test_gguf_model import split
from tests.models.test_safetensors_header import CONFIG, hf_folder


@pytest.fixture
def small_starter(data_dir: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`smollm2` is the tiny model for this test; not installed yet."""
    content = tiny.read_bytes()
    entry = replace(
        catalogue.CATALOGUE["smollm2"],
        sha256=hashlib.sha256(content).hexdigest(),
        num_bytes=len(content),
    )
    monkeypatch.setitem(catalogue.CATALOGUE, "smollm2", entry)
    return tiny


def test_a_file_is_resolved_with_its_config_and_template(data_dir: Path, tiny: Path) -> None:
    model = resolve_model(str(tiny))
    assert (model.files.name, model.files.paths, model.files.format) == ("tiny", (tiny,), "gguf")
    assert (model.origin, model.spec, model.template.origin) == ("file", str(tiny), "model")
    assert model.config.num_layers == 2
    assert model.header is not None
    assert model.notes == ()


def test_home_and_relative_paths_are_expanded(
    data_dir: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(tiny, tmp_path / "smollm2")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for spec in ("~/smollm2", "./smollm2"):
        assert resolve_model(spec).spec == str(tmp_path / "smollm2")


def test_a_catalogue_name_that_is_not_installed_says_how_to_get_it(small_starter: Path) -> None:
    for spec in ("smollm2", None):
        with pytest.raises(ModelNotFound, match="not installed; run `edgeinfer models pull smollm2`"):
            resolve_model(spec)


def test_a_missing_model_is_pulled_when_the_caller_can(small_starter: Path) -> None:
    asked: list[str] = []

    def pull_missing(name: str) -> None:
        asked.append(name)
        pull(name, source=small_starter)

    model = resolve_model(None, pull_missing=pull_missing)
    assert asked == ["smollm2"]
    assert (model.files.name, model.spec, model.origin) == ("smollm2", "smollm2", "catalogue")
    assert model.files.digest == hashlib.sha256(small_starter.read_bytes()).hexdigest()
    assert model.installed is not None
    assert resolve_model("smollm2").files == model.files


def test_without_a_name_the_last_used_model_is_taken(small_starter: Path, tmp_path: Path) -> None:
    other = write_tiny_gguf(tmp_path / "other.gguf")
    store.record_last_used(resolve_model(str(other)).spec)
    assert resolve_model(None).files.paths == (other,)


def test_a_last_used_model_that_is_gone_is_said_and_the_starter_taken(small_starter: Path) -> None:
    pull("smollm2", source=small_starter)
    store.record_last_used("/gone/model.gguf")
    model = resolve_model(None)
    assert model.files.name == "smollm2"
    assert len(model.notes) == 1
    assert "/gone/model.gguf: no such file" in model.notes[0]


def test_a_folder_with_one_model_is_taken(data_dir: Path, tmp_path: Path, tiny: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    shutil.copy(tiny, folder / "a.gguf")
    (folder / "mmproj-a.gguf").write_bytes(b"")
    model = resolve_model(str(folder))
    assert (model.files.name, model.origin) == ("mine", "folder")


def test_a_folder_of_shards_is_one_model(data_dir: Path, tmp_path: Path) -> None:
    paths = split(tmp_path)
    (tmp_path / "whole.gguf").unlink()
    assert list(resolve_model(str(tmp_path)).files.paths) == paths


def test_a_folder_with_several_models_names_them(data_dir: Path, tmp_path: Path, tiny: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(tiny, tmp_path / name)
    with pytest.raises(
        ModelNotFound, match=r"has 2 GGUF models \(a.gguf, b.gguf\); give the path of one"
    ):
        resolve_model(str(tmp_path))


LLAMA = {**CONFIG, "model_type": "llama"}


def llama_folder(folder: Path, *, sharded: bool = False) -> Path:
    hf_folder(folder, LLAMA, sharded=sharded)
    (folder / "tokenizer.json").write_text('{"added_tokens": [{"id": 1, "content": "<|im_start|>"}]}')
    return folder


def test_a_hugging_face_folder_is_one_model(data_dir: Path, tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "hf")
    for spec, origin in ((folder, "folder"), (folder / "model.safetensors", "file")):
        model = resolve_model(str(spec))
        assert (model.files.name, model.files.format, model.origin) == ("hf", "safetensors", origin)
        assert model.files.paths == (folder / "model.safetensors",)
        assert model.files.weight_types == (("F32", 320),)
        assert (model.spec, model.header) == (str(folder), None)
        assert (model.template.origin, model.template.name) == ("fallback", "chatml")
    store.record_last_used(model.spec)
    assert resolve_model(None).files == model.files


def test_shards_of_a_folder_are_taken_in_order(data_dir: Path, tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "hf", sharded=True)
    expected = [folder / f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for spec in (folder, folder / "model.safetensors.index.json", expected[1]):
        assert list(resolve_model(str(spec)).files.paths) == expected


def test_the_template_of_a_folder_is_its_own(data_dir: Path, tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "hf")
    config = folder / "tokenizer_config.json"
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "listed"}]
    for value, expected in (("{{ 1 }}", "{{ 1 }}"), (named, "listed")):
        config.write_text(json.dumps({"chat_template": value, "bos_token": {"content": "<s>"}}))
        template = resolve_model(str(folder)).template
        assert (template.text, template.origin, template.bos) == (expected, "model", "<s>")
    (folder / "chat_template.jinja").write_text("from the file")
    assert resolve_model(str(folder)).template.text == "from the file"
    config.write_text("[")
    with pytest.raises(ModelFileInvalid, match=r"tokenizer_config\.json"):
        resolve_model(str(folder))


def test_safetensors_that_nothing_here_runs_are_refused_with_the_way_out(
    data_dir: Path, tmp_path: Path
) -> None:
    folder = hf_folder(tmp_path / "hf")
    for kind in (None, "mamba", ["llama"], 7):
        (folder / "config.json").write_text(json.dumps({**CONFIG, "model_type": kind}))
        for spec in (folder, folder / "model.safetensors"):
            with pytest.raises(UnsupportedModel, match=r"cannot be run .*use a \.gguf"):
                resolve_model(str(spec))
    (folder / "other.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match="not part of the model"):
        resolve_model(str(folder / "other.safetensors"))
    (folder / "config.json").unlink()
    with pytest.raises(UnsupportedModel, match=r"config\.json.*use a .gguf"):
        resolve_model(str(folder / "model.safetensors"))
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ModelFileInvalid):
        resolve_model(str(folder / "model.safetensors"))


def test_names_and_paths_that_lead_nowhere_get_one_line_each(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "note.gguf").write_text("shopping list")
    for spec, kind, expected in (
        ("hf:owner/repo", ModelNotFound, "not installed; run `edgeinfer models pull hf:owner/repo`"),
        ("hf:owner", ModelNotFound, "is not a model of the Hugging Face hub; write hf:owner/repo"),
        ("smolm", ModelNotFound, "did you mean 'smollm2'"),
        ("zzz", ModelNotFound, "`edgeinfer models list` shows"),
        ("", ModelNotFound, "name is empty"),
        ("  ", ModelNotFound, "name is empty"),
        ("none.gguf", ModelNotFound, "no such file or folder"),
        ("/no/such/model.gguf", ModelNotFound, "no such file or folder"),
        ("~nobody-here/x.gguf", ModelNotFound, "cannot be opened"),
        ("x" * 5000, ModelNotFound, "cannot be opened"),
        ("a\0b", ModelNotFound, "cannot be opened"),
        (str(tmp_path / "empty"), ModelNotFound, "has no .gguf model in it"),
        (str(tmp_path / "pipe.gguf"), ModelFileInvalid, "pipe or socket"),
        (str(tmp_path / "note.gguf" / "x"), ModelNotFound, "cannot be opened (Not a directory)"),
        (str(tmp_path / "note.gguf"), ModelFileInvalid, "seems to be a text file"),
        ("/dev/null", ModelFileInvalid, "a device"),
    ):
        with pytest.raises(kind) as caught:
            resolve_model(spec)
        assert expected in str(caught.value), spec
        assert len(str(caught.value)) <= 600


def test_a_damaged_installed_model_says_how_to_mend_it(small_starter: Path) -> None:
    pull("smollm2", source=small_starter).path.unlink()
    with pytest.raises(ModelError, match="pull --force smollm2"):
        resolve_model("smollm2")


@pytest.mark.model
def test_the_starter_resolves(starter_model: Path, data_dir: Path) -> None:
    model = resolve_model(str(starter_model))
    assert model.config.architecture == "llama"
    assert model.template.origin == "model"
