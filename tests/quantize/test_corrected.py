"""Whole models, layer by layer onto their types' grids: of every family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgeinfer.backend import RowQuantizer
from edgeinfer.errors import UsageError
from edgeinfer.quantize import corrected
from edgeinfer.quantize.calibrated import stored_of
from edgeinfer.quantize.corrected import Correction, correct
from edgeinfer.quantize.finished_tensors import FinishedTensors
from edgeinfer.quantize.forms import ggml_forms
from edgeinfer.quantize.layer_walk import LayerWalk
from edgeinfer.quantize.scaling import links_of
from edgeinfer.registry import get_backend
from edgeinfer_models.conversion.model import SourceModel, source_of_folder
from edgeinfer_models.conversion.to_gguf import GgufPlan, write_gguf
from edgeinfer_models.families.shape import DecoderShape
from tests.fixtures_families import CONFIGS, VOCAB, full, llama_cpp_logits, write_folder
from tests.fixtures_gguf import tiny_vocabulary
from tests.fixtures_layers import TEXTS, TOKENS, any_scales, logits_of, streamed

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def rows() -> Iterator[RowQuantizer]:
    found = get_backend("llamacpp").row_quantizer(1)
    yield found
    found.close()


def types_of(source: SourceModel, kind: str) -> dict[str, str | None]:
    return {
        rule.gguf: kind
        if rule.layer >= 0 and len(rule.shape) == 2 and not rule.gguf.endswith("gate_inp.weight")
        else None
        for rule in source.family.rules(source.shape)
        if not rule.gguf.endswith("gate_inp_shexp.weight")
    }


def written(
    folder: Path, source: SourceModel, types: Mapping[str, str | None], finished: FinishedTensors
) -> Path:
    path = folder / "corrected.gguf"
    metadata = {"general.name": "tiny", **tiny_vocabulary(VOCAB)}
    plan = GgufPlan(source.family, source.shape, "F32", metadata, types=types)
    stored = {
        rule.gguf: finished.blocks(rule.gguf)
        for rule in source.family.rules(source.shape)
        if rule.gguf in finished
    }
    write_gguf(path, source.source, plan, stored=stored, force=True)
    return path


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("scales", [False, True], ids=["gptq", "awq+gptq"])
def test_a_model_of_every_family_predicts_as_before(
    config: Mapping[str, Any],
    scales: bool,
    tmp_path: Path,
    rows: RowQuantizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(corrected, "best_scales", any_scales)
    source = source_of_folder(write_folder(tmp_path / "model", {**full(config), "pad_token_id": 0}))
    layers = streamed(source)
    before = logits_of(layers, TOKENS)
    types = types_of(source, "Q8_0")
    finished = FinishedTensors(tmp_path / "work", {})
    done: list[float] = []
    forms = ggml_forms(types.values(), rows)
    correct(source, types, layers, TEXTS, forms, finished, Correction(scales=scales), done.append)
    assert done[-1] == 1.0 and done == sorted(done)
    path = written(tmp_path, source, types, finished)
    after = llama_cpp_logits(path, TOKENS)
    assert np.abs(after - before).mean() < 0.02 * np.abs(before).max()
    rounded = {name for name, kind in types.items() if kind}
    assert all(0 < finished.error(name) < 1e-3 for name in rounded)
    if scales and links_of(source.shape)[0]:
        assert any(name.startswith("columns of") for name in finished.names)


def test_what_is_finished_is_not_done_again(
    tmp_path: Path, rows: RowQuantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of_folder(write_folder(tmp_path / "model", full(CONFIGS["qwen2"])))
    types = types_of(source, "Q4_0")
    how = Correction(scales=True)

    def run(folder: str, job: Mapping[str, Any], stop_after: int | None = None) -> FinishedTensors:
        finished = FinishedTensors(tmp_path / folder, job)

        def progress(done: float) -> None:
            if stop_after is not None and done >= stop_after / source.shape.num_layers:
                raise KeyboardInterrupt

        forms = ggml_forms(types.values(), rows)
        correct(source, types, streamed(source), TEXTS, forms, finished, how, progress)
        return finished

    whole = run("whole", {"job": 1})
    with pytest.raises(KeyboardInterrupt):
        run("cut", {"job": 1}, stop_after=2)
    observed: list[int] = []
    observe = LayerWalk.observe
    monkeypatch.setattr(
        LayerWalk,
        "observe",
        lambda self, layer, *rest: observed.append(layer) or observe(self, layer, *rest),
    )
    again = run("cut", {"job": 1})
    assert observed == [2]
    for name in types:
        if types[name]:
            assert np.array_equal(whole.blocks(name), again.blocks(name)), name
    observed.clear()
    run("cut", {"job": 2})  # another job: nothing of it is taken
    assert observed == [0, 1, 2]


def test_damaged_work_is_made_anew(tmp_path: Path) -> None:
    finished = FinishedTensors(tmp_path / "work", {"a": 1})
    for number in range(3):
        finished.keep(f"tensor {number}", np.full((2, 8), number, np.uint8), 0.5)
    (tmp_path / "work" / "1.blocks").write_bytes(b"other")
    again = FinishedTensors(tmp_path / "work", {"a": 1})
    assert "tensor 0" in again and "tensor 1" not in again and "tensor 2" not in again
    again.keep("tensor 0", np.zeros((1, 4), np.uint8), 0.25)
    assert again.blocks("tensor 0").shape == (1, 4)
    assert FinishedTensors(tmp_path / "work", {"a": 1}).error("tensor 0") == 0.25
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    with pytest.raises(UsageError, match="not made by edgeinfer"):
        FinishedTensors(tmp_path / "other", {})
    assert (tmp_path / "other" / "mine.txt").is_file()


def test_norms_that_awq_changed_come_in_the_type_that_the_file_has_them_in(tmp_path: Path) -> None:
    finished = FinishedTensors(tmp_path / "work", {})
    values = np.array([0.5, -2.0, 1.25], np.float32)
    finished.keep("norm", values.view(np.uint8).reshape(1, -1), 0.0)
    for kind, dtype in (("F32", np.float32), ("F16", np.float16)):
        plan: Any = SimpleNamespace(types={"norm": kind, "other": "Q4_0"})
        stored = stored_of(finished, plan)
        assert list(stored) == ["norm"]
        assert np.array_equal(stored["norm"].reshape(-1).view(dtype), values.astype(dtype))


def test_what_awq_cannot_scale_is_said(tmp_path: Path) -> None:
    def shape(name: str) -> DecoderShape:
        folder = write_folder(
            tmp_path / f"{name} {len(list(tmp_path.iterdir()))}",
            {**full(CONFIGS[name]), "pad_token_id": 0},
        )
        return source_of_folder(folder).shape

    assert links_of(shape("llama"))[1] == []
    assert len(links_of(shape("llama"))[0]) == 4
    assert "no norm" in links_of(shape("olmo2"))[1][0]
    assert "router" in links_of(shape("qwen3_moe"))[1][0]
