"""llama.cpp's importance matrices, in both of their forms."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeinfer.errors import EdgeInferError, ModelFileInvalid, UsageError
from edgeinfer_models.conversion.imatrix import Columns, Form, Imatrix, read_imatrix, write_imatrix
from edgeinfer_models.gguf_header import read_gguf_header

FORMS: tuple[Form, ...] = ("gguf", "dat")


def sample() -> Imatrix:
    """A matrix, a stack of three experts of which one saw nothing, and one that nobody used."""
    random = np.random.default_rng(3)

    def columns(matrices: int, width: int, *counts: int) -> Columns:
        sums = random.gamma(2.0, 40.0, (matrices, width)).astype(np.float32)
        sums[np.array(counts) == 0] = 0.0
        return Columns(sums, np.array(counts, np.int64))

    tensors = {
        "blk.0.ffn_up.weight": columns(1, 7, 384),
        "blk.0.ffn_down_exps.weight": columns(3, 4, 300, 0, 84),
        "blk.1.ffn_up.weight": columns(1, 7, 0),
    }
    return Imatrix(tensors, ("wiki.txt", "code.txt"), chunk_size=128, chunk_count=3)


def written(path: Path, imatrix: Imatrix, form: Form) -> Path:
    write_imatrix(path, imatrix, form, force=True)
    return path


def test_the_gguf_form_comes_back_as_it_was(tmp_path: Path) -> None:
    before = sample()
    after = read_imatrix(written(tmp_path / "a.gguf", before, "gguf"))
    assert (after.datasets, after.chunk_size, after.chunk_count) == (before.datasets, 128, 3)
    assert after.tensors.keys() == before.tensors.keys()
    for name, columns in before.tensors.items():
        assert np.array_equal(after.tensors[name].in_sum2, columns.in_sum2)
        assert np.array_equal(after.tensors[name].counts, columns.counts)


def test_the_gguf_form_is_laid_out_as_llama_imatrix_does_it(tmp_path: Path) -> None:
    header = read_gguf_header(written(tmp_path / "a.gguf", sample(), "gguf"))
    assert list(header.types.items()) == [
        ("general.type", "str"),
        ("imatrix.datasets", "[str]"),
        ("imatrix.chunk_count", "u32"),
        ("imatrix.chunk_size", "u32"),
    ]
    assert [(t.name, t.shape, t.type_name) for t in header.tensors][:4] == [
        ("blk.0.ffn_down_exps.weight.in_sum2", (4, 3), "F32"),
        ("blk.0.ffn_down_exps.weight.counts", (1, 3), "F32"),
        ("blk.0.ffn_up.weight.in_sum2", (7,), "F32"),
        ("blk.0.ffn_up.weight.counts", (1,), "F32"),
    ]


def test_the_older_form_holds_the_means_and_leaves_out_what_saw_nothing(tmp_path: Path) -> None:
    before = sample()
    path = written(tmp_path / "a.dat", before, "dat")
    after = read_imatrix(path)
    assert (after.datasets, after.chunk_size, after.chunk_count) == (("code.txt",), 0, 3)
    assert list(after.tensors) == ["blk.0.ffn_down_exps.weight", "blk.0.ffn_up.weight"]
    for name, columns in after.tensors.items():
        expected = before.importance(name)
        assert expected is not None and columns.in_sum2.shape == (1, expected.size)
        found = after.importance(name)
        assert found is not None
        np.testing.assert_allclose(found.ravel(), expected.ravel(), rtol=3e-7)
    again = written(tmp_path / "b.dat", after, "dat")
    assert again.read_bytes() == path.read_bytes()


def test_importance_is_a_mean_in_float32_and_1_where_nothing_was_seen() -> None:
    imatrix = sample()
    name = "blk.0.ffn_down_exps.weight"
    found = imatrix.importance(name)
    assert found is not None and found.dtype == np.float32
    sums = imatrix.tensors[name].in_sum2
    assert np.array_equal(found[0], sums[0] / np.float32(300))
    assert np.array_equal(found[1], np.ones(4, np.float32))
    assert np.array_equal(found[2], sums[2] / np.float32(84))
    assert imatrix.importance("output.weight") is None


def test_chunks_of_none_leave_the_older_forms_numbers_as_they_are(tmp_path: Path) -> None:
    """llama-quantize does so."""
    path = tmp_path / "a.dat"
    path.write_bytes(struct.pack("<ii1sii2f", 1, 1, b"w", 0, 2, 3.0, 5.0))
    found = read_imatrix(path)
    assert found.chunk_count == 0 and found.datasets == ()
    means = found.importance("w")
    assert means is not None and means.tolist() == [[3.0, 5.0]]


def test_counts_are_rounded_as_llama_cpp_does_it(tmp_path: Path) -> None:
    path = written(tmp_path / "a.gguf", sample(), "gguf")
    overwrite(path, "blk.0.ffn_down_exps.weight.counts", np.array([0.4, 0.5, 2.5], np.float32))
    assert read_imatrix(path).tensors["blk.0.ffn_down_exps.weight"].counts.tolist() == [0, 1, 3]


def test_a_file_that_is_there_stays_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"mine")
    with pytest.raises(UsageError, match="--force"):
        write_imatrix(path, sample())
    assert path.read_bytes() == b"mine"


def test_a_name_too_long_for_the_form_leaves_no_file(tmp_path: Path) -> None:
    imatrix = Imatrix({"w" * 60: Columns(np.ones((1, 2), np.float32), np.ones(1, np.int64))})
    with pytest.raises(ModelFileInvalid, match="more than 63 bytes"):
        write_imatrix(tmp_path / "a.gguf", imatrix)
    assert not list(tmp_path.iterdir())
    write_imatrix(tmp_path / "a.dat", imatrix, "dat")


def overwrite(path: Path, tensor_name: str, values: Any) -> None:
    header = read_gguf_header(path)
    tensor = header.tensor(tensor_name)
    assert tensor is not None and tensor.num_bytes == values.nbytes
    with path.open("r+b") as file:
        file.seek(header.data_offset + tensor.offset)
        file.write(values.tobytes())


@pytest.mark.parametrize("number", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize("part", ["in_sum2", "counts"])
def test_a_number_that_is_no_sum_of_squares_is_named(tmp_path: Path, number: float, part: str) -> None:
    path = written(tmp_path / "a.gguf", sample(), "gguf")
    size = 7 if part == "in_sum2" else 1
    overwrite(path, f"blk.1.ffn_up.weight.{part}", np.full(size, number, np.float32))
    with pytest.raises(ModelFileInvalid, match=rf"'blk.1.ffn_up.weight.{part}' holds a number"):
        read_imatrix(path)


def dat(*entries: bytes, count: int | None = None) -> bytes:
    return struct.pack("<i", len(entries) if count is None else count) + b"".join(entries)


def one(name: bytes = b"w.weight", calls: int = 3, width: int = 2, *values: float) -> bytes:
    numbers = values or (1.0, 2.0)
    return struct.pack(f"<i{len(name)}sii{len(numbers)}f", len(name), name, calls, width, *numbers)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "seems to be empty"),
        (b"A text of several lines.\n" * 9, "seems to be a text file"),
        (dat(one(), count=0), "is no importance matrix"),
        (dat(one(), count=-3), "is no importance matrix"),
        (dat(one(), count=2**31 - 1), "is no importance matrix"),
        (dat(one(), one(b"v" * 9), count=3), "take 4 bytes where the file has 0 left"),
        (dat(one(), one()), "has the entry 'w.weight' twice"),
        (dat(one(b"a\0b")), "the name of entry 0 is no text"),
        (dat(one(b"\xff\xfe\xfd")), "the name of entry 0 is no text"),
        (dat(one(b"n" * 64)), "has a name of 64 bytes"),
        (dat(one(calls=-1)), "has 2 columns of -1 chunks"),
        (dat(one(width=0)), "has 0 columns"),
        (dat(one(width=2**30)), "take 4,294,967,296 bytes"),
        (dat(one(b"w.weight", 3, 2, 1.0, float("nan"))), "'w.weight' holds a number"),
        (dat(one(b"w.weight", 3, 2, -1.0, 1.0)), "'w.weight' holds a number"),
        (dat(one()) + struct.pack("<ii", -1, 0), "-1 chunks"),
        (dat(one()) + struct.pack("<ii", 1, 2**30), "the dataset's name has 1,073,741,824 bytes"),
        (dat(one()) + struct.pack("<ii", 1, 0) + b"more", "4 bytes after its end"),
        (dat(one()) + b"ab", "the number of chunks take 4 bytes"),
    ],
)
def test_a_damaged_file_of_the_older_form_is_one_line(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "a.dat"
    path.write_bytes(data)
    with pytest.raises(ModelFileInvalid) as caught:
        read_imatrix(path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_is_no_importance_matrix(tmp_path: Path) -> None:
    from tests.fixtures_gguf import write_tiny_gguf

    path = tmp_path / "model.gguf"
    write_tiny_gguf(path)
    with pytest.raises(ModelFileInvalid, match="is a model and no importance matrix"):
        read_imatrix(path)


def test_missing_parts_of_a_gguf_file_are_named(tmp_path: Path) -> None:
    path = written(tmp_path / "a.gguf", sample(), "gguf")
    data = path.read_bytes()
    for before, after, said in (
        (b"blk.1.ffn_up.weight.counts", b"blk.1.ffn_up.weight.cuonts", "no counts for 'blk.1.ffn_up"),
        (b"imatrix.chunk_size", b"imatrix.chunk_sise", "lacks 'imatrix.chunk_size'"),
        (b"imatrix.datasets", b"imatrix.datasetz", "lacks 'imatrix.datasets'"),
        (b".in_sum2", b".in_sum3", "a GGUF file of something else"),
    ):
        path.write_bytes(data.replace(before, after))
        with pytest.raises(ModelFileInvalid, match=said):
            read_imatrix(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(form=st.sampled_from(FORMS), data=st.data())
def test_any_damage_ends_in_sound_numbers_or_one_line(
    tmp_path: Path, form: Form, data: st.DataObject
) -> None:
    raw = bytearray(written(tmp_path / "sound", sample(), form).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(raw) - 1))
        what = data.draw(st.sampled_from(("byte", "word", "cut", "repeat")))
        if what == "byte":
            raw[place] = data.draw(st.integers(0, 255))
        elif what == "word":
            word = data.draw(st.sampled_from((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 0x7FC00000)))
            raw[place : place + 4] = struct.pack("<I", word)
        elif what == "cut":
            del raw[max(place, 1) :]
        else:
            raw[place:place] = raw[place : place + 16]
    path = tmp_path / "damaged"
    path.write_bytes(raw)
    try:
        found = read_imatrix(path)
    except EdgeInferError as error:
        assert "\n" not in str(error)
        return
    for name in found.tensors:
        means = found.importance(name)
        assert means is not None and np.isfinite(means).all() and (means >= 0).all()
    if all(len(name.encode()) < 56 for name in found.tensors):
        for other in FORMS:
            written(tmp_path / "again", replace(found, chunk_count=1), other)
