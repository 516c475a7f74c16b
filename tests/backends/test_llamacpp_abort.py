"""When an abort counts: from the first thing that a step does, and for no operation after it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeinfer.backend import Runtime, RuntimeSettings, SequenceStep, Step
from edgeinfer.errors import StepAborted
from edgeinfer.registry import get_backend
from edgeinfer_models.resolve import resolve_model
from tests.fixtures_gguf import write_tiny_gguf

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

SETTINGS = RuntimeSettings(
    context=512, sequences=2, threads=1, threads_batch=1, gpu_layers=0, kv_layout="shared"
)


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    files = resolve_model(str(write_tiny_gguf(tmp_path / "model.gguf", weight_type="Q4_0"))).files
    runtime = get_backend("llamacpp").load(files, SETTINGS, lambda done: True)
    yield runtime
    runtime.close()


def test_an_abort_while_cells_are_moved_ends_the_step(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = runtime.open()
    runtime.forward(Step((SequenceStep(other, (5,) * 10),)))
    sequence = runtime.open()
    prompt = Step((SequenceStep(sequence, (7,) * 100),))
    align = runtime._align  # type: ignore[attr-defined]

    def align_and_abort(of: int, count: int) -> None:
        align(of, count)
        runtime.abort()

    monkeypatch.setattr(runtime, "_align", align_and_abort)
    with pytest.raises(StepAborted):
        runtime.forward(prompt)
    assert (runtime.length(sequence), runtime.length(other)) == (0, 10)
    runtime.check_integrity()

    monkeypatch.setattr(runtime, "_align", align)
    runtime.forward(prompt)
    assert runtime.length(sequence) == 100


def test_an_abort_after_a_step_ends_nothing(runtime: Runtime) -> None:
    sequence = runtime.open()
    runtime.forward(Step((SequenceStep(sequence, (7,) * 100),)))
    runtime.abort()
    other = runtime.open()
    assert len(runtime.embed(other, (5, 6, 7))) == runtime.facts.embedding_size
    runtime.abort()
    runtime.forward(Step((SequenceStep(sequence, (7,)),)))
    assert runtime.length(sequence) == 101
