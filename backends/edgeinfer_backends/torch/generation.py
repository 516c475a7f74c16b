"""Many texts written at once, a position of each in a step whose every tensor stays where it is.

The engine serves people: prompts of any length, each answer its own sampler. Training wants millions of
tokens and does not care which, so here all texts stand at the same position: what an opening prescribes
is put in place of what was drawn, and where a turn ends, the template's text is. So a step has no branch
and no wait for the device, and can be recorded as a CUDA graph, as in static_decode.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from edgeinfer.exits import ANSWERED, ASKED, FORCED, Opening, Turns
from edgeinfer_backends.torch.decoder import Decoder
from edgeinfer_backends.torch.static_decode import recorded
from edgeinfer_models.families.shape import DecoderShape

_SPAN = 128  # attention looks at a multiple of so many positions, of which there is a graph each
# A token less likely than this share of the likeliest is never drawn ("min-p", Nguyen et al. 2024,
# arXiv:2407.01082): it cuts the tail as top-p does, but needs no sorting.
_LEAST_SHARE = 0.05
_GREEDY = 1e-4  # a temperature at which noise decides between equals only
_ASKING, _ANSWERING, _PLAIN = 0, 1, 2


class BatchAttention:
    """`decoder.Attention` for one row of each text at `position`, over the first `span` places."""

    def __init__(
        self, shape: DecoderShape, caches: list[tuple[Tensor, Tensor]], position: Tensor, span: int
    ) -> None:
        """caches: keys and values of each layer, (texts * kv_heads, length, head_dim)."""
        self._shape = shape
        self._caches = caches
        self._position = position
        self._span = span
        self._scale = shape.attention_scale or shape.head_dim**-0.5

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = self._shape
        found = []
        for buffer, new in zip(self._caches[layer], (k, v), strict=True):
            buffer.index_copy_(1, self._position, new.reshape(-1, 1, shape.head_dim).to(buffer.dtype))
            found.append(buffer[:, : self._span])
        keys, values = found
        grouped = q.reshape(keys.shape[0], -1, shape.head_dim) * self._scale
        scores = torch.bmm(grouped.to(keys.dtype), keys.transpose(1, 2)).float()
        column = torch.arange(self._span, device=q.device)
        scores = scores.masked_fill(column > self._position, float("-inf"))
        weights = functional.softmax(scores, dim=-1).to(values.dtype)
        return torch.bmm(weights, values).reshape(q.shape[0], -1).to(q.dtype)


class BatchWriter:
    """records: steps become CUDA graphs."""

    def __init__(
        self,
        decoder: Decoder,
        ends: Tensor,
        turns: Turns,
        texts: int,
        length: int,
        *,
        records: bool,
        told: Callable[[str], None] = lambda _: None,
    ) -> None:
        """ends: for each token of the vocabulary whether it ends a turn. told: is given what a user
        should know."""
        weight = decoder.embed_tokens.weight
        device, shape = weight.device, decoder.shape
        self._decoder = decoder
        self._texts, self._length = texts, length
        self._ends = ends.to(device)
        self._records = records
        self._told = told
        size = (texts * shape.num_kv_heads, length, shape.head_dim)
        self._caches = [
            (
                torch.zeros(size, dtype=weight.dtype, device=device),
                torch.zeros(size, dtype=weight.dtype, device=device),
            )
            for _ in range(shape.num_layers)
        ]

        def numbers(*size: int, fill: int = 0) -> Tensor:
            return torch.full(size, fill, dtype=torch.int64, device=device)

        self._position = numbers(1)
        self._token = numbers(texts)
        self._phase = numbers(texts)
        self._place = numbers(texts)  # within what goes between two turns; 0: outside
        self._forced = numbers(texts, length + 1, fill=-1)
        self._written = numbers(texts, length + 1)
        self._kinds = torch.zeros((texts, length + 1), dtype=torch.uint8, device=device)
        self._temperature = torch.ones((texts, 1), device=device)
        self._noise = torch.ones((texts, shape.vocab_size), device=device)
        between = (turns.after_question, turns.after_answer, turns.after_text)
        widest = max(len(each) for each in between)
        rows = [list(each) + [0] * (widest - len(each)) for each in between]
        self._between = torch.tensor(rows, device=device)
        self._between_lengths = torch.tensor([len(each) for each in between], device=device)
        self._next_phase = torch.tensor([_ANSWERING, _ASKING, _PLAIN], device=device)
        self._phase_kinds = torch.tensor([ASKED, ANSWERED, ANSWERED], device=device)
        self._steps: dict[int, Callable[[], Tensor]] = {}
        with torch.no_grad():
            self._prepare()

    def write(
        self, openings: Sequence[Opening], seed: int, going_on: Callable[[int], bool]
    ) -> tuple[Tensor, Tensor]:
        """Tokens and kinds, (texts, n) each: n is the length, or less if `going_on` said so."""
        self._begin(openings)
        generator = torch.Generator(device=self._token.device)
        generator.manual_seed(seed)
        done = 1
        with torch.no_grad():
            while done < self._length and going_on(done):
                # Drawn outside of the graph: a generator inside of one has rules of its own.
                self._noise.exponential_(generator=generator)
                self._steps[self._span_at(done - 1)]()
                done += 1
        return self._written[:, :done].to(torch.int32), self._kinds[:, :done].clone()

    def _begin(self, openings: Sequence[Opening]) -> None:
        if len(openings) != self._texts:
            raise ValueError(f"{len(openings)} openings for {self._texts} texts")
        forced = torch.full((self._texts, self._length + 1), -1, dtype=torch.int64)
        for row, opening in zip(forced, openings, strict=True):
            if not 0 < len(opening.tokens) < self._length:
                raise ValueError(f"an opening of {len(opening.tokens)} tokens for {self._length}")
            row[: len(opening.tokens)] = torch.tensor(opening.tokens)
        self._forced.copy_(forced)
        phases = [_ASKING if opening.asks else _PLAIN for opening in openings]
        self._phase.copy_(torch.tensor(phases))
        temperatures = [[max(opening.temperature, _GREEDY)] for opening in openings]
        self._temperature.copy_(torch.tensor(temperatures))
        self._position.zero_()
        self._place.zero_()
        self._written.zero_()
        self._kinds.fill_(FORCED)
        self._token.copy_(self._forced[:, 0])
        self._written[:, 0] = self._token

    def _prepare(self) -> None:
        """Make the steps of all spans before there is a text: making one runs it."""
        pool = torch.cuda.graph_pool_handle() if self._records else None  # no two of them run at once
        for span in sorted({self._span_at(place) for place in range(self._length - 1)}):
            step = self._step_over(span)
            if self._records:
                try:
                    self._position.zero_()
                    self._steps[span] = recorded(step, pool)
                    continue
                except RuntimeError as error:  # slower, but the texts are the same
                    self._told(f"steps are not recorded as a CUDA graph: {error}")
                    self._records = False
                    self._steps = {each: self._step_over(each) for each in self._steps}
            self._steps[span] = step

    def _span_at(self, position: int) -> int:
        return min((position // _SPAN + 1) * _SPAN, self._length)

    def _step_over(self, span: int) -> Callable[[], Tensor]:
        attention = BatchAttention(self._decoder.shape, self._caches, self._position, span)

        def step() -> Tensor:
            positions = self._position.expand(self._texts)
            hidden = self._decoder.hidden(self._token, positions, attention)
            self._choose(self._decoder.logits(hidden))
            return self._token

        return step

    def _choose(self, logits: Tensor) -> None:
        """The next token of every text, and what follows from it."""
        drawn = self._drawn(logits)
        behind = self._position + 1
        forced = self._forced.index_select(1, behind).squeeze(1)
        is_forced = forced >= 0
        is_free = ~is_forced & (self._place == 0)
        ends = is_free & self._ends[drawn]
        is_between = ends | (~is_forced & (self._place > 0))
        between = self._between[self._phase, self._place]
        token = torch.where(is_forced, forced, torch.where(is_between, between, drawn))
        # Where a plain text ended, the model wanted another token than the one that is put there.
        is_own = is_free & ~(ends & (self._phase == _PLAIN))
        # (masked_fill, not where: a number given to `where` is copied to the device, and waited for)
        kind = self._phase_kinds[self._phase].masked_fill(~is_own, FORCED)
        place = self._place + is_between.to(torch.int64)
        is_over = is_between & (place >= self._between_lengths[self._phase])
        self._written.index_copy_(1, behind, token.unsqueeze(1))
        self._kinds.index_copy_(1, behind, kind.to(torch.uint8).unsqueeze(1))
        self._place.copy_(place.masked_fill(is_over, 0))
        self._phase.copy_(torch.where(is_over, self._next_phase[self._phase], self._phase))
        self._token.copy_(token)
        self._position.copy_(behind)

    def _drawn(self, logits: Tensor) -> Tensor:
        """By the Gumbel trick: the largest of log p - log e, e drawn exponentially, is a draw from p."""
        asks = (self._phase == _ASKING).unsqueeze(1)
        scaled = logits / self._temperature.masked_fill(asks, 1.0)
        least = scaled.amax(dim=-1, keepdim=True) + math.log(_LEAST_SHARE)
        noisy = scaled - self._noise.clamp_min(1e-20).log()
        return noisy.masked_fill(scaled < least, float("-inf")).argmax(dim=-1)
