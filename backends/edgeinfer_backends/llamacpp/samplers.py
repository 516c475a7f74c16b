"""llama.cpp's C samplers, chained in the order SamplingParams documents."""

from __future__ import annotations

import ctypes
from typing import Any

from edgeinfer.sampling import SamplingParams
from edgeinfer_backends.llamacpp.library import library

DRY_BREAKERS = (b"\n", b":", b'"', b"*")


class LlamaSampler:
    """`edgeinfer.backend.Sampler`: a native chain owned here and freed by `close`."""

    def __init__(self, params: SamplingParams, seed: int, vocab: Any, vocab_size: int) -> None:
        for token, _ in params.logit_bias:
            if token >= vocab_size:
                raise ValueError(f"logit_bias names token {token}; the vocabulary has {vocab_size}")
        # asked for every token
        self.is_argmax = params.is_greedy and not params.has_penalties
        self.logit_bias = params.logit_bias
        self._raised = any(bias > 0.0 for _, bias in params.logit_bias)
        self._biased = frozenset(token for token, _ in params.logit_bias)
        self._seed = seed
        self._vocab_size = vocab_size
        self._lib = library()
        chain_params = self._lib.llama_sampler_chain_default_params()
        chain_params.no_perf = True
        self.chain: Any = self._lib.llama_sampler_chain_init(chain_params)
        for sampler in _stages(self._lib, params, seed, vocab, vocab_size):
            # takes ownership: the stage is freed with the chain
            self._lib.llama_sampler_chain_add(self.chain, sampler)

    @property
    def seed(self) -> int:
        return self._seed

    def accept(self, token: int) -> None:
        if not 0 <= token < self._vocab_size:
            raise ValueError(f"token {token} is outside the vocabulary of {self._vocab_size}")
        self._lib.llama_sampler_accept(self.chain, token)

    def moves(self, best: int) -> bool:
        """Whether a bias may make another token than `best` the likeliest one."""
        return self._raised or best in self._biased

    def close(self) -> None:
        if self.chain is not None:
            self._lib.llama_sampler_free(self.chain)
            self.chain = None


def _stages(lib: Any, p: SamplingParams, seed: int, vocab: Any, vocab_size: int) -> list[Any]:
    stages = []
    if p.logit_bias:
        biases = (lib.llama_logit_bias * len(p.logit_bias))()
        for entry, (token, bias) in zip(biases, p.logit_bias, strict=True):
            entry.token, entry.bias = token, bias
        # llama_sampler_init_logit_bias(int32_t n_vocab, int32_t n_logit_bias,
        #     const llama_logit_bias * logit_bias): copies the array
        stages.append(lib.llama_sampler_init_logit_bias(vocab_size, len(p.logit_bias), biases))
    if p.repeat_penalty != 1.0 or p.frequency_penalty != 0.0 or p.presence_penalty != 0.0:
        # llama_sampler_init_penalties(int32_t n_vocab, int32_t penalty_last_n, float penalty_repeat,
        #     float penalty_freq, float penalty_present)
        stages.append(
            lib.llama_sampler_init_penalties(
                vocab_size,
                p.penalty_last_n,
                p.repeat_penalty,
                p.frequency_penalty,
                p.presence_penalty,
            )
        )
    if p.dry_multiplier > 0.0:
        breakers = (ctypes.c_char_p * len(DRY_BREAKERS))(*DRY_BREAKERS)
        # llama_sampler_init_dry(const struct llama_vocab * vocab, float dry_multiplier,
        #     float dry_base, int32_t dry_allowed_length, int32_t dry_penalty_last_n,
        #     const char ** seq_breakers, size_t num_breakers)
        stages.append(
            lib.llama_sampler_init_dry(
                vocab,
                p.dry_multiplier,
                p.dry_base,
                p.dry_allowed_length,
                p.dry_last_n,
                breakers,
                len(DRY_BREAKERS),
            )
        )
    if p.is_greedy:
        stages.append(lib.llama_sampler_init_greedy())
        return stages
    if p.top_k > 0:
        stages.append(lib.llama_sampler_init_top_k(p.top_k))
    if p.typical_p < 1.0:
        stages.append(lib.llama_sampler_init_typical(p.typical_p, 1))
    if p.top_p < 1.0:
        stages.append(lib.llama_sampler_init_top_p(p.top_p, 1))
    if p.min_p > 0.0:
        stages.append(lib.llama_sampler_init_min_p(p.min_p, 1))
    stages.append(lib.llama_sampler_init_temp(p.temperature))
    stages.append(lib.llama_sampler_init_dist(seed))
    return stages
