"""A model's layers, read from its files when they are used: memory is that of one layer, whatever the
model's size."""

from __future__ import annotations

import torch
from torch import nn

from edgeinfer.backend import RuntimeSettings
from edgeinfer_backends.torch.decoder import Decoder, Layer
from edgeinfer_backends.torch.devices import chosen_device
from edgeinfer_backends.torch.layers import LayerAccess, Part
from edgeinfer_backends.torch.loading import DTYPES, mapped, number_types, source_of, tokenizer_of
from edgeinfer_backends.torch.weights import read_parameter
from edgeinfer_models.conversion.model import SourceModel
from edgeinfer_models.conversion.to_gguf import check_tensors
from edgeinfer_models.families.tensors import TensorRule
from edgeinfer_models.model_files import ModelFiles
from edgeinfer_models.tokenizer import Tokenizer


class StreamedLayers(LayerAccess):
    """Holds the embeddings, the head or one layer; what replaced a layer's matrices goes with it."""

    def __init__(
        self,
        model: SourceModel,
        decoder: Decoder,
        device: torch.device,
        dtype: torch.dtype,
        context: int,
    ) -> None:
        super().__init__(decoder, device, dtype, context)
        self._model = model
        self._held: Part | None = None
        rules = model.family.rules(model.shape)
        self._rules: dict[Part, list[TensorRule]] = {
            layer: [rule for rule in rules if rule.layer == layer]
            for layer in range(model.shape.num_layers)
        }
        outside = {rule.hf[0]: rule for rule in rules if rule.layer < 0}
        embeddings = outside.pop("model.embed_tokens.weight")
        self._rules["embeddings"] = [embeddings]
        self._rules["head"] = [*outside.values(), *([embeddings] if model.shape.is_tied else ())]

    def _hold(self, part: Part) -> None:
        if self._held == part:
            return
        if self._held is not None:
            self._release(self._held)
        self._held = part
        for rule in self._rules[part]:
            for name in rule.hf:
                read_parameter(self._decoder, self._model, rule, name, self._dtype, self._device)

    def _release(self, part: Part) -> None:
        decoder = self._decoder
        with torch.device("meta"):
            if isinstance(part, int):
                decoder.layers[part] = Layer(decoder.shape, part)
                return
            names = ("embed_tokens",) if part == "embeddings" else ("embed_tokens", "norm", "lm_head")
            for name in names:
                module = getattr(decoder, name, None)  # a tied model has no lm_head
                if module is not None:
                    module.weight = nn.Parameter(torch.empty(module.weight.shape), requires_grad=False)

    def close(self) -> None:
        if self._held is not None:
            self._release(self._held)
            self._held = None


class StreamedModel:
    """Implements `edgeinfer.backend.LayeredModel`."""

    def __init__(self, layers: StreamedLayers, tokenizer: Tokenizer) -> None:
        self.layers = layers
        self.tokenizer = tokenizer

    def close(self) -> None:
        self.layers.close()


def open_streamed(files: ModelFiles, context: int) -> StreamedModel:
    """As `Backend.open_layers`."""
    if context < 1:
        raise ValueError(f"a context of {context}")
    with mapped(files.name):
        model = source_of(files)
        device = chosen_device(RuntimeSettings())
        dtype = DTYPES[number_types(model, "auto", device).computed]
        check_tensors(model.source, model.family.rules(model.shape))
        with torch.device("meta"):
            decoder = Decoder(model.shape)
        decoder.set_context(context, device)
        layers = StreamedLayers(model, decoder, device, dtype, context)
        return StreamedModel(layers, tokenizer_of(model))
