"""Models of random weights in the shapes people run: `python -m benchmarks.shapes 1b`.

Speed depends on a model's shape and tensor types, not on what its weights say, and the real ones cannot
be shipped. The files have the types that `llama-quantize … q4_0` gives such a model: matrices in Q4_0,
the output (or the embeddings, where they are shared) in Q6_K, norms in F32. Blocks are drawn directly:
the 8B file takes as long as its 4.7 GB take to write, and no more memory than its largest tensor.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers import PeerError
from scripts.wheel_cache import cache_folder, exclusive

# Part of the file's name: another number makes everybody's files anew.
GENERATION = 1
SEED = 1
# Left on the disk beside the file.
_SPARE_BYTES = 1 << 30

Progress = Callable[[int, int], None]  # (bytes written, bytes in all)


@dataclass(frozen=True)
class Shape:
    """A model of the Llama architecture. `hidden` is a multiple of 256, for Q6_K."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocab_size: int
    context: int
    tied: bool  # the output is the embeddings

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


@dataclass(frozen=True)
class Tensor:
    """shape: (rows, columns), or (columns,) of a norm. std: of its weights."""

    name: str
    shape: tuple[int, ...]
    type_name: str  # Q4_0, Q6_K or F32
    std: float

    @property
    def elements(self) -> int:
        return self.shape[0] * (self.shape[1] if len(self.shape) > 1 else 1)

    @property
    def num_bytes(self) -> int:
        from edgeinfer_models.ggml_types import row_bytes

        return row_bytes(self.type_name, self.elements)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("1b", 2048, 16, 32, 8, 8192, 128_256, 131_072, tied=True),  # Llama 3.2 1B
        Shape("8b", 4096, 32, 32, 8, 14_336, 128_256, 8192, tied=False),  # Llama 3 8B
        Shape("tiny", 256, 2, 4, 2, 512, 49_408, 2048, tied=True),  # for tests
    )
}


def shape_file(name: str, progress: Progress | None = None) -> Path:
    """The file of one of SHAPES in the cache folder, made now if it never was.

    Raises KeyError for another name, PeerError where the disk has no room.
    """
    shape = SHAPES[name]
    folder = cache_folder() / "benchmark-models"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"shape-{name}-q4_0-seed{SEED}-g{GENERATION}.gguf"
    with exclusive(target.with_suffix(".lock"), lambda: _say(f"waiting for {target.name}")):
        if not target.exists():
            from benchmarks.model_files import starter

            write_shape(target, shape, starter(), progress=progress or _show_progress(target.name))
    return target


def write_shape(
    path: Path,
    shape: Shape,
    vocabulary: Path,
    *,
    seed: int = SEED,
    progress: Progress | None = None,
) -> None:
    """Write a model of random weights, whole or not at all.

    vocabulary: a GGUF file whose tokenizer it gets, padded with tokens that no text gives. The same
    arguments give the same bytes. Raises PeerError if the disk has no room for it or the vocabulary is
    larger than the shape's; OSError.
    """
    import numpy as np

    tensors = list(tensors_of(shape))
    total = sum(tensor.num_bytes for tensor in tensors)
    free = shutil.disk_usage(path.parent).free
    if free < total + _SPARE_BYTES:
        raise PeerError(
            f"{path.parent}: {free / 1e9:.1f} GB are free, and the {shape.name} shape takes"
            f" {total / 1e9:.1f} GB and leaves {_SPARE_BYTES / 1e9:.0f};"
            " make room, or set XDG_CACHE_HOME"
        )
    random = np.random.Generator(np.random.SFC64(seed))
    with _replacing(path) as partial:
        writer = _open_writer(partial, shape, vocabulary, tensors)
        try:
            done = 0
            for tensor in tensors:
                writer.write_tensor_data(_drawn(tensor, random))
                done += tensor.num_bytes
                if progress is not None:
                    progress(done, total)
        finally:
            writer.close()


def tensors_of(shape: Shape) -> Iterator[Tensor]:
    """In the order of the file.

    Weights have the size that keeps activations near 1 and the residual stream from growing with depth,
    as in a trained model; logits then spread by about 2.
    """
    hidden, wide = shape.hidden, shape.feed_forward
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    out_std = 2 / hidden**0.5
    yield Tensor(
        "token_embd.weight", (shape.vocab_size, hidden), "Q6_K" if shape.tied else "Q4_0", out_std
    )
    added = 1 / (2 * shape.layers) ** 0.5
    for layer in range(shape.layers):
        for name, rows, columns, gain in (
            ("attn_norm", 0, hidden, 1.0),
            ("attn_q", q, hidden, 1.0),
            ("attn_k", kv, hidden, 1.0),
            ("attn_v", kv, hidden, 1.0),
            ("attn_output", hidden, q, added),
            ("ffn_norm", 0, hidden, 1.0),
            ("ffn_gate", wide, hidden, 1.0),
            ("ffn_up", wide, hidden, 1.0),
            ("ffn_down", hidden, wide, added),
        ):
            full = f"blk.{layer}.{name}.weight"
            if rows:
                yield Tensor(full, (rows, columns), "Q4_0", gain / columns**0.5)
            else:
                yield Tensor(full, (columns,), "F32", 0.1)
    yield Tensor("output_norm.weight", (hidden,), "F32", 0.1)
    if not shape.tied:
        yield Tensor("output.weight", (shape.vocab_size, hidden), "Q6_K", out_std)


def _drawn(tensor: Tensor, random: Any) -> Any:
    """The tensor's bytes, shape (bytes,) of uint8; F32 as (columns,) of float32."""
    import numpy as np

    if tensor.type_name == "F32":
        return (1 + tensor.std * random.standard_normal(tensor.shape)).astype(np.float32)
    blocks = {"Q4_0": _q4_0, "Q6_K": _q6_k}[tensor.type_name]
    drawn = blocks(tensor.elements, tensor.std, random)
    return drawn.reshape(-1)


def _q4_0(elements: int, std: float, random: Any) -> Any:
    """struct block_q4_0 { ggml_half d; uint8_t qs[16]; }: 32 weights d * (q - 8).
    Source: ggml-common.h of llama.cpp as packaged in llama-cpp-python 0.3.36."""
    import numpy as np

    blocks = _bytes(elements // 32, 18, random)
    # q is uniform over 0..15: q - 8 has the mean -0.5, which a d of either sign takes away.
    size = std / (256 / 12) ** 0.5
    d = _either_sign(np.full(len(blocks), size, np.float16), random)
    blocks[:, :2] = d.view(np.uint8).reshape(-1, 2)
    return blocks


def _q6_k(elements: int, std: float, random: Any) -> Any:
    """struct block_q6_K { uint8_t ql[128]; uint8_t qh[64]; int8_t scales[16]; ggml_half d; }: 256
    weights d * scale * (q - 32), each scale for 16 of them. Source: as above."""
    import numpy as np

    blocks = _bytes(elements // 256, 210, random)
    # From 16 to 31 and not to 127: so d stays a normal half where weights are small.
    scales = (blocks[:, 192:208] & 15 | 16).view(np.int8)
    rms = float(np.sqrt(np.mean(np.arange(16, 32) ** 2)))
    size = std / (rms * (4096 / 12) ** 0.5)
    d = _either_sign(np.full(len(blocks), size, np.float16), random)
    blocks[:, 192:208] = scales.view(np.uint8)
    blocks[:, 208:210] = d.view(np.uint8).reshape(-1, 2)
    return blocks


def _bytes(rows: int, columns: int, random: Any) -> Any:
    """Random bytes, shape (rows, columns), drawn eight at a time: singly takes far longer."""
    import numpy as np

    words = -(-rows * columns // 8)
    drawn = random.integers(0, 2**64, words, dtype=np.uint64)
    return drawn.view(np.uint8)[: rows * columns].reshape(rows, columns)


def _either_sign(halves: Any, random: Any) -> Any:
    import numpy as np

    return halves * (1 - 2 * random.integers(0, 2, len(halves), dtype=np.int8)).astype(np.float16)


def _open_writer(path: Path, shape: Shape, vocabulary: Path, tensors: list[Tensor]) -> Any:
    """A GGUFWriter with everything but the tensors' data in the file."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.add_name(f"Random {shape.name}")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500_000.0)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_vocab_size(shape.vocab_size)
    _add_vocabulary(writer, shape.vocab_size, vocabulary)
    for tensor in tensors:
        if tensor.type_name == "F32":
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes)
        else:
            kind = gguf.GGMLQuantizationType[tensor.type_name]
            # Not uint8: the writer would take the shape for one in bytes.
            row = np.dtype(np.int8)
            writer.add_tensor_info(tensor.name, tensor.shape, row, tensor.num_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def _add_vocabulary(writer: Any, size: int, vocabulary: Path) -> None:
    """The tokenizer and chat template of another file, with tokens added up to `size`."""
    from edgeinfer_models.gguf_header import read_gguf_header

    header = read_gguf_header(vocabulary)
    tokens = header.get_list("tokenizer.ggml.tokens") or []
    missing = size - len(tokens)
    if missing < 0:
        raise PeerError(f"{vocabulary.name}: its {len(tokens)} tokens are more than the shape's {size}")
    # Normal tokens, though no merge makes them: sampled, they give text; special ones would be looked
    # for in every prompt.
    padding: dict[str, list[Any]] = {
        "tokenizer.ggml.tokens": [f"<unused{number}>" for number in range(missing)],
        "tokenizer.ggml.token_type": [1] * missing,
        "tokenizer.ggml.scores": [0.0] * missing,
    }
    for key in header.metadata:
        if not key.startswith("tokenizer."):
            continue
        values = header.get_list(key)
        if values is not None:
            writer.add_array(key, values + padding.get(key, []))
            continue
        value = header.get(key)
        kind = header.types[key]
        if kind == "str":
            writer.add_string(key, value)
        elif kind == "bool":
            writer.add_bool(key, value)
        elif kind == "u32":
            writer.add_uint32(key, value)
        else:
            raise PeerError(f"{vocabulary.name}: '{key}' has the type {kind}, which is not copied")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place at the end, and is removed if that does not come."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _show_progress(name: str) -> Progress:
    """A line on stderr each five seconds: also a log file is to be readable."""
    started = told = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= 5 or done == total:
            told = now
            _say(f"{name}: {done / 1e9:.1f} of {total / 1e9:.1f} GB, {now - started:.0f} s")

    return show


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shapes", description=__doc__)
    parser.add_argument("shape", nargs="+", choices=sorted(SHAPES))
    try:
        for name in parser.parse_args().shape:
            print(shape_file(name), flush=True)
    except (PeerError, OSError) as error:
        _say(f"shapes: {error}")
        return 1
    except KeyboardInterrupt:
        _say("shapes: interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
