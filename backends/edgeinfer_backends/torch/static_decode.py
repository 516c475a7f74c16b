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
from typing import Any, TypeVar

import torch
from torch import Tensor

from edgeinfer_backends.torch.decoder import Decoder, attention_weights, weigh
from edgeinfer_backends.torch.kv_cache import Rows, SequenceCache
from edgeinfer_models.families.shape import DecoderShape

_LEAST_SPAN = 256
MOST_SPANS = 64  # more than there are powers of two
_WARM_UPS = 3  # what libraries allocate or choose at their first calls must not be in the graph

Found = TypeVar("Found")


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
        self._pool: Any = None
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

    def forget(self) -> None:
        """What was recorded: a weight is another one."""
        self._steps.clear()

    def give_up(self) -> None:
        """Leave the sequence that is here whole."""
        owner = self._owner() if self._owner is not None else None
        if owner is not None and owner.layers is self._layers:
            owner.move_out()

    def _adopt(self, cache: SequenceCache) -> None:
        if cache.layers is self._layers:
            return
        self.give_up()
        cache.move_into(self._layers, self._context)
        self._owner = weakref.ref(cache)

    def _made(self, span: int) -> Callable[[], Tensor]:
        attention = StaticAttention(self._decoder.shape, self._layers, self._position, span)

        def step() -> Tensor:
            hidden = self._decoder.hidden(self._token, self._position, attention)
            return self._decoder.logits(hidden)

        made = step if self._compiler is None else self._compiler(step)
        if not self._records:
            return made
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return recorded(made, self._pool)


def recorded(step: Callable[[], Found], pool: Any) -> Callable[[], Found]:
    """As a CUDA graph: `step` is run a few times, then recorded. What it returns is in the same tensors
    each time. pool: memory that the graphs share, as no two of them run at once; None: its own."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        found = step()

    def replay() -> Found:
        graph.replay()
        return found

    return replay
