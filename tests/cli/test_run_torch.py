"""The torch backend from the command line: its options, and what others say to them."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeinfer_backends.torch import TorchBackend
from tests.cli.conftest import Console, Invoke
from tests.fixtures_gguf import write_tiny_gguf
from tests.fixtures_hf import write_tiny_folder

FOUND = TorchBackend().probe()
needs_torch = pytest.mark.skipif(not FOUND.usable, reason=f"torch: {FOUND.reason}")
ANSWER = ("--json", "--temp", "0", "--max-tokens", "8", "--threads", "1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_folder(tmp_path / "tiny", model_type="qwen3")


@needs_torch
def test_a_folder_is_answered_by_torch(console: Console, folder: Path) -> None:
    done = console("run", "--backend", "torch", *ANSWER, "--ctx", "256", folder, "hello")
    assert (done.code, done.err) == (0, "")
    assert (done.json["backend"], done.json["usage"]["completion_tokens"]) == ("torch", 8)
    assert done.json["warnings"] == []


@needs_torch
def test_smaller_numbers_are_taken_and_their_price_is_said(console: Console, folder: Path) -> None:
    options = ("--load-as", "int8", "--kv-type", "int8", "--ctx", "256")
    done = console("run", "--backend", "torch", *ANSWER, *options, folder, "hello")
    assert done.code == 0
    assert (done.json["kv"]["type_k"], done.json["kv"]["type_v"]) == ("int8", "int8")
    assert any("weights are rounded to int8" in warning for warning in done.json["warnings"])
    whole = console("run", "--backend", "torch", *ANSWER, "--ctx", "256", folder, "hello")
    assert done.json["kv"]["bytes_per_token"] < whole.json["kv"]["bytes_per_token"]


@needs_torch
def test_heavy_hitters_stay_in_a_full_context_and_that_is_said(console: Console, folder: Path) -> None:
    options = ("--window", "64", "--overflow", "stream", "--max-tokens", "60")
    how = ("--backend", "torch", "--json", "--temp", "0", "--threads", "1", "--eviction", "h2o")
    done = console("run", *how, *options, folder, "-", stdin=b"tell me more of this " * 3)
    assert done.code == 0
    kv = done.json["kv"]
    assert kv["evicted_tokens"] == kv["newly_evicted"] > 0
    assert any("those least attended to" in warning for warning in done.json["warnings"])
    assert done.json["usage"]["completion_tokens"] == 60


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--eviction h2o", "--eviction h2o: the llamacpp backend does not count attention"),
        ("--load-as int8", "--load-as int8: the llamacpp backend computes with weights as they are"),
        ("--kv-type int8", "the llamacpp backend has no KV cache of type int8"),
        ("--kv-type-v fp8", "the llamacpp backend has no KV cache of type fp8"),
        ("--eviction oldest", "--eviction 'oldest' is not one of streaming, h2o"),
        ("--load-as q4", "--load-as 'q4' is not one of auto, f32, bf16, f16, int8, int4"),
    ],
)
def test_what_another_backend_cannot_do_is_wrong_usage(
    invoke: Invoke, tmp_path: Path, options: str, said: str
) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    done = invoke("run", *options.split(), path, "hi")
    assert (done.code, done.out) == (2, "")
    assert done.error_line.startswith(said)


def test_eval_too_says_that_a_backend_does_not_count_attention(invoke: Invoke, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    done = invoke("eval", path, "--suite", "stream", "--settings", "f16:64:4:h2o")
    assert (done.code, done.out) == (2, "")
    assert "--backend torch does" in done.error_line
