"""What is the MLX runtime's own: agreement with mlx-lm, moved keys, hostile folders, failed steps."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeinfer.backend import RuntimeSettings, SequenceStep, Step
from edgeinfer.errors import (
    BackendUnavailable,
    EdgeInferError,
    LoadFailed,
    ModelError,
    StepAborted,
    StepFailed,
    UnsupportedModel,
)
from edgeinfer.sampling import SamplingParams
from edgeinfer_backends import mlx as room
from edgeinfer_backends.mlx.checked_folder import check_folder
from edgeinfer_models.model_files import ModelFiles
from tests.contract.driving import feed, is_same, opened, probe, some_tokens, unchanged
from tests.fixtures_hf import ModelType, write_tiny_folder

FOUND = room.MlxBackend().probe()
needs_mlx = pytest.mark.skipif(not FOUND.usable, reason=f"mlx: {FOUND.reason}")

EXACT = RuntimeSettings(context=1024, sequences=2, kv_type_k="f32", kv_type_v="f32")
TOKENS = [5, 70, 131, 22, 240, 9, 9, 61, 200, 17, 99, 4, 150, 33]


def files_of(folder: Path) -> ModelFiles:
    return ModelFiles(folder.name, (folder / "model.safetensors",), "safetensors")


def load(folder: Path, settings: RuntimeSettings = EXACT) -> Any:
    return room.MlxBackend().load(files_of(folder), settings, lambda done: True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_folder(tmp_path / "tiny")


@pytest.fixture
def runtime(folder: Path) -> Iterator[Any]:
    loaded = load(folder)
    yield loaded
    loaded.close()


def all_rows(runtime: Any, tokens: list[int]) -> Any:
    result = runtime.forward(Step([SequenceStep(runtime.open(), tokens, "all")]))
    return np.stack([runtime.logits(result.starts[0] + i).copy() for i in range(len(tokens))])


def stock_rows(folder: Path, chunks: list[list[int]]) -> Any:
    """The same by mlx-lm alone: its loader, its model's own call, its stock cache."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    cache = make_prompt_cache(model)
    rows = [np.array(model(mx.array([chunk]), cache=cache)[0].astype(mx.float32)) for chunk in chunks]
    return np.concatenate(rows)


# -- agreement with mlx-lm -------------------------------------------------------------------------


@needs_mlx
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_logits_are_those_of_mlx_lms_own_call_with_its_stock_cache(
    tmp_path: Path, model_type: ModelType
) -> None:
    folder = write_tiny_folder(tmp_path / "tiny", model_type=model_type)
    runtime = load(folder)
    expected = stock_rows(folder, [TOKENS[:8], *([token] for token in TOKENS[8:])])
    assert is_same(all_rows(runtime, TOKENS), expected)
    assert expected.std() > 0.5, "logits that are all alike would agree with anything"


def quantized_folder(folder: Path) -> Path:
    import mlx.core as mx

    write_tiny_folder(folder)
    weights = dict(mx.load(str(folder / "model.safetensors")))
    for name in [name for name in weights if name.endswith(("_proj.weight", "embed_tokens.weight"))]:
        packed, scales, biases = mx.quantize(weights[name], group_size=32, bits=4)
        base = name.removesuffix("weight")
        weights |= {name: packed, f"{base}scales": scales, f"{base}biases": biases}
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    change_config(folder, {"quantization": {"group_size": 32, "bits": 4}})
    return folder


@needs_mlx
def test_weights_that_mlx_quantized_are_run(tmp_path: Path) -> None:
    folder = quantized_folder(tmp_path / "tiny")
    runtime = load(folder)
    assert is_same(all_rows(runtime, TOKENS), stock_rows(folder, [TOKENS]))
    assert runtime.facts.warnings == ()


@needs_mlx
@pytest.mark.parametrize("weights", ["float16", "4 bits"])
@pytest.mark.parametrize("kv_type", ["f32", "f16", "bf16"])
def test_however_a_prompt_is_cut_its_rows_are_the_same(
    tmp_path: Path, weights: str, kv_type: str
) -> None:
    """On the CPU build; the contract suite holds it for float32 weights."""
    if FOUND.devices[0].kind != "cpu":
        pytest.skip("mlx: a GPU takes other kernels for other numbers of rows")
    at = tmp_path / "tiny"
    folder = quantized_folder(at) if weights == "4 bits" else write_tiny_folder(at, dtype="float16")
    runtime = load(folder, RuntimeSettings(context=256, kv_type_k=kv_type, kv_type_v=kv_type))
    tokens = some_tokens(runtime, 100)
    expected = feed(runtime, runtime.open(), tokens, chunk=100)
    for chunk in (1, 3, 64, 99):
        sequence = runtime.open()
        assert is_same(feed(runtime, sequence, tokens, chunk=chunk), expected), chunk
        runtime.free(sequence)


# -- moved keys ------------------------------------------------------------------------------------

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "linear": {"type": "linear", "factor": 2.0},
    "llama3": LLAMA3,
    "yarn": YARN,
}


@needs_mlx
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_one_layer_after_an_eviction_is_the_model_run_on_what_is_left(
    tmp_path: Path, model_type: ModelType, scaling: str
) -> None:
    """In a single layer keys and values depend on their own token and position only."""
    config = {"rope_scaling": SCALINGS[scaling]}
    folder = write_tiny_folder(tmp_path / "tiny", model_type=model_type, layers=1, config=config)
    runtime = load(folder)
    tokens = some_tokens(runtime, 300)
    evicted, never = opened(runtime, tokens), opened(runtime, tokens[:4] + tokens[204:])
    runtime.evict(evicted, 4, 204)
    assert runtime.length(evicted) == 100
    np.testing.assert_allclose(probe(runtime, evicted), probe(runtime, never), atol=2e-4)
    moved, fresh = (runtime._sequences[s].rows(0, 0, 100)[0] for s in (evicted, never))
    np.testing.assert_allclose(np.array(moved), np.array(fresh), atol=2e-4)


@needs_mlx
def test_many_small_evictions_drift_no_further_than_rounding(tmp_path: Path) -> None:
    runtime = load(write_tiny_folder(tmp_path / "tiny", layers=1))
    tokens = some_tokens(runtime, 250)
    sequence = opened(runtime, tokens)
    for _ in range(50):
        runtime.evict(sequence, 4, 7)
    never = opened(runtime, tokens[:4] + tokens[154:])
    np.testing.assert_allclose(probe(runtime, sequence), probe(runtime, never), atol=1e-3)


@needs_mlx
def test_positions_whose_angle_depends_on_the_length_are_not_moved(tmp_path: Path) -> None:
    config = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64}
    runtime = load(write_tiny_folder(tmp_path / "tiny", config=config))
    assert not runtime.facts.can.evict
    assert any("cannot be shifted" in warning for warning in runtime.facts.warnings)
    sequence = opened(runtime, TOKENS)
    with pytest.raises(NotImplementedError):
        runtime.evict(sequence, 1, 3)


@needs_mlx
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_rope_settings_mean_the_same_where_newer_files_put_them(
    tmp_path: Path, model_type: ModelType
) -> None:
    old = {"rope_theta": 5e5, "rope_scaling": LLAMA3}
    new = {"rope_theta": None, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}}
    rows = [
        all_rows(load(write_tiny_folder(tmp_path / name, model_type=model_type, config=config)), TOKENS)
        for name, config in (("old", old), ("new", new), ("none", {}))
    ]
    assert is_same(rows[0], rows[1])
    assert not np.allclose(rows[0], rows[2])


# -- half-way failures -----------------------------------------------------------------------------


def fail_at(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, call: int, error: Exception) -> None:
    """The `call`-th call of a method raises, and only that one."""
    original, calls = getattr(where, name), [0]

    def failing(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise error
        return original(*arguments, **named)

    monkeypatch.setattr(where, name, failing)


@needs_mlx
@pytest.mark.parametrize("method", ["MlxModel.logits", "SequenceCache.commit", "StepLayer.make_mask"])
def test_a_step_that_fails_in_its_second_part_keeps_nothing_of_the_first(
    runtime: Any, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    from edgeinfer_backends.mlx import model, sequence_cache

    owner, name = method.split(".")
    where = getattr(model if owner == "MlxModel" else sequence_cache, owner)
    one, other = (opened(runtime, some_tokens(runtime, 100, seed=seed)) for seed in (1, 2))
    more = some_tokens(runtime, 9, seed=3)
    with unchanged(runtime, one, other), monkeypatch.context() as patch:
        fail_at(patch, where, name, 2, RuntimeError("[malloc] unable to allocate"))
        with pytest.raises(StepFailed, match=r"MLX failed on a step .*unable to allocate"):
            runtime.forward(Step([SequenceStep(one, more), SequenceStep(other, more)]))
    runtime.forward(Step([SequenceStep(one, more), SequenceStep(other, more)]))


@needs_mlx
def test_an_abort_stops_a_prompt_between_two_layers(
    runtime: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeinfer_backends.mlx.sequence_cache import StepLayer

    sequence = opened(runtime, some_tokens(runtime, 100))
    original, seen = StepLayer.update_and_fetch, []

    def aborted_in_the_first_layer(layer: Any, keys: Any, values: Any) -> Any:
        seen.append(layer)
        runtime.abort()
        return original(layer, keys, values)

    with unchanged(runtime, sequence), monkeypatch.context() as patch:
        patch.setattr(StepLayer, "update_and_fetch", aborted_in_the_first_layer)
        with pytest.raises(StepAborted):
            feed(runtime, sequence, some_tokens(runtime, 50))
    assert len(seen) == 1


@needs_mlx
def test_an_abort_without_a_step_is_forgotten(runtime: Any) -> None:
    runtime.abort()
    sequence = runtime.open()
    feed(runtime, sequence, TOKENS)  # raises StepAborted if it was kept for this step
    assert runtime.length(sequence) == len(TOKENS)


@needs_mlx
def test_numbers_that_are_not_finite_are_an_error_not_a_token(tmp_path: Path) -> None:
    bad = {"model.norm.weight": np.full(64, np.nan, np.float32)}
    runtime = load(write_tiny_folder(tmp_path / "tiny", tensors=bad))
    feed(runtime, runtime.open(), TOKENS)
    with pytest.raises(StepFailed, match="not finite"):
        runtime.sample(0, runtime.create_sampler(SamplingParams(), 1))


# -- memory ----------------------------------------------------------------------------------------


@needs_mlx
def test_a_fork_takes_memory_only_when_it_is_written(folder: Path) -> None:
    import mlx.core as mx

    runtime = load(folder, RuntimeSettings(context=1024, sequences=8))
    parent = opened(runtime, some_tokens(runtime, 500))
    before = mx.get_active_memory()
    forks = [runtime.fork(parent, 500) for _ in range(10)]
    assert mx.get_active_memory() - before < 50_000
    feed(runtime, forks[0], TOKENS)
    one_cache = 500 * runtime.facts.kv_bytes_per_token
    assert mx.get_active_memory() - before >= one_cache


@needs_mlx
def test_decoding_writes_in_place_and_rewinding_gives_memory_back(runtime: Any) -> None:
    import mlx.core as mx

    sequence = opened(runtime, some_tokens(runtime, 1000))
    cache = runtime._sequences[sequence]
    feed(runtime, sequence, [1])
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    feed(runtime, sequence, [1])
    assert mx.get_active_memory() - before < 20_000, "the buffers were copied and both kept"
    runtime.rewind(sequence, 100)
    assert cache.capacity == 256
    runtime.rewind(sequence, 0)
    assert cache.capacity == 0


# -- what is refused -------------------------------------------------------------------------------


def change_config(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def drop_tensor(folder: Path) -> None:
    shutil.rmtree(folder)
    write_tiny_folder(folder, tensors={"model.layers.1.mlp.up_proj.weight": None})


def reshape_tensor(folder: Path) -> None:
    shutil.rmtree(folder)
    write_tiny_folder(folder, tensors={"model.layers.1.mlp.up_proj.weight": np.zeros((64, 96))})


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config is text": (lambda f: (f / "config.json").write_text("hello"), "config.json"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    "tokenizer is empty": (
        lambda f: (f / "tokenizer.json").write_text('{"decoder": {"type": "ByteLevel"}}'),
        "tokenizer.json",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no .safetensors"),
    "weights cut off": (lambda f: truncate(f / "model.safetensors"), "missing at its end"),
    "a tensor missing": (drop_tensor, "up_proj"),
    "a tensor of another shape": (reshape_tensor, "up_proj"),
    "a layer too many": (lambda f: change_config(f, {"num_hidden_layers": 3}), "3 layers"),
    "another vocabulary": (lambda f: change_config(f, {"vocab_size": 500}), "500"),
    "odd heads": (lambda f: change_config(f, {"num_key_value_heads": 3}), "KV heads"),
}


@needs_mlx
@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_folder_is_one_line(folder: Path, what: str) -> None:
    damage, expected = DAMAGES[what]
    damage(folder)
    with pytest.raises(LoadFailed) as caught:
        load(folder)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


HOSTILE: dict[str, dict[str, Any]] = {
    "a path as model type": {"model_type": "../../evil"},
    "a module that is no model": {"model_type": "cache"},
    "a number as model type": {"model_type": 7},
    "a list as model type": {"model_type": ["llama"]},
    "an angle that is no number": {"rope_theta": float("nan")},
    "an angle of 400 digits": {"rope_theta": 10**400},
    "a factor of 400 digits": {"rope_scaling": {"type": "linear", "factor": 10**400}},
    "terabytes of embeddings": {"vocab_size": 2**31 - 1, "hidden_size": 2**17},
    "more than any machine": {"hidden_size": 10**30},
    "a negative size": {"intermediate_size": -1},
    "true as a number": {"num_attention_heads": True},
    "text as a number": {"rope_theta": "many"},
    "a size that is not whole": {"head_dim": 16.5},
    "no heads": {"num_attention_heads": 0},
    "a million layers": {"num_hidden_layers": 10**6},
    "an unknown RoPE": {"rope_scaling": {"type": "os.system", "factor": 2.0}},
    "RoPE by nothing": {"rope_scaling": {"type": "linear", "factor": "x"}},
    "a RoPE table of megabytes": {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 10_000}},
    "layers of an unknown kind": {"layer_types": ["evil", "full_attention"]},
    "too few layer kinds": {"layer_types": ["full_attention"]},
    "packed in an impossible way": {"quantization": {"group_size": 7, "bits": 4}},
    "packed by another tool": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "an epsilon of a million": {"rms_norm_eps": 1e6},
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_configuration_is_refused_before_mlx_sees_it(tmp_path: Path, what: str) -> None:
    pytest.importorskip("tokenizers", reason="mlx: the extra is not installed")
    folder = write_tiny_folder(tmp_path / "tiny")
    change_config(folder, HOSTILE[what])
    with pytest.raises(ModelError, match=r"config\.json"):
        check_folder(files_of(folder))


@needs_mlx
@pytest.mark.parametrize("scaling", [{"rope_type": "yarn", "factor": 0}, {"rope_type": "longrope"}])
def test_a_rope_that_cannot_be_computed_fails_the_load(tmp_path: Path, scaling: dict[str, Any]) -> None:
    folder = write_tiny_folder(tmp_path / "tiny", config={"rope_scaling": scaling})
    with pytest.raises(LoadFailed, match="tiny"):
        load(folder)


@needs_mlx
@pytest.mark.parametrize("key", ["model_file", "auto_map"])
def test_python_in_a_model_folder_is_never_run(folder: Path, key: str) -> None:
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nModel = ModelArgs = None\n")
    value: Any = "evil.py" if key == "model_file" else {"AutoModelForCausalLM": "evil.Model"}
    change_config(folder, {key: value, "trust_remote_code": True})
    if key == "model_file":
        with pytest.raises(UnsupportedModel, match="never run"):
            load(folder)
    else:  # transformers' way, which means nothing to mlx-lm
        load(folder)
    assert not (folder / "ran").exists()


@needs_mlx
def test_only_files_that_were_checked_are_read(tmp_path: Path) -> None:
    """mlx-lm alone reads every model*.safetensors and hf_quant_config.json, and takes brackets in a path
    for a pattern."""
    folder = write_tiny_folder(tmp_path / "tiny [4bit]*")
    expected = all_rows(load(folder), TOKENS)
    (folder / "model-extra.safetensors").write_bytes(b"not checked by anybody")
    (folder / "hf_quant_config.json").write_text('{"quant_method": "bitnet"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    runtime = load(folder)
    assert is_same(all_rows(runtime, TOKENS), expected)
    assert runtime.tokenizer.is_end(1)


@needs_mlx
def test_nothing_is_compiled_into_a_folder_that_others_can_write(folder: Path, tmp_path: Path) -> None:
    """On the CPU mx.compile calls g++ and loads what it finds under a foreseeable name in /tmp."""
    code = """
import sys
from pathlib import Path
import mlx.core as mx
from tests.backends.test_mlx import all_rows, load, TOKENS
all_rows(load(Path(sys.argv[1])), TOKENS)
print((Path(sys.argv[2]) / "mlx").exists())
mx.enable_compile()
if mx.default_device() == mx.cpu:
    mx.eval(mx.compile(lambda x: x * mx.sigmoid(x) + 1)(mx.ones(9)))
    print((Path(sys.argv[2]) / "mlx").exists())
"""
    if not shutil.which("g++") or FOUND.devices[0].kind != "cpu":
        pytest.skip("mlx: there is no g++ or no CPU build, so nothing could be compiled")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(temporary)],
        env=os.environ | {"TMPDIR": str(temporary)}, capture_output=True, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout.split() == ["False", "True"], done.stderr


# -- what is said ----------------------------------------------------------------------------------


@needs_mlx
def test_settings_that_cannot_be_had_are_said(folder: Path) -> None:
    asked = RuntimeSettings(context=256, kv_type_k="q8_0", flash_attention=False, gpu_layers=7)
    warnings = "\n".join(load(folder, asked).facts.warnings)
    for expected in ("q8_0", "one kind of attention", "does not divide layers"):
        assert expected in warnings
    assert load(folder, RuntimeSettings(context=256)).facts.warnings == ()
    with pytest.raises(LoadFailed, match="adapters"):
        load(folder, RuntimeSettings(adapters=(("a.safetensors", 1.0),)))
    for name in ("context", "sequences", "step_tokens", "logit_rows"):
        with pytest.raises(ValueError, match=name):
            load(folder, RuntimeSettings(**{name: 0}))


@needs_mlx
def test_a_sliding_window_that_is_not_applied_is_said(tmp_path: Path) -> None:
    window = {"sliding_window": 512}
    runtime = load(write_tiny_folder(tmp_path / "a", model_type="mistral", config=window))
    assert any("sliding window of 512" in warning for warning in runtime.facts.warnings)
    window |= {"use_sliding_window": False}
    assert (
        load(write_tiny_folder(tmp_path / "b", model_type="qwen2", config=window)).facts.warnings == ()
    )


@needs_mlx
def test_a_sliding_window_that_the_model_has_is_applied(tmp_path: Path) -> None:
    config = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    folder = write_tiny_folder(tmp_path / "tiny", config=config)
    runtime = load(folder)
    assert runtime.facts.warnings == ()
    expected = stock_rows(folder, [TOKENS])
    np.testing.assert_allclose(all_rows(runtime, TOKENS), expected, atol=1e-5)
    plain = load(write_tiny_folder(tmp_path / "plain"))
    assert not np.allclose(all_rows(plain, TOKENS)[-1], expected[-1], atol=1e-3)


@needs_mlx
def test_the_identity_tells_models_settings_and_files_apart(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "tiny")
    base = dict(load(folder).identity())
    assert dict(load(folder, RuntimeSettings(kv_type_v="f32")).identity()) != base
    os.utime(folder / "model.safetensors", ns=(1, 1))
    touched = dict(load(folder).identity())
    assert touched != base
    change_config(folder, {"rope_theta": 20000.0})
    assert dict(load(folder).identity()) != touched


# -- probing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["mlx", "mlx_lm", "tokenizers"])
def test_what_is_not_installed_is_named_with_the_way_to_get_it(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else object())
    found = room.MlxBackend().probe()
    assert not found.usable
    assert missing.replace("_", "-") in found.reason
    assert "pip install edgeinfer[mlx]" in found.reason
    with pytest.raises(BackendUnavailable, match="pip install"):
        room.MlxBackend().load(files_of(Path("x")), RuntimeSettings(), lambda done: True)


def test_another_series_of_mlx_lm_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.99.1")
    found = room.MlxBackend().probe()
    assert not found.usable
    assert "mlx-lm 0.99.1" in found.reason


def test_a_probe_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> object:
        raise OSError("libmlx.so: cannot open shared object file")

    monkeypatch.setattr("importlib.util.find_spec", broken)
    found = room.MlxBackend().probe()
    assert not found.usable
    assert "libmlx.so" in found.reason


def test_other_formats_are_refused() -> None:
    with pytest.raises(EdgeInferError, match="safetensors"):
        room.MlxBackend().load(ModelFiles("x", (), "gguf"), RuntimeSettings(), lambda done: True)
