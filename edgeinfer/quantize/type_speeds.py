"""How fast a model would be in each weight type on this machine, found out without quantizing it.

    speeds = measure_type_speeds(source, candidates, threads, folder)

For each type a file of the model's shape with made-up weights is written to a temporary folder, loaded
as any model is, and asked to read a prompt and to answer; the types take turns, for a machine's speed
drifts. Of a large model only some layers are written, twice: layers cost the same, so what the larger
file takes more than the smaller one is what the rest take, and embeddings, head and overhead are counted
once. The files are larger than the processor's cache, as the model is: their weights come from memory.

What was found is kept for this machine, shape and build.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeinfer.errors import EdgeInferError, MeasureFailed
from edgeinfer.machine.cost_store import load_measured, save_measured
from edgeinfer.machine.probe import machine_fingerprint, probe_machine
from edgeinfer.machine.processor_cache import last_level_cache_bytes
from edgeinfer.quantize.candidates import Candidate, tensor_bytes
from edgeinfer.quantize.choice import ANSWER_TOKENS, PROMPT_TOKENS
from edgeinfer.quantize.made_up_rows import MadeUpRows
from edgeinfer.quantize.measuring_process import MeasuringProcess
from edgeinfer.quantize.quantization import Source
from edgeinfer.quantize.scratch_folder import scratch_folder
from edgeinfer.registry import get_backend
from edgeinfer_models.conversion.conversion import lacking_room
from edgeinfer_models.conversion.stand_in import layer_of, write_stand_in
from edgeinfer_models.gguf_header import GgufHeader

Progress = Callable[[str, float], None]
BACKEND = "llamacpp"  # the one that runs these types
WHOLE_BYTES = 400_000_000  # a model of no more than this is written whole
# Of a cache that is larger (a server's, shared with others) no model can count on more.
MOST_CACHE_BYTES = 64 * 2**20
TIMES_CACHE = 1.5
LEAST_MORE_LAYERS = 4  # that the larger file has: the fewer, the more a rounding in either counts
MEMORY_SHARE = 0.25  # of what is free, for one file
KEPT_SHARE = 0.5  # for all of them loaded at once
QUIET = 0.75  # of the cores must have been free for what was measured to be kept
_COPIES = 2.0  # of the weights while a file is loaded: its pages and what is repacked from them
_FORMAT = "1"


@dataclass(frozen=True)
class TypeSpeed:
    """spread: between the quartiles of an answer's time in the rounds it was measured in, as a share of
    their median. threads: (decode, prefill) that were fastest. layers: of the files it was measured
    on; one number: the whole model was."""

    type_name: str
    prefill_tok_s: float
    decode_tok_s: float
    spread: float
    threads: tuple[int, int]
    layers: tuple[int, ...]
    rounds: int


@dataclass(frozen=True)
class _File:
    candidate: Candidate
    layers: int
    types: Mapping[str, str | None]
    num_bytes: int

    @property
    def key(self) -> str:
        return f"{self.candidate.type_name}-{self.layers}"


def measure_type_speeds(
    source: Source,
    candidates: Sequence[Candidate],
    folder: Path,
    *,
    refresh: bool = False,
    progress: Progress = lambda *_: None,
) -> tuple[dict[str, TypeSpeed], list[str]]:
    """By type, and why some are missing. folder: of what was measured of this machine (cost_store.py);
    refresh: measure again. Raises MeasureFailed, OSError, and what a reader of the model raises."""
    conditions = _conditions(candidates)
    kept = None if refresh else _read(load_measured(folder, conditions))
    if kept is not None:
        return kept, []
    num_layers = 1 + max(layer_of(name) for name in candidates[0].types)
    available = probe_machine().available_bytes
    files, notes = [], []
    for candidate in candidates:
        parts = [_file(candidate, layers, num_layers) for layers in _layer_counts(candidate, num_layers)]
        if parts[-1].num_bytes * _COPIES > MEMORY_SHARE * available:
            notes.append(
                f"{candidate.type_name} was not measured: {parts[-1].num_bytes / 1e9:.1f} GB of layers"
                f" would take too much of the {available / 1e9:.1f} GB of memory that are free"
            )
            continue
        files += parts
    if not files:
        raise MeasureFailed("no type's speed can be measured: too little memory is free")
    speeds, is_quiet = _measured(source, files, num_layers, available, progress)
    if is_quiet:
        save_measured(folder, conditions, [asdict(speed) for speed in speeds.values()])
    else:
        notes.append(
            "other programs were busy while the types were measured: their speeds are rough, and are"
            " measured again the next time"
        )
    return speeds, notes


def _measured(
    source: Source, files: Sequence[_File], num_layers: int, available: int, progress: Progress
) -> tuple[dict[str, TypeSpeed], bool]:
    """And whether the machine was there for it alone."""
    total = sum(file.num_bytes for file in files)
    parent = Path(tempfile.gettempdir())
    lacking = lacking_room(parent, total)
    if lacking:
        raise MeasureFailed(f"{parent}: measuring the types {lacking}; free some, or set TMPDIR")
    rows = get_backend(BACKEND).row_quantizer()
    with contextlib.closing(rows), scratch_folder() as name:
        made_up, paths = MadeUpRows(rows), {}
        for index, file in enumerate(files):
            progress("writing layers of each type", index / len(files))
            paths[file.key] = str(_written(Path(name), source, file, num_layers, made_up))
        job = {
            "backend": BACKEND,
            "paths": paths,
            "keeps_loaded": total * _COPIES <= KEPT_SHARE * available,
        }
        process = MeasuringProcess("edgeinfer.quantize.speed_process", job, progress)
        found: dict[str, dict[str, Any]] = {}
        is_quiet = True
        try:
            for row in process.rows():
                if "free_cores" in row:
                    free = row["free_cores"]
                    is_quiet = free is None or free >= QUIET * probe_machine().physical_cores
                else:
                    found[row["key"]] = row
        except EdgeInferError as error:
            raise MeasureFailed(
                f"the types' speed cannot be measured ({error}); name one: --type q4_k_m, say"
            ) from None
    speeds = {}
    for candidate in {file.candidate.type_name: file.candidate for file in files}.values():
        own = [file for file in files if file.candidate is candidate]
        speeds[candidate.type_name] = _speed(candidate, own, [found[file.key] for file in own])
    return speeds, is_quiet


def _written(folder: Path, source: Source, file: _File, num_layers: int, made_up: MadeUpRows) -> Path:
    candidate = file.candidate
    if candidate.is_original and file.layers == num_layers and isinstance(source, GgufHeader):
        return source.path
    path = folder / f"{file.key}.gguf"
    write_stand_in(path, source, file.layers, file.types, candidate.file_type, made_up)
    return path


# -- which layers --------------------------------------------------------------------------------------


def _layer_counts(candidate: Candidate, num_layers: int) -> tuple[int, ...]:
    """Of the files to be written: the whole model, or two of fewer layers."""
    layers = sum(candidate.bytes_of(name) for name in candidate.types if layer_of(name) >= 0)
    if candidate.num_bytes <= WHOLE_BYTES or layers == 0:
        return (num_layers,)
    cache = TIMES_CACHE * min(last_level_cache_bytes(), MOST_CACHE_BYTES)
    small = max(2, math.ceil(cache / (layers / num_layers)))
    large = small + max(LEAST_MORE_LAYERS, small)
    return (num_layers,) if large >= num_layers else (small, large)


def _file(candidate: Candidate, layers: int, num_layers: int) -> _File:
    """Each of its layers has the types of one of the model's, evenly chosen: mixtures give some layers
    more bits than others."""
    types: dict[str, str | None] = {}
    size = 0
    for name, shape in candidate.shapes.items():
        layer = layer_of(name)
        if layer >= layers:
            continue
        chosen = int((layer + 0.5) * num_layers / layers)
        twin = name if layer < 0 else name.replace(f"blk.{layer}.", f"blk.{chosen}.", 1)
        if candidate.shapes.get(twin) != shape:
            twin = name  # a layer of another kind
        # What is copied from the model is copied from this very layer.
        own = candidate.made_up[name]
        types[name] = own if own is None else (candidate.made_up[twin] or own)
        kind = types[name] or candidate.types[name]
        size += candidate.bytes_of(name) if kind == candidate.types[name] else tensor_bytes(shape, kind)
    return _File(candidate, layers, types, size)


# -- from rounds to figures ----------------------------------------------------------------------------


def _speed(
    candidate: Candidate, files: Sequence[_File], found: Sequence[Mapping[str, Any]]
) -> TypeSpeed:
    """found: of each file {"decode": {threads: seconds a token by round}, "prefill": likewise}."""
    decode = _whole(candidate, files, [row["decode"] for row in found])
    prefill = _whole(candidate, files, [row["prefill"] for row in found])
    answers = [
        PROMPT_TOKENS * p + ANSWER_TOKENS * d
        for p, d in zip(found[-1]["prefill"][prefill[0]], found[-1]["decode"][decode[0]], strict=True)
    ]
    low, middle, high = _quartiles(answers)
    return TypeSpeed(
        candidate.type_name,
        1 / prefill[1],
        1 / decode[1],
        (high - low) / middle,
        (int(decode[0]), int(prefill[0])),
        tuple(file.layers for file in files),
        len(answers),
    )


def _whole(
    candidate: Candidate, files: Sequence[_File], found: Sequence[Mapping[str, Sequence[float]]]
) -> tuple[str, float]:
    """The threads that were fastest, and with them the whole model's seconds a token."""
    costs: dict[str, float] = {}
    for threads in found[-1]:
        times = [_undisturbed(row[threads]) for row in found]
        costs[threads] = times[-1]
        if len(files) > 1:
            small, large = files
            # Layers of a mixture differ: what is missing is counted in bytes, and not in layers.
            more = (candidate.num_bytes - large.num_bytes) / (large.num_bytes - small.num_bytes)
            costs[threads] += more * max(0.0, times[1] - times[0])
    best = min(costs, key=lambda threads: costs[threads])
    return best, costs[best]


def _undisturbed(times: Sequence[float]) -> float:
    """The first quartile: other programs only ever add to a time, in some rounds and not in others."""
    return _quartiles(times)[0]


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


# -- what is kept --------------------------------------------------------------------------------------


def _conditions(candidates: Sequence[Candidate]) -> dict[str, str]:
    digest = hashlib.blake2b(digest_size=16)
    for candidate in candidates:
        for name in sorted(candidate.types):
            digest.update(f"{name} {candidate.types[name]} {candidate.shapes[name]}\n".encode())
    backend = get_backend(BACKEND)
    return {
        **backend.switches(),
        "measured": "weight types' speed",
        "format": _FORMAT,
        "types": " ".join(candidate.type_name for candidate in candidates),
        "tensors": digest.hexdigest(),
        "backend": BACKEND,
        "build": backend.probe().build,
        "machine": machine_fingerprint(),
        "environment": os.environ.get("OMP_WAIT_POLICY", ""),
    }


def _read(data: object) -> dict[str, TypeSpeed] | None:
    """None for what is not as it was written."""
    if not isinstance(data, list):
        return None
    found = {}
    for row in data:
        try:
            speed = TypeSpeed(**row)
            numbers = (speed.prefill_tok_s, speed.decode_tok_s)
            if not all(isinstance(n, float) and math.isfinite(n) and n > 0 for n in numbers):
                return None
            decode, prefill = map(int, speed.threads)
            found[str(speed.type_name)] = TypeSpeed(
                str(speed.type_name), *numbers, float(speed.spread), (decode, prefill),
                tuple(map(int, speed.layers)), int(speed.rounds),
            )  # fmt: skip
        except (TypeError, ValueError):
            return None
    return found or None
