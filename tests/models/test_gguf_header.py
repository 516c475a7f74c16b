"""The GGUF reader: right on real files, one clear line on everything else."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import pytest

from edgeinfer.errors import (
    EdgeInferError,
    ModelError,
    ModelFileInvalid,
    ModelNotFound,
    UnsupportedModel,
)
from edgeinfer_models.ggml_types import GGML_TYPES
from edgeinfer_models.gguf_format import GgufArray
from edgeinfer_models.gguf_header import read_gguf_header
from edgeinfer_models.gguf_model import read_gguf_model
from tests.models.raw_gguf import BOOL, F32, I32, STR, U8, U32, array, entry, gguf, string, tensor


def test_our_table_of_tensor_types_equals_that_of_the_gguf_package() -> None:
    import gguf as package

    theirs = {int(t): (t.name, *sizes) for t, sizes in package.GGML_QUANT_SIZES.items()}
    ours = {t.id: (t.name, t.block, t.block_bytes) for t in GGML_TYPES.values()}
    newer = {42: ("Q2_0", 64, 18)}  # in llama.cpp, not yet in gguf 0.19
    assert {**ours, **{k: v for k, v in newer.items() if k not in theirs}} == {**newer, **theirs}


def test_the_header_agrees_with_the_gguf_package(tiny: Path) -> None:
    import gguf as package

    theirs = package.GGUFReader(tiny)
    ours = read_gguf_header(tiny)
    assert {t.name: (t.shape, t.type_name, t.num_bytes) for t in ours.tensors} == {
        t.name: (tuple(int(n) for n in t.shape), t.tensor_type.name, int(t.n_bytes))
        for t in theirs.tensors
    }
    assert [ours.data_offset + t.offset for t in ours.tensors] == [t.data_offset for t in theirs.tensors]
    for key, field in theirs.fields.items():
        if key.startswith("GGUF."):
            continue
        mine = ours.get(key)
        if isinstance(mine, GgufArray):
            mine = mine.read()
        assert mine == pytest.approx(field.contents()), key


def test_long_arrays_stay_in_the_file_until_they_are_read(tiny: Path) -> None:
    tokens = read_gguf_header(tiny).get("tokenizer.ggml.tokens")
    assert isinstance(tokens, GgufArray)
    assert tokens.read()[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def test_short_arrays_and_scalars_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(
        gguf(
            [
                array("a", I32, [-1, 2]),
                array("s", STR, ["x", "é"]),
                entry("b", BOOL, 1),
                entry("f", F32, 0.5),
            ]
        )
    )
    header = read_gguf_header(path)
    assert header.metadata == {"a": [-1, 2], "s": ["x", "é"], "b": True, "f": 0.5}
    assert header.types == {"a": "[i32]", "s": "[str]", "b": "bool", "f": "f32"}
    assert header.get_int("b") == 0, "a truth value is no number"
    assert header.get_length("a") == 2


NOT_GGUF = {
    "empty": (b"", "is empty"),
    "text": (b"hello, this is not a model\n" * 9, "a text file"),
    "html": (b"<!DOCTYPE html><html>404</html>", "a web page"),
    "json": (b'{"a": 1}' * 9, "JSON text"),
    "zip": (b"PK\x03\x04" + bytes(90), "a zip archive or PyTorch checkpoint"),
    "pickle": (b"\x80\x02}q\x00" + bytes(90), "a PyTorch pickle"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer"),
    "safetensors": (struct.pack("<Q", 60) + b'{"a":{"dtype":"F32"}}' + bytes(50), "a safetensors file"),
    "big-endian magic": (b"FUGG" + bytes(90), "big-endian"),
    "old ggml": (b"tjgg"[::-1] + bytes(90), "before GGUF"),
    "zeros": (bytes(4096), "all zeros"),
    "noise": (bytes(range(128, 256)), "unknown data"),
    "magic only": (b"GGUF", "has only 4 bytes"),
    "cut header": (b"GGUF" + struct.pack("<I", 3), "has only 8 bytes"),
}


@pytest.mark.parametrize("name", NOT_GGUF)
def test_a_file_that_is_no_gguf_is_named_for_what_it_seems_to_be(tmp_path: Path, name: str) -> None:
    content, expected = NOT_GGUF[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileInvalid, match=r"^model\.gguf: ") as caught:
        read_gguf_header(path)
    assert expected in str(caught.value)


KEY = entry("general.architecture", STR, "llama")
MALFORMED = {
    "version 1": (gguf(version=1), UnsupportedModel, "version 1"),
    "version 4": (gguf(version=4), UnsupportedModel, "version 4"),
    "version 0": (gguf(version=0), ModelFileInvalid, "version 0"),
    "big-endian": (gguf(version=3 << 24), UnsupportedModel, "big-endian"),
    "terabytes of metadata": (gguf([KEY], num_entries=2**40), ModelFileInvalid, "metadata entries"),
    "terabytes of tensors": (gguf([KEY], num_tensors=2**63), ModelFileInvalid, "tensors in a file"),
    "key past the end": (gguf([struct.pack("<Q", 2**62)]) + bytes(64), ModelFileInvalid, "claims"),
    "value past the end": (
        gguf([string("k") + struct.pack("<IQ", STR, 2**50)]) + bytes(64), ModelFileInvalid, "claims",
    ),
    "array past the end": (
        gguf([array("k", U32, [1], count=2**50)]) + bytes(64), ModelFileInvalid, "claims",
    ),
    "string array past the end": (
        gguf([array("k", STR, [b"a" * 9], count=2) + struct.pack("<Q", 2**60)]) + bytes(64),
        ModelFileInvalid, "'k'",
    ),
    "nested array": (
        gguf([string("k") + struct.pack("<IIQ", 9, 9, 0)]) + bytes(64),
        UnsupportedModel, "array of arrays",
    ),
    "unknown type": (
        gguf([string("k") + struct.pack("<I", 13)]) + bytes(64), ModelFileInvalid, "type 13",
    ),
    "unknown element type": (
        gguf([string("k") + struct.pack("<IIQ", 9, 77, 0)]) + bytes(64), ModelFileInvalid, "type 77",
    ),
    "key twice": (gguf([KEY, KEY]), ModelFileInvalid, "twice"),
    "key not UTF-8": (gguf([entry(b"\xff\xfe", U8, 1)]) + bytes(64), ModelFileInvalid, "not UTF-8"),
    "empty key": (gguf([entry("", U8, 1)]) + bytes(64), ModelFileInvalid, "empty"),
    "alignment 3": (gguf([entry("general.alignment", U32, 3)]), ModelFileInvalid, "power of two"),
    "alignment 0": (gguf([entry("general.alignment", U32, 0)]), ModelFileInvalid, "power of two"),
    "alignment of a wrong type": (
        gguf([entry("general.alignment", I32, 32)]), ModelFileInvalid, "power of two",
    ),
    "no dimensions": (gguf((), [tensor("t", [])], bytes(64)), ModelFileInvalid, "0 dimensions"),
    "five dimensions": (gguf((), [tensor("t", [1] * 5)], bytes(64)), ModelFileInvalid, "5 dimensions"),
    "zero dimension": (gguf((), [tensor("t", [4, 0])], bytes(64)), ModelFileInvalid, "shape"),
    "negative dimension": (gguf((), [tensor("t", [-4])], bytes(64)), ModelFileInvalid, "shape"),
    "overflowing shape": (
        gguf((), [tensor("t", [2**31, 2**31, 2**31])], bytes(64)), ModelFileInvalid, "shape",
    ),
    "terabyte tensor": (gguf((), [tensor("t", [2**40])], bytes(64)), ModelFileInvalid, "are missing"),
    "unknown tensor type": (gguf((), [tensor("t", [4], 99)], bytes(64)), ModelFileInvalid, "type 99"),
    "removed tensor type": (gguf((), [tensor("t", [4], 31)], bytes(64)), UnsupportedModel, "Q4_0_4_4"),
    "row of half a block": (
        gguf((), [tensor("t", [16], 2)], bytes(64)), ModelFileInvalid, "blocks of 32",
    ),
    "unaligned offset": (gguf((), [tensor("t", [4], 0, 4)], bytes(64)), ModelFileInvalid, "offset 4"),
    "overlapping tensors": (
        gguf((), [tensor("a", [64]), tensor("b", [4])], bytes(512)),
        ModelFileInvalid, "256 was expected",
    ),
    "huge offset": (gguf((), [tensor("t", [4], 0, 2**63)], bytes(64)), ModelFileInvalid, "offset"),
    "tensor twice": (
        gguf((), [tensor("t", [8]), tensor("t", [8], 0, 32)], bytes(64)), ModelFileInvalid, "twice",
    ),
    "long tensor name": (gguf((), [tensor("t" * 64, [8])], bytes(64)), ModelFileInvalid, "63 bytes"),
    "tensor name not UTF-8": (gguf((), [tensor(b"\xff", [8])], bytes(64)), ModelFileInvalid, "UTF-8"),
    "truncated data": (gguf((), [tensor("t", [32])], bytes(100)), ModelFileInvalid, "28 of 192 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_header_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content, kind, expected = MALFORMED[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(kind, match=r"^model\.gguf: ") as caught:
        read_gguf_header(path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_truncation_of_a_model_is_refused(tiny: Path, tmp_path: Path) -> None:
    content = tiny.read_bytes()
    path = tmp_path / "cut.gguf"
    for length in [*range(200), *range(200, len(content), 997), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(ModelFileInvalid):
            read_gguf_model(path)


def test_a_cut_off_download_says_how_much_is_missing(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny.read_bytes()[:-1000])
    with pytest.raises(
        ModelFileInvalid, match=r"cut.gguf: 1,000 of 231,\d+ bytes are missing at its end"
    ):
        read_gguf_header(path)


@pytest.mark.parametrize("seed", range(6))
def test_mutated_models_never_escape_as_anything_but_a_model_error(
    tiny: Path, tmp_path: Path, seed: int
) -> None:
    from edgeinfer_models.chat_template import template_of
    from edgeinfer_models.config import config_from_gguf

    content = tiny.read_bytes()
    in_header = read_gguf_header(tiny).data_offset
    chance = random.Random(seed)
    path = tmp_path / "mutated.gguf"
    refused = 0
    for _ in range(60):
        mutated = bytearray(content)
        for _ in range(chance.choice((1, 1, 2, 8))):
            at = chance.randrange(in_header)
            if chance.random() < 0.7:
                mutated[at] = chance.choice((0, 1, 127, 128, 255, mutated[at] ^ 1))
            else:
                mutated[at : at + 8] = chance.choice((0, 1, 2**31, 2**63, 2**64 - 1)).to_bytes(
                    8, "little"
                )
        path.write_bytes(mutated)
        try:
            header = read_gguf_model(path)
            config_from_gguf(header).kv_bytes_per_token("q8_0", "q4_0")
            template_of(header)
        except ModelError as error:
            refused += 1
            assert str(error).startswith("mutated.gguf: ")
    assert refused, "a fuzz run that refuses nothing tests nothing"


def test_paths_that_are_no_regular_file_get_one_line_and_never_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    for path, kind, expected in (
        (tmp_path / "none.gguf", ModelNotFound, "no such file"),
        (tmp_path, ModelFileInvalid, "is a folder"),
        (tmp_path / "pipe.gguf", ModelFileInvalid, "pipe or socket"),
        (Path("/dev/zero"), ModelFileInvalid, "a device"),
        (tmp_path / ("x" * 300), ModelFileInvalid, "too long"),
    ):
        with pytest.raises(kind, match=expected):
            read_gguf_header(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_says_so(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "secret.gguf"
    path.write_bytes(tiny.read_bytes())
    path.chmod(0)
    with pytest.raises(EdgeInferError, match="permission denied"):
        read_gguf_header(path)


def test_the_reader_loads_neither_numpy_nor_gguf(tiny: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; from edgeinfer_models.gguf_model import read_gguf_model;"
        "read_gguf_model(Path(sys.argv[1]));"
        "print([m for m in ('numpy', 'gguf', 'jinja2', 'safetensors', 'platformdirs') if m in"
        " sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.model
def test_the_starter_is_read_as_published(starter_model: Path) -> None:
    header = read_gguf_model(starter_model)
    assert (header.architecture, len(header.tensors), header.weights_bytes) == ("llama", 272, 96_576_768)
