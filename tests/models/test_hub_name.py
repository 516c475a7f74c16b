"""`hf:owner/repo[@revision][:file]`, and which of a repository's files it means."""

from __future__ import annotations

import pytest

from edgeinfer.errors import ModelNotFound, UnsupportedModel
from edgeinfer_models.hub_choice import candidates, choose, quantization
from edgeinfer_models.hub_installed import matching_name
from edgeinfer_models.hub_name import HubName, is_safe_path, parse_hub_name
from edgeinfer_models.store import folder_name

REPO = [
    "README.md",
    "Tiny-IQ2_M.gguf",
    "Tiny-Q4_0.gguf",
    "Tiny-Q4_K_M.gguf",
    "Tiny-Q8_0.gguf",
    "Tiny.imatrix.gguf",
    "f16/Tiny-f16-00001-of-00002.gguf",
    "f16/Tiny-f16-00002-of-00002.gguf",
    "mmproj-Tiny-f16.gguf",
]


def chosen(spec: str, paths: list[str] = REPO) -> str:
    return choose(parse_hub_name(spec), paths).model.path


@pytest.mark.parametrize(
    ("spec", "parsed"),
    [
        ("hf:o/r", HubName("o/r")),
        ("hf:o/r:a.gguf", HubName("o/r", "", "a.gguf")),
        ("hf:o/r:sub/a.gguf", HubName("o/r", "", "sub/a.gguf")),
        ("hf:o/r@v1.0", HubName("o/r", "v1.0")),
        ("hf:o/r@refs/pr/3:Q8_0", HubName("o/r", "refs/pr/3", "Q8_0")),
        ("hf:o-1/r_2.x:a@b.gguf", HubName("o-1/r_2.x", "", "a@b.gguf")),
    ],
)
def test_a_name_has_three_parts_and_is_written_as_it_was_read(spec: str, parsed: HubName) -> None:
    assert parse_hub_name(spec) == parsed
    assert str(parsed) == spec


def test_the_default_branch_is_no_name_of_its_own() -> None:
    assert str(parse_hub_name("hf:o/r@main:a.gguf")) == "hf:o/r:a.gguf"


@pytest.mark.parametrize(
    "spec",
    [
        "hf:", "hf:o", "hf:o/", "hf:/r", "hf:o/r/x", "hf: o/r", "hf:o/r:", "hf:o/r@", "hf:o/r@:a.gguf",
        "hf:../r", "hf:o/..", "hf:o--x/r", "hf:o/r:../a.gguf", "hf:o/r:/etc/a.gguf", "hf:o/r:a//b.gguf",
        "hf:o/r:./a.gguf", "hf:o/r:a\\b.gguf", "hf:o/r:a\nb.gguf", "hf:o/r@../x", "hf:o/r@-x",
        "hf:o/r@a b", "hf:" + "o" * 99 + "/r", "hf:o/r:" + "a" * 300, "hf:o/r?x=1", "hf:o/r#x",
    ],
)  # fmt: skip
def test_what_cannot_be_a_name_is_refused_in_one_line(spec: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        parse_hub_name(spec)
    assert "\n" not in str(caught.value)
    assert folder_name(spec) is None


def test_a_folder_keeps_names_apart_that_differ_in_capitals_file_or_revision() -> None:
    names = ["hf:o/r:a.gguf", "hf:O/r:a.gguf", "hf:o/r:A.gguf", "hf:o/r@v1:a.gguf", "hf:o/r:x/a.gguf"]
    folders = {folder_name(name) for name in names}
    assert len(folders) == len(names)
    assert all(folder and folder == folder.lower() and "/" not in folder for folder in folders)
    assert folder_name("hf:o/r") is None, "without its file it names no single model"


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ("hf:o/r", "Tiny-Q4_K_M.gguf"),
        ("hf:o/r:Tiny-Q8_0.gguf", "Tiny-Q8_0.gguf"),
        ("hf:o/r:tiny-q8_0.GGUF", "Tiny-Q8_0.gguf"),
        ("hf:o/r:q8_0", "Tiny-Q8_0.gguf"),
        ("hf:o/r:iq2_m", "Tiny-IQ2_M.gguf"),
        ("hf:o/r:F16", "f16/Tiny-f16-00001-of-00002.gguf"),
        ("hf:o/r:f16/Tiny-f16-00002-of-00002.gguf", "f16/Tiny-f16-00001-of-00002.gguf"),
    ],
)
def test_a_path_a_name_or_a_quantization_selects_in_any_case(spec: str, path: str) -> None:
    assert chosen(spec) == path


def test_without_a_file_the_preferred_quantization_is_taken_and_the_others_are_named() -> None:
    choice = choose(HubName("o/r"), REPO)
    assert choice.model.tag == "Q4_K_M"
    assert [m.tag for m in choice.others] == ["IQ2_M", "Q4_0", "Q8_0", "F16"]
    assert chosen("hf:o/r", [p for p in REPO if "K_M" not in p]) == "Tiny-Q4_0.gguf"
    assert choose(HubName("o/r"), ["only.gguf", "README.md"]).others == ()
    assert choose(HubName("o/r"), ["only.gguf"]).model.path == "only.gguf"


def test_shards_are_one_model_with_all_its_files() -> None:
    model = choose(HubName("o/r", "", "f16"), REPO).model
    assert model.files == ("f16/Tiny-f16-00001-of-00002.gguf", "f16/Tiny-f16-00002-of-00002.gguf")
    assert candidates(["a-00002-of-00002.gguf"]) == []
    assert candidates(["a-00001-of-99999.gguf"]) == [], "nobody's list of a hundred thousand names"


@pytest.mark.parametrize(
    ("spec", "paths", "said"),
    [
        ("hf:o/r:Q2_K", REPO, "no GGUF model of that name or quantization; it has Q4_K_M, Q4_0, Q8_0"),
        ("hf:o/r", ["a.gguf", "b.gguf"], r"could be 2 models \(a.gguf, b.gguf\); name one: hf:o/r:a"),
        ("hf:o/r", ["a-Q4_0.gguf", "b-Q4_0.gguf", "c-Q8_0.gguf"], "could be 2 models"),
        ("hf:o/r:q8_0", ["a-Q8_0.gguf", "b-Q8_0.gguf"], "could be 2 models"),
        ("hf:o/r", ["README.md"], "has no GGUF model in it"),
        ("hf:o/r", ["mmproj-f16.gguf"], "has no GGUF model in it"),
    ],
)
def test_what_is_not_there_or_could_be_several_is_told_with_what_there_is(
    spec: str, paths: list[str], said: str
) -> None:
    with pytest.raises(ModelNotFound, match=said):
        chosen(spec, paths)


@pytest.mark.parametrize(
    ("spec", "paths", "said"),
    [
        ("hf:o/r", ["model.safetensors", "config.json"], "has safetensors weights and no GGUF file"),
        ("hf:o/r:mmproj-Tiny-f16.gguf", REPO, "is a projector for images"),
        ("hf:o/r:README.md", REPO, "is not a GGUF model"),
    ],
)
def test_what_cannot_be_run_says_what_it_is(spec: str, paths: list[str], said: str) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        chosen(spec, paths)


@pytest.mark.parametrize(
    ("path", "tag"),
    [
        ("Llama-3.2-1B-Instruct-Q4_K_M.gguf", "Q4_K_M"),
        ("llama-2-7b.Q5_0.gguf", "Q5_0"),
        ("qwen3-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("model-bf16.gguf", "BF16"),
        ("model_fp16.gguf", "F16"),
        ("Q6_K/model-00001-of-00003.gguf", "Q6_K"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("Qwen3-0.6B.gguf", ""),
        ("model.gguf", ""),
    ],
)
def test_a_files_name_tells_its_quantization(path: str, tag: str) -> None:
    assert quantization(path) == tag


@pytest.mark.parametrize(
    "path",
    ["../a.gguf", "/a.gguf", "a/../b.gguf", "a//b.gguf", "", ".", "a\\b.gguf", "C:a.gguf", "a\0b"],
)
def test_paths_that_could_leave_a_folder_are_not_safe(path: str) -> None:
    assert not is_safe_path(path)
    assert candidates([f"{path}/x-Q4_0.gguf"] if path else [""]) == []


def test_an_installed_model_is_found_by_repository_or_quantization_but_not_by_another_revision() -> None:
    names = ["hf:o/r:a-Q8_0.gguf", "hf:o/r@v1:a-Q4_0.gguf", "smollm2"]
    assert matching_name(HubName("o/r"), names) == names[0]
    assert matching_name(HubName("o/r", "", "q8_0"), names) == names[0]
    assert matching_name(HubName("o/r", "v1"), names) == names[1]
    assert matching_name(HubName("o/r", "", "Q4_0"), names) is None
    assert matching_name(HubName("o/x"), names) is None
    both = ["hf:o/r:a-Q8_0.gguf", "hf:o/r:a-Q4_0.gguf"]
    assert matching_name(HubName("o/r"), both) == both[1]
    with pytest.raises(ModelNotFound, match="could be 2 models"):
        matching_name(HubName("o/r"), both, alone=True)
