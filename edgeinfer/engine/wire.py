"""How the engine's process and its owner talk: length-prefixed JSON over two pipes.

JSON and not pickle: the worker runs native code on untrusted files, and what it sends must not be able
to execute here.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO, Any

from edgeinfer.constraint import Constraint
from edgeinfer.engine.draft_source import DraftSource
from edgeinfer.engine.request import (
    CacheStats,
    DraftOptions,
    Embedded,
    Ended,
    Event,
    KvStats,
    Prefilled,
    Queued,
    Request,
    RunStats,
    SpeculationStats,
    Started,
    Text,
    Timings,
    TokenLogprob,
    Usage,
)
from edgeinfer.errors import WorkerDied
from edgeinfer.sampling import SamplingParams
from edgeinfer_models.config import ModelConfig, WeightGroup
from edgeinfer_models.model_files import ModelFiles

_LENGTH = struct.Struct("<I")
MAX_MESSAGE_BYTES = 1 << 30


def send(stream: IO[bytes], *messages: Mapping[str, Any]) -> None:
    """All messages in one write. OSError if the other side is gone."""
    stream.write(b"".join(encoded(message) for message in messages))
    stream.flush()


def encoded(message: Mapping[str, Any]) -> bytes:
    data = json.dumps(message, separators=(",", ":")).encode()
    return _LENGTH.pack(len(data)) + data


def receive(stream: IO[bytes]) -> dict[str, Any] | None:
    """The next message; None when the other side closed or died, between messages or inside one.
    Raises WorkerDied if what came is not a message."""
    head = _read(stream, _LENGTH.size)
    if head is None:
        return None
    (size,) = _LENGTH.unpack(head)
    if size > MAX_MESSAGE_BYTES:
        raise WorkerDied(f"the model's process sent a message of {size} bytes; it is out of step")
    data = _read(stream, size)
    if data is None:
        return None
    try:
        message = json.loads(data)
    except ValueError as error:
        raise WorkerDied("the model's process sent something that is not a message") from error
    if not isinstance(message, dict):
        raise WorkerDied("the model's process sent something that is not a message")
    return message


def _read(stream: IO[bytes], size: int) -> bytearray | None:
    data = bytearray(size)
    view = memoryview(data)
    done = 0
    while done < size:
        count = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            return None
        done += count
    return data


def request_to_wire(request: Request) -> dict[str, Any]:
    """A rendered request: `prompt` or `tokens`; messages and tools stay with the client."""
    return {
        "prompt": request.prompt,
        "tokens": request.tokens,
        "sampling": asdict(request.sampling),
        "max_tokens": request.max_tokens,
        "stop": request.stop,
        "stop_before": request.stop_before,
        "ignore_eos": request.ignore_eos,
        "logprobs": request.logprobs,
        "overflow": request.overflow,
        "kept_characters": request.kept_characters,
        "pinned": request.pinned,
        "embedding": request.embedding,
        "asked_by": request.asked_by,
        "visible_tokens": request.visible_tokens,
        "drafts": asdict(request.drafts),
        "constraint": None if request.constraint is None else asdict(request.constraint),
    }


def request_from_wire(data: Mapping[str, Any]) -> Request:
    sampling = dict(data["sampling"])
    sampling["logit_bias"] = tuple((int(t), float(b)) for t, b in sampling["logit_bias"])
    tokens, constraint = data["tokens"], data["constraint"]
    return Request(
        prompt=data["prompt"],
        tokens=None if tokens is None else tuple(tokens),
        sampling=SamplingParams(**sampling),
        max_tokens=data["max_tokens"],
        stop=tuple(data["stop"]),
        stop_before=tuple(data["stop_before"]),
        ignore_eos=data["ignore_eos"],
        logprobs=data["logprobs"],
        overflow=data["overflow"],
        kept_characters=data["kept_characters"],
        pinned=data["pinned"],
        embedding=data["embedding"],
        asked_by=data["asked_by"],
        visible_tokens=tuple(data["visible_tokens"]),
        drafts=DraftOptions(**{**data["drafts"], "says": tuple(data["drafts"]["says"])}),
        constraint=None if constraint is None else Constraint(**constraint),
    )


def config_from_wire(data: Mapping[str, Any]) -> ModelConfig:
    weights = tuple(WeightGroup(**group) for group in data["weights"])
    heads = tuple(data["num_kv_heads"])
    return ModelConfig(**{**data, "weights": weights, "num_kv_heads": heads})


def event_to_wire(event: Event) -> dict[str, Any]:
    if isinstance(event, Text):  # the hot one
        wire: dict[str, Any] = {"kind": "text", "text": event.text, "n": event.num_tokens}
        if event.num_drafted:
            wire["drafted"] = event.num_drafted
        if event.logprobs:
            wire["logprobs"] = [asdict(logprob) for logprob in event.logprobs]
        return wire
    if isinstance(event, Queued):
        return {"kind": "queued", **asdict(event)}
    if isinstance(event, Started):
        return {"kind": "started", **asdict(event)}
    if isinstance(event, Prefilled):
        return {"kind": "prefilled", **asdict(event)}
    if isinstance(event, Embedded):
        return {"kind": "embedded", "vector": event.vector}
    return {"kind": "ended", **asdict(event)}


def event_from_wire(data: Mapping[str, Any]) -> Event:
    kind = data["kind"]
    if kind == "text":
        logprobs = tuple(
            TokenLogprob(
                item["token"],
                item["logprob"],
                tuple(item["bytes"]),
                tuple((text, value) for text, value in item["top"]),
            )
            for item in data.get("logprobs", ())
        )
        return Text(data["text"], data["n"], logprobs, data.get("drafted", 0))
    if kind == "queued":
        return Queued(data["prompt_tokens"], data["prompt_end"])
    if kind == "started":
        return Started(data["prompt_tokens"], data["cached_tokens"])
    if kind == "prefilled":
        return Prefilled(data["done"], data["total"])
    if kind == "embedded":
        return Embedded(tuple(data["vector"]))
    return Ended(data["outcome"], stats_from_wire(data["stats"]), data["error_type"], data["error"])


_PARTS = {
    "usage": Usage,
    "timings": Timings,
    "speculation": SpeculationStats,
    "kv": KvStats,
    "cache": CacheStats,
}


def stats_from_wire(data: Mapping[str, Any]) -> RunStats:
    values = {
        field.name: _PARTS[field.name](**data[field.name]) if field.name in _PARTS else data[field.name]
        for field in fields(RunStats)
    }
    return RunStats(**values)


def files_to_wire(files: ModelFiles) -> dict[str, Any]:
    return {
        "name": files.name,
        "paths": [str(path) for path in files.paths],
        "format": files.format,
        "digest": files.digest,
        "weight_types": files.weight_types,
    }


def files_from_wire(data: Mapping[str, Any]) -> ModelFiles:
    return ModelFiles(
        data["name"],
        tuple(Path(path) for path in data["paths"]),
        data["format"],
        data["digest"],
        tuple((name, num_bytes) for name, num_bytes in data["weight_types"]),
    )


def draft_to_wire(draft: DraftSource) -> dict[str, Any]:
    return {
        "exit_path": None if draft.exit_path is None else str(draft.exit_path),
        "files": None if draft.files is None else files_to_wire(draft.files),
        "config": None if draft.config is None else asdict(draft.config),
        "is_wanted": draft.is_wanted,
    }


def draft_from_wire(data: Mapping[str, Any]) -> DraftSource:
    return DraftSource(
        None if data["exit_path"] is None else Path(data["exit_path"]),
        None if data["files"] is None else files_from_wire(data["files"]),
        None if data["config"] is None else config_from_wire(data["config"]),
        data["is_wanted"],
    )
