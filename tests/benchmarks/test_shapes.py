"""Models of random weights: they load, answer, are the same again, and are never half there."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.peers import PeerError
from benchmarks.shapes import SHAPES, tensors_of, write_shape
from edgeinfer.client import LocalClient, Message, OpenOptions, Request, Text
from edgeinfer.sampling import SamplingParams
from edgeinfer_models.gguf_header import read_gguf_header
from tests.fixtures_gguf import write_tiny_gguf

TINY = replace(SHAPES["tiny"], vocab_size=512)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("vocabulary") / "tiny.gguf")


@pytest.mark.parametrize("tied", [True, False])
def test_a_shape_loads_and_its_numbers_are_finite(tmp_path: Path, vocabulary: Path, tied: bool) -> None:
    path = tmp_path / "shape.gguf"
    write_shape(path, replace(TINY, tied=tied), vocabulary)
    with LocalClient(OpenOptions(model=str(path), context=128)) as client:
        assert client.load().vocab_size == TINY.vocab_size
        request = Request(
            messages=(Message("user", "hello"),),
            max_tokens=12,
            ignore_eos=True,
            logprobs=5,
            sampling=SamplingParams(temperature=0.0),
        )
        generation = client.start(request)
        events = [event for event in generation.events() if isinstance(event, Text)]
        assert generation.result().stats.usage.completion_tokens == 12
    likely = [value for event in events for token in event.logprobs for _, value in token.top]
    assert len(likely) >= 12
    assert all(math.isfinite(value) for value in likely)
    assert len({round(value, 3) for value in likely}) > 5  # no flat line either


def test_a_seed_gives_the_same_bytes_and_another_one_others(tmp_path: Path, vocabulary: Path) -> None:
    files = [tmp_path / name for name in ("a.gguf", "b.gguf", "c.gguf")]
    for path, seed in zip(files, (1, 1, 2), strict=True):
        write_shape(path, TINY, vocabulary, seed=seed)
    first, again, other = (path.read_bytes() for path in files)
    assert first == again != other


def test_weights_have_the_spread_that_was_asked_for(tmp_path: Path, vocabulary: Path) -> None:
    import gguf

    path = tmp_path / "shape.gguf"
    write_shape(path, TINY, vocabulary)
    wanted = {tensor.name: tensor for tensor in tensors_of(TINY)}
    reader = gguf.GGUFReader(path)
    assert {tensor.name for tensor in reader.tensors} == wanted.keys()
    for tensor in reader.tensors:
        weights = gguf.dequantize(tensor.data, tensor.tensor_type)
        expected = wanted[tensor.name]
        assert weights.shape == expected.shape
        assert float(weights.std()) == pytest.approx(
            expected.std, rel=0.25 if len(weights) < 300 else 0.1
        )
        assert abs(float(weights.mean()) - (len(weights.shape) == 1)) < 0.1 * expected.std + 0.02


class Published(NamedTuple):
    parameters: float
    file_bytes: float


@pytest.mark.parametrize(
    ("name", "published"), [("1b", Published(1.236e9, 0.77e9)), ("8b", Published(8.03e9, 4.66e9))]
)
def test_the_shapes_have_the_size_of_the_models_they_stand_for(name: str, published: Published) -> None:
    tensors = list(tensors_of(SHAPES[name]))
    assert sum(t.elements for t in tensors) == pytest.approx(published.parameters, rel=0.002)
    assert sum(t.num_bytes for t in tensors) == pytest.approx(published.file_bytes, rel=0.01)


def test_the_types_are_those_of_llama_quantize() -> None:
    tied = {t.name: t.type_name for t in tensors_of(SHAPES["1b"])}
    assert tied["token_embd.weight"] == "Q6_K" and "output.weight" not in tied
    untied = {t.name: t.type_name for t in tensors_of(SHAPES["8b"])}
    assert (untied["token_embd.weight"], untied["output.weight"]) == ("Q4_0", "Q6_K")
    assert {untied[name] for name in untied if "ffn_" in name and "norm" not in name} == {"Q4_0"}


def test_the_vocabulary_is_the_given_one_and_padding(tmp_path: Path, vocabulary: Path) -> None:
    path = tmp_path / "shape.gguf"
    write_shape(path, TINY, vocabulary)
    given, made = (read_gguf_header(p).get_list("tokenizer.ggml.tokens") for p in (vocabulary, path))
    assert given is not None and made is not None
    assert made[: len(given)] == given
    assert len(made) == len(set(made)) == 512
    same = "tokenizer.chat_template"
    assert read_gguf_header(path).get(same) == read_gguf_header(vocabulary).get(same)


def test_a_vocabulary_that_is_too_large_is_refused(tmp_path: Path, vocabulary: Path) -> None:
    with pytest.raises(PeerError, match="more than the shape's 100"):
        write_shape(tmp_path / "shape.gguf", replace(TINY, vocab_size=100), vocabulary)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**29))
    with pytest.raises(PeerError, match=r"0\.5 GB are free"):
        write_shape(tmp_path / "shape.gguf", TINY, vocabulary)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_file_leaves_nothing(tmp_path: Path, vocabulary: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shape(tmp_path / "shape.gguf", TINY, vocabulary, progress=interrupt)
    assert list(tmp_path.iterdir()) == []
