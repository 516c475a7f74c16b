"""llama.cpp's mixtures: which type each tensor gets. (07_rtn compares with llama-quantize.)"""

from __future__ import annotations

from collections import Counter

import pytest

from edgeinfer.errors import UsageError
from edgeinfer_models.conversion.presets import PRESETS, MixtureFacts, choose_types, file_type

LAYERS = 16


def shapes(hidden: int = 512, *, layers: int = LAYERS, tied: bool = False) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (1000, hidden),
        "output_norm.weight": (hidden,),
    }
    if not tied:
        found["output.weight"] = (1000, hidden)
    for layer in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            found[f"blk.{layer}.{name}.weight"] = (hidden, hidden)
        found[f"blk.{layer}.attn_norm.weight"] = (hidden,)
    return found


def chosen(preset: str, hidden: int = 512, heads_per_kv: int = 2, **how: bool) -> dict[str, str | None]:
    facts = MixtureFacts("llama", LAYERS, heads_per_kv)
    return choose_types(preset, shapes(hidden, tied=how.pop("tied", False)), facts, **how)


def layers_with(types: dict[str, str | None], name: str, kind: str) -> list[int]:
    return [layer for layer in range(LAYERS) if types[f"blk.{layer}.{name}.weight"] == kind]


def test_q4_k_m_gives_more_bits_to_the_ends_and_every_third_layer_between() -> None:
    types = chosen("Q4_K_M")
    more = [0, 1, 4, 7, 10, 13, 14, 15]
    assert layers_with(types, "ffn_down", "Q6_K") == more
    assert layers_with(types, "attn_v", "Q6_K") == more
    assert types["output.weight"] == "Q6_K"
    assert types["token_embd.weight"] == types["blk.3.attn_q.weight"] == "Q4_K"
    assert types["output_norm.weight"] is None


def test_layers_are_counted_by_their_number_and_not_by_their_name() -> None:
    """blk.10 comes after blk.9 and not after blk.1."""
    assert layers_with(chosen("Q4_K_S"), "attn_v", "Q5_K") == [0, 1, 2, 3]
    assert layers_with(chosen("Q3_K_M"), "attn_v", "Q5_K") == [0, 1]


def test_the_output_of_tied_embeddings_keeps_more_bits() -> None:
    assert chosen("Q4_0", tied=True)["token_embd.weight"] == "Q6_K"
    assert chosen("Q4_0")["token_embd.weight"] == "Q4_0"
    assert chosen("Q4_0", hidden=576, tied=True)["token_embd.weight"] == "Q8_0"
    assert chosen("Q8_0", tied=True)["token_embd.weight"] == "Q8_0"


@pytest.mark.parametrize(
    ("preset", "expected"),
    [("Q4_K_M", {"Q5_0", "Q8_0"}), ("Q5_K_S", {"Q5_1", "Q8_0"}), ("IQ4_XS", {"IQ4_NL", "Q5_1", "Q8_0"})],
)
def test_rows_of_no_whole_blocks_of_256_get_a_type_of_blocks_of_32(
    preset: str, expected: set[str]
) -> None:
    assert {kind for kind in chosen(preset, hidden=576).values() if kind} == expected


def test_rows_that_no_block_makes_up_stay_floats() -> None:
    kinds = Counter(kind for kind in chosen("Q4_0", hidden=48).values() if kind)
    assert set(kinds) == {"F16", "Q8_0"} or set(kinds) == {"F16"}


def test_an_importance_matrix_changes_what_llama_cpp_changes() -> None:
    assert layers_with(chosen("Q4_0"), "ffn_down", "Q4_1") == []
    assert layers_with(chosen("Q4_0", has_imatrix=True), "ffn_down", "Q4_1") == [0, 1]
    assert layers_with(chosen("IQ4_NL"), "ffn_down", "Q5_K") == [0, 1]
    assert layers_with(chosen("IQ4_NL", has_imatrix=True), "ffn_down", "Q5_K") == []


@pytest.mark.parametrize("preset", ["IQ1_S", "IQ2_XXS", "IQ2_M", "Q2_K_S"])
def test_what_needs_an_importance_matrix_says_so(preset: str) -> None:
    with pytest.raises(UsageError, match="needs to know which weights matter"):
        chosen(preset)
    assert chosen(preset, has_imatrix=True)


def test_eight_experts_have_a_mixture_of_their_own() -> None:
    facts = MixtureFacts("llama", LAYERS, 4, num_experts=8)
    types = choose_types("Q4_K_M", shapes(), facts)
    assert types["blk.5.attn_v.weight"] == types["blk.5.attn_k.weight"] == "Q8_0"
    assert types["blk.5.attn_output.weight"] == "Q5_K"


def test_every_preset_has_a_number_and_a_type_for_every_tensor() -> None:
    for preset in PRESETS:
        assert file_type(preset) >= 0
        types = chosen(preset, has_imatrix=True)
        assert types.keys() == shapes().keys()
        assert all((kind is None) == name.endswith("_norm.weight") for name, kind in types.items())
