"""Columns that matter made larger before they are rounded, what feeds them smaller by as much.

Activation-aware weight quantization (AWQ; Lin et al., 2023, arXiv:2306.00978): a matrix's column that
large inputs meet loses less if it is scaled up by s, as long as its inputs are scaled down by s.
Whatever makes those inputs takes the factor: a norm's weight, the rows of the values (whose weighted
mean the attention's last product is given), the rows of a gated feed-forward's `up`. In all three what
the model computes stays the same, but for rounding; where it would not, nothing is scaled, and
`links_of` says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgeinfer_models.families.shape import DecoderShape

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgeinfer.quantize.forms import Form

    Floats = npt.NDArray[np.float32]
    Indices = npt.NDArray[np.int64]

_EXPONENTS = tuple(step / 10 for step in range(11))  # 0: nothing is scaled
_ROWS = 256  # of a matrix that the search looks at
_LEAST = 1e-12


@dataclass(frozen=True)
class Link:
    """feeder: the norm or the matrix that takes the factors (within the layer, without ".weight").
    rows: which of its rows makes each column's input. fed: matrices that are given the same."""

    feeder: str
    rows: Indices
    fed: tuple[str, ...]
    is_norm: bool


def links_of(shape: DecoderShape) -> tuple[list[Link], list[str]]:
    """Of every layer of such a model; and what stays unscaled, a line each."""
    links: list[Link] = []
    unscaled: list[str] = []
    columns = np.arange(shape.hidden_size)
    attention = ("qkv_proj",) if shape.is_fused else ("q_proj", "k_proj", "v_proj")
    fed = tuple(f"self_attn.{name}" for name in attention)
    if shape.norms == "after":
        unscaled.append("what attention and feed-forward are given: no norm stands before them")
    else:
        links.append(Link("input_layernorm", columns, fed, is_norm=True))
    links.append(Link(fed[-1], _value_rows(shape), ("self_attn.o_proj",), is_norm=False))
    if shape.experts is not None:
        unscaled.append("what experts are given: their router is given the same, and is kept exact")
        return links, unscaled
    into = ("mlp.gate_up_proj",) if shape.is_fused else ("mlp.gate_proj", "mlp.up_proj")
    if shape.norms != "after":
        norm = "post_attention_layernorm" if shape.norms == "before" else "pre_feedforward_layernorm"
        links.append(Link(norm, columns, into, is_norm=True))
    width = shape.intermediate_size
    up_rows = np.arange(width) + (width if shape.is_fused else 0)
    links.append(Link(into[-1], up_rows, ("mlp.down_proj",), is_norm=False))
    return links, unscaled


def _value_rows(shape: DecoderShape) -> Indices:
    """Several heads of queries share one of values."""
    columns = np.arange(shape.q_size)
    heads, entries = np.divmod(columns, shape.head_dim)
    shared = shape.num_heads // shape.num_kv_heads
    first = shape.q_size + shape.kv_size if shape.is_fused else 0
    found: Indices = first + heads // shared * shape.head_dim + entries
    return found


def best_scales(
    link: Link,
    weights: Mapping[str, Floats],
    second_moment: Floats,
    forms: Mapping[str, Form],
) -> Floats:
    """Of each column of what `link` feeds; ones where nothing helps. weights, forms: of the matrices it
    feeds. second_moment: of what they are given."""
    squares = np.maximum(np.diag(second_moment), 0).astype(np.float64)
    size = np.sqrt(_shared_mean(squares, link.rows) + _LEAST)
    best, least = np.ones(len(size), np.float32), np.inf
    for exponent in _EXPONENTS:
        scales = size**exponent
        scales = (scales / np.sqrt(scales.max() * scales.min())).astype(np.float32)
        lost = sum(
            _lost(_some_rows(weights[name]), scales, second_moment, forms[name]) for name in link.fed
        )
        if lost < least:
            best, least = scales, lost
    return best


def _shared_mean(squares: npt.NDArray[np.float64], rows: Indices) -> npt.NDArray[np.float64]:
    """Columns that one row of the feeder makes have one factor."""
    which, places = np.unique(rows, return_inverse=True)
    sums = np.bincount(places, squares, len(which)) / np.bincount(places, minlength=len(which))
    found: npt.NDArray[np.float64] = sums[places]
    return found


def _some_rows(weight: Floats) -> Floats:
    step = max(len(weight) // _ROWS, 1)
    return weight[::step]


def _lost(weight: Floats, scales: Floats, second_moment: Floats, form: Form) -> float:
    importance = np.maximum(np.diag(second_moment) / scales**2, 0).astype(np.float32)
    scaled = np.ascontiguousarray(weight * scales)
    off = form.numbers(form.rounded(scaled, importance)) / scales - weight
    return float(np.einsum("ij,ij->", off @ second_moment, off))


def said(unscaled: Sequence[str]) -> str:
    return "awq leaves unscaled " + "; ".join(unscaled)
