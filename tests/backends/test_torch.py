"""The torch backend beyond the contract: number types, KV types, heavy hitters, experts, layers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeinfer.backend import LoadAs, Runtime, RuntimeSettings, SequenceStep, Step
from edgeinfer.errors import LoadFailed
from edgeinfer.registry import get_backend
from edgeinfer_models.conversion.model import source_of_folder
from edgeinfer_models.model_files import ModelFiles
from edgeinfer_models.resolve import resolve_model
from tests.fixtures_families import CONFIGS, full, write_folder
from tests.fixtures_hf import write_tiny_folder

torch = pytest.importorskip("torch")

SETTINGS = RuntimeSettings(
    context=512, sequences=2, step_tokens=256, logit_rows=64, threads=1, threads_batch=1, gpu_layers=0
)
Load = Callable[..., Runtime]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("torch") / "tiny", feed_forward=128, head_dim=32)


@pytest.fixture
def load(folder: Path) -> Iterator[Load]:
    """`load(**settings)`: a runtime of the tiny folder, closed at the end."""
    loaded: list[Runtime] = []

    def load_one(path: Path = folder, **settings: Any) -> Runtime:
        files = ModelFiles(path.name, (path / "model.safetensors",), "safetensors")
        found = get_backend("torch").load(files, replace(SETTINGS, **settings), lambda _: True)
        loaded.append(found)
        return found

    yield load_one
    for runtime in loaded:
        runtime.close()


def tokens_of(count: int, seed: int = 0, vocab: int = 250) -> list[int]:
    return np.random.default_rng(seed).integers(5, vocab, count).tolist()


def read(runtime: Runtime, sequence: int, tokens: list[int]) -> Any:
    """All rows of logits, shape (n, vocabulary)."""
    result = runtime.forward(Step([SequenceStep(sequence, tokens, "all")]))
    return np.stack([runtime.logits(result.starts[0] + i).copy() for i in range(len(tokens))])


def mean_kl(found: Any, reference: Any) -> float:
    def log_softmax(x: Any) -> Any:
        x = x.astype(np.float64)
        x = x - x.max(axis=-1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    p, q = log_softmax(reference), log_softmax(found)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


# -- number types ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load_as", "stored", "fast_bf16", "device", "family", "computed", "held"),
    [
        ("auto", "F32", True, "cpu", "llama", "f32", "plain"),
        ("auto", "F16", True, "cpu", "llama", "bf16", "plain"),
        ("auto", "F16", False, "cpu", "llama", "f32", "plain"),
        ("auto", "Q4_K_M", True, "cpu", "llama", "bf16", "plain"),
        ("auto", "F16", True, "cuda", "llama", "f16", "plain"),
        ("auto", "F16", True, "cuda", "gemma3", "bf16", "plain"),
        ("auto", "BF16", False, "cuda", "llama", "f16", "plain"),
        ("auto", "BF16", False, "cuda", "gemma2", "bf16", "plain"),
        ("f32", "F16", True, "cpu", "llama", "f32", "plain"),
        ("f16", "BF16", True, "cpu", "llama", "f16", "plain"),
        ("int8", "BF16", True, "cpu", "llama", "bf16", "int8"),
        ("int4", "F32", True, "cpu", "llama", "f32", "int4"),
    ],
)
def test_number_types_are_chosen_by_what_is_stored_and_what_is_fast(
    load_as: LoadAs,
    stored: str,
    fast_bf16: bool,
    device: str,
    family: str,
    computed: str,
    held: str,
) -> None:
    from edgeinfer_backends.torch.number_types import choose

    found = choose(load_as, stored, fast_bf16=fast_bf16, device=device, family=family)
    assert (found.computed, found.held) == (computed, held)
    loses = held != "plain" or (computed != "f32" and computed.upper() != stored)
    assert bool(found.note) == loses, "what is lost is said, and nothing else"


def test_a_gemma_is_not_computed_in_f16() -> None:
    from edgeinfer_backends.torch.number_types import choose

    with pytest.raises(LoadFailed, match="use bf16 or f32"):
        choose("f16", "F16", fast_bf16=True, device="cuda", family="gemma3")


@pytest.mark.parametrize(("load_as", "most"), [("bf16", 1e-3), ("f16", 1e-4), ("int8", 1e-2)])
def test_what_a_smaller_number_type_costs_is_bounded(load: Load, load_as: str, most: float) -> None:
    tokens = tokens_of(48)
    plain, small = load(), load(load_as=load_as)
    expected = read(plain, plain.open(), tokens)
    found = mean_kl(read(small, small.open(), tokens), expected)
    assert 0.0 < found < most
    assert any("--load-as" in warning for warning in small.facts.warnings)
    assert plain.facts.warnings == ()


@pytest.mark.parametrize("load_as", ["bf16", "int8", "int4"])
def test_the_memory_of_smaller_weights_is_predicted(load: Load, folder: Path, load_as: str) -> None:
    runtime = load(load_as=load_as)
    config = resolve_model(str(folder)).config
    files = ModelFiles("tiny", (folder / "model.safetensors",), "safetensors")
    settings = replace(SETTINGS, load_as=load_as)  # type: ignore[arg-type]
    predicted = get_backend("torch").predict_memory(files, config, settings)

    def weights(items: Any) -> int:
        return sum(item.num_bytes for item in items if item.name == "weights")

    assert weights(predicted) == pytest.approx(weights(runtime.memory()), rel=0.1)
    assert weights(runtime.memory()) < weights(load().memory())


# -- 8 and 4 bits ----------------------------------------------------------------------------------


def planted(folder: Path, path: Path, factor: float = 60.0) -> Path:
    """The same function with a few hidden channels of each layer that are `factor` times larger where
    matrices take them in: their norms' weights are, and the matrices' columns are that much smaller."""

    from safetensors.numpy import load_file, save_file

    tensors = {name: values.copy() for name, values in load_file(folder / "model.safetensors").items()}
    channels = [3, 17, 40]
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for norm, matrices in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            tensors[f"{prefix}{norm}.weight"][channels] *= factor
            for matrix in matrices:
                tensors[f"{prefix}{matrix}.weight"][:, channels] /= factor
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (path / name).write_text(json.dumps(json.loads((folder / name).read_text())))
    return path


def test_outlier_columns_save_what_plain_int8_loses(load: Load, folder: Path, tmp_path: Path) -> None:
    """LLM.int8 (arXiv:2208.07339), on a model with planted outlier channels."""
    from edgeinfer_backends.torch.quantized import Int8Linear
    from edgeinfer_backends.torch.weights import replace_module

    path, tokens = planted(folder, tmp_path / "planted"), tokens_of(60)
    reference, with_columns, plain = load(path), load(path, load_as="int8"), load(path)
    count = 0
    decoder = plain._decoder  # type: ignore[attr-defined]
    for place, module in list(decoder.named_modules()):
        if isinstance(module, torch.nn.Linear) and place.startswith("layers."):
            replace_module(decoder, place, Int8Linear(module, float("inf"), keeps=False))
            count += 1
    assert count == 2 * 7
    expected = read(reference, reference.open(), tokens)
    kl = mean_kl(read(with_columns, with_columns.open(), tokens), expected)
    kl_plain = mean_kl(read(plain, plain.open(), tokens), expected)
    assert kl < 0.1 * kl_plain, f"{kl:.6f} with outlier columns, {kl_plain:.6f} without"


def test_a_row_s_outliers_do_not_change_the_rows_beside_it() -> None:
    from edgeinfer_backends.torch.quantized import Int8Linear

    torch.manual_seed(0)
    small = Int8Linear(torch.nn.Linear(64, 96, bias=True).requires_grad_(False))
    x = torch.randn(4, 64)
    alone = small(x[:1])
    x[1, 7], x[2, 9] = 40.0, -25.0
    assert torch.allclose(small(x)[:1], alone, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_ways_through_a_4_bit_matrix_agree_with_what_its_numbers_mean(dtype: str) -> None:
    from edgeinfer_backends.torch.quantized import Int4Linear

    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 128, bias=True).to(getattr(torch, dtype)).requires_grad_(False)
    small = Int4Linear(linear)
    x = torch.randn(200, 96).to(linear.weight.dtype)
    meant = torch.nn.functional.linear(x.float(), small.dequantized().float(), linear.bias.float())
    few = torch.cat([small(part) for part in x.split(10)])
    rounding = 1e-5 if dtype == "float32" else 0.05
    assert (small(x).float() - meant).abs().max() < rounding
    assert (few.float() - meant).abs().max() < rounding
    step = (linear.weight.float().amax() - linear.weight.float().amin()) / 15
    assert (small.dequantized().float() - linear.weight.float()).abs().max() <= 0.6 * step


def test_a_matrix_that_4_bits_do_not_fit_stays_as_it_is() -> None:
    from edgeinfer_backends.torch.quantized import quantized

    for size in ((33, 64), (64, 65)):
        linear = torch.nn.Linear(*size)
        assert quantized(linear, "int4") is linear


# -- KV types --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "most_kl", "share"),
    [("f16", 1e-5, 0.5), ("bf16", 1e-3, 0.5), ("int8", 2e-3, 0.29), ("fp8", 5e-2, 0.29)],
)
def test_what_a_kv_type_costs_is_bounded(load: Load, kind: str, most_kl: float, share: float) -> None:
    tokens = tokens_of(200)
    plain, small = load(kv_type_k="f32", kv_type_v="f32"), load(kv_type_k=kind, kv_type_v=kind)
    one, other = plain.open(), small.open()
    for start in range(0, 200, 50):
        part = tokens[start : start + 50]
        expected, found = read(plain, one, part), read(small, other, part)
    kl = mean_kl(found, expected)
    assert 0.0 < kl < most_kl
    assert small.facts.kv_bytes_per_token <= share * plain.facts.kv_bytes_per_token


def test_a_type_of_llama_cpp_is_answered_with_the_nearest_and_a_warning(load: Load) -> None:
    runtime = load(kv_type_k="q8_0", kv_type_v="q4_0")
    assert (runtime.facts.kv_type_k, runtime.facts.kv_type_v) == ("int8", "f16")
    assert [w for w in runtime.facts.warnings if "no KV cache of type q8_0; int8 is used" in w]
    assert [w for w in runtime.facts.warnings if "no KV cache of type q4_0; f16 is used" in w]


def test_a_token_of_zeros_survives_8_bits() -> None:
    from edgeinfer_backends.torch.kv_cache import read as read_rows
    from edgeinfer_backends.torch.kv_cache import rounded

    for kind in ("int8", "fp8"):
        values = torch.zeros(2, 3, 16)
        values[0, 1] = torch.linspace(-7e4, 7e4, 16)
        values[1, 2] = torch.linspace(-1e-6, 1e-6, 16)
        found = read_rows(rounded(values, kind), torch.float32)
        assert torch.isfinite(found).all()
        assert torch.allclose(found, values, rtol=0.07, atol=7e4 / 250)
        assert torch.allclose(found[1, 2], values[1, 2], rtol=0.07, atol=1e-8)


# -- heavy hitters ---------------------------------------------------------------------------------


def test_attention_is_counted_whole_however_a_text_is_cut(load: Load) -> None:
    runtime = load(heavy_hitters=True)
    tokens = tokens_of(90)
    one, other = runtime.open(), runtime.open()
    read(runtime, one, tokens[:60])
    read(runtime, one, tokens[60:])
    for start in range(0, 90, 30):
        read(runtime, other, tokens[start : start + 30])
    caches = runtime._sequences  # type: ignore[attr-defined]
    weights = [caches[sequence].weight(0, 90) for sequence in (one, other)]
    assert torch.allclose(weights[0], weights[1], atol=1e-3)
    # Each row gives away 1 in each of the two query heads of a KV head.
    assert torch.allclose(weights[0].sum(dim=-1), torch.full((2, 2), 2.0 * 90), rtol=1e-4)


def test_scores_too_large_for_f16_are_no_harm() -> None:
    from edgeinfer_backends.torch.decoder import attend, attention_weights, weigh
    from tests.fixtures_families import shape_of

    torch.manual_seed(0)
    shape = shape_of(full({"model_type": "llama", "head_dim": 64, "hidden_size": 256}))
    q = torch.full((1, 4, 64), 40.0).half()
    k = (torch.ones(2, 5, 64) * torch.tensor([50.0, 20.0, 45.0, 1.0, 49.0])[None, :, None]).half()
    v = torch.randn(2, 5, 64).half()
    found = weigh(shape, attention_weights(shape, q, k, None), v)
    assert torch.isfinite(found).all()
    assert torch.allclose(found, attend(shape, q, k, v, None), atol=1e-2)


def test_counting_attention_changes_no_prediction(load: Load) -> None:
    plain, counting = load(), load(heavy_hitters=True)
    tokens = tokens_of(50)
    expected, found = read(plain, plain.open(), tokens), read(counting, counting.open(), tokens)
    assert np.abs(found - expected).max() < 1e-3


def test_letting_the_lightest_go_is_evicting_where_the_lightest_are_together(load: Load) -> None:
    runtime = load(heavy_hitters=True)
    tokens, end = tokens_of(80), tokens_of(5, seed=1)
    one = runtime.open()
    read(runtime, one, tokens[:50])
    read(runtime, one, tokens[50:])
    other = runtime.fork(one, 80)
    weight = runtime._sequences[one]._weight  # type: ignore[attr-defined]
    weight[:, :, 10:30] = 0.0
    runtime.evict_lightest(one, 4, 60, 36)
    runtime.evict(other, 10, 30)
    assert runtime.length(one) == runtime.length(other) == 60
    assert np.array_equal(read(runtime, one, end), read(runtime, other, end))


def test_the_keys_that_each_head_kept_are_at_their_new_positions(load: Load) -> None:
    """Of the first layer: those depend on a token and its position alone."""
    runtime = load(heavy_hitters=True, kv_type_k="f32", kv_type_v="f32")
    sequence, tokens = runtime.open(), tokens_of(60)
    read(runtime, sequence, tokens)
    weight = runtime._sequences[sequence].weight(0, 60)[0].clone()  # type: ignore[attr-defined]
    runtime.evict_lightest(sequence, 4, 50, 10)
    keys = runtime._sequences[sequence].rows(0, 0, 24)[0].numbers  # type: ignore[attr-defined]
    kept = []
    for head in range(2):
        own = sorted((weight[head, 4:50].topk(10).indices + 4).tolist())
        kept.append([*range(4), *own, *range(50, 60)])
        fresh = runtime.open()
        read(runtime, fresh, [tokens[place] for place in kept[head]])
        expected = runtime._sequences[fresh].rows(0, 0, 24)[0].numbers  # type: ignore[attr-defined]
        assert torch.allclose(keys[head], expected[head], atol=1e-5)
    assert kept[0] != kept[1], "the two heads should differ, or this shows nothing"


def test_the_digest_says_which_were_kept(load: Load) -> None:
    runtime = load(heavy_hitters=True)
    digests = []
    for seed in (0, 0, 1):
        sequence = runtime.open()
        read(runtime, sequence, tokens_of(40, seed=seed))
        digests.append(runtime.evict_lightest(sequence, 4, 30, 6))
        runtime.free(sequence)
    assert digests[0] == digests[1] != digests[2]
    empty = runtime.open()
    assert runtime.evict_lightest(empty, 0, 0, 0) == b""


def test_each_head_keeps_its_own_heaviest(load: Load) -> None:
    runtime = load(heavy_hitters=True)
    sequence = runtime.open()
    read(runtime, sequence, tokens_of(40))
    cache = runtime._sequences[sequence]  # type: ignore[attr-defined]
    before = [[rows.numbers.clone() for rows in cache.rows(layer, 0, 40)] for layer in range(2)]
    weight = cache.weight(0, 40).clone()
    runtime.evict_lightest(sequence, 4, 30, 6)
    assert runtime.length(sequence) == 20
    for layer in range(2):
        for head in range(2):
            own = sorted((weight[layer, head, 4:30].topk(6).indices + 4).tolist())
            kept = [*range(4), *own, *range(30, 40)]
            values = cache.rows(layer, 0, 20)[1].numbers[head]
            assert torch.equal(values, before[layer][1][head][kept])
            assert torch.equal(cache.weight(0, 20)[layer, head], weight[layer, head][kept])


def test_attention_survives_a_snapshot_and_a_fork(load: Load) -> None:
    runtime = load(heavy_hitters=True)
    tokens, end = tokens_of(60), tokens_of(4, seed=2)
    one = runtime.open()
    read(runtime, one, tokens)
    fork = runtime.fork(one, 60)
    restored = runtime.open()
    runtime.restore(restored, runtime.snapshot(one, 0, 40), 40)
    runtime.restore(restored, runtime.snapshot(one, 40, 60), 20)
    for sequence in (one, fork, restored):
        runtime.evict_lightest(sequence, 2, 50, 20)
    expected = read(runtime, one, end)
    assert np.array_equal(read(runtime, fork, end), expected)
    assert np.array_equal(read(runtime, restored, end), expected)


def test_what_was_rewound_gives_no_attention_to_what_comes_next(load: Load) -> None:
    runtime = load(heavy_hitters=True)
    sequence = runtime.open()
    read(runtime, sequence, tokens_of(50))
    runtime.rewind(sequence, 20)
    read(runtime, sequence, tokens_of(10, seed=3))
    cache = runtime._sequences[sequence]  # type: ignore[attr-defined]
    # Of a position's own row and those after it: never more than there are.
    most = 2.0 * torch.arange(10, 0, -1)
    assert (cache.weight(20, 30) <= most + 1e-4).all()


@pytest.mark.parametrize("bad", [(4, 60, 57), (4, 60, -1), (60, 4, 1), (4, 99, 1)])
def test_an_impossible_choice_of_the_lightest_is_refused(load: Load, bad: tuple[int, int, int]) -> None:
    runtime = load(heavy_hitters=True)
    sequence = runtime.open()
    read(runtime, sequence, tokens_of(60))
    with pytest.raises(ValueError):
        runtime.evict_lightest(sequence, *bad)
    assert runtime.length(sequence) == 60
    plain = load()
    assert not plain.facts.can.heavy_hitters
    one = plain.open()
    read(plain, one, tokens_of(60))
    with pytest.raises(NotImplementedError):
        plain.evict_lightest(one, 4, 60, 10)


# -- experts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_only_the_experts_a_row_is_routed_to_are_computed(name: str, tmp_path: Path) -> None:
    from edgeinfer_backends.torch.decoder import ExpertFeedForward, FeedForward
    from edgeinfer_backends.torch.layers import LayerAccess
    from edgeinfer_backends.torch.weights import load_decoder

    source = source_of_folder(write_folder(tmp_path / "moe", full(CONFIGS[name])))
    cpu = torch.device("cpu")
    decoder = load_decoder(source, torch.float32, cpu, "plain", lambda _: True)
    decoder.set_context(64, cpu)
    rows: list[int] = []
    for layer in decoder.layers:
        assert isinstance(layer.mlp, ExpertFeedForward)
        for expert in layer.mlp.experts:
            assert isinstance(expert, FeedForward)
            expert.register_forward_pre_hook(lambda _, given: rows.append(given[0].shape[0]))
    layers = LayerAccess(decoder, cpu, torch.float32, 64)
    layers.run(0, layers.embed([tokens_of(1)]))
    assert rows == [1, 1], "one row, two of its four experts"
    rows.clear()
    layers.run(0, layers.embed([tokens_of(30)]))
    assert sum(rows) == 30 * 2


# -- single layers ---------------------------------------------------------------------------------


def test_layers_one_by_one_are_the_model(load: Load) -> None:
    runtime = load(kv_type_k="f32", kv_type_v="f32")
    tokens = tokens_of(30)
    layers = runtime.layers()
    states = layers.embed([tokens, tokens_of(30, seed=1)])
    for layer in range(layers.num_layers):
        states = layers.run(layer, states)
    assert np.abs(layers.head(states)[0] - read(runtime, runtime.open(), tokens)).max() < 1e-4


def test_what_a_matrix_is_given_is_captured(load: Load) -> None:
    layers = load().layers()
    states = layers.embed([tokens_of(20), tokens_of(20, seed=1)])
    after, given = layers.capture(0, states)
    assert np.array_equal(after, layers.run(0, states))
    assert set(given) == set(layers.matrices(0))
    assert given["self_attn.q_proj"].shape == (40, 64)
    assert given["mlp.down_proj"].shape == (40, 128)
    assert np.array_equal(given["self_attn.q_proj"], given["self_attn.v_proj"])
    gate, up = (given["mlp.gate_proj"] @ layers.weight(0, f"mlp.{n}_proj").T for n in ("gate", "up"))
    assert np.allclose(given["mlp.down_proj"], gate / (1 + np.exp(-gate)) * up, atol=1e-4)


def test_a_replaced_matrix_is_what_the_runtime_computes_with(load: Load) -> None:
    runtime = load()
    tokens = tokens_of(20)
    before = read(runtime, runtime.open(), tokens)
    layers = runtime.layers()
    original = layers.weight(1, "mlp.down_proj")
    layers.replace(1, "mlp.down_proj", np.zeros_like(original))
    assert np.abs(read(runtime, runtime.open(), tokens) - before).max() > 0.01
    layers.replace(1, "mlp.down_proj", original)
    assert np.array_equal(read(runtime, runtime.open(), tokens), before)


def test_gradients_are_those_of_finite_differences(load: Load) -> None:
    layers = load().layers()
    random = np.random.default_rng(5)
    states = layers.embed([tokens_of(6), tokens_of(6, seed=1)])
    wanted = random.normal(size=states.shape).astype(np.float32)

    def loss(given: Any) -> float:
        return float((layers.run(0, given).astype(np.float64) * wanted).sum())

    own, of_weights = layers.differentiate(0, states, wanted)
    direction = random.normal(size=states.shape).astype(np.float32)
    step = 1e-3
    slope = (loss(states + step * direction) - loss(states - step * direction)) / (2 * step)
    assert slope == pytest.approx(float((own * direction).sum()), rel=2e-2)
    for matrix in ("self_attn.k_proj", "mlp.gate_proj"):
        weight = layers.weight(0, matrix)
        direction = random.normal(size=weight.shape).astype(np.float32)
        found = []
        for sign in (step, -step):
            layers.replace(0, matrix, weight + sign * direction)
            found.append(loss(states))
        layers.replace(0, matrix, weight)
        slope = (found[0] - found[1]) / (2 * step)
        assert slope == pytest.approx(float((of_weights[matrix] * direction).sum()), rel=2e-2)


def test_differentiating_leaves_the_model_as_it_was(load: Load) -> None:
    runtime = load()
    tokens = tokens_of(20)
    before = read(runtime, runtime.open(), tokens)
    layers = runtime.layers()
    states = layers.embed([tokens])
    layers.differentiate(0, states, np.ones_like(states))
    assert np.array_equal(read(runtime, runtime.open(), tokens), before)


def test_what_cannot_be_asked_of_layers_is_refused(load: Load) -> None:
    layers = load().layers()
    states = layers.embed([tokens_of(4)])
    for wrong in (
        lambda: layers.run(2, states),
        lambda: layers.run(-1, states),
        lambda: layers.run(0, states[0]),
        lambda: layers.run(0, states[:, :, :10]),
        lambda: layers.run(0, states[:, :0]),
        lambda: layers.run(0, np.zeros((1, 513, 64), np.float32)),
        lambda: layers.weight(0, "mlp"),
        lambda: layers.weight(0, "no_such"),
        lambda: layers.replace(0, "mlp.up_proj", np.zeros((3, 3), np.float32)),
        lambda: layers.differentiate(0, states, states[:, :2]),
        lambda: layers.embed([]),
        lambda: layers.embed([[]]),
        lambda: layers.embed([[1, 2], [1]]),
        lambda: layers.embed([[10**6]]),
    ):
        with pytest.raises(ValueError):
            wrong()


@pytest.mark.parametrize("load_as", ["int8", "int4"])
def test_a_rounded_matrix_has_the_slope_of_what_its_numbers_mean(load: Load, load_as: str) -> None:
    small, plain = load(load_as=load_as).layers(), load().layers()
    for matrix in plain.matrices(0):
        plain.replace(0, matrix, small.weight(0, matrix))
    states = plain.embed([tokens_of(6)])
    wanted = np.random.default_rng(5).normal(size=states.shape).astype(np.float32)
    expected, _ = plain.differentiate(0, states, wanted)
    found, of_weights = small.differentiate(0, states, wanted)
    assert np.allclose(found, expected, atol=1e-4)
    assert of_weights == {}
    assert np.array_equal(small.weight(0, "mlp.up_proj"), plain.weight(0, "mlp.up_proj"))


def test_snapshots_of_before_a_replacement_are_refused_after_it(load: Load) -> None:
    from edgeinfer.errors import SnapshotRejected

    runtime = load()
    sequence = runtime.open()
    read(runtime, sequence, tokens_of(20))
    payload, identity = runtime.snapshot(sequence, 0, 20), dict(runtime.identity())
    layers = runtime.layers()
    layers.replace(1, "self_attn.k_proj", 2 * layers.weight(1, "self_attn.k_proj"))
    assert dict(runtime.identity()) != identity
    with pytest.raises(SnapshotRejected):
        runtime.restore(runtime.open(), payload, 20)
    runtime.restore(runtime.open(), runtime.snapshot(sequence, 0, 20), 20)


def test_layers_of_8_bits_tell_what_their_numbers_mean(load: Load) -> None:
    plain, small = load().layers(), load(load_as="int8").layers()
    original, found = plain.weight(0, "mlp.up_proj"), small.weight(0, "mlp.up_proj")
    assert 0.0 < np.abs(found - original).max() <= np.abs(original).max() / 127


def test_an_expert_nobody_was_routed_to_was_given_nothing(tmp_path: Path) -> None:
    from edgeinfer_backends.torch.layers import LayerAccess
    from edgeinfer_backends.torch.weights import load_decoder

    source = source_of_folder(write_folder(tmp_path / "moe", full(CONFIGS["qwen3_moe"])))
    cpu = torch.device("cpu")
    decoder = load_decoder(source, torch.float32, cpu, "plain", lambda _: True)
    decoder.set_context(64, cpu)
    layers = LayerAccess(decoder, cpu, torch.float32, 64)
    states = layers.embed([tokens_of(1)])
    _, given = layers.capture(0, states)
    rows = [given[f"mlp.experts.{index}.up_proj"].shape for index in range(4)]
    assert sorted(rows) == [(0, 64), (0, 64), (1, 64), (1, 64)]
    _, gradients = layers.differentiate(0, states, np.ones_like(states))
    idle = [index for index in range(4) if rows[index][0] == 0]
    assert all(not gradients[f"mlp.experts.{index}.up_proj"].any() for index in idle)
    assert not all(not gradients[f"mlp.experts.{index}.up_proj"].any() for index in range(4))


# -- decoding by recorded steps --------------------------------------------------------------------


def static(runtime: Any, **how: Any) -> Any:
    """What a CUDA device would have recorded, run step by step here."""
    from edgeinfer_backends.torch.static_decode import StaticDecoder

    found = StaticDecoder(
        runtime._decoder, runtime._new_cache(), 512, torch.device("cpu"), records=False, **how
    )
    runtime._static = found
    return found


@pytest.mark.parametrize("compiler", [None, "eager"])
def test_a_step_over_fixed_buffers_predicts_as_any_other(load: Load, compiler: str | None) -> None:
    """compiler: torch.compile without a compiler, which still insists on a step without breaks."""
    plain, fixed = load(), load()
    how = {}
    if compiler:
        how["compiler"] = lambda step: torch.compile(step, backend=compiler, fullgraph=True)
    static(fixed, **how)
    tokens = tokens_of(250)
    one, other = plain.open(), fixed.open()
    for start in range(0, 250, 50):
        read(plain, one, tokens[start : start + 50])
        read(fixed, other, tokens[start : start + 50])
    for token in tokens_of(12, seed=1):  # past the end of the first span
        expected, found = read(plain, one, [token]), read(fixed, other, [token])
        assert np.abs(found - expected).max() < 1e-4
    assert len(fixed._static._steps) == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "olmo2", "phi3", "granite"])
def test_fixed_buffers_heed_what_a_family_has_of_its_own(name: str, tmp_path: Path) -> None:
    from edgeinfer_backends.torch.kv_cache import SequenceCache
    from edgeinfer_backends.torch.layers import LayerAccess
    from edgeinfer_backends.torch.static_decode import StaticDecoder
    from edgeinfer_backends.torch.weights import load_decoder

    source = source_of_folder(write_folder(tmp_path / "model", full(CONFIGS[name])))
    cpu = torch.device("cpu")
    decoder = load_decoder(source, torch.float32, cpu, "plain", lambda _: True)
    decoder.set_context(64, cpu)
    layers, tokens = LayerAccess(decoder, cpu, torch.float32, 64), tokens_of(30)
    states = layers.embed([tokens])
    for layer in range(layers.num_layers):
        states = layers.run(layer, states)
    expected = layers.head(states)[0]
    caches = [SequenceCache(decoder.shape, ("f32", "f32"), cpu, weighs=False) for _ in range(2)]
    decoding = StaticDecoder(decoder, caches[0], 64, cpu, records=False)
    with torch.no_grad():
        for row, token in enumerate(tokens):
            caches[1].begin(1)
            found = decoding.decode(caches[1], token)[0].numpy()
            caches[1].commit(1)
            assert np.abs(found - expected[row]).max() < 1e-4


def test_sequences_take_turns_with_the_fixed_buffers_and_lose_nothing(load: Load) -> None:
    plain, fixed = load(), load()
    static(fixed)
    pairs = []
    for seed in range(3):
        pair = plain.open(), fixed.open()
        for runtime, sequence in zip((plain, fixed), pair, strict=True):
            read(runtime, sequence, tokens_of(40 + seed, seed=seed))
        pairs.append(pair)
    random = np.random.default_rng(2)
    for turn in range(40):
        which = int(random.integers(3))
        one, other = pairs[which]
        what = int(random.integers(6))
        length = plain.length(one)
        if what == 0 and length > 20:
            for runtime, sequence in ((plain, one), (fixed, other)):
                runtime.evict(sequence, 4, 12)
        elif what == 1:
            for runtime, sequence in ((plain, one), (fixed, other)):
                runtime.rewind(sequence, length - 3)
        elif what == 2:
            forks = plain.fork(one, length), fixed.fork(other, length)
            plain.free(one)
            fixed.free(other)
            pairs[which] = forks
        elif what == 3:
            again = fixed.open()
            fixed.restore(again, fixed.snapshot(other, 0, length), length)
            fixed.free(other)
            pairs[which] = one, again
        one, other = pairs[which]
        expected, found = read(plain, one, [turn + 5]), read(fixed, other, [turn + 5])
        assert np.abs(found - expected).max() < 2e-3
        fixed.check_integrity()


def test_more_spans_than_torch_expects_of_a_function_are_compiled(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeinfer_backends.torch import runtime, static_decode

    monkeypatch.setattr(static_decode, "_LEAST_SPAN", 1)
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **how: real(step, backend="eager", **how))
    fixed = load()
    static(fixed, compiler=runtime._compiled)
    sequence = fixed.open()
    for token in tokens_of(300):
        fixed.forward(Step([SequenceStep(sequence, [token], "last")]))
    assert len(fixed._static._steps) == 10  # type: ignore[attr-defined]
    assert fixed.facts.warnings == ()


def test_where_recording_fails_decoding_goes_on_without_and_says_so(load: Load) -> None:
    plain, fixed = load(), load()
    calls = []

    def broken(step: Any) -> Any:
        def fail() -> Any:
            calls.append(1)
            if len(calls) > 3:
                raise RuntimeError("no memory\nfor a graph")
            return step()

        return fail

    static(fixed, compiler=broken)
    one, other = plain.open(), fixed.open()
    for token in tokens_of(8):
        expected, found = read(plain, one, [token]), read(fixed, other, [token])
        assert np.abs(found - expected).max() < 1e-4
    assert len(calls) == 4, "it is not tried again"
    (warning,) = fixed.facts.warnings
    assert "not recorded as a CUDA graph (RuntimeError: no memory)" in warning
    fixed.check_integrity()


def test_what_another_sequence_left_in_the_fixed_buffers_is_not_seen(load: Load) -> None:
    plain, fixed = load(), load()
    static(fixed)
    ruined = fixed.open()
    read(fixed, ruined, tokens_of(60))
    read(fixed, ruined, [5])
    for _, values in fixed._sequences[ruined].layers:  # type: ignore[attr-defined]
        values.numbers[:, 30:] = float("inf")
    fixed.free(ruined)
    one, other = plain.open(), fixed.open()
    for token in tokens_of(5, seed=4):
        expected, found = read(plain, one, [token]), read(fixed, other, [token])
        assert np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize(
    ("name", "kinds", "held", "weighs", "said"),
    [
        ("llama", ("f16", "bf16"), "plain", False, ""),
        ("gemma3", ("f16", "f16"), "int4", False, ""),
        ("mixtral", ("f16", "f16"), "plain", False, "experts"),
        ("llama", ("f16", "f16"), "int8", False, "outliers"),
        ("llama", ("int8", "f16"), "plain", False, "quantized"),
        ("llama", ("f16", "fp8"), "plain", False, "quantized"),
        ("llama", ("f16", "f16"), "plain", True, "counted"),
    ],
)
def test_what_cannot_be_recorded_has_a_reason(
    name: str, kinds: tuple[str, str], held: Any, weighs: bool, said: str
) -> None:
    from edgeinfer_backends.torch.recording import obstacle

    found = obstacle(kinds, held, has_experts=name == "mixtral", weighs=weighs)
    assert (said in found) if said else found == ""


# -- loading ---------------------------------------------------------------------------------------


def test_longrope_s_identity_knows_which_factors_are_taken(tmp_path: Path) -> None:
    path = write_tiny_folder(
        tmp_path / "tiny",
        config={
            "rope_scaling": {
                "rope_type": "longrope",
                "long_factor": [4.0] * 8,
                "short_factor": [1.0] * 8,
                "original_max_position_embeddings": 128,
            }
        },
    )
    files = ModelFiles("tiny", (path / "model.safetensors",), "safetensors")
    found = []
    for context in (64, 128, 256, 512):
        runtime = get_backend("torch").load(files, replace(SETTINGS, context=context), lambda _: True)
        found.append(tuple(sorted(runtime.identity().items())))
        runtime.close()
    assert found[0] == found[1] != found[2] == found[3]


def test_what_is_missing_or_of_another_shape_is_one_line(tmp_path: Path) -> None:
    for number, (change, said) in enumerate(
        (
            (
                {"model.layers.1.mlp.up_proj.weight": None},
                "mlp.up_proj.weight' is missing",
            ),
            ({"model.norm.weight": np.zeros(63, np.float32)}, "has the shape [63]"),
            ({"model.norm.weight": np.full(64, np.nan, np.float32)}, "NaN (entry 0)"),
            ({"extra.weight": np.zeros(4, np.float32)}, "'extra.weight'"),
        )
    ):
        path = write_tiny_folder(tmp_path / str(number), tensors=change)
        files = ModelFiles("tiny", (path / "model.safetensors",), "safetensors")
        with pytest.raises(LoadFailed) as caught:
            get_backend("torch").load(files, SETTINGS, lambda _: True)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["torch", "tokenizers"])
def test_without_a_package_the_probe_says_what_to_install(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else real(name)
    )
    found = get_backend("torch").probe()
    assert not found.usable
    assert found.reason == f"{missing} is not installed; run `pip install edgeinfer[torch]`"


def packed_folder(path: Path, bits: int = 4) -> Path:
    """The tiny folder's layers as GPTQ packs them (every code 0), one matrix of them all."""
    write_tiny_folder(path)
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, width = tensors.pop(name).shape
        stem = name.removesuffix(".weight")
        tensors[f"{stem}.qweight"] = np.zeros((width * bits // 32, rows), np.int32)
        tensors[f"{stem}.qzeros"] = np.zeros((width // 16, rows * bits // 32), np.int32)
        tensors[f"{stem}.scales"] = np.ones((width // 16, rows), np.float16)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": bits, "group_size": 16}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("kind", ["packed", "tied", "tied int8"])
def test_weights_are_predicted_as_they_will_be_held(tmp_path: Path, kind: str) -> None:
    if kind == "packed":
        path = packed_folder(tmp_path / "tiny")
    else:
        path = write_tiny_folder(tmp_path / "tiny", model_type="qwen3")
    settings = replace(SETTINGS, load_as="int8" if "int8" in kind else "f32")
    files = ModelFiles("tiny", (path / "model.safetensors",), "safetensors")
    config = resolve_model(str(path)).config
    predicted = get_backend("torch").predict_memory(files, config, settings)
    runtime = get_backend("torch").load(files, settings, lambda _: True)
    real = [item.num_bytes for item in runtime.memory() if item.name == "weights"]
    runtime.close()
    assert [i.num_bytes for i in predicted if i.name == "weights"] == pytest.approx(real, rel=0.1)
    if kind == "packed":
        assert config.quantization == "GPTQ"


@pytest.mark.parametrize(
    ("metadata", "drop", "said"),
    [
        ({"llama.rope.freq_base": 0.0}, "", "'rope.freq_base' is 0.0"),
        ({}, "rope_factors_short.weight", "no short ones"),
    ],
)
def test_rope_of_a_gguf_that_cannot_be_is_one_line(
    tmp_path: Path, metadata: dict[str, float], drop: str, said: str
) -> None:
    from edgeinfer.errors import ModelFileInvalid
    from edgeinfer_models.families.rope import rope_from_gguf
    from edgeinfer_models.gguf_header import read_gguf_header
    from tests.fixtures_gguf import write_tiny_gguf

    header = read_gguf_header(write_tiny_gguf(tmp_path / "tiny.gguf", metadata=metadata))
    factors = {"rope_factors_long.weight": [1.0] * 8} if drop else {}
    with pytest.raises(ModelFileInvalid, match=said):
        rope_from_gguf(header, 16, factors)


def test_more_experts_than_any_model_has_are_refused_before_they_are_named() -> None:
    from edgeinfer.errors import ModelFileInvalid
    from tests.fixtures_families import shape_of

    with pytest.raises(ModelFileInvalid, match="2,000,000,000 experts"):
        shape_of({**full(CONFIGS["qwen3_moe"]), "num_experts": 2_000_000_000})
