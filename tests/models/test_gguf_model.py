"""Headers that are well-formed and still no model: what llama.cpp would abort on is said before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgeinfer.errors import ModelFileInvalid, ModelNotFound, UnsupportedModel
from edgeinfer_models.gguf_model import read_gguf_model
from tests.fixtures_gguf import write_tiny_gguf

BAD_METADATA: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no layers": ({"llama.block_count": 0}, ModelFileInvalid, "'llama.block_count' is 0"),
    "too many layers": ({"llama.block_count": 513}, ModelFileInvalid, "outside [1, 512]"),
    "a layer that is not there": (
        {"llama.block_count": 3}, ModelFileInvalid, "layer 2 of 3 has no tensors",
    ),
    "a layer too many": ({"llama.block_count": 1}, ModelFileInvalid, "tensors for layer 1"),
    "missing layers key": (
        {"llama.block_count": None}, ModelFileInvalid, "'llama.block_count' is missing",
    ),
    "layers as text": ({"llama.block_count": "2"}, ModelFileInvalid, "has the type str, not u32"),
    "no context": ({"llama.context_length": None}, ModelFileInvalid, "context_length' is missing"),
    "no width": ({"llama.embedding_length": None}, ModelFileInvalid, "embedding_length' is missing"),
    "another width": ({"llama.embedding_length": 96}, ModelFileInvalid, "shape [64, 295]"),
    "no heads": ({"llama.attention.head_count": None}, ModelFileInvalid, "head_count' is missing"),
    "zero heads": ({"llama.attention.head_count": 0}, ModelFileInvalid, "0 attention heads"),
    "heads as text": ({"llama.attention.head_count": "2"}, ModelFileInvalid, "neither a number"),
    "KV heads that do not divide": (
        {"llama.attention.head_count_kv": 3}, ModelFileInvalid, "over 3 KV heads",
    ),
    "KV heads of another count": (
        {"llama.attention.head_count_kv": [1, 1, 1]}, ModelFileInvalid, "one for each of 2 layers",
    ),
    "unequal heads": ({"llama.attention.value_length": 16}, ModelFileInvalid, "keys are 32 wide"),
    "a partial rope": ({"llama.rope.dimension_count": 16}, ModelFileInvalid, "RoPE turns 16"),
    "a wide rope": ({"llama.rope.dimension_count": 64}, ModelFileInvalid, "RoPE turns 64"),
    "a negative epsilon": (
        {"llama.attention.layer_norm_rms_epsilon": -1.0}, ModelFileInvalid, "epsilon' is -1.0",
    ),
    "an epsilon that is no number": (
        {"llama.attention.layer_norm_rms_epsilon": float("nan")}, ModelFileInvalid, "epsilon' is nan",
    ),
    "a rope base of zero": ({"llama.rope.freq_base": 0.0}, ModelFileInvalid, "freq_base"),
    "an unknown rope scaling": ({"llama.rope.scaling.type": "magic"}, UnsupportedModel, "'magic'"),
    "an unknown pooling": ({"llama.pooling_type": 9}, ModelFileInvalid, "pooling_type"),
    "experts without use": ({"llama.expert_count": 4}, ModelFileInvalid, "0 of 4 experts"),
    "use without experts": ({"llama.expert_used_count": 4}, ModelFileInvalid, "4 of 0 experts"),
    "too many experts": (
        {"llama.expert_count": 5000, "llama.expert_used_count": 1},
        ModelFileInvalid, "expert_count' is 5,000",
    ),
    "an adapter": ({"general.type": "adapter"}, UnsupportedModel, "of type 'adapter'"),
    "no tokenizer": (
        {"tokenizer.ggml.model": None}, ModelFileInvalid, "tokenizer.ggml.model' is missing",
    ),
    "an unknown tokenizer": ({"tokenizer.ggml.model": "magic"}, UnsupportedModel, "tokenizer 'magic'"),
    "no merges": ({"tokenizer.ggml.merges": None}, ModelFileInvalid, "merges' is missing"),
    "too few token types": (
        {"tokenizer.ggml.token_type": [1] * 9}, ModelFileInvalid, "9 elements for 295",
    ),
    "scores of a wrong type": (
        {"tokenizer.ggml.scores": ["a"]}, ModelFileInvalid, "type [str], not [f32]",
    ),
    "an end token outside": (
        {"tokenizer.ggml.eos_token_id": 295}, ModelFileInvalid, "eos_token_id' is 295",
    ),
    "a flag that is a number": ({"tokenizer.ggml.add_bos_token": 1}, ModelFileInvalid, "not bool"),
    "a template that is a number": ({"tokenizer.chat_template": 7}, ModelFileInvalid, "not str"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_METADATA)
def test_metadata_that_cannot_be_is_refused(tmp_path: Path, name: str) -> None:
    metadata, kind, expected = BAD_METADATA[name]
    path = write_tiny_gguf(tmp_path / "model.gguf", metadata=metadata)
    with pytest.raises(kind, match=r"^model\.gguf: ") as caught:
        read_gguf_model(path)
    assert expected in str(caught.value)


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", metadata={"general.architecture": "hyperbrain"})
    with pytest.raises(UnsupportedModel, match="architecture 'hyperbrain' is unknown"):
        read_gguf_model(path)


def test_a_projector_is_told_from_a_model(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "mmproj.gguf", metadata={"general.architecture": "clip"})
    with pytest.raises(UnsupportedModel, match="projector"):
        read_gguf_model(path)


@pytest.mark.parametrize("other", ["t8", "t8\0hidden from C"])
def test_a_vocabulary_with_a_token_twice_is_refused(tmp_path: Path, other: str) -> None:
    """llama.cpp: GGML_ASSERT(id_to_token.size() == token_to_id.size())."""
    tokens = [f"t{i}" for i in range(295)]
    tokens[7] = other
    path = write_tiny_gguf(tmp_path / "model.gguf", metadata={"tokenizer.ggml.tokens": tokens})
    with pytest.raises(ModelFileInvalid, match="1 tokens twice"):
        read_gguf_model(path)


def test_an_spm_vocabulary_without_a_byte_token_is_refused(tmp_path: Path) -> None:
    from tests.fixtures_gguf import _vocabulary

    tokens = list(_vocabulary("spm")["tokenizer.ggml.tokens"])
    tokens[tokens.index("<0xF0>")] = "other"
    path = write_tiny_gguf(
        tmp_path / "model.gguf", tokenizer="spm", metadata={"tokenizer.ggml.tokens": tokens}
    )
    with pytest.raises(UnsupportedModel, match="no token <0xF0>"):
        read_gguf_model(path)


def test_a_missing_embedding_and_wrong_tensor_types_are_named(tmp_path: Path) -> None:
    import numpy as np

    for tensors, expected in (
        ({"token_embd.weight": None}, "'token_embd.weight' is missing"),
        (
            {"blk.0.attn_norm.weight": np.ones(64, np.float16)},
            "vector 'blk.0.attn_norm.weight' has the type F16",
        ),
        (
            {"blk.1.ffn_up.weight": np.ones((128, 64), np.int32)},
            "matrix 'blk.1.ffn_up.weight' has the type I32",
        ),
    ):
        path = write_tiny_gguf(tmp_path / "model.gguf", tensors=tensors)
        with pytest.raises((ModelFileInvalid, UnsupportedModel)) as caught:
            read_gguf_model(path)
        assert expected in str(caught.value)


def test_a_vocabulary_without_weights_is_told(tmp_path: Path) -> None:
    import gguf

    path = tmp_path / "vocab.gguf"
    whole = read_gguf_model(write_tiny_gguf(tmp_path / "whole.gguf"))
    names = [tensor.name for tensor in whole.tensors]
    write_tiny_gguf(path, tensors=dict.fromkeys(names))
    assert not gguf.GGUFReader(path).tensors
    with pytest.raises(ModelFileInvalid, match="has no weights"):
        read_gguf_model(path)


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("tokenizer", ["bpe", "spm"])
def test_good_models_pass(tmp_path: Path, arch: Any, tokenizer: Any) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", arch=arch, tokenizer=tokenizer)
    header = read_gguf_model(path)
    assert header.architecture == arch
    assert header.shards == (path,)


def test_per_layer_heads_are_read(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", metadata={"llama.attention.head_count_kv": [1, 2]})
    assert read_gguf_model(path).get("{arch}.attention.head_count_kv") == [1, 2]


def test_the_same_arguments_write_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    assert write_tiny_gguf(tmp_path / "again.gguf").read_bytes() == tiny.read_bytes()


# -- shards ------------------------------------------------------------------------------------------


def split(folder: Path) -> list[Path]:
    """The tiny model in two shards, written as llama-gguf-split does."""
    import gguf
    import numpy as np

    whole = read_gguf_model(write_tiny_gguf(folder / "whole.gguf"))
    names = [t.name for t in whole.tensors]
    half = len(names) // 2
    reader = gguf.GGUFReader(folder / "whole.gguf")
    paths = []
    for number, part in enumerate((names[:half], names[half:])):
        path = folder / f"tiny-{number + 1:05d}-of-00002.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        if number == 0:
            for key, value in whole.metadata.items():
                kind = whole.types[key]
                content = whole.get_list(key) if kind.startswith("[") else value
                if key == "general.architecture":
                    continue
                if kind.startswith("["):
                    writer.add_array(key, content)
                else:
                    getattr(writer, {"u32": "add_uint32", "f32": "add_float32", "bool": "add_bool"}.get(
                        kind, "add_string"))(key, content)  # fmt: skip
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(names))
        for tensor in reader.tensors:
            if tensor.name in part:
                writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths


def test_a_split_model_is_found_from_any_of_its_shards(tmp_path: Path) -> None:
    first, second = split(tmp_path)
    header = read_gguf_model(second)
    assert header.shards == (first, second)
    whole = read_gguf_model(tmp_path / "whole.gguf")
    assert {t.name for t in header.tensors} == {t.name for t in whole.tensors}
    assert header.weights_bytes == whole.weights_bytes
    assert header.file_bytes == first.stat().st_size + second.stat().st_size


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    first, second = split(tmp_path)
    second.unlink()
    with pytest.raises(ModelNotFound, match=r"tiny-00002-of-00002.gguf: shard 2 of 2 is missing"):
        read_gguf_model(first)


def test_a_shard_of_another_model_or_name_is_refused(tmp_path: Path) -> None:
    first, second = split(tmp_path)
    second.write_bytes(first.read_bytes())
    with pytest.raises(ModelFileInvalid, match="does not say it is shard 2 of 2"):
        read_gguf_model(first)
    renamed = first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(ModelFileInvalid, match="is not named so"):
        read_gguf_model(renamed)
