"""Errors of tensors, by the layer that their names say."""

from __future__ import annotations

import pytest

from edgeinfer.quality.tensor_error import TensorError, errors_by_layer


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("blk.3.attn_q.weight", 3),
        ("model.layers.12.self_attn.q_proj.weight", 12),
        ("token_embd.weight", None),
        ("model.norm.weight", None),
        ("blk.x.ffn_up.weight", None),
    ],
)
def test_a_name_says_which_layer_it_is_of(name: str, layer: int | None) -> None:
    assert TensorError(name, "Q4_0", 0.1).layer == layer


def test_a_layer_has_the_mean_of_its_tensors() -> None:
    errors = [
        TensorError("blk.10.ffn_up.weight", "Q4_0", 0.3),
        TensorError("blk.2.ffn_up.weight", "Q4_0", 0.1),
        TensorError("blk.10.ffn_down.weight", "Q6_K", 0.1),
        TensorError("output.weight", "Q6_K", 9.0),
    ]
    assert list(errors_by_layer(errors).items()) == [(2, 0.1), (10, 0.2)]
