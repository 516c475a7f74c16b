"""What a decoder computes, in numbers and choices: all in which the families differ.

One `DecoderShape` is made of a Hugging Face config.json or of GGUF metadata, and written as either; the
torch decoder is built from it. Its tensors are named and laid out as Hugging Face has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu_tanh"]
RopeKind = Literal["linear", "llama3", "yarn", "longrope"]
# Where a layer's norms stand: before its two halves (Llama), behind them (OLMo 2), or both (Gemma 2).
NormPlaces = Literal["before", "after", "around"]
# Over each head, or over all heads at once (OLMo 2).
QkNorm = Literal["none", "head", "whole"]


@dataclass(frozen=True)
class RopeScaling:
    """How positions past those a model was first trained on are made to fit.

    linear: positions are divided by `factor`. llama3: low frequencies are (Llama 3.1 model card).
    yarn: low frequencies are, by a ramp between `beta_fast` and `beta_slow` turns (Peng et al. 2023,
    arXiv:2309.00071). longrope: each frequency is divided by its own factor, one list for contexts up to
    `original_context`, one for longer ones (Ding et al. 2024, arXiv:2402.13753).
    attention_factor: of queries and keys together; 0: what the method says.
    """

    kind: RopeKind
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    long_factors: tuple[float, ...] = ()
    short_factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class Rope:
    """base: of the geometric row of frequencies. dim: entries of a head that are turned."""

    base: float
    dim: int
    scaling: RopeScaling | None = None


@dataclass(frozen=True)
class Experts:
    """A feed-forward that is `used` of `count` small ones, by a router's choice, and where shared_width
    is not 0 one more that every token goes through.

    renormalizes: the weights of the chosen ones are made to add up to one. gates_shared: the shared one
    is weighed by a gate of its own (Qwen 2 MoE).
    """

    count: int
    used: int
    width: int
    renormalizes: bool
    shared_width: int = 0
    gates_shared: bool = False


@dataclass(frozen=True)
class DecoderShape:
    """Sizes in elements. Everything after `rope` has the value of a plain Llama where it is left out."""

    family: str  # a file of this folder
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    context_trained: int
    norm_eps: float
    rope: Rope
    is_tied: bool = False  # the embeddings are the head's weights too
    activation: Activation = "silu"
    norms: NormPlaces = "before"
    adds_one_to_norms: bool = False  # a norm's weight is stored less one (Gemma)
    qk_norm: QkNorm = "none"
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's last product
    mlp_bias: bool = False
    is_fused: bool = False  # q, k, v are one matrix, and so are gate and up (Phi 3)
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float = 0.0  # 0: one over the root of head_dim
    logit_divisor: float = 1.0
    attention_softcap: float = 0.0  # 0: none
    logit_softcap: float = 0.0
    window: int = 0  # of the layers with a sliding window
    sliding: tuple[bool, ...] = ()  # for each layer; (): none has one
    rope_sliding: Rope | None = None  # of the sliding layers, where it is another
    experts: Experts | None = None

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def slides(self, layer: int) -> bool:
        return bool(self.sliding) and self.sliding[layer]
