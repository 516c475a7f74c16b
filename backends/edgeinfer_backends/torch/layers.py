"""Single layers of a decoder: run, capture, replace, differentiate (`edgeinfer.backend.Layers`)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn

from edgeinfer_backends.torch.decoder import Decoder, attend, seen_by
from edgeinfer_backends.torch.quantized import Int4Linear, Int8Linear
from edgeinfer_backends.torch.weights import replace_module

if TYPE_CHECKING:
    from edgeinfer.backend import Floats

Matrix = nn.Linear | Int8Linear | Int4Linear
Part = int | Literal["embeddings", "head"]


class WholeTexts:
    """`decoder.Attention` over texts of equal length, each from position 0 on. Nothing is kept."""

    def __init__(self, decoder: Decoder, texts: int) -> None:
        self._shape = decoder.shape
        self._texts = texts

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = self._shape
        length = q.shape[0] // self._texts
        window = shape.window if shape.slides(layer) else 0
        seen = seen_by(0, length, length, window, q.device)
        found = []
        for own in range(0, q.shape[0], length):
            rows = slice(own, own + length)
            keys, values = k[rows].transpose(0, 1), v[rows].transpose(0, 1)
            found.append(attend(shape, q[rows], keys, values, seen))
        return torch.cat(found)


class LayerAccess:
    """Implements `edgeinfer.backend.Layers`."""

    def __init__(
        self,
        decoder: Decoder,
        device: torch.device,
        dtype: torch.dtype,
        context: int,
        on_replaced: Callable[[str], None] = lambda _: None,
    ) -> None:
        """on_replaced: told what a matrix was replaced by, as text that names it and its numbers."""
        self._on_replaced = on_replaced
        self._decoder = decoder
        self._device = device
        self._dtype = dtype
        self._context = context

    @property
    def num_layers(self) -> int:
        return self._decoder.shape.num_layers

    def _hold(self, part: Part) -> None:
        """Called before a part of the model is used: all of it is in memory here."""

    def matrices(self, layer: int) -> Sequence[str]:
        return [name for name, _ in self._matrices(layer)]

    def embed(self, tokens: Sequence[Sequence[int]]) -> Floats:
        if not tokens or len({len(text) for text in tokens}) != 1 or not len(tokens[0]):
            raise ValueError("texts must be at least one, of equal length, and not empty")
        self._hold("embeddings")
        flat = [token for text in tokens for token in text]
        if min(flat) < 0 or max(flat) >= self._decoder.shape.vocab_size:
            raise ValueError(f"a token is outside the vocabulary of {self._decoder.shape.vocab_size}")
        with torch.no_grad():
            found = self._decoder.embed(torch.tensor(flat, device=self._device))
        return _to_numpy(found.view(len(tokens), len(tokens[0]), -1))

    def run(self, layer: int, states: Floats) -> Floats:
        with torch.no_grad():
            return _to_numpy(self._run(layer, self._states(layer, states)))

    def capture(self, layer: int, states: Floats) -> tuple[Floats, Mapping[str, Floats]]:
        captured: dict[str, Floats] = {}
        with torch.no_grad(), self._listening(layer, captured):
            found = self._run(layer, self._states(layer, states))
        for name, matrix in self._matrices(layer):  # an expert that no row was routed to
            captured.setdefault(name, _to_numpy(torch.empty(0, matrix.in_features)))
        return _to_numpy(found), captured

    def head(self, states: Floats) -> Floats:
        rows = self._states(None, states)
        self._hold("head")
        with torch.no_grad():
            return _to_numpy(self._decoder.logits(self._decoder.norm(rows)))

    def differentiate_head(self, states: Floats, gradient: Floats) -> Floats:
        rows = self._states(None, states).requires_grad_()
        self._hold("head")
        behind = torch.from_numpy(np.ascontiguousarray(gradient)).to(self._device)
        with torch.enable_grad():
            logits = self._decoder.logits(self._decoder.norm(rows))
            if behind.shape != logits.shape:
                raise ValueError(f"the gradient must have the shape {list(logits.shape)}")
            (found,) = torch.autograd.grad(logits, rows, behind)
        return _to_numpy(found)

    def weight(self, layer: int, matrix: str) -> Floats:
        found = self._matrix(layer, matrix)
        wide = found.weight if isinstance(found, nn.Linear) else found.dequantized()
        return _to_numpy(wide.detach())

    def replace(self, layer: int, matrix: str, weight: Floats) -> None:
        old = self._matrix(layer, matrix)
        new = torch.from_numpy(weight.copy()).to(self._device, self._dtype)
        if new.shape != (old.out_features, old.in_features):
            raise ValueError(
                f"{matrix} of layer {layer} has the shape {[old.out_features, old.in_features]}, not"
                f" {list(new.shape)}"
            )
        replace_module(self._decoder, f"layers.{layer}.{matrix}", _linear(new, old.bias))
        numbers = hashlib.sha256(weight.tobytes()).hexdigest()
        self._on_replaced(f"{layer}.{matrix}:{numbers}")

    def differentiate(
        self, layer: int, states: Floats, gradient: Floats
    ) -> tuple[Floats, Mapping[str, Floats]]:
        before = self._states(layer, states).detach().requires_grad_()
        behind = self._states(layer, gradient)
        if behind.shape != before.shape:
            raise ValueError("the gradient must have the shape of the states")
        originals = self._matrices(layer)
        linears: list[tuple[str, nn.Linear]] = []
        try:
            for name, matrix in originals:
                if isinstance(matrix, nn.Linear):
                    own = _linear(matrix.weight.detach().clone(), matrix.bias, learns=True)
                    linears.append((name, own))
                else:  # rounding has no slope: by what its numbers mean
                    own = _linear(matrix.dequantized().to(self._dtype), matrix.bias)
                replace_module(self._decoder, f"layers.{layer}.{name}", own)
            with torch.enable_grad():
                found = self._run(layer, before)
                wanted = [before, *(matrix.weight for _, matrix in linears)]
                grads = torch.autograd.grad(found, wanted, behind, allow_unused=True)
        finally:
            for name, matrix in originals:
                replace_module(self._decoder, f"layers.{layer}.{name}", matrix)
        of_states, of_weights = grads[0], grads[1:]
        assert of_states is not None
        named = {
            name: _to_numpy(torch.zeros_like(matrix.weight) if each is None else each)
            for (name, matrix), each in zip(linears, of_weights, strict=True)
        }
        return _to_numpy(of_states), named

    # -- parts -----------------------------------------------------------------------------------

    def _run(self, layer: int, states: Tensor) -> Tensor:
        texts, length, width = states.shape
        positions = torch.arange(length, device=self._device).repeat(texts)
        attention = WholeTexts(self._decoder, texts)
        found = self._decoder.run_layer(layer, states.reshape(-1, width), positions, attention)
        return found.view(texts, length, width)

    @contextmanager
    def _listening(self, layer: int, captured: dict[str, Floats]) -> Iterator[None]:
        """Keep what every matrix is given."""

        last: list[tuple[Tensor, Floats]] = []

        def listener(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def listen(_: nn.Module, given: tuple[Tensor, ...]) -> None:
                if not last or last[0][0] is not given[0]:
                    own = _to_numpy(given[0].reshape(-1, given[0].shape[-1]))
                    last[:] = [(given[0], own)]
                captured[name] = last[0][1]

            return listen

        handles = [
            matrix.register_forward_pre_hook(listener(name)) for name, matrix in self._matrices(layer)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _matrices(self, layer: int) -> list[tuple[str, Matrix]]:
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"there is no layer {layer} of {self.num_layers}")
        self._hold(layer)
        found = self._decoder.layers[layer].named_modules()
        return [(name, each) for name, each in found if isinstance(each, Matrix)]

    def _matrix(self, layer: int, name: str) -> Matrix:
        for own, matrix in self._matrices(layer):
            if own == name:
                return matrix
        raise ValueError(f"layer {layer} has no matrix {name!r}")

    def _states(self, layer: int | None, states: Floats) -> Tensor:
        """layer: that they are for; None: the head."""
        width = self._decoder.shape.hidden_size
        if states.ndim != 3 or states.shape[2] != width or not states.size:
            raise ValueError(f"states have the shape (texts, n, {width}), not {list(states.shape)}")
        if states.shape[1] > self._context:
            raise ValueError(f"texts of {states.shape[1]} tokens in a context of {self._context}")
        if layer is not None:
            self._matrices(layer)
        return torch.from_numpy(states.copy()).to(self._device, self._dtype)


def _linear(weight: Tensor, bias: nn.Parameter | None, *, learns: bool = False) -> nn.Linear:
    found = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    found.weight = nn.Parameter(weight, requires_grad=learns)
    if bias is not None:
        found.bias = bias
    return found


def _to_numpy(values: Tensor) -> Floats:
    found: Floats = values.float().cpu().numpy()
    return found
