"""A full-precision model of the starter's quality whose weights lie on no grid.

The starter is quantized itself (Q4_1 and Q8_0). What its blocks mean lies on their grids, and types
whose grids are alike would lose less on it than on real weights. Here each weight is drawn uniformly
from the cell that was rounded to its number, with a fixed seed. That alone costs a third in
perplexity, so a short distillation from the starter follows, on ordinary text, in which no weight
leaves its cell. Then the model is tried: its perplexity must be within 15 % of the starter's.

python -m benchmarks.off_grid: makes it (a quarter of an hour, once) and prints where it is.
"""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.model_files import starter
from benchmarks.quality_texts import TRAINING, UNSEEN, quality_text
from edgeinfer.backend import RuntimeSettings, SequenceStep, Step
from edgeinfer.quantize.conversion import convert, plan_conversion
from edgeinfer.registry import get_backend
from edgeinfer_models.conversion.model import source_of_folder, source_of_gguf
from edgeinfer_models.model_files import ModelFiles
from scripts.wheel_cache import cache_folder, sha256_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

SEED = 7
MOST_WORSE = 1.15
_STEPS, _TEXT_TOKENS, _RATE = 80, 512, 2e-4
_TOKENS, _WINDOW = 4096, 1024  # that it is tried on
_BLOCK = 32


def off_grid() -> Path:
    """Its F16 GGUF; kept. Raises ValueError where it does not work as the starter does."""
    original = starter()
    folder = cache_folder() / "benchmark-models"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"smollm2-off-grid-{SEED}-{sha256_of(original)[:16]}.gguf"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            partial = _made(original, Path(temporary))
            before, after = perplexity(original), perplexity(partial)
            _say(f"perplexity {after:.2f}, the starter's {before:.2f}")
            if after > MOST_WORSE * before:
                raise ValueError(f"weights off their grid: perplexity {after:.2f}, not {before:.2f}")
            partial.rename(target)
    return target


def _made(original: Path, folder: Path) -> Path:
    """A GGUF of what the numbers mean and one of their cells' sizes, as folders; then the drawing."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)  # the same result wherever it runs, and no waiting for busy cores
    _write(original, folder / "middles.gguf", _middles)
    _write(original, folder / "sizes.gguf", _cell_sizes)
    for name in ("middles", "sizes"):
        _converted(source_of_gguf(folder / f"{name}.gguf"), folder / name, "safetensors", "f32")
    load = AutoModelForCausalLM.from_pretrained
    teacher, student = load(folder / "middles", dtype=torch.bfloat16).eval(), load(folder / "middles")
    sizes = dict(load(folder / "sizes").named_parameters())
    tokenizer = AutoTokenizer.from_pretrained(folder / "middles")
    random = torch.Generator().manual_seed(SEED)
    cells: dict[str, tuple[Any, Any]] = {}
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if weight.ndim == 1:
                weight.requires_grad_(False)
                continue
            half = sizes[name] / 2
            cells[name] = (weight - half, weight + half)
            weight += (2 * torch.rand(weight.shape, generator=random) - 1) * half
    tokens = tokenizer(quality_text(TRAINING), add_special_tokens=False)["input_ids"]
    _distil(teacher, student, cells, torch.tensor(tokens), random)
    student.save_pretrained(folder / "drawn")
    tokenizer.save_pretrained(folder / "drawn")
    target = folder / "drawn.gguf"
    _converted(source_of_folder(folder / "drawn"), target, "gguf", "f16")
    return target


def _distil(teacher: Any, student: Any, cells: Any, tokens: Any, random: Any) -> None:
    import torch

    learnt = [weight for weight in student.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(learnt, lr=_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 5, 1.0) * (1 - step / _STEPS)
    )
    for step in range(_STEPS):
        start = int(torch.randint(len(tokens) - _TEXT_TOKENS, (1,), generator=random))
        text = tokens[None, start : start + _TEXT_TOKENS]
        with torch.no_grad():
            wanted = teacher(text).logits[0].float().log_softmax(-1)
        with torch.autocast("cpu", torch.bfloat16):
            found = student(text).logits[0]
        lost = torch.nn.functional.kl_div(
            found.float().log_softmax(-1), wanted, reduction="batchmean", log_target=True
        )
        optimizer.zero_grad()
        lost.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for name, weight in student.named_parameters():
                if name in cells:
                    weight.clamp_(*cells[name])
        if step % 10 == 0:
            _say(f"step {step} of {_STEPS}: KL from the starter {float(lost.detach()):.4f}")


def _converted(source: Any, target: Path, to: Any, dtype: str) -> None:
    convert(plan_conversion(source, target, to, dtype, target, force=False))


def _write(original: Path, target: Path, values_of: Any) -> None:
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(original)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = gguf.LlamaFileType.ALL_F32 if field.name == "general.file_type" else field.contents()
        kind, *of = field.types
        writer.add_key_value(field.name, value, kind, of[-1] if of else None)
    for tensor in reader.tensors:
        is_matrix = len(tensor.shape) > 1
        values = values_of(tensor) if is_matrix else _middles(tensor)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _middles(tensor: Any) -> npt.NDArray[np.float32]:
    from gguf.quants import dequantize

    found: npt.NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type)
    return found


def _cell_sizes(tensor: Any) -> npt.NDArray[np.float32]:
    """Of each number, the distance of its block's neighbouring ones. Blocks begin with it, in F16."""
    import numpy as np

    kind = tensor.tensor_type.name
    if kind not in ("Q4_1", "Q8_0"):
        raise ValueError(f"{tensor.name} is {kind}: the starter has changed")
    blocks = tensor.data.reshape(tensor.data.shape[0], -1, {"Q4_1": 20, "Q8_0": 34}[kind])
    steps = np.ascontiguousarray(blocks[:, :, :2]).view("<f2")[:, :, 0].astype(np.float32)
    return np.repeat(np.abs(steps), _BLOCK, axis=1)


def perplexity(path: Path) -> float:
    """Over text that nothing here was trained on, in windows."""
    import numpy as np

    settings = RuntimeSettings(context=_WINDOW, logit_rows=_WINDOW, step_tokens=_WINDOW)
    files = ModelFiles(path.name, (path,), "gguf")
    runtime = get_backend("llamacpp").load(files, settings, lambda _: True)
    try:
        encode = runtime.tokenizer.encode
        tokens = encode(quality_text(UNSEEN), add_special=False, parse_special=False)[:_TOKENS]
        lost: list[float] = []
        for start in range(0, len(tokens), _WINDOW):
            window = tokens[start : start + _WINDOW]
            sequence = runtime.open()
            step = runtime.forward(Step([SequenceStep(sequence, window, "all")]))
            for row, following in enumerate(window[1:]):
                logits = runtime.logits(step.starts[0] + row)
                highest = float(logits.max())
                rest = float(np.exp(logits - highest).sum(dtype=np.float64))
                lost.append(highest + math.log(rest) - float(logits[following]))
            runtime.free(sequence)
        return math.exp(sum(lost) / len(lost))
    finally:
        runtime.close()


def _say(text: str) -> None:
    print(f"off the grid: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    print(off_grid())
