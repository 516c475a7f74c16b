"""A whole GGUF model: one file or its shards, structure and meaning checked."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from edgeinfer.errors import ModelFileInvalid, ModelNotFound
from edgeinfer_models.gguf_checks import check_model
from edgeinfer_models.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from edgeinfer_models.gguf_vocabulary import check_vocabulary

SHARD_NAME = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")


def read_gguf_model(path: Path) -> GgufHeader:
    """The header of a model that llama.cpp can be given: `shards` has its files in order.

    path: the model, or any shard of it. Raises ModelNotFound (a shard is missing), ModelFileInvalid,
    UnsupportedModel.
    """
    header = read_gguf_header(first_shard(path))
    if header.get_int("split.count") > 1:
        header = _join_shards(header)
    check_model(header)
    check_vocabulary(header)
    return header


def first_shard(path: Path) -> Path:
    """`path`, or the first shard of the split model it is a later shard of."""
    match = SHARD_NAME.match(path.name)
    if match is None or int(match["number"]) <= 1:
        return path
    return path.with_name(f"{match['stem']}-00001-of-{match['count']}.gguf")


def is_later_shard(path: Path) -> bool:
    return first_shard(path) != path


def _join_shards(first: GgufHeader) -> GgufHeader:
    count = first.get_int("split.count")
    name = first.path.name
    match = SHARD_NAME.match(name)
    if match is None or int(match["count"]) != count:
        raise ModelFileInvalid(
            f"{name}: is the first of {count} shards but is not named so;"
            f" name them NAME-00001-of-{count:05d}.gguf and on"
        )
    if first.get_int("split.no") != 0:
        raise ModelFileInvalid(
            f"{name}: says it is not the first shard; its name is wrong or it is damaged"
        )
    headers = [first]
    for number in range(2, count + 1):
        shard = first.path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf")
        try:
            header = read_gguf_header(shard)
        except ModelNotFound:
            raise ModelNotFound(
                f"{shard.name}: shard {number} of {count} is missing; put it beside {name}"
            ) from None
        if header.get_int("split.no", -1) != number - 1 or header.get_int("split.count") != count:
            raise ModelFileInvalid(
                f"{shard.name}: does not say it is shard {number} of {count}; get it again"
            )
        headers.append(header)
    tensors = _all_tensors(headers)
    expected = first.get_int("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise ModelFileInvalid(
            f"{name}: the shards hold {len(tensors)} tensors where {expected} were split; get them again"
        )
    return replace(
        first,
        tensors=tensors,
        file_bytes=sum(h.file_bytes for h in headers),
        weights_bytes=sum(h.weights_bytes for h in headers),
        shards=tuple(h.path for h in headers),
    )


def _all_tensors(headers: list[GgufHeader]) -> tuple[GgufTensor, ...]:
    owners: dict[str, str] = {}
    tensors: list[GgufTensor] = []
    for header in headers:
        for tensor in header.tensors:
            if tensor.name in owners:
                raise ModelFileInvalid(
                    f"{header.path.name}: tensor '{tensor.name}' is also in {owners[tensor.name]};"
                    " the shards are of different models"
                )
            owners[tensor.name] = header.path.name
            tensors.append(tensor)
    return tuple(tensors)
