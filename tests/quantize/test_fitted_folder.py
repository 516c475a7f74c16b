"""Folders whose matrices are fitted to text, of every family: read with what reads any such folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeinfer.errors import UsageError
from edgeinfer.quantize import corrected
from edgeinfer.quantize.calibrated import work_folder
from edgeinfer.quantize.corrected import Correction, correct
from edgeinfer.quantize.finished_tensors import FinishedTensors
from edgeinfer.quantize.fitted_folder import fit_folder, forms_of, method_of_folder, with_finished
from edgeinfer.quantize.folders import FolderOptions, FolderPlan, plan_folder, write
from edgeinfer.quantize.layer_walk import LayerWalk
from edgeinfer_models.conversion.floats import to_float32
from edgeinfer_models.conversion.mlx_folder import MLX_LM_TYPES
from edgeinfer_models.conversion.model import SourceModel, source_of_folder
from tests.fixtures_families import CONFIGS, full, write_folder
from tests.fixtures_hf import write_tiny_folder
from tests.fixtures_layers import TEXTS, TOKENS, any_scales, logits_of, streamed

pytest.importorskip("torch")


def planned(source: SourceModel, out: Path, kind: str, **options: Any) -> FolderPlan:
    return plan_folder(source, out, kind, None, out, FolderOptions(**options))


def values(source: SourceModel, name: str) -> np.ndarray:
    info = source.source.info(name)
    return to_float32(source.source.rows(name, 0, info.shape[0]), info.dtype)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", ["mlx-8bit", "int8"])
def test_a_folder_of_every_family_predicts_as_before(
    config: Mapping[str, Any], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with norms that took awq's factors, experts in one stack, rows that GGUF orders otherwise."""
    monkeypatch.setattr(corrected, "best_scales", any_scales)
    source = source_of_folder(write_folder(tmp_path / "model", {**full(config), "pad_token_id": 0}))
    if kind.startswith("mlx") and source.model_type not in MLX_LM_TYPES:
        pytest.skip("mlx-lm has no class for it")
    before = logits_of(streamed(source), TOKENS)
    plan = planned(source, tmp_path / "out", kind, group=32 if kind == "mlx-8bit" else None)
    forms = forms_of(plan)
    finished = FinishedTensors(tmp_path / "work", {})
    types = {name: form.name for name, form in forms.items()}
    by_name = {form.name: form for form in forms.values()}
    correct(source, types, streamed(source), TEXTS, by_name, finished, Correction(scales=True))
    write(with_finished(plan, forms, finished))
    after = logits_of(streamed(source_of_folder(plan.out)), TOKENS)
    assert np.abs(after - before).mean() < 0.02 * np.abs(before).max()
    packed = source_of_folder(plan.out)
    for rule in source.family.rules(source.shape):
        if rule.gguf in forms:
            kept = finished.blocks(rule.gguf)
            assert kept.shape[0] == len(rule.hf) * rule.shape[0]
            assert {packed.source.info(name).shape for name in rule.hf} == {rule.shape}


def test_what_was_found_is_what_is_read(tmp_path: Path) -> None:
    """Embeddings and head are as without text; the layers' matrices are not."""
    folder = write_tiny_folder(tmp_path / "tiny", hidden=64, feed_forward=128, dtype="float16")
    source = source_of_folder(folder)
    for kind in ("mlx-4bit", "int4"):
        nearest = planned(source, tmp_path / f"{kind}-rtn", kind)
        write(nearest)
        fitted = fit_folder(planned(source, tmp_path / kind, kind), "gptq", None, 2048)
        write(fitted.plan)
        plain, other = source_of_folder(nearest.out), source_of_folder(fitted.plan.out)
        forms = forms_of(nearest)
        for rule in source.family.rules(source.shape):
            for name in rule.hf:
                same = np.array_equal(values(plain, name), values(other, name))
                assert same is (rule.gguf not in forms), name
        assert nearest.num_bytes == fitted.plan.num_bytes
        assert fitted.finished.error("blk.0.attn_q.weight") < 0.02


def test_norms_take_awqs_factors_in_the_folders_float_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corrected, "best_scales", any_scales)
    source = source_of_folder(write_tiny_folder(tmp_path / "tiny", model_type="qwen2"))
    plan = planned(source, tmp_path / "out", "mlx-8bit", group=32, scale_type="bf16")
    write(fit_folder(plan, "awq", None, 2048).plan)
    found = source_of_folder(plan.out)
    for name in ("model.layers.0.input_layernorm.weight", "model.layers.1.self_attn.v_proj.bias"):
        assert found.source.info(name).dtype == "BF16"
        assert not np.allclose(values(found, name), values(source, name), rtol=0.02)
    norm = "model.norm.weight"
    assert np.allclose(values(found, norm), values(source, norm), rtol=0.01)


def test_an_interrupted_folder_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of_folder(write_tiny_folder(tmp_path / "tiny", layers=3))
    whole = planned(source, tmp_path / "whole", "int4")
    write(fit_folder(whole, "awq+gptq", None, 2048).plan)
    plan = planned(source, tmp_path / "cut", "int4")

    def stop(_: str, done: float) -> None:
        if done >= 2 / 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_folder(plan, "awq+gptq", None, 2048, stop)
    assert work_folder(plan.out).is_dir() and not plan.out.exists()
    observed: list[int] = []
    observe = LayerWalk.observe
    monkeypatch.setattr(
        LayerWalk,
        "observe",
        lambda self, layer, *rest: observed.append(layer) or observe(self, layer, *rest),
    )
    again = fit_folder(plan, "awq+gptq", None, 2048)
    assert observed == [2]
    write(again.plan)
    again.finished.remove()
    assert not work_folder(plan.out).exists()
    one, other = (path / "model.safetensors" for path in (whole.out, plan.out))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("kind", "method", "text", "said"),
    [
        ("fp8", "gptq", None, "--method gptq is for whole numbers"),
        ("fp8", "auto", "text", "fp8 is rounded without looking at text; leave it out"),
        ("int8", "auto", "text", "it is for --method gptq"),
        ("int4", "qat", None, "--method qat is for GGUF files; of folders there are rtn, awq, gptq"),
        ("int4", "imatrix", None, "--method imatrix is for GGUF files"),
        ("int4", "rtn", "text", "looks at no text"),
    ],
)
def test_methods_that_a_folder_has_not_are_refused(
    kind: str, method: str, text: str | None, said: str, tmp_path: Path
) -> None:
    source = source_of_folder(write_tiny_folder(tmp_path / "tiny"))
    plan = planned(source, tmp_path / "out", kind)
    with pytest.raises(UsageError, match=said.replace("+", r"\+")):
        method_of_folder(plan, method, None if text is None else Path(text))


def test_what_is_taken_without_being_asked_for(tmp_path: Path) -> None:
    source = source_of_folder(write_tiny_folder(tmp_path / "tiny"))
    found = {
        kind: method_of_folder(planned(source, tmp_path / kind, kind), "auto", None)[0]
        for kind in ("mlx-4bit", "mlx-8bit", "int8", "int4", "fp8")
    }
    fitted = "awq+gptq"
    assert found == {
        "mlx-4bit": fitted, "mlx-8bit": "rtn", "int8": "rtn", "int4": fitted, "fp8": "rtn",
    }  # fmt: skip
    plain = plan_folder(source, tmp_path / "p", "f16", "mlx", tmp_path / "p", FolderOptions())
    assert method_of_folder(plain, "auto", None) == (None, ())
    with pytest.raises(UsageError, match="--method is for weights of fewer bits"):
        method_of_folder(plain, "gptq", None)
