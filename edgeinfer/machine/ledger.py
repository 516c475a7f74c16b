"""What a model takes of this machine's memory: predicted, made to fit, compared with what was allocated.

Integers only; what a load with given settings takes comes from `Backend.predict_memory`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from edgeinfer.backend import MemoryForm, MemoryItem, RuntimeSettings
from edgeinfer.errors import ModelTooLarge

Predict = Callable[[RuntimeSettings], Sequence[MemoryItem]]

# A prediction is within 5 % of what a process takes (benchmarks/bars/03_memory.py).
MARGIN = 0.05
# A GPU's libraries take some for themselves (cuBLAS workspaces, graphs); not measured.
GPU_MARGIN_BYTES = 256 * 2**20

# Tokens of a step that are tried where compute buffers are what does not fit. Not below 128: a prompt
# cut into pieces of fewer than 64 tokens is computed by another kernel (see engine/scheduler.py).
STEPS = (512, 256, 128)
CONTEXT_STEP = 256
STEP_BUFFERS = ("compute", "logits", "work", "unpacked")
PASSING = ("copies",)  # there for a moment only
LEAST_CONTEXT = 512  # that is chosen unasked: less is no chat


@dataclass(frozen=True)
class MemoryUse:
    """An item as it was predicted and as the backend said it was; None: not predicted, not said."""

    name: str
    device: str
    form: MemoryForm
    predicted_bytes: int | None
    real_bytes: int | None

    def __str__(self) -> str:
        """weights (mapped): 235 MiB predicted, 235 MiB allocated"""
        what = ", ".join(filter(None, (self.form, self.device if self.device != "cpu" else "")))
        figures = [
            f"{shown_bytes(size)} {how}"
            for size, how in ((self.predicted_bytes, "predicted"), (self.real_bytes, "allocated"))
            if size is not None
        ]
        return f"{self.name}{what and f' ({what})'}: {', '.join(figures)}"


@dataclass(frozen=True)
class MemoryLedger:
    items: tuple[MemoryItem, ...]

    def total(self, device: str | None = None) -> int:
        return sum(i.num_bytes for i in self.items if device in (None, i.device))

    def of(self, *names: str) -> int:
        return sum(i.num_bytes for i in self.items if i.name in names)

    def compared(self, real: Iterable[MemoryItem]) -> tuple[MemoryUse, ...]:
        predicted, said = _by_place(self.items), _by_place(real)
        return tuple(
            MemoryUse(*place, predicted.get(place), said.get(place)) for place in predicted | said
        )

    def deviation(self, resident_bytes: int, *, is_warm: bool = True) -> float:
        """How far a process's resident memory is from the prediction: 0.1 is a tenth more, -0.1 less.
        Copies may be there or not, and before a first long prompt (not is_warm) the buffers of a step
        may be untouched: anything from without to with them is 0."""
        most = self.total("cpu")
        uncertain = PASSING if is_warm else (*PASSING, *STEP_BUFFERS)
        least = most - sum(i.num_bytes for i in self.items if i.device == "cpu" and i.name in uncertain)
        nearest = min(max(resident_bytes, least), most)
        return resident_bytes / nearest - 1 if nearest else 0.0


@dataclass(frozen=True)
class Room:
    """Memory that a model may take, what its process has already included.

    gpu_bytes: free on GPUs with memory of their own; None: there is none, what would lie there is in the
    machine's memory too. pressure: what the system says about being short of memory, if it is.
    """

    free_bytes: int
    total_bytes: int
    gpu_bytes: int | None = None
    pressure: str = ""

    def __str__(self) -> str:
        return f"{shown_bytes(self.free_bytes)} memory is free{self.pressure and f' ({self.pressure})'}"


@dataclass(frozen=True)
class Automatic:
    """Which settings are ours to choose; the others were asked for."""

    context: bool = False
    gpu_layers: bool = False
    kv_type: bool = False


@dataclass(frozen=True)
class Fit:
    settings: RuntimeSettings
    cache_bytes: int
    ledger: MemoryLedger
    warnings: tuple[str, ...] = ()


def fit_model(
    name: str,
    predict: Predict,
    settings: RuntimeSettings,
    cache_bytes: int,
    room: Room,
    automatic: Automatic,
    num_layers: int = 0,
    kv_types: Sequence[str] = (),
) -> Fit:
    """The settings with which a model fits into the room there is, those asked for where they do.

    In this order: as many layers on the GPU as fit; the first of the KV types that does; smaller steps;
    a smaller context, if it is ours to choose; and a prompt cache of what is left. num_layers: without
    the output, which counts as one more. kv_types: those that may be chosen, best first; none: what
    the settings say. Raises ModelTooLarge with the arithmetic.
    """
    choice = _Choice(predict, room)
    warnings: list[str] = []
    if kv_types:
        settings = _with_kv_type(name, choice, settings, kv_types, warnings)
    asked = settings
    if room.gpu_bytes is not None:
        settings = _on_gpu(name, choice, settings, automatic.gpu_layers, num_layers, warnings)
    if not choice.fits(settings):
        settings = _made_smaller(name, choice, settings, automatic.context)
        warnings += _lowered(name, asked, settings, room)
    ledger = choice.ledger(settings)
    left = max(0, room.free_bytes - choice.needed(ledger))
    if left < cache_bytes:
        warnings.append(
            f"the prompt cache may take {shown_bytes(left)} instead of {shown_bytes(cache_bytes)}:"
            f" no more memory is free beside {name}{room.pressure and f' ({room.pressure})'}"
        )
    return Fit(settings, min(cache_bytes, left), ledger, tuple(warnings))


@dataclass(frozen=True)
class _Choice:
    predict: Predict
    room: Room

    def ledger(self, settings: RuntimeSettings) -> MemoryLedger:
        return MemoryLedger(tuple(self.predict(settings)))

    def needed(self, ledger: MemoryLedger) -> int:
        """Of the machine's own memory, with a margin."""
        total = ledger.total(None if self.room.gpu_bytes is None else "cpu")
        return int(total * (1 + MARGIN))

    def fits(self, settings: RuntimeSettings) -> bool:
        return self.needed(self.ledger(settings)) <= self.room.free_bytes

    def gpu_fits(self, settings: RuntimeSettings) -> bool:
        need = self.ledger(settings).total("gpu")
        margin = max(int(need * MARGIN), GPU_MARGIN_BYTES) if need else 0
        return need + margin <= (self.room.gpu_bytes or 0)

    def largest_context(self, settings: RuntimeSettings) -> int:
        """The largest multiple of CONTEXT_STEP below the one asked for that fits with small steps; 0 if
        none does."""
        low, high = 0, (settings.context - 1) // CONTEXT_STEP
        while low < high:
            middle = (low + high + 1) // 2
            if self.fits(_with_step(replace(settings, context=middle * CONTEXT_STEP), STEPS[-1])):
                low = middle
            else:
                high = middle - 1
        return low * CONTEXT_STEP


def _with_kv_type(
    name: str,
    choice: _Choice,
    settings: RuntimeSettings,
    kv_types: Sequence[str],
    warnings: list[str],
) -> RuntimeSettings:
    """The first type that fits; if none does, the smallest."""
    tried = [replace(settings, kv_type_k=kind, kv_type_v=kind) for kind in kv_types]
    caches = {each.kv_type_k: choice.ledger(each).of("kv cache") for each in tried}
    smallest = min(tried, key=lambda each: caches[each.kv_type_k])
    taken = next((each for each in tried if choice.fits(each)), smallest)
    best = tried[0]
    if caches[taken.kv_type_k] < caches[best.kv_type_k]:
        warnings.append(
            f"the KV cache of {name} is {taken.kv_type_k} instead of {best.kv_type_k}:"
            f" {shown_bytes(caches[taken.kv_type_k])} instead of {shown_bytes(caches[best.kv_type_k])},"
            f" as {choice.room}; --kv-type {best.kv_type_k} insists"
        )
    return taken


def _on_gpu(
    name: str,
    choice: _Choice,
    settings: RuntimeSettings,
    is_automatic: bool,
    num_layers: int,
    warnings: list[str],
) -> RuntimeSettings:
    """As many layers as fit, or those asked for. Raises ModelTooLarge if those do not fit."""
    if choice.gpu_fits(settings):
        return settings
    most = num_layers + 1
    wanted = most if settings.gpu_layers < 0 else min(settings.gpu_layers, most)
    layers = next(
        (n for n in range(wanted - 1, 0, -1) if choice.gpu_fits(replace(settings, gpu_layers=n))), 0
    )
    free = shown_bytes(choice.room.gpu_bytes or 0)
    if not is_automatic:
        ledger = choice.ledger(settings)
        raise ModelTooLarge(
            f"{wanted} layers of {name} on the GPU need {shown_bytes(ledger.total('gpu'))} and {free} of"
            f" its memory is free; --gpu-layers {layers} would fit, or leave the option out"
        )
    warnings.append(
        f"{layers} of {most} layers of {name} run on the GPU, the rest on the processor: {free} of its"
        " memory is free"
    )
    return replace(settings, gpu_layers=layers)


def _made_smaller(
    name: str, choice: _Choice, settings: RuntimeSettings, may_lower_context: bool
) -> RuntimeSettings:
    smaller = _with_largest_step(choice, settings)
    if smaller is not None:
        return smaller
    context = choice.largest_context(settings)
    if not may_lower_context or context < LEAST_CONTEXT:
        raise ModelTooLarge(_refusal(name, choice, _with_step(settings, STEPS[-1]), context))
    smaller = _with_largest_step(choice, replace(settings, context=context))
    assert smaller is not None  # noqa: S101 (largest_context tried the smallest)
    return smaller


def _with_largest_step(choice: _Choice, settings: RuntimeSettings) -> RuntimeSettings | None:
    tried = (_with_step(settings, step) for step in STEPS)
    return next((each for each in tried if choice.fits(each)), None)


def _with_step(settings: RuntimeSettings, step: int) -> RuntimeSettings:
    return replace(settings, step_tokens=min(settings.step_tokens, step))


def _lowered(name: str, asked: RuntimeSettings, got: RuntimeSettings, room: Room) -> list[str]:
    warnings = []
    if got.context < asked.context:
        warnings.append(
            f"{name} has a context of {got.context} tokens instead of {asked.context}: {room};"
            f" --ctx{_smaller_kv(got)} changes that"
        )
    if got.step_tokens < asked.step_tokens:
        warnings.append(
            f"prompts are read in steps of {got.step_tokens} tokens instead of {asked.step_tokens},"
            f" which is slower: {room}"
        )
    return warnings


def _is_unquantized(settings: RuntimeSettings) -> bool:
    return {settings.kv_type_k, settings.kv_type_v} <= {"f16", "f32", "bf16"}


def _smaller_kv(settings: RuntimeSettings) -> str:
    return " or a q8_0 KV cache" if _is_unquantized(settings) else ""


def _refusal(name: str, choice: _Choice, settings: RuntimeSettings, context: int) -> str:
    """context: the largest that would fit; 0: none."""
    room = choice.room
    ledger = choice.ledger(settings)
    need = choice.needed(ledger)
    home = MemoryLedger(tuple(i for i in ledger.items if room.gpu_bytes is None or i.device == "cpu"))
    times = f"{settings.sequences} x " if settings.sequences > 1 else ""
    parts = [
        f"weights {shown_bytes(home.of('weights'))}",
        f"KV cache {shown_bytes(home.of('kv cache'))} for {times}{settings.context} tokens",
        f"compute {shown_bytes(home.of(*STEP_BUFFERS, *PASSING))}",
        f"process {shown_bytes(home.of('tables', 'process'))}",
        f"{MARGIN:.0%} to spare",
    ]
    ways = [f"--ctx {context}"] if context else []
    if _is_unquantized(settings):
        quantized = replace(settings, kv_type_k="q8_0", kv_type_v="q8_0", flash_attention=True)
        if choice.fits(quantized):
            ways.append("--kv-type q8_0")
    advice = (
        f"{' or '.join(ways)} would fit" if ways else "use a smaller or more strongly quantized model"
    )
    pressed = f" and others press for it ({room.pressure})" if room.pressure else ""
    return (
        f"{name} needs {shown_bytes(need)} ({' + '.join(parts)}) and {shown_bytes(room.free_bytes)} of"
        f" {shown_bytes(room.total_bytes)} memory is free{pressed}; {advice}"
    )


def shown_bytes(num_bytes: int) -> str:
    if num_bytes >= 10 * 2**30:
        return f"{num_bytes / 2**30:.0f} GiB"
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.1f} GiB"
    return f"{num_bytes / 2**20:.0f} MiB"


def _by_place(items: Iterable[MemoryItem]) -> dict[tuple[str, str, MemoryForm], int]:
    sums: dict[tuple[str, str, MemoryForm], int] = {}
    for item in items:
        place = (item.name, item.device, item.form)
        sums[place] = sums.get(place, 0) + item.num_bytes
    return sums
