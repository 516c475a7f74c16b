"""From a model's tensors to a `Decoder`, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from edgeinfer.errors import LoadFailed
from edgeinfer_backends.torch.decoder import Decoder
from edgeinfer_backends.torch.number_types import Held
from edgeinfer_backends.torch.packed_linear import packed_linear
from edgeinfer_backends.torch.quantized import quantized
from edgeinfer_models.conversion.model import SourceModel
from edgeinfer_models.conversion.to_gguf import check_tensors, row_chunks
from edgeinfer_models.families.tensors import TensorRule, decoder_name

Progress = Callable[[float], bool]


def load_decoder(
    model: SourceModel,
    dtype: torch.dtype,
    device: torch.device,
    held: Held,
    progress: Progress,
    *,
    as_stored: bool = False,
) -> Decoder:
    """held: what becomes of the layers' matrices, each as soon as it has been read. as_stored: only of
    those that the file has packed, with the codes they have there. Raises ModelFileInvalid, LoadFailed
    (cancelled)."""
    rules = model.family.rules(model.shape)
    check_tensors(model.source, rules)
    with torch.device("meta"):
        decoder = Decoder(model.shape)
    names = [(rule, name) for rule in rules for name in rule.hf]
    for index, (rule, name) in enumerate(names):
        if as_stored and rule.layer >= 0 and name.endswith(".weight"):
            packed = packed_linear(model.source, name, held, dtype, device)
            if packed is not None:
                place = decoder_name(name).removesuffix(".weight")
                packed.bias = cast(nn.Linear, decoder.get_submodule(place)).bias
                replace_module(decoder, place, packed)
                continue
        place, module = read_parameter(decoder, model, rule, name, dtype, device)
        is_rounded = held != "plain" and not as_stored and rule.layer >= 0 and not _is_router(place)
        if is_rounded and isinstance(module, nn.Linear) and _is_whole(module):
            replace_module(decoder, place, quantized(module, held))
        if not progress((index + 1) / (len(names) + 1)):
            raise LoadFailed(f"loading {model.name} was cancelled")
    return decoder


def read_parameter(
    decoder: Decoder,
    model: SourceModel,
    rule: TensorRule,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[str, nn.Module]:
    """name: of `rule.hf`. Returns the module that it belongs to and where that is."""
    own = decoder_name(name)
    place, _, leaf = own.rpartition(".")
    module = decoder.get_submodule(place)
    values = _tensor(model, rule, name, dtype, device)
    assert getattr(module, leaf).shape == values.shape, own
    setattr(module, leaf, nn.Parameter(values, requires_grad=False))
    return place, module


def replace_module(decoder: Decoder, place: str, module: nn.Module) -> None:
    parent, _, leaf = place.rpartition(".")
    setattr(decoder.get_submodule(parent), leaf, module)


def _is_whole(module: nn.Linear) -> bool:
    """Weight and bias have been read."""
    return not any(parameter.is_meta for parameter in module.parameters())


def _is_router(place: str) -> bool:
    """Which experts are taken hangs on a router's last bits."""
    return place.endswith((".mlp.gate", ".shared_expert_gate"))


def _tensor(
    model: SourceModel, rule: TensorRule, name: str, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    found = torch.empty(rule.shape, dtype=dtype, device=device)
    for start, stop in row_chunks(rule):
        rows = model.source.rows(name, start, stop)
        part = torch.from_numpy(rows if rows.flags.writeable else rows.copy())
        if model.source.info(name).dtype == "BF16":
            part = part.view(torch.bfloat16)
        found[start:stop] = part
    return found
