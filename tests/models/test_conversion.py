"""Weights and vocabularies between safetensors and GGUF: every kind of number, every kind of damage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeinfer.errors import ModelFileInvalid, ModelNotFound, UnsupportedModel, UsageError
from edgeinfer_models.conversion.floats import first_bad, from_float32, to_float32
from edgeinfer_models.conversion.model import source_of_folder, source_of_gguf
from edgeinfer_models.conversion.new_file import NewFile
from edgeinfer_models.conversion.packed import packing_of
from edgeinfer_models.conversion.pre_tokenizers import CUTS, cuts_from_hf, name_of
from edgeinfer_models.conversion.sources import SafetensorsSource
from edgeinfer_models.conversion.to_gguf import GgufPlan, write_gguf
from edgeinfer_models.conversion.vocabulary import vocabulary_to_gguf, vocabulary_to_hf
from edgeinfer_models.gguf_header import GgufHeader
from edgeinfer_models.gguf_model import read_gguf_model
from edgeinfer_models.safetensors_header import read_safetensors_folder
from tests.fixtures_gguf import write_tiny_gguf
from tests.fixtures_hf import write_tiny_folder

# -- numbers ---------------------------------------------------------------------------------------


def test_bfloat16_is_the_upper_half_of_float32() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    values = to_float32(bits, "BF16")
    finite = np.isfinite(values)
    assert np.array_equal(from_float32(values, "BF16")[finite], bits[finite])
    assert np.isnan(to_float32(from_float32(np.array([np.nan], np.float32), "BF16"), "BF16")[0])


def test_rounding_to_bfloat16_is_to_nearest_ties_to_even() -> None:
    mx = pytest.importorskip("mlx.core")
    values = np.random.default_rng(1).standard_normal(100_000).astype(np.float32)
    values[:4] = [1.00390625, 1.01171875, -1.00390625, 3.0e38]  # ties, and one near the largest
    expected = np.array(mx.array(values).astype(mx.bfloat16).view(mx.uint16))
    assert np.array_equal(from_float32(values, "BF16"), expected)


def test_the_codes_of_8_bit_floats() -> None:
    codes = {0x00: 0.0, 0x01: 2**-9, 0x07: 7 * 2**-9, 0x08: 2**-6, 0x38: 1.0, 0x3C: 1.5, 0xB8: -1.0}
    codes |= {0x7E: 448.0, 0xFE: -448.0}
    found = to_float32(np.array(list(codes), np.uint8), "F8_E4M3")
    assert found.tolist() == list(codes.values())
    nan = to_float32(np.array([0x7F, 0xFF], np.uint8), "F8_E4M3")
    assert np.isnan(nan).all() and first_bad(nan) == 0


@pytest.mark.parametrize("scales", ["one", "rows", "blocks"])
def test_8_bit_floats_are_read_with_their_scales(tmp_path: Path, scales: str) -> None:
    random = np.random.default_rng(2)
    codes = random.integers(0, 0x7E, (48, 64)).astype(np.uint8)
    by = {"one": np.array(0.5), "rows": random.random((48, 1)), "blocks": random.random((3, 2))}[scales]
    by = by.astype(np.float32)
    tensors = {"w": ("F8_E4M3", codes), "w_scale_inv": ("F32", by), "bare": ("F8_E4M3", codes)}
    write_raw(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text("{}")
    source = SafetensorsSource(read_safetensors_folder(tmp_path))
    spread = by if scales != "blocks" else np.kron(by, np.ones((16, 32), np.float32))
    expected = to_float32(codes, "F8_E4M3") * spread
    assert np.array_equal(source.rows("w", 0, 48), expected)
    assert np.array_equal(source.rows("w", 17, 35), expected[17:35])
    assert sorted(source.names) == ["bare", "w"]
    with pytest.raises(ModelFileInvalid, match="no scales"):
        source.rows("bare", 0, 48)


def write_raw(path: Path, tensors: dict[str, tuple[str, Any]]) -> None:
    header: dict[str, Any] = {}
    data = b""
    for name, (dtype, array) in tensors.items():
        stop = len(data) + array.nbytes
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(data), stop],
        }
        data += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_what_f16_cannot_hold_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "tiny")
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = 70_000.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelFileInvalid, match="70000, which F16 cannot"):
        to_gguf(folder, tmp_path / "out.gguf", "F16")
    assert not (tmp_path / "out.gguf").exists()
    to_gguf(folder, tmp_path / "out.gguf", "BF16")


def to_gguf(folder: Path, path: Path, dtype: str) -> None:
    model = source_of_folder(folder)
    plan = GgufPlan(model.family, model.shape, dtype, model.gguf_metadata())
    write_gguf(path, model.source, plan)


# -- files -----------------------------------------------------------------------------------------


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with pytest.raises(RuntimeError), NewFile(path) as new:
        new.file.write(b"half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with NewFile(path) as new:
        new.file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    with pytest.raises(UsageError, match="--force"):
        NewFile(path)
    with NewFile(path, force=True) as new:
        new.file.write(b"another")
        assert path.read_bytes() == b"whole"
    assert path.read_bytes() == b"another"
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_a_file_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with pytest.raises(UsageError, match="--force"), NewFile(path) as new:
        new.file.write(b"ours")
        path.write_bytes(b"somebody's")
    assert path.read_bytes() == b"somebody's"
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="no unnamed files here")
@pytest.mark.parametrize("place", ["out", "folder/out"])
def test_a_kill_leaves_nothing(tmp_path: Path, place: str) -> None:
    code = f"""
        import sys, time
        from pathlib import Path
        from edgeinfer_models.conversion.new_file import NewFile
        with NewFile(Path({str(tmp_path / place)!r}), within=Path({str(tmp_path)!r})) as new:
            new.file.write(b"x" * 10**6)
            new.file.flush()
            print("writing", flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_made_when_its_file_is_whole(tmp_path: Path) -> None:
    with NewFile(tmp_path / "folder" / "out", within=tmp_path) as new:
        new.file.write(b"whole")
        assert list(tmp_path.iterdir()) == []
    assert (tmp_path / "folder" / "out").read_bytes() == b"whole"


def test_what_a_kill_left_elsewhere_goes_in_time(tmp_path: Path) -> None:
    for name, age in ((".edgeinfer-old.part", 10**6), (".edgeinfer-new.part", 10), ("film.part", 10**6)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with NewFile(tmp_path / "out"):
        pass
    left = sorted(each.name for each in tmp_path.iterdir())
    assert left == [".edgeinfer-new.part", "film.part", "out"]


def test_a_folder_in_f16_is_refused_where_f16_cannot_hold_a_number(tmp_path: Path) -> None:
    from edgeinfer_models.conversion.to_safetensors import write_safetensors
    from tests.fixtures_gguf import write_tiny_gguf

    large = {"output_norm.weight": np.full(64, 7e4, np.float32)}
    model = source_of_gguf(write_tiny_gguf(tmp_path / "t.gguf", tensors=large))
    rules = model.family.rules(model.shape)
    with pytest.raises(ModelFileInvalid, match=r"'model\.norm\.weight' holds 70000, which F16 cannot"):
        write_safetensors(tmp_path / "out", model.source, rules, model.hf_files(), dtype="F16")
    assert not (tmp_path / "out").exists()
    write_safetensors(tmp_path / "out", model.source, rules, model.hf_files(), dtype="BF16")


# -- vocabularies ----------------------------------------------------------------------------------


def test_every_way_to_cut_texts_is_found_again() -> None:
    for name, cuts in CUTS.items():
        definition = {
            "pre_tokenizer": cuts.to_hf(),
            "model": {"ignore_merges": cuts.whole_words},
        }
        assert cuts_from_hf(json.loads(json.dumps(definition))) == cuts, name
        assert CUTS[name_of(cuts)] == cuts


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_a_vocabulary_comes_back_from_gguf(tmp_path: Path, model_type: Any) -> None:
    import tokenizers

    folder = write_tiny_folder(tmp_path / "tiny", model_type=model_type)
    to_gguf(folder, tmp_path / "out.gguf", "F16")
    files = source_of_gguf(tmp_path / "out.gguf").hf_files()
    back = tmp_path / "back"
    back.mkdir()
    for name, text in files.items():
        (back / name).write_text(text)
    one = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    other = tokenizers.Tokenizer.from_file(str(back / "tokenizer.json"))
    for text in ("the other in an", "<|im_start|>user\nÀ la carte<|im_end|>", "日本語 🦙\t  x", ""):
        assert one.encode(text).ids == other.encode(text).ids
        assert one.encode(text, add_special_tokens=False).ids == (
            other.encode(text, add_special_tokens=False).ids
        )
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    assert vocabulary_to_gguf(back, size) == vocabulary_to_gguf(folder, size)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "tiny")
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    with pytest.raises(ModelFileInvalid, match="another model's"):
        vocabulary_to_gguf(folder, size - 100)


def test_a_vocabulary_of_another_model_is_refused_on_the_way_back(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    header = source_of_gguf(path).origin
    assert isinstance(header, GgufHeader)
    rows = header.get_length("tokenizer.ggml.tokens")
    assert rows is not None and vocabulary_to_hf(header, rows)
    with pytest.raises(ModelFileInvalid, match=rf"^tiny\.gguf: has {rows} tokens .* for {rows - 1};"):
        vocabulary_to_hf(header, rows - 1)
    tokens = [f"t{index}" for index in range(rows + 1)]
    kinds = [1] * len(tokens)
    keys = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    other = write_tiny_gguf(
        tmp_path / "other.gguf",
        metadata=keys,
        tensors={"token_embd.weight": np.zeros((rows, 64), np.float16)},
    )
    with pytest.raises(ModelFileInvalid, match=rf"^other\.gguf: its vocabulary has {rows + 1} tokens"):
        source_of_gguf(other)


def test_a_folder_with_sentencepieces_own_file_alone_is_told_what_to_do(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path / "tiny")
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(UnsupportedModel, match=r"^tiny: has a tokenizer\.model .*AutoTokenizer"):
        source_of_folder(folder).gguf_metadata()
    (folder / "tokenizer.model").unlink()
    with pytest.raises(ModelNotFound, match=r"tokenizer\.json: "):
        source_of_folder(folder).gguf_metadata()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "no name for"),
        ({"pre_tokenizer": None}, "no name for"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "type WordPiece"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    folder = write_tiny_folder(tmp_path / "tiny")
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UnsupportedModel, match=said):
        vocabulary_to_gguf(folder, 1000)


@pytest.mark.parametrize(
    "change",
    [
        {"model": None},
        {"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a"]]}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["ab"]}},
        {"added_tokens": [{"id": "x"}]},
        {"added_tokens": 7},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": 7}},
    ],
)
def test_a_damaged_tokenizer_is_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = write_tiny_folder(tmp_path / "tiny")
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelFileInvalid, match=r"^tokenizer\.json: [^\n]+$"):
        vocabulary_to_gguf(folder, 1000)


def test_merges_that_never_happen_are_left_out_and_impossible_ones_refused(tmp_path: Path) -> None:
    from tests.fixtures_gguf import MERGES, write_tiny_gguf

    never = ("Ġan d",)  # nothing makes "Ġan"
    assert set(never) < set(MERGES)
    found = source_of_gguf(write_tiny_gguf(tmp_path / "t.gguf")).hf_files()["tokenizer.json"]
    merges = [" ".join(pair) for pair in json.loads(found)["model"]["merges"]]
    assert merges == [merge for merge in MERGES if merge not in never]
    whole = {"tokenizer.ggml.merges": [*MERGES, "q z"]}
    path = write_tiny_gguf(tmp_path / "impossible.gguf", metadata=whole)
    with pytest.raises(UnsupportedModel, match="its merges make 'qz', which is no token"):
        source_of_gguf(path).hf_files()


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "bitsandbytes"},
        {"quant_method": None},
        {"quant_method": "gptq", "bits": 3},
        {"quant_method": "gptq", "bits": "4"},
        {"quant_method": "awq", "bits": 4, "version": "gemv"},
        {"quant_method": "gptq", "group_size": 0},
    ],
)
def test_weights_packed_in_ways_nobody_knows_are_refused_with_the_reason(
    tmp_path: Path, quantization: dict[str, Any]
) -> None:
    folder = write_tiny_folder(tmp_path / "tiny", config={"quantization_config": quantization})
    with pytest.raises(UnsupportedModel, match="original weights"):
        source_of_folder(folder)


def packed(codes: Any, order: Sequence[int], bits: int) -> Any:
    """Along the last dimension, one by one: entry order[i] of each word at bit i * bits."""
    per = 32 // bits
    words = np.zeros((codes.shape[0], codes.shape[1] // per), np.uint32)
    for column in range(words.shape[1]):
        for place, entry in enumerate(order):
            part = codes[:, column * per + entry].astype(np.uint32)
            words[:, column] |= part << np.uint32(bits * place)
    return words.view(np.int32)


@pytest.mark.parametrize(
    ("method", "bits", "order", "format_name"),
    [
        ("gptq", 4, range(8), "gptq"),
        ("gptq", 4, range(8), "gptq_v2"),
        ("gptq", 8, range(4), "gptq"),
        ("gptq", 2, range(16), "gptq"),
        ("awq", 4, (0, 2, 4, 6, 1, 3, 5, 7), ""),
    ],
)
@pytest.mark.parametrize("shuffled", [False, True])
def test_packed_weights_are_what_their_codes_say(
    tmp_path: Path, method: Any, bits: int, order: Sequence[int], format_name: str, shuffled: bool
) -> None:
    random = np.random.default_rng(bits)
    inputs, outputs, group = 64, 48, 16
    codes = random.integers(0, 2**bits, (inputs, outputs))
    zeros = random.integers(1, 2**bits, (inputs // group, outputs))
    scales = random.random((inputs // group, outputs)).astype(np.float16)
    of = np.arange(inputs, dtype=np.int32) // group
    if shuffled and method == "gptq":  # act-order
        of = random.permutation(of).astype(np.int32)
    expected = (scales[of].astype(np.float32) * (codes - zeros[of])).T
    stored = zeros - 1 if format_name == "gptq" else zeros
    is_gptq = method == "gptq"
    qweight = packed(codes.T, order, bits).T.copy() if is_gptq else packed(codes, order, bits)
    tensors = {
        "a.qweight": ("I32", qweight),
        "a.qzeros": ("I32", packed(stored, order, bits)),
        "a.scales": ("F16", scales),
        "b.weight": ("F16", scales),
    }
    if method == "gptq":
        tensors["a.g_idx"] = ("I32", of)
    write_raw(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text("{}")
    settings = {"quant_method": method, "bits": bits, "group_size": group}
    packing = packing_of({**settings, "checkpoint_format": format_name or "gptq"}, "config.json")
    source = SafetensorsSource(read_safetensors_folder(tmp_path), packing)
    assert sorted(source.names) == ["a.weight", "b.weight"]
    assert source.info("a.weight").shape == (outputs, inputs)
    assert np.array_equal(source.rows("a.weight", 0, outputs), expected)
    assert np.array_equal(source.rows("a.weight", 5, 31), expected[5:31])


@pytest.mark.parametrize("damage", ["zeros", "type", "missing", "groups"])
def test_packed_weights_that_do_not_fit_are_one_line(tmp_path: Path, damage: str) -> None:
    tensors: dict[str, tuple[str, Any]] = {
        "a.qweight": ("I32", np.zeros((8, 16), np.int32)),
        "a.qzeros": ("I32", np.zeros((4, 2), np.int32)),
        "a.scales": ("F16", np.zeros((4, 16), np.float16)),
        "a.g_idx": ("I32", np.full(64, 9 if damage == "groups" else 0, np.int32)),
    }
    if damage == "zeros":
        tensors["a.qzeros"] = ("I32", np.zeros((4, 3), np.int32))
    if damage == "type":
        tensors["a.scales"] = ("I32", np.zeros((4, 16), np.int32))
    if damage == "missing":
        del tensors["a.scales"]
    write_raw(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text("{}")
    packing = packing_of({"quant_method": "gptq", "bits": 4, "group_size": 16}, "config.json")
    with pytest.raises(ModelFileInvalid, match=r"a\.(qzeros|scales|g_idx)"):
        SafetensorsSource(read_safetensors_folder(tmp_path), packing).rows("a.weight", 0, 16)


# -- the starter -----------------------------------------------------------------------------------

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return x ** 2  # squared\n\n\n",
    "Ünïcödé, 日本語, русский, العربية, हिन्दी 🦙🏔️👩‍👩‍👧",
    "1234567890 3.14159 0x7f 1,000,000",
    "   leading\t\ttabs  and trailing   ",
    "it's I'll you've they'd IT'S",
    "<|im_start|>user\nHello<|im_end|>\n<|endoftext|>",
    "\r\n\r\n a\u00a0b\u2003c\u200bd",
)


@pytest.mark.model
def test_the_starters_vocabulary_is_that_of_llama_cpp_in_tokenizers(
    starter: Path, tmp_path: Path
) -> None:
    import tokenizers

    from edgeinfer.backend import RuntimeSettings
    from edgeinfer.registry import get_backend
    from edgeinfer_models.model_files import ModelFiles

    model = source_of_gguf(starter)
    for name, text in model.hf_files().items():
        (tmp_path / name).write_text(text)
    runtime = get_backend("llamacpp").load(
        ModelFiles("starter", (starter,), "gguf"), RuntimeSettings(context=64), lambda _: True
    )
    found = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        expected = runtime.tokenizer.encode(text, add_special=False, parse_special=True)
        assert found.encode(text, add_special_tokens=False).ids == expected, text
    runtime.close()
    again = vocabulary_to_gguf(tmp_path, model.shape.vocab_size)
    header = read_gguf_model(starter)
    for key in ("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.eos_token_id"):
        assert again[key] == header.get(key), key


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_vocabulary_is_that_of_llama_cpp_in_tokenizers(
    tmp_path: Path, prefix: bool
) -> None:
    import tokenizers

    from edgeinfer.backend import RuntimeSettings
    from edgeinfer.registry import get_backend
    from edgeinfer_models.model_files import ModelFiles

    path = write_tiny_gguf(
        tmp_path / "spm.gguf",
        tokenizer="spm",
        metadata={"tokenizer.ggml.add_space_prefix": prefix},
    )
    for name, text in source_of_gguf(path).hf_files().items():
        (tmp_path / name).write_text(text)
    runtime = get_backend("llamacpp").load(
        ModelFiles("spm", (path,), "gguf"), RuntimeSettings(context=64), lambda _: True
    )
    found = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("the other in an", "here", "on the hinter seas", "Ünï 🦙", "a  b\n", "an <unk>on"):
        expected = runtime.tokenizer.encode(text, add_special=False, parse_special=True)
        assert found.encode(text, add_special_tokens=False).ids == expected, text
    runtime.close()
