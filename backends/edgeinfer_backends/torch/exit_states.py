"""What exits learn from: of many texts at once, the model's states at the exits and its distribution.

It is read once and kept: a model of thirty layers costs ten times what an exit does, and an exit reads
every text several times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from edgeinfer_backends.torch.decoder import Decoder
from edgeinfer_backends.torch.static_decode import recorded
from edgeinfer_models.families.shape import DecoderShape

_LOGIT_ROWS = 8192  # rows of logits that there are at a time


class CausalTexts:
    """`decoder.Attention` over texts of equal length, each from position 0 on, all at once and with
    kernels that hold no scores. (`layers.WholeTexts` serves every family; this one those of
    `obstacle`.)"""

    def __init__(self, shape: DecoderShape, texts: int) -> None:
        self._shape = shape
        self._texts = texts
        self._scale = shape.attention_scale or shape.head_dim**-0.5

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shared = self._shape.num_heads // self._shape.num_kv_heads
        heads = []
        for each in (q, k, v):
            # (n, heads, d) to (texts, heads, length, d)
            heads.append(each.view(self._texts, -1, *each.shape[1:]).transpose(1, 2))
        if shared > 1:  # not every kernel divides heads itself
            heads[1:] = [
                each.unsqueeze(2).expand(-1, -1, shared, -1, -1).flatten(1, 2) for each in heads[1:]
            ]
        found = functional.scaled_dot_product_attention(
            heads[0], heads[1], heads[2], is_causal=True, scale=self._scale
        )
        return found.transpose(1, 2).reshape(q.shape[0], -1)


def obstacle(shape: DecoderShape) -> str:
    """Why no exit can be trained for such a model; "": it can."""
    if shape.experts is not None:
        return "its feed-forwards are experts, and an exit's would be too"
    if shape.window and any(shape.sliding):
        return "some of its layers see a window only"
    if shape.attention_softcap or shape.logit_softcap:
        return "it caps scores or logits"
    return ""


@dataclass
class Captured:
    """Of texts of one length. states: at each exit layer, (texts, length, hidden), in the numbers that
    the model computes with. targets, shares: the likeliest next tokens and their probabilities, (texts,
    length, target_tokens), the likeliest first; targets are indices among the kept tokens (0 with a
    share of 0 for others). likeliest: of all tokens, (texts, length). weight: how much a position
    counts, (texts, length)."""

    states: dict[int, Tensor]
    targets: Tensor
    shares: Tensor
    likeliest: Tensor
    weight: Tensor

    filled: int = 0  # texts that are here

    @staticmethod
    def empty(texts: int, length: int, layers: Iterable[int], targets: int, like: Tensor) -> Captured:
        """like: of the kind of number, the width and the device of states."""
        device = like.device

        def numbers(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.empty((texts, length, *size), dtype=dtype, device=device)

        return Captured(
            {layer: numbers(like.shape[-1], dtype=like.dtype) for layer in layers},
            numbers(targets, dtype=torch.int32),
            numbers(targets, dtype=torch.float16),
            numbers(dtype=torch.int32),
            numbers(dtype=torch.float32),
        )

    @staticmethod
    def bytes_per_token(layers: int, targets: int, hidden_bytes: int) -> int:
        return layers * hidden_bytes + 6 * targets + 8

    def put(self, found: Mapping[str, Tensor], weight: Tensor) -> None:
        """found: of `StateReader.read`. weight: (texts, length), of as many texts as count; the reader's
        others are padding."""
        count, length = weight.shape
        rows = slice(self.filled, self.filled + count)
        own = {name: values[: count * length].view(count, length, -1) for name, values in found.items()}
        for layer, states in self.states.items():
            states[rows] = own[str(layer)]
        self.targets[rows] = own["targets"]
        self.shares[rows] = own["shares"]
        self.likeliest[rows] = own["likeliest"].squeeze(-1)
        self.weight[rows] = weight
        self.filled += count


class StateReader:
    """Reads `texts` texts of `length` tokens at a time. records: as a CUDA graph."""

    def __init__(
        self,
        decoder: Decoder,
        exit_layers: Sequence[int],
        kept: Tensor,
        target_tokens: int,
        texts: int,
        length: int,
        *,
        records: bool,
        told: Callable[[str], None] = lambda _: None,
    ) -> None:
        device = decoder.embed_tokens.weight.device
        self._decoder = decoder
        self._exit_layers = frozenset(exit_layers)
        self._targets = min(target_tokens, kept.numel())
        self.texts = texts
        self._tokens = torch.zeros(texts * length, dtype=torch.int64, device=device)
        self._positions = torch.arange(length, device=device).repeat(texts)
        self._attention = CausalTexts(decoder.shape, texts)
        self._place_of = torch.full((decoder.shape.vocab_size,), -1, device=device)
        self._place_of[kept.to(device)] = torch.arange(kept.numel(), device=device)
        self._step: Callable[[], dict[str, Tensor]] = self._read
        if records:
            with torch.no_grad():
                try:
                    self._step = recorded(self._read, None)
                except RuntimeError as error:  # slower, but the same
                    told(f"reading is not recorded as a CUDA graph: {error}")

    def read(self, tokens: Tensor) -> dict[str, Tensor]:
        """tokens: (texts, length). What is found holds until the next call: states of layer N under "N",
        "targets", "shares" and "likeliest", (texts * length, …) each."""
        self._tokens.copy_(tokens.reshape(-1))
        with torch.no_grad():
            return self._step()

    def _read(self) -> dict[str, Tensor]:
        decoder = self._decoder
        found: dict[str, Tensor] = {}
        x = decoder.embed(self._tokens)
        for layer in range(decoder.shape.num_layers):
            if layer in self._exit_layers:
                found[str(layer)] = x
            x = decoder.run_layer(layer, x, self._positions, self._attention)
        parts = [self._distribution(rows) for rows in decoder.norm(x).split(_LOGIT_ROWS)]
        for index, name in enumerate(("targets", "shares", "likeliest")):
            found[name] = torch.cat([part[index] for part in parts])
        return found

    def _distribution(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self._decoder.logits(hidden)
        best, tokens = logits.topk(self._targets, dim=-1)
        shares = (best - logits.logsumexp(dim=-1, keepdim=True)).exp()
        places = self._place_of[tokens]
        is_kept = places >= 0
        targets = places.clamp_min(0).to(torch.int32)
        return targets, shares.masked_fill(~is_kept, 0.0).to(torch.float16), tokens[:, 0].to(torch.int32)
