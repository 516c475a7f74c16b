"""Train early exits within a fixed time and write what came of it: for a machine that is lent for
minutes.

    python -m benchmarks.train_exit_on_gpu MODEL.gguf --out FOLDER --seconds 330

Writes `exit-layer-N.safetensors` for each place (the layer and the norm in bf16, the kept tokens),
`figures.json` and some of the texts (`texts-N.u16`, rows of --length tokens). All that is measured is
written at every point of the curve, so what there is when the time is over is there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeinfer.distill.openings import ChatFrame, Library
from edgeinfer.distill.texts import Texts
from edgeinfer.distill.training import ExitFigures, ExitTraining, TrainingPlan, summary
from edgeinfer.errors import EdgeInferError
from edgeinfer.exits import ExitPlace, ExitRecipe, ExitTrainer
from edgeinfer.registry import get_backend
from edgeinfer_models.chat_template import TemplateRenderer, template_of
from edgeinfer_models.gguf_model import read_gguf_model

MIB = 2**20
_FILES, _FILE_BYTES, _ALL_BYTES = 8, 15 * MIB, 60 * MIB  # that may be written
_SPARE_S = 20.0  # between the end of learning and the end of all
_BEGIN = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - _BEGIN:6.1f} s] {text}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    end = _BEGIN + options.seconds
    _end_at(end + _SPARE_S)
    places = tuple(ExitPlace.parse(each) for each in options.places.split(","))
    path = Path(options.model)
    trainer = get_backend("torch").exit_trainer(path, options.device, say)
    say(f"loaded {path.name} on {trainer.device_name}")
    template = template_of(read_gguf_model(path))
    with TemplateRenderer(template.text, template.bos, template.eos) as renderer:
        frame = _frame(renderer, trainer)
        library = Library()
        say(f"turns: {frame.turns}")
        plan = TrainingPlan(
            places,
            ExitRecipe(
                learning_rate=options.rate,
                batch_texts=options.batch,
                sharpness=options.sharpness,
                hard_share=options.hard_share,
            ),
            length=options.length,
            texts_at_once=options.at_once,
            most_tokens=options.most_tokens,
            held_out=options.held_out,
            most_rounds=options.most_rounds,
        )
        training = ExitTraining(
            trainer, plan, frame, library, say, lambda figures: _write(out, trainer, figures)
        )
        now = time.monotonic()
        left = end - now
        train, held_out = training.write(now + options.share * left, now + 1.5 * options.share * left)
        say(f"{len(train):,} texts to learn from, {train.written_tokens:,} tokens of the model's own")
        _show(trainer, held_out)
        room = _ALL_BYTES - sum(14 * MIB if place.new_layers > 1 else 7 * MIB for place in places)
        _write_texts(out, train, room, _FILES - 1 - len(places))
        figures = training.train(train, held_out, end - _SPARE_S)
    for line in summary(figures):
        say(line)
    say(f"seconds: {figures.seconds}; rounds {figures.rounds:.2f}")
    trainer.close()
    say("done")
    return 0


def _frame(renderer: TemplateRenderer, trainer: ExitTrainer) -> ChatFrame:
    try:
        return ChatFrame(renderer.render, trainer.tokenizer)
    except EdgeInferError as error:  # the machine is there once, and the starter's template is this
        say(f"the template's process does not work here ({error}); ChatML instead")
        return ChatFrame(_chatml, trainer.tokenizer)


def _chatml(messages: Sequence[Mapping[str, Any]]) -> str:
    turns = [f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>\n" for each in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


def _write(out: Path, trainer: ExitTrainer, figures: ExitFigures) -> None:
    content = json.dumps(figures.as_json(), indent=1)
    _replace(out / "figures.json", content.encode())
    done = figures.curve[-1].done
    if done == 1.0 or 0.3 < done < 0.7:  # a file each takes a moment
        for place in figures.plan.places:
            _write_exit(out / f"exit-layer-{place.name}.safetensors", trainer, figures, place)


def _write_exit(path: Path, trainer: ExitTrainer, figures: ExitFigures, place: ExitPlace) -> None:
    header: dict[str, Any] = {
        "__metadata__": {"exit_layer": str(place.layer), "new_layers": str(place.new_layers)}
    }
    content = b""
    parts = [
        (name, "BF16", values.shape, _bf16(values)) for name, values in trainer.weights(place).items()
    ]
    kept = figures.kept.astype("<i4")
    for name, kind, shape, numbers in [*parts, ("kept_tokens", "I32", kept.shape, kept.tobytes())]:
        offsets = [len(content), len(content) + len(numbers)]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": offsets}
        content += numbers
    head = json.dumps(header).encode()
    _replace(path, len(head).to_bytes(8, "little") + head + content)


def _bf16(values: np.ndarray) -> bytes:
    """Rounded to the nearest, halves to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def _write_texts(out: Path, texts: Texts, room: int, files: int) -> None:
    row_bytes = 2 * texts.length
    done = 0
    for index in range(min(max(files, 0), 3)):
        rows = min(min(_FILE_BYTES, room) // row_bytes, len(texts) - done)
        if rows < 1 or texts.tokens.max() > 0xFFFF:
            return
        part = texts.tokens[done : done + rows].astype("<u2")
        _replace(out / f"texts-{index}.u16", part.tobytes())
        room -= rows * row_bytes
        done += rows
    say(f"wrote {done:,} texts of {texts.length} tokens")


def _replace(path: Path, content: bytes) -> None:
    partial = path.parent / (path.name + ".part")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _show(trainer: ExitTrainer, texts: Texts) -> None:
    """The beginnings of a few, so that one sees whether they are worth anything."""
    for group in range(4):
        for row in np.flatnonzero(texts.groups == group)[:2]:
            text = trainer.tokenizer.decode([int(token) for token in texts.tokens[row][:160]])
            say(f"group {group}, temperature {texts.temperatures[row]:.1f}: {text[:420]!r}")


def _end_at(moment: float) -> None:
    """End the process then, whatever it is doing: all that counts has been written before."""

    def end() -> None:
        time.sleep(max(moment - time.monotonic(), 0.0))
        say("out of time")
        sys.stdout.flush()
        os._exit(3)

    threading.Thread(target=end, daemon=True).start()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("--out", required=True)
    parser.add_argument("--seconds", type=float, default=330.0, help="for everything")
    parser.add_argument("--share", type=float, default=0.4, help="of the time for writing texts")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--places", default="4,6,8,10,8x2")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--at-once", type=int, default=2048)
    parser.add_argument("--held-out", type=int, default=512)
    parser.add_argument("--most-tokens", type=int, default=12_000_000)
    parser.add_argument("--most-rounds", type=float, default=24.0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--sharpness", type=float, default=1.0)
    parser.add_argument("--hard-share", type=float, default=0.2)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
