"""Decoding one sequence with a step whose every tensor stays where it is, so that it can be recorded
once as a CUDA graph, and be compiled. (As gpt-fast decodes.)

At one token a step a GPU waits for the processor that launches its some thousand kernels; a graph
launches them all at once. It needs fixed addresses: the sequence that decodes has its cache moved into
buffers of the whole context, until another one needs them or something is done to it that moves it out.
Attention looks at a power of two of positions, of which there is a graph each.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from edgeinfer_backends.torch.decoder import Decoder, attention_weights, weigh
from edgeinfer_backends.torch.kv_cache import Rows, SequenceCache
from edgeinfer_backends.torch.kv_types import is_plain
from edgeinfer_backends.torch.number_types import Held
from edgeinfer_models.families.shape import DecoderShape

_LEAST_SPAN = 256
_WARM_UPS = 3  # what libraries allocate or choose at their first calls must not be in the graph


def obstacle(shape: DecoderShape, kinds: tuple[str, str], held: Held, *, weighs: bool) -> str:
    """Why this model's steps cannot be recorded; "": they can."""
    if shape.experts is not None:
        return "which experts are computed is known only when a step has begun"
    if held == "int8":
        return "which columns are outliers is known only when a step has begun"
    if not (is_plain(kinds[0]) and is_plain(kinds[1])):
        return "its KV cache is quantized"
    return "attention is counted" if weighs else ""


class StaticAttention:
    """`decoder.Attention` for one row at `position`, over the first `span` places of fixed buffers."""

    def __init__(
        self, shape: DecoderShape, layers: list[tuple[Rows, Rows]], position: Tensor, span: int
    ) -> None:
        self._shape = shape
        self._layers = layers
        self._position = position
        self._span = span

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = []
        for buffer, new in zip(self._layers[layer], (k, v), strict=True):
            rows = new.transpose(0, 1).to(buffer.numbers.dtype)
            buffer.numbers.index_copy_(1, self._position, rows)
            found.append(buffer.numbers[:, : self._span].to(q.dtype))
        column = torch.arange(self._span, device=q.device)
        seen = column <= self._position
        if self._shape.slides(layer):
            seen = seen & (self._position - column < self._shape.window)
        weights = attention_weights(self._shape, q, found[0], seen)
        return weigh(self._shape, weights, found[1])


class StaticDecoder:
    """records: steps become CUDA graphs. compiler: applied to a step first (torch.compile)."""

    def __init__(
        self,
        decoder: Decoder,
        buffers: SequenceCache,
        context: int,
        device: torch.device,
        *,
        records: bool,
        compiler: Callable[[Callable[[], Tensor]], Callable[[], Tensor]] | None = None,
    ) -> None:
        self._decoder = decoder
        self._context = context
        self._records = records
        self._compiler = compiler
        buffers.reserve(context)
        self._layers = buffers.layers
        self._owner: weakref.ref[SequenceCache] | None = None
        self._token = torch.zeros(1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self._steps: dict[int, Callable[[], Tensor]] = {}  # by span

    def decode(self, cache: SequenceCache, token: int) -> Tensor:
        """The logits after one more token: (1, vocab_size) float32, valid until the next call. The
        caller commits."""
        self._adopt(cache)
        self._token.fill_(token)
        self._position.fill_(cache.length)
        span = min(max(_LEAST_SPAN, 1 << cache.length.bit_length()), self._context)
        if span not in self._steps:
            self._steps[span] = self._made(span)
        return self._steps[span]()

    def _adopt(self, cache: SequenceCache) -> None:
        if cache.layers is self._layers:
            return
        before = self._owner() if self._owner is not None else None
        if before is not None and before.layers is self._layers:
            before.move_out()
        cache.move_into(self._layers, self._context)
        self._owner = weakref.ref(cache)

    def _made(self, span: int) -> Callable[[], Tensor]:
        attention = StaticAttention(self._decoder.shape, self._layers, self._position, span)

        def step() -> Tensor:
            hidden = self._decoder.hidden(self._token, self._position, attention)
            return self._decoder.logits(hidden)

        made = step if self._compiler is None else self._compiler(step)
        return _recorded(made) if self._records else made


def _recorded(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()

    def replay() -> Tensor:
        graph.replay()
        return found

    return replay
