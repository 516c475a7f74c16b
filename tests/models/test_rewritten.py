"""A GGUF file with its tensors in other types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeinfer.backend import RuntimeSettings, SequenceStep, Step
from edgeinfer.errors import ModelFileInvalid, UsageError
from edgeinfer.quantize.quantization import opened, plan_quantization, quantize
from edgeinfer.registry import get_backend
from edgeinfer_models.gguf_header import read_gguf_header
from edgeinfer_models.model_files import ModelFiles
from tests.fixtures_families import CONFIGS, converted, full, write_folder
from tests.fixtures_hf import write_tiny_folder


def quantized(source: Path, type_name: str, out: Path, **how: Any) -> Path:
    plan = plan_quantization(opened(source), source, type_name, out, force=how.pop("force", False))
    quantize(plan, **how)
    assert out.stat().st_size > plan.num_bytes
    return out


def dequantized(path: Path) -> dict[str, Any]:
    """By the gguf library: another reader than the one that wrote."""
    import gguf

    reader = gguf.GGUFReader(path)
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


@pytest.mark.parametrize(
    ("type_name", "most"), [("q8_0", 0.01), ("q5_1", 0.05), ("q4_0", 0.1), ("iq4_nl", 0.09)]
)
@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_every_tensor_means_what_it_meant_but_for_rounding(
    tmp_path: Path, type_name: str, most: float, form: str
) -> None:
    config = full(CONFIGS["llama"])
    source = write_folder(tmp_path / "model", config)
    path = converted(source, config, "F32")
    if form == "folder":
        source = write_tiny_folder(tmp_path / "tiny")
        from edgeinfer.quantize.conversion import convert, plan_conversion

        path = tmp_path / "tiny-f32.gguf"
        model = opened(source)
        convert(plan_conversion(model, source, "gguf", "f32", path, force=False))  # type: ignore[arg-type]
    out = quantized(source if form == "folder" else path, type_name, tmp_path / "out.gguf")
    before, after = dequantized(path), dequantized(out)
    assert before.keys() == after.keys()
    for name, values in before.items():
        off = float(np.sqrt(((after[name] - values) ** 2).mean() / (values**2).mean()))
        is_kept = values.ndim == 1
        assert (off == 0.0) if is_kept else (0.0 < off < most), name


def test_metadata_stay_byte_for_byte_but_for_the_type(tmp_path: Path) -> None:
    config = full(CONFIGS["qwen3"])
    path = converted(write_folder(tmp_path / "model", config), config, "F16")
    before = read_gguf_header(path)
    after = read_gguf_header(quantized(path, "q4_0", tmp_path / "out.gguf"))
    changed = ("general.file_type", "general.quantization_version")
    for key, value in before.metadata.items():
        if key not in changed:
            read = value.read() if hasattr(value, "read") else value
            found = after.metadata[key]
            assert (found.read() if hasattr(found, "read") else found) == read, key
            assert after.types[key] == before.types[key]
    assert (after.get_int("general.file_type"), after.get_int("general.quantization_version")) == (2, 2)
    # Room for what it cost, which is not measured here.
    assert not after.get_str("edgeinfer.quantize.report").strip()
    assert set(after.metadata) == {*before.metadata, *changed, "edgeinfer.quantize.report"}


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen2_moe", "gemma3", "phi3", "granite"])
def test_a_quantized_file_predicts_nearly_what_the_original_does(name: str, tmp_path: Path) -> None:
    config = full(CONFIGS[name])
    path = converted(write_folder(tmp_path / "model", config), config, "F16")
    out = quantized(path, "q8_0", tmp_path / "out.gguf")
    logits = []
    for each in (path, out):
        settings = RuntimeSettings(context=128, threads=1, threads_batch=1)
        runtime = get_backend("llamacpp").load(
            ModelFiles("tiny", (each,), "gguf"), settings, lambda _: True
        )
        result = runtime.forward(Step([SequenceStep(runtime.open(), list(range(5, 45)), "last")]))
        logits.append(runtime.logits(result.starts[0]).copy())
        runtime.close()
    assert 0.0 < np.abs(logits[0] - logits[1]).max() < 0.15


def test_a_number_that_is_not_finite_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    config = full(CONFIGS["llama"])
    folder = write_folder(tmp_path / "model", config)
    path = converted(folder, config, "F32")
    header = read_gguf_header(path)
    tensor = header.tensor("blk.1.ffn_up.weight")
    assert tensor is not None
    with path.open("r+b") as file:
        file.seek(header.data_offset + tensor.offset + 4 * (3 * 64 + 5))
        file.write(np.float32(np.nan).tobytes())
    with pytest.raises(ModelFileInvalid, match=r"'blk.1.ffn_up.weight' holds NaN \(row 3, column 5\)"):
        quantized(path, "q4_0", tmp_path / "out.gguf")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][2, 1] = np.inf
    save_file(tensors, folder / "model.safetensors")
    for file_name in ("tokenizer.json", "tokenizer_config.json"):
        tiny = write_tiny_folder(tmp_path / f"tiny-{file_name}")
        (folder / file_name).write_text((tiny / file_name).read_text())
    with pytest.raises(ModelFileInvalid, match=r"mlp.up_proj.weight' holds an infinite number"):
        quantized(folder, "q4_0", tmp_path / "out.gguf")
    assert not list(tmp_path.glob("*out*"))


def test_a_file_that_is_there_stays_unless_forced(tmp_path: Path) -> None:
    config = full(CONFIGS["llama"])
    path = converted(write_folder(tmp_path / "model", config), config, "F32")
    out = tmp_path / "out.gguf"
    out.write_bytes(b"mine")
    with pytest.raises(UsageError, match="--force"):
        plan = plan_quantization(opened(path), path, "q4_0", out, force=False)
        quantize(plan)
    assert out.read_bytes() == b"mine"
    quantized(path, "q4_0", out, force=True)


def test_weights_that_are_quantized_already_are_said_to_lose_more(tmp_path: Path) -> None:
    config = full(CONFIGS["llama"])
    path = converted(write_folder(tmp_path / "model", config), config, "F32")
    assert plan_quantization(opened(path), path, "q4_0", None, force=False).notes == ()
    small = quantized(path, "q8_0", tmp_path / "small.gguf")
    (note,) = plan_quantization(opened(small), small, "q4_0", None, force=False).notes
    assert "quantized already (Q8_0)" in note


def test_progress_rises_to_one_and_may_end_it(tmp_path: Path) -> None:
    config = full(CONFIGS["llama"])
    path = converted(write_folder(tmp_path / "model", config), config, "F32")
    seen: list[float] = []
    quantized(path, "q4_0", tmp_path / "out.gguf", progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == 1.0

    def stop(_: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantized(path, "q4_0", tmp_path / "other.gguf", progress=stop)
    assert not list(tmp_path.glob("*other*"))


def test_experts_are_weighed_each_by_its_own_importance(tmp_path: Path) -> None:
    """In both forms of file, and from both forms of model: a part may hold rows of several."""
    from edgeinfer.quantize.importance import named_imatrix
    from edgeinfer_models.conversion.imatrix import Columns, Imatrix, write_imatrix

    config = full(CONFIGS["mixtral"])
    folder = write_folder(tmp_path / "model", config)
    path = converted(folder, config, "F32")
    name = "blk.1.ffn_up_exps.weight"
    random = np.random.default_rng(5)
    sums = random.gamma(0.5, 300.0, (4, 64)).astype(np.float32)
    counts = np.array([128, 64, 0, 32])
    imatrix = Imatrix({name: Columns(sums, counts)}, ("text",), chunk_size=128, chunk_count=1)
    write_imatrix(tmp_path / "new", imatrix)
    write_imatrix(tmp_path / "old", imatrix, "dat")
    source = opened(path)
    rows = next(t for t in source.tensors if t.name == name)  # type: ignore[union-attr]
    values = np.fromfile(path, "<f4", rows.elements, offset=source.data_offset + rows.offset)  # type: ignore[union-attr]
    rounder = get_backend("llamacpp").row_quantizer(1)
    weights = imatrix.importance(name)
    assert weights is not None and (weights[2] == 1.0).all()
    expected = np.concatenate(
        [
            rounder.quantize("Q5_1", matrix, columns)
            for matrix, columns in zip(values.reshape(4, -1, 64), weights, strict=True)
        ]
    )
    rounder.close()
    for form in ("new", "old"):
        out = tmp_path / f"{form}.gguf"
        named = named_imatrix(tmp_path / form)
        quantize(plan_quantization(source, path, "q5_1", out, force=False, imatrix=named))
        header = read_gguf_header(out)
        tensor = header.tensor(name)
        assert tensor is not None and tensor.num_bytes == expected.size
        found = np.fromfile(out, np.uint8, expected.size, offset=header.data_offset + tensor.offset)
        if form == "new":
            assert np.array_equal(found, expected.ravel())
        else:  # its means were rounded once more
            assert (found != expected.ravel()).mean() < 0.01


def test_an_encoder_is_told_which_rows_it_gets(tmp_path: Path) -> None:
    """One that takes their blocks from elsewhere can rely on it, experts included."""
    config = full({**CONFIGS["mixtral"], "hidden_size": 256, "intermediate_size": 1600})
    folder = write_folder(tmp_path / "model", config)
    path = converted(folder, config, "F16")
    for tokenizer in ("tokenizer.json", "tokenizer_config.json"):
        tiny = write_tiny_folder(tmp_path / f"tiny-{tokenizer}")
        (folder / tokenizer).write_text((tiny / tokenizer).read_text())
    plain = quantized(path, "q8_0", tmp_path / "plain.gguf")
    header = read_gguf_header(plain)
    data = plain.read_bytes()
    seen: set[tuple[str, int]] = set()

    def stored(name: str, type_name: str, rows: Any, first_row: int) -> Any:
        seen.add((name, first_row))
        tensor = header.tensor(name)
        assert tensor is not None and tensor.type_name == type_name
        width = tensor.num_bytes * tensor.shape[0] // tensor.elements
        begin = header.data_offset + tensor.offset + first_row * width
        found = np.frombuffer(data[begin : begin + len(rows) * width], np.uint8)
        return found.reshape(len(rows), width)

    again = quantized(path, "q8_0", tmp_path / "again.gguf", encode=stored)
    assert again.read_bytes() == data
    name = "blk.0.ffn_up_exps.weight"
    firsts = sorted(row for found, row in seen if found == name)
    assert firsts[0] == 0 and firsts[1] % 1600, "a part ends within a matrix"


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_no_byte(tmp_path: Path, threads: int) -> None:
    config = full({**CONFIGS["llama"], "hidden_size": 256, "intermediate_size": 2304})
    path = converted(write_folder(tmp_path / "model", config), config, "F16")
    one = quantized(path, "q4_0", tmp_path / "one.gguf", threads=2)
    other = quantized(path, "q4_0", tmp_path / "other.gguf", threads=threads)
    assert one.read_bytes() == other.read_bytes()


def test_the_first_error_in_the_file_is_told_whichever_thread_comes_first(tmp_path: Path) -> None:
    config = full({**CONFIGS["llama"], "hidden_size": 256, "intermediate_size": 2304})
    path = converted(write_folder(tmp_path / "model", config), config, "F16")

    def failing(name: str, type_name: str, rows: Any, first_row: int) -> Any:
        raise ModelFileInvalid(f"{name} {first_row}")

    with pytest.raises(ModelFileInvalid, match=r"token_embd.weight 0"):
        quantized(path, "q4_0", tmp_path / "out.gguf", encode=failing)
    assert not list(tmp_path.glob("*out*"))
