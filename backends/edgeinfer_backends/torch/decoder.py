"""One decoder for all families, after its `DecoderShape`: to be read beside the papers.

It computes rows of hidden states; what the rows before them were is the business of `Attention`, which a
runtime supplies: it stores keys and values where it likes and lets each row see those of its sequence.
Weights are laid out as Hugging Face has them, so their names are its names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeinfer_backends.torch.rotary import Rotary
from edgeinfer_models.families.shape import DecoderShape, Experts


class Attention(Protocol):
    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: (n, heads, head_dim), turned; k, v: (n, kv_heads, head_dim). Returns what each row takes
        from the values of the rows it sees: (n, heads * head_dim)."""
        ...


class RmsNorm(nn.Module):
    """Root mean square layer normalization (Zhang and Sennrich 2019, arXiv:1910.07467), in float32."""

    def __init__(self, size: int, eps: float, *, adds_one: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self._eps = eps
        self._adds_one = adds_one

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self._eps)
        weight = self.weight.float()
        return (wide * (weight + 1.0 if self._adds_one else weight)).to(x.dtype)


class SelfAttention(nn.Module):
    def __init__(self, shape: DecoderShape, layer: int) -> None:
        super().__init__()
        self._shape = shape
        self._layer = layer
        q_size, kv_size, bias = shape.q_size, shape.kv_size, shape.qkv_bias
        if shape.is_fused:
            self.qkv_proj = nn.Linear(shape.hidden_size, q_size + 2 * kv_size, bias=bias)
        else:
            self.q_proj = nn.Linear(shape.hidden_size, q_size, bias=bias)
            self.k_proj = nn.Linear(shape.hidden_size, kv_size, bias=bias)
            self.v_proj = nn.Linear(shape.hidden_size, kv_size, bias=bias)
        self.o_proj = nn.Linear(q_size, shape.hidden_size, bias=shape.output_bias)
        if shape.qk_norm != "none":
            is_whole = shape.qk_norm == "whole"
            self.q_norm = _norm(shape, q_size if is_whole else shape.head_dim)
            self.k_norm = _norm(shape, kv_size if is_whole else shape.head_dim)

    def forward(self, x: Tensor, positions: Tensor, rotary: Rotary, attention: Attention) -> Tensor:
        shape = self._shape
        q, k, v = self._project(x)
        if shape.qk_norm == "whole":
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.view(-1, shape.num_heads, shape.head_dim)
        k = k.view(-1, shape.num_kv_heads, shape.head_dim)
        v = v.view(-1, shape.num_kv_heads, shape.head_dim)
        if shape.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotary.turn(q, positions), rotary.turn(k, positions)
        found: Tensor = self.o_proj(attention(self._layer, q, k, v))
        return found

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shape = self._shape
        if shape.is_fused:
            q, k, v = self.qkv_proj(x).split((shape.q_size, shape.kv_size, shape.kv_size), dim=-1)
            return q, k, v
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


class FeedForward(nn.Module):
    """Gated (Shazeer 2020, arXiv:2002.05202): down(act(gate(x)) * up(x))."""

    def __init__(self, shape: DecoderShape, width: int) -> None:
        super().__init__()
        hidden, bias = shape.hidden_size, shape.mlp_bias
        self._is_fused = shape.is_fused
        if shape.is_fused:
            self.gate_up_proj = nn.Linear(hidden, 2 * width, bias=bias)
        else:
            self.gate_proj = nn.Linear(hidden, width, bias=bias)
            self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)
        self._activate = _activation(shape)

    def forward(self, x: Tensor) -> Tensor:
        if self._is_fused:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        found: Tensor = self.down_proj(self._activate(gate) * up)
        return found


class ExpertFeedForward(nn.Module):
    """Of `count` small feed-forwards the `used` likeliest ones for each row, weighed by the router; only
    those are computed."""

    def __init__(self, shape: DecoderShape, experts: Experts) -> None:
        super().__init__()
        self._experts = experts
        self.gate = nn.Linear(shape.hidden_size, experts.count, bias=False)
        self.experts = nn.ModuleList(FeedForward(shape, experts.width) for _ in range(experts.count))
        if experts.shared_width:
            self.shared_expert = FeedForward(shape, experts.shared_width)
        if experts.gates_shared:
            self.shared_expert_gate = nn.Linear(shape.hidden_size, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self._route(x)
        found = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows, places = (chosen == index).nonzero(as_tuple=True)
            if rows.numel():
                part = expert(x[rows]) * weights[rows, places].unsqueeze(-1)
                found.index_add_(0, rows, part.to(found.dtype))
        if self._experts.shared_width:
            shared = self.shared_expert(x)
            if self._experts.gates_shared:
                shared = torch.sigmoid(self.shared_expert_gate(x)) * shared
            found = found + shared
        return found

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, used) each: the weights, and which experts."""
        likelihood = functional.softmax(self.gate(x).float(), dim=-1)
        weights, chosen = likelihood.topk(self._experts.used, dim=-1)
        if self._experts.renormalizes:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(x.dtype), chosen


class Layer(nn.Module):
    def __init__(self, shape: DecoderShape, layer: int) -> None:
        super().__init__()
        self._shape = shape
        self.self_attn = SelfAttention(shape, layer)
        experts = shape.experts
        self.mlp: nn.Module = (
            FeedForward(shape, shape.intermediate_size)
            if experts is None
            else ExpertFeedForward(shape, experts)
        )
        if shape.norms != "after":
            self.input_layernorm = _norm(shape, shape.hidden_size)
        self.post_attention_layernorm = _norm(shape, shape.hidden_size)
        if shape.norms == "around":
            self.pre_feedforward_layernorm = _norm(shape, shape.hidden_size)
        if shape.norms != "before":
            self.post_feedforward_layernorm = _norm(shape, shape.hidden_size)

    def forward(self, x: Tensor, positions: Tensor, rotary: Rotary, attention: Attention) -> Tensor:
        """x: (n, hidden_size). The same shape comes back."""
        norms, scale = self._shape.norms, self._shape.residual_scale
        inner = x if norms == "after" else self.input_layernorm(x)
        attended: Tensor = self.self_attn(inner, positions, rotary, attention)
        if norms == "before":
            x = x + scale * attended
            fed: Tensor = self.mlp(self.post_attention_layernorm(x))
            return x + scale * fed
        x = x + scale * self.post_attention_layernorm(attended)
        inner = x if norms == "after" else self.pre_feedforward_layernorm(x)
        fed = self.post_feedforward_layernorm(self.mlp(inner))
        return x + scale * fed


class Decoder(nn.Module):
    """tokens, positions -> hidden states -> logits. Call `set_context` once before the first."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape, index) for index in range(shape.num_layers))
        self.norm = _norm(shape, shape.hidden_size)
        if not shape.is_tied:
            self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self._rotary: Rotary | None = None
        self._rotary_sliding: Rotary | None = None

    def set_context(self, context: int, device: torch.device) -> None:
        """Work out RoPE for so many positions."""
        shape = self.shape
        self._rotary = Rotary(shape.rope, context, shape.context_trained, device)
        self._rotary_sliding = self._rotary
        if shape.rope_sliding is not None:
            self._rotary_sliding = Rotary(shape.rope_sliding, context, shape.context_trained, device)

    def rotary(self, layer: int) -> Rotary:
        found = self._rotary_sliding if self.shape.slides(layer) else self._rotary
        assert found is not None, "set_context was not called"
        return found

    def rope_kind(self, context: int) -> str:
        """What of the context changes the frequencies."""
        scaling = self.shape.rope.scaling
        if scaling is None or scaling.kind != "longrope":
            return ""
        return "long" if context > scaling.original_context else "short"

    def embed(self, tokens: Tensor) -> Tensor:
        """(n,) -> (n, hidden_size)."""
        x: Tensor = self.embed_tokens(tokens)
        scale = self.shape.embedding_scale
        # Gemma rounds the factor to the weights' type before it multiplies. (A number, no tensor: one on
        # a GPU would have to be copied there, which a step that is recorded may not.)
        return x if scale == 1.0 else x * torch.tensor(scale, dtype=x.dtype).item()

    def run_layer(self, layer: int, x: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        found: Tensor = self.layers[layer](x, positions, self.rotary(layer), attention)
        return found

    def hidden(self, tokens: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """After the last norm: (n, hidden_size)."""
        x = self.embed(tokens)
        for layer in range(self.shape.num_layers):
            x = self.run_layer(layer, x, positions, attention)
        found: Tensor = self.norm(x)
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, hidden_size) -> (n, vocab_size), float32."""
        head = self.embed_tokens.weight if self.shape.is_tied else self.lm_head.weight
        found = functional.linear(hidden, head).float() / self.shape.logit_divisor
        cap = self.shape.logit_softcap
        return found if not cap else cap * torch.tanh(found / cap)


def attend(shape: DecoderShape, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """Softmax attention of one sequence's rows. q: (n, heads, d); k, v: (kv_heads, m, d); seen: (n, m),
    bool, or None: every row sees all. Returns (n, heads * d)."""
    if shape.attention_softcap:
        return weigh(shape, attention_weights(shape, q, k, seen), v)
    shared = shape.num_heads // shape.num_kv_heads
    if q.is_cuda and seen is not None and shared > 1:  # fused kernels may not take a mask and GQA
        k, v = (each.repeat_interleave(shared, dim=0) for each in (k, v))
        shared = 1
    found = functional.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        k.unsqueeze(0),
        v.unsqueeze(0),
        attn_mask=seen,
        scale=_scale(shape),
        enable_gqa=shared > 1,
    )
    return found[0].transpose(0, 1).reshape(q.shape[0], -1)


def attention_weights(shape: DecoderShape, q: Tensor, k: Tensor, seen: Tensor | None) -> Tensor:
    """How much each row takes from each position: (kv_heads, heads of each, n, m), float32. As in
    `attend`, which never holds them all."""
    shared = shape.num_heads // shape.num_kv_heads
    grouped = q.view(q.shape[0], shape.num_kv_heads, shared, shape.head_dim).permute(1, 2, 0, 3)
    # Scaled first: unscaled scores can be more than f16 holds.
    scores = ((grouped * _scale(shape)) @ k.unsqueeze(1).transpose(-1, -2)).float()
    cap = shape.attention_softcap
    if cap:
        scores = cap * torch.tanh(scores / cap)
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return functional.softmax(scores, dim=-1)


def weigh(shape: DecoderShape, weights: Tensor, v: Tensor) -> Tensor:
    """weights: of `attention_weights`; v: (kv_heads, m, d). Returns (n, heads * d)."""
    found = weights.to(v.dtype) @ v.unsqueeze(1)
    return found.permute(2, 0, 1, 3).reshape(weights.shape[2], shape.q_size)


def seen_by(first: int, count: int, length: int, window: int, device: torch.device) -> Tensor | None:
    """Which of `length` positions the rows at [first, first + count) see: those up to their own, with a
    window (0: none) the last so many. Shape (count, length); None where each sees all."""
    if count == 1 and length == first + 1 and not 0 < window < length:
        return None
    row = torch.arange(first, first + count, device=device).unsqueeze(1)
    column = torch.arange(length, device=device).unsqueeze(0)
    seen = column <= row
    return seen & (row - column < window) if window else seen


def _scale(shape: DecoderShape) -> float:
    return shape.attention_scale or shape.head_dim**-0.5


def _norm(shape: DecoderShape, size: int) -> RmsNorm:
    return RmsNorm(size, shape.norm_eps, adds_one=shape.adds_one_to_norms)


def _activation(shape: DecoderShape) -> Callable[[Tensor], Tensor]:
    if shape.activation == "silu":
        return functional.silu
    return lambda x: functional.gelu(x, approximate="tanh")
