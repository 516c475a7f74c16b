"""What is chosen, lowered and refused on machines with little memory: integers only, no model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from edgeinfer.backend import MemoryItem, RuntimeSettings
from edgeinfer.errors import ModelTooLarge
from edgeinfer.machine.ledger import (
    Automatic,
    Fit,
    MemoryLedger,
    Room,
    fit_model,
    shown_bytes,
)

MIB = 2**20
LAYERS = 10
ASKED = RuntimeSettings(context=4096, step_tokens=512)
AUTOMATIC = Automatic(context=True, gpu_layers=True)


def predict(settings: RuntimeSettings) -> list[MemoryItem]:
    """1,000 MiB of layers, 100 of output, 100 of embeddings; 100 KiB of KV cache a token, half as much
    in q8_0; 1 MiB of compute for each token of a step; 50 MiB of process. GPU layers count."""
    wanted = LAYERS + 1 if settings.gpu_layers < 0 else settings.gpu_layers
    layers = min(wanted - 1, LAYERS) if wanted else 0
    cell = 100 * 1024 // (2 if settings.kv_type_k == "q8_0" else 1)
    kv = cell * settings.context * settings.sequences
    compute = settings.step_tokens * MIB
    return [
        MemoryItem("weights", (100 + 100 * (LAYERS - layers) + (0 if wanted else 100)) * MIB),
        MemoryItem("weights", (100 * layers + 100 * bool(wanted)) * MIB, "gpu"),
        MemoryItem("kv cache", kv * (LAYERS - layers) // LAYERS),
        MemoryItem("kv cache", kv * layers // LAYERS, "gpu"),
        MemoryItem("compute", compute if layers < LAYERS else 10 * MIB),
        MemoryItem("compute", compute if wanted else 0, "gpu"),
        MemoryItem("process", 50 * MIB),
    ]


def on_processor(settings: RuntimeSettings) -> list[MemoryItem]:
    return [item for item in predict(replace(settings, gpu_layers=0)) if item.num_bytes]


def fit(
    free_mib: int,
    asked: RuntimeSettings = ASKED,
    *,
    automatic: Automatic = AUTOMATIC,
    cache_mib: int = 0,
    gpu_mib: int | None = None,
    **room: Any,
) -> Fit:
    gpu = None if gpu_mib is None else gpu_mib * MIB
    where = Room(free_mib * MIB, 16 * 1024 * MIB, gpu, **room)
    how = on_processor if gpu_mib is None else predict
    return fit_model("model", how, asked, cache_mib * MIB, where, automatic, LAYERS)


# Weights 1,200 + KV 400 + compute 512 + process 50 = 2,162 MiB; with 5 % to spare 2,271.


def test_what_fits_is_left_as_it_was_asked_for() -> None:
    found = fit(2300)
    assert (found.settings, found.warnings) == (ASKED, ())
    assert found.ledger.total() == 2162 * MIB


def test_compute_buffers_are_made_smaller_first() -> None:
    found = fit(2200)
    assert (found.settings.context, found.settings.step_tokens) == (4096, 256)
    (warning,) = found.warnings
    assert "steps of 256 tokens instead of 512" in warning
    assert "2.1 GiB memory is free" in warning
    assert fit(1900).settings.step_tokens == 128
    asked_for = fit(1900, automatic=Automatic())
    assert asked_for.settings.step_tokens == 128


def test_steps_that_were_small_are_not_made_larger() -> None:
    assert fit(9000, replace(ASKED, step_tokens=100)).settings.step_tokens == 100


def test_the_context_is_lowered_in_steps_and_said_with_both_numbers() -> None:
    found = fit(1700)
    context = found.settings.context
    assert 512 <= context < 4096
    assert context % 256 == 0
    assert found.settings.step_tokens == 128
    fits = replace(found.settings, context=context)
    larger = replace(found.settings, context=context + 256)
    assert MemoryLedger(tuple(on_processor(fits))).total() * 1.05 <= 1700 * MIB
    assert MemoryLedger(tuple(on_processor(larger))).total() * 1.05 > 1700 * MIB
    assert f"a context of {context} tokens instead of 4096" in found.warnings[0]


def test_a_context_that_was_asked_for_is_refused_with_the_one_that_would_fit() -> None:
    lowered = fit(1700).settings.context
    with pytest.raises(ModelTooLarge) as refused:
        fit(1700, automatic=Automatic())
    said = str(refused.value)
    assert f"--ctx {lowered}" in said
    assert "--kv-type q8_0 would fit" in said
    fit(1700, replace(ASKED, context=lowered), automatic=Automatic())
    fit(1700, replace(ASKED, kv_type_k="q8_0", kv_type_v="q8_0"), automatic=Automatic())


def test_a_quantized_cache_is_not_advised_where_there_is_one() -> None:
    with pytest.raises(ModelTooLarge) as refused:
        fit(1500, replace(ASKED, kv_type_k="q8_0", kv_type_v="q8_0"), automatic=Automatic())
    assert "q8_0" not in str(refused.value)


def test_the_refusal_is_the_arithmetic() -> None:
    with pytest.raises(ModelTooLarge) as refused:
        fit(900, replace(ASKED, sequences=2))
    said = str(refused.value)
    assert "weights 1.2 GiB + KV cache 800 MiB for 2 x 4096 tokens + compute 128 MiB" in said
    assert "process 50 MiB + 5% to spare) and 900 MiB of 16 GiB memory is free" in said
    assert said.endswith("use a smaller or more strongly quantized model")
    assert said.startswith("model needs 2.2 GiB (")


def test_no_context_too_small_to_talk_in_is_chosen_unasked() -> None:
    with pytest.raises(ModelTooLarge, match=r"; --ctx 256 would fit"):
        fit(1485)


def test_pressure_is_named_where_something_was_lowered_or_refused() -> None:
    pressure = "waited for 40% of the last 10 s"
    assert pressure in fit(1700, pressure=pressure).warnings[0]
    with pytest.raises(ModelTooLarge, match="others press for it"):
        fit(900, pressure=pressure)


# -- the prompt cache ------------------------------------------------------------------------------


def test_the_prompt_cache_gets_what_is_left() -> None:
    assert fit(4000, cache_mib=1024).cache_bytes == 1024 * MIB
    found = fit(2600, cache_mib=1024)
    assert 300 * MIB < found.cache_bytes < 340 * MIB
    assert "instead of 1.0 GiB" in found.warnings[0]
    assert fit(2300, cache_mib=0).warnings == ()


# -- the GPU ---------------------------------------------------------------------------------------

# All of it on the GPU: 1,100 + 400 + 512 = 2,012 MiB and a margin of 256.


@pytest.mark.parametrize(
    ("gpu_mib", "layers"), [(2300, None), (2000, 9), (1500, 5), (1000, 1), (500, 0)]
)
def test_as_many_layers_as_fit_are_on_the_gpu(gpu_mib: int, layers: int | None) -> None:
    found = fit(8000, gpu_mib=gpu_mib)
    assert found.settings.gpu_layers == (-1 if layers is None else layers)
    assert found.ledger.total("gpu") <= gpu_mib * MIB
    if layers is None:
        assert found.warnings == ()
    else:
        assert f"{layers} of {LAYERS + 1} layers of model run on the GPU" in found.warnings[0]
        more = MemoryLedger(tuple(predict(replace(found.settings, gpu_layers=layers + 1))))
        assert more.total("gpu") + 256 * MIB > gpu_mib * MIB


def test_the_machines_own_memory_need_not_hold_what_lies_on_the_gpu() -> None:
    found = fit(300, gpu_mib=3000)
    assert found.settings == ASKED
    with pytest.raises(ModelTooLarge):
        fit(300, gpu_mib=0)


def test_layers_that_were_asked_for_and_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ModelTooLarge, match=r"11 layers of model on the GPU .* --gpu-layers 5 would fit"
    ):
        fit(8000, replace(ASKED, gpu_layers=99), automatic=Automatic(), gpu_mib=1500)
    assert fit(8000, replace(ASKED, gpu_layers=3), automatic=Automatic(), gpu_mib=1500).warnings == ()


def test_a_gpu_that_shares_the_machines_memory_is_counted_there() -> None:
    where = Room(1900 * MIB, 16 * 1024 * MIB, None)
    found = fit_model("model", predict, ASKED, 0, where, AUTOMATIC, LAYERS)
    assert found.settings.gpu_layers == -1
    assert found.ledger.total() * 1.05 <= 1900 * MIB


# -- predicted and real ----------------------------------------------------------------------------


def test_items_are_compared_by_name_device_and_form() -> None:
    ledger = MemoryLedger(
        (
            MemoryItem("weights", 5 * MIB, form="mapped"),
            MemoryItem("weights", 2 * MIB),
            MemoryItem("weights", 1 * MIB),
            MemoryItem("process", 9 * MIB),
        )
    )
    uses = ledger.compared([MemoryItem("weights", 4 * MIB), MemoryItem("scratch", 7 * MIB, "gpu")])
    assert [str(use) for use in uses] == [
        "weights (mapped): 5 MiB predicted",
        "weights: 3 MiB predicted, 4 MiB allocated",
        "process: 9 MiB predicted",
        "scratch (gpu): 7 MiB allocated",
    ]


def test_buffers_of_a_step_that_are_still_untouched_are_no_deviation() -> None:
    ledger = MemoryLedger((MemoryItem("weights", 100 * MIB), MemoryItem("compute", 50 * MIB)))
    for resident in (100, 120, 150):
        assert ledger.deviation(resident * MIB, is_warm=False) == 0
    assert ledger.deviation(120 * MIB) == pytest.approx(-0.2)
    assert ledger.deviation(90 * MIB, is_warm=False) == pytest.approx(-0.1)
    assert ledger.deviation(165 * MIB, is_warm=False) == pytest.approx(0.1)


def test_sizes_are_shown_in_the_unit_that_suits_them() -> None:
    assert [shown_bytes(n * MIB) for n in (0, 900, 2048, 20480)] == [
        "0 MiB",
        "900 MiB",
        "2.0 GiB",
        "20 GiB",
    ]


def kv_fit(free_mib: int, *kinds: str, automatic: Automatic = AUTOMATIC) -> Fit:
    where = Room(free_mib * MIB, 16 * 1024 * MIB)
    return fit_model("model", on_processor, ASKED, 0, where, automatic, LAYERS, kinds)


# With q8_0 it is 200 MiB less: 1,962 MiB, 2,061 with 5 % to spare.


def test_the_first_kv_type_that_fits_is_taken() -> None:
    assert kv_fit(2300, "f16", "q8_0").settings == ASKED
    smaller = kv_fit(2100, "f16", "q8_0")
    assert smaller.settings == replace(ASKED, kv_type_k="q8_0", kv_type_v="q8_0")
    (warning,) = smaller.warnings
    assert warning == (
        "the KV cache of model is q8_0 instead of f16: 200 MiB instead of 400 MiB, as 2.1 GiB memory"
        " is free; --kv-type f16 insists"
    )


def test_a_smaller_kv_type_that_is_preferred_needs_no_warning() -> None:
    for free in (2300, 2100):
        found = kv_fit(free, "q8_0", "f16")
        assert (found.settings.kv_type_v, found.warnings) == ("q8_0", ())


def test_where_no_kv_type_fits_the_smallest_is_lowered_further() -> None:
    found = kv_fit(1550, "f16", "q8_0")
    assert found.settings.kv_type_k == "q8_0"
    assert found.settings.step_tokens == 128
    assert found.settings.context < ASKED.context
    assert "--ctx changes that" in " ".join(found.warnings)  # and no advice to take what is taken
    alone = kv_fit(1550, "f16")
    assert alone.settings.context < found.settings.context
    assert "--ctx or a q8_0 KV cache changes that" in " ".join(alone.warnings)
    with pytest.raises(ModelTooLarge) as caught:
        kv_fit(1550, "f16", "q8_0", automatic=Automatic())
    assert "--kv-type" not in str(caught.value)
