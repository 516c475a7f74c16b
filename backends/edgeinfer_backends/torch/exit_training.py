"""Exits learn here (`edgeinfer.exits.ExitTrainer`): from their own model, on texts that it wrote.

trainer = TorchExitTrainer(path, "auto")
trainer.begin([ExitPlace(8)], kept, ExitRecipe(), texts=512, held_out=64, length=512)
trainer.capture(tokens, kinds, held_out=False)
trainer.step(done=0.0)
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeinfer.errors import BackendUnavailable, UnsupportedModel, UsageError
from edgeinfer.exits import ANSWERED, ASKED, ExitPlace, ExitRecipe, Opening, Predictions, Turns
from edgeinfer.machine.probe import probe_machine
from edgeinfer_backends.torch.decoder import Attention, Decoder, Layer, RmsNorm
from edgeinfer_backends.torch.devices import is_fast_at_bf16
from edgeinfer_backends.torch.exit_loss import cross_entropy
from edgeinfer_backends.torch.exit_states import Captured, CausalTexts, StateReader, obstacle
from edgeinfer_backends.torch.generation import BatchWriter
from edgeinfer_backends.torch.loading import tokenizer_of
from edgeinfer_backends.torch.weights import load_decoder
from edgeinfer_models.conversion.model import source_of_folder, source_of_gguf
from edgeinfer_models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from edgeinfer.exits import Floats, Kinds, Tokens

_CONTEXT = 4096
_SPARE_GPU_BYTES = 16 * 2**30  # for the activations and logits of a training step
_MOST_OF_MEMORY = 0.6  # of what a processor's programs share
_READ_AT_ONCE = {"cuda": 64, "cpu": 8}  # texts
_BETAS = (0.9, 0.98)
_LONGEST_SLOPE = 1.0
_HEAD_ROWS = 8192  # rows of the head's numbers that there are at a time


class ExitLayers(nn.Module):
    """An exit's own layers and norm, in float32: what is small must add up over thousands of steps. They
    begin as the model's last ones."""

    def __init__(self, decoder: Decoder, place: ExitPlace) -> None:
        super().__init__()
        shape = decoder.shape
        first = shape.num_layers - place.new_layers
        with torch.device("meta"):
            own = [Layer(shape, first + index) for index in range(place.new_layers)]
            self.norm = RmsNorm(shape.hidden_size, shape.norm_eps, adds_one=shape.adds_one_to_norms)
        self.layers = nn.ModuleList(own)
        self._first = first
        self._decoder = [decoder]  # in a list: its weights are no parameters of this module
        for new, old in zip(
            [*self.layers, self.norm], [*decoder.layers[first:], decoder.norm], strict=True
        ):
            weights = {name: value.detach().float().clone() for name, value in old.state_dict().items()}
            new.load_state_dict(weights, assign=True)
        self.requires_grad_(True)

    def forward(self, x: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """x: the model's states at the exit, (n, hidden). Returns what the head reads."""
        for index, layer in enumerate(self.layers):
            x = layer(x, positions, self._decoder[0].rotary(self._first + index), attention)
        found: Tensor = self.norm(x)
        return found


@dataclass
class _Learning:
    """What there is after `begin`. order: of the texts in this round, on the device, so that no step
    waits for a copy. used: how many of them were learnt from."""

    recipe: ExitRecipe
    kept: Tensor
    head: Tensor
    exits: dict[ExitPlace, ExitLayers]
    optimizer: torch.optim.Optimizer
    texts: Captured
    held_out: Captured
    reader: StateReader
    random: torch.Generator
    order: Tensor
    losses: dict[ExitPlace, Tensor]
    used: int = 0


class TorchExitTrainer:
    """device: "auto", or a name of torch's ("cuda", "mps", "cpu"). records: steps become CUDA graphs,
    where there is such a device. told: is given what a user should know. Raises LoadFailed,
    ModelFileInvalid, UnsupportedModel, BackendUnavailable."""

    def __init__(
        self,
        path: Path,
        device: str = "auto",
        *,
        records: bool = True,
        told: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._device = _chosen(device)
        self._records = records and self._device.type == "cuda"
        self._told = told
        self._bf16 = is_fast_at_bf16(self._device)
        model = source_of_folder(path) if path.is_dir() else source_of_gguf(path)
        reason = obstacle(model.shape)
        if reason:
            raise UnsupportedModel(f"{model.name}: no exit can be trained for it: {reason}")
        self._tokenizer = tokenizer_of(model)
        dtype = torch.bfloat16 if self._bf16 else torch.float32
        self._decoder = load_decoder(model, dtype, self._device, "plain", lambda _: True)
        self._decoder.set_context(min(_CONTEXT, model.shape.context_trained), self._device)
        self._writer: BatchWriter | None = None
        self._learning: _Learning | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def num_layers(self) -> int:
        return self._decoder.shape.num_layers

    @property
    def device_name(self) -> str:
        if self._device.type == "cuda":
            return torch.cuda.get_device_name(self._device)
        return self._device.type

    # -- writing ---------------------------------------------------------------------------------

    def prepare_writing(self, texts: int, length: int, turns: Turns) -> None:
        self.end_writing()
        tokens = range(self._decoder.shape.vocab_size)
        ends = torch.tensor([self._tokenizer.is_end(token) for token in tokens])
        self._writer = BatchWriter(
            self._decoder, ends, turns, texts, length, records=self._records, told=self._told
        )

    def write(
        self, openings: Sequence[Opening], seed: int, going_on: Callable[[int], bool]
    ) -> tuple[Tokens, Kinds]:
        assert self._writer is not None, "prepare_writing was not called"
        tokens, kinds = self._writer.write(openings, seed, going_on)
        return tokens.cpu().numpy(), kinds.cpu().numpy()

    def end_writing(self) -> None:
        self._writer = None
        gc.collect()  # its steps hold it and it holds them
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    # -- learning --------------------------------------------------------------------------------

    def texts_that_fit(self, places: Sequence[ExitPlace], recipe: ExitRecipe, length: int) -> int:
        layers = len({place.layer for place in places})
        hidden_bytes = self._decoder.shape.hidden_size * (2 if self._bf16 else 4)
        size = length * Captured.bytes_per_token(layers, recipe.target_tokens, hidden_bytes)
        return max(self._free_bytes(), 0) // size

    def begin(
        self,
        places: Sequence[ExitPlace],
        kept: Tokens,
        recipe: ExitRecipe,
        *,
        texts: int,
        held_out: int,
        length: int,
    ) -> None:
        for place in places:
            if not 0 < place.layer < self.num_layers or place.new_layers > self.num_layers:
                raise UsageError(f"an exit at {place.name} of a model of {self.num_layers} layers")
        if length > min(_CONTEXT, self._decoder.shape.context_trained):
            raise UsageError(f"texts of {length} tokens are longer than the model reads")
        decoder, device = self._decoder, self._device
        exits = {place: ExitLayers(decoder, place) for place in places}
        parameters = [parameter for each in exits.values() for parameter in each.parameters()]
        optimizer = torch.optim.AdamW(
            parameters,
            lr=0.0,
            betas=_BETAS,
            weight_decay=recipe.weight_decay,
            fused=device.type == "cuda",
        )
        layers = sorted({place.layer for place in places})
        own = torch.from_numpy(kept.astype(np.int64)).to(device)
        head = decoder.embed_tokens.weight if decoder.shape.is_tied else decoder.lm_head.weight
        targets = min(recipe.target_tokens, own.numel())
        like = decoder.embed_tokens.weight[:1]
        at_once = _READ_AT_ONCE.get(device.type, 8)
        reader = StateReader(
            decoder, layers, own, targets, at_once, length, records=self._records, told=self._told
        )
        self._learning = _Learning(
            recipe,
            own,
            (head.detach()[own] / decoder.shape.logit_divisor).contiguous(),
            exits,
            optimizer,
            Captured.empty(texts, length, layers, targets, like),
            Captured.empty(held_out, length, layers, targets, like),
            reader,
            torch.Generator().manual_seed(recipe.seed),
            torch.empty(0, dtype=torch.int64, device=device),
            {},
        )

    def capture(self, tokens: Tokens, kinds: Kinds, *, held_out: bool) -> None:
        learning = self._begun()
        into = learning.held_out if held_out else learning.texts
        at_once = learning.reader.texts
        weight = _weights(kinds, learning.recipe.question_weight)
        for start in range(0, len(tokens), at_once):
            part = torch.from_numpy(tokens[start : start + at_once].astype(np.int64))
            padded = torch.cat((part, part[:1].expand(at_once - len(part), -1)))
            own = torch.from_numpy(weight[start : start + at_once]).to(self._device)
            into.put(learning.reader.read(padded), own)

    def step(self, done: float) -> None:
        learning = self._begun()
        learning.losses.clear()
        for group in learning.optimizer.param_groups:
            group["lr"] = learning.recipe.rate_at(done)
        chosen = self._next_texts()
        texts = learning.texts
        targets = texts.targets[chosen].flatten(0, 1).long()
        shares = _target_shares(texts.shares[chosen].flatten(0, 1).float(), learning.recipe)
        weight = texts.weight[chosen].flatten()
        learning.optimizer.zero_grad(set_to_none=True)
        for place, own in learning.exits.items():
            with self._in_its_numbers():
                hidden = self._run(own, texts.states[place.layer][chosen])
            with torch.no_grad():
                loss, slope = cross_entropy(hidden.detach(), learning.head, targets, shares, weight)
            torch.autograd.backward(hidden, slope)
            nn.utils.clip_grad_norm_(own.parameters(), _LONGEST_SLOPE)
            learning.losses[place] = loss
        learning.optimizer.step()

    def losses(self) -> Mapping[ExitPlace, float]:
        return {place: float(loss) for place, loss in self._begun().losses.items()}

    def predict(self) -> Predictions:
        learning = self._begun()
        held_out = learning.held_out
        at_once = learning.reader.texts
        found: dict[ExitPlace, Tokens] = {}
        with torch.no_grad(), self._in_its_numbers():
            for place, own in learning.exits.items():
                states = held_out.states[place.layer][: held_out.filled]
                parts = [
                    self._likeliest(own, states[start : start + at_once])
                    for start in range(0, len(states), at_once)
                ]
                found[place] = torch.cat(parts).to(torch.int32).cpu().numpy()
        return Predictions(held_out.likeliest[: held_out.filled].cpu().numpy(), found)

    # -- what is kept ----------------------------------------------------------------------------

    def weights(self, place: ExitPlace) -> Mapping[str, Floats]:
        own = self._begun().exits[place]
        return {name: _to_numpy(value) for name, value in own.state_dict().items()}

    def state(self) -> Mapping[str, Floats]:
        found: dict[str, Floats] = {}
        moments = self._begun().optimizer.state
        for name, parameter in self._parameters():
            found[f"weight/{name}"] = _to_numpy(parameter)
            for part, value in moments[parameter].items():
                found[f"{part}/{name}"] = _to_numpy(value)
        return found

    def restore(self, state: Mapping[str, Floats]) -> None:
        wanted = {f"weight/{name}": parameter.shape for name, parameter in self._parameters()}
        for name, shape in wanted.items():
            if name not in state or state[name].shape != tuple(shape):
                raise ValueError(f"what was learnt so far lacks {name}, or it has another shape")
        moments = self._begun().optimizer.state
        with torch.no_grad():
            for name, parameter in self._parameters():
                parameter.copy_(torch.from_numpy(state[f"weight/{name}"].copy()))
                for part in ("step", "exp_avg", "exp_avg_sq"):
                    if f"{part}/{name}" in state:
                        value = torch.from_numpy(np.array(state[f"{part}/{name}"]))
                        moments[parameter][part] = value.to(self._device)

    def close(self) -> None:
        self._learning = None
        self.end_writing()

    # -- parts -----------------------------------------------------------------------------------

    def _begun(self) -> _Learning:
        assert self._learning is not None, "begin was not called"
        return self._learning

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for place, own in self._begun().exits.items():
            for name, parameter in own.named_parameters():
                yield f"{place.name}/{name}", parameter

    def _in_its_numbers(self) -> torch.autocast:
        # Without a cache of rounded weights: each is used once a step.
        return torch.autocast(
            self._device.type, dtype=torch.bfloat16, enabled=self._bf16, cache_enabled=False
        )

    def _run(self, own: ExitLayers, states: Tensor) -> Tensor:
        """states: (texts, length, hidden). Returns (texts * length, hidden)."""
        texts, length, width = states.shape
        positions = torch.arange(length, device=self._device).repeat(texts)
        found: Tensor = own(
            states.reshape(-1, width), positions, CausalTexts(self._decoder.shape, texts)
        )
        return found

    def _likeliest(self, own: ExitLayers, states: Tensor) -> Tensor:
        """(texts, length), of the model's tokens."""
        learning, hidden = self._begun(), self._run(own, states)
        best = [
            functional.linear(hidden[start : start + _HEAD_ROWS], learning.head).argmax(dim=-1)
            for start in range(0, len(hidden), _HEAD_ROWS)
        ]
        return learning.kept[torch.cat(best)].view(states.shape[:2])

    def _next_texts(self) -> Tensor:
        """Indices. What is left of a round and fills no batch is left out."""
        learning = self._begun()
        count = min(learning.recipe.batch_texts, learning.texts.filled)
        if learning.used + count > len(learning.order):
            order = torch.randperm(learning.texts.filled, generator=learning.random)
            learning.order, learning.used = order.to(self._device), 0
        learning.used += count
        return learning.order[learning.used - count : learning.used]

    def _free_bytes(self) -> int:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            return int(torch.cuda.mem_get_info(self._device)[0]) - _SPARE_GPU_BYTES
        return int(_MOST_OF_MEMORY * probe_machine().available_bytes)


def _weights(kinds: Kinds, question_weight: float) -> Floats:
    """Of each position, by who wrote the token that follows it; nobody wrote the one after the last."""
    by_kind = np.zeros(256, dtype=np.float32)
    by_kind[ASKED], by_kind[ANSWERED] = question_weight, 1.0
    found = np.zeros(kinds.shape, dtype=np.float32)
    found[:, :-1] = by_kind[kinds[:, 1:]]
    return found


def _target_shares(shares: Tensor, recipe: ExitRecipe) -> Tensor:
    """shares: (n, k), of the model's whole distribution. The rows that come back add up to 1 or 0."""
    found = shares if recipe.sharpness == 1.0 else shares.pow(recipe.sharpness)
    total = found.sum(dim=-1, keepdim=True)
    found = found / total.clamp_min(1e-9) * (total > 0)
    if recipe.hard_share:
        # Where the likeliest token is not kept, the likeliest kept one is not what is wanted either.
        is_first = shares[:, :1] > 0
        found = torch.where(is_first, found * (1.0 - recipe.hard_share), found)
        found[:, :1] += recipe.hard_share * is_first
    return found


def _chosen(name: str) -> torch.device:
    """Raises BackendUnavailable."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise BackendUnavailable("torch sees no NVIDIA GPU here; take --device cpu")
    return torch.device(name)


def _to_numpy(values: Tensor) -> Floats:
    found: Floats = values.detach().float().cpu().numpy()
    return found
