"""Make an exit's file of what `benchmarks/train_exit_on_gpu.py` left.

    python -m benchmarks.exit_from_training FOLDER PLACE MODEL.gguf OUT.exit.gguf

FOLDER has exit-layer-PLACE.safetensors (weights in bf16, kept tokens) and figures.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgeinfer.distill.exit_file_of import write_exit
from edgeinfer.exits import ExitPlace
from edgeinfer.registry import get_backend
from edgeinfer_models.gguf_model import read_gguf_model


def main(arguments: list[str]) -> int:
    if len(arguments) != 4:
        print(__doc__)
        return 2
    folder, place = Path(arguments[0]), ExitPlace.parse(arguments[1])
    weights, kept = read_training(folder / f"exit-layer-{place.name}.safetensors")
    rows = get_backend("llamacpp").row_quantizer()
    told = told_of(json.loads((folder / "figures.json").read_text()), place)
    model, out = read_gguf_model(Path(arguments[2])), Path(arguments[3])
    write_exit(out, model, place, weights, kept, told, rows)
    rows.close()
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {told['agreement']}")
    return 0


def read_training(path: Path) -> tuple[dict[str, Any], Any]:
    """Weights, float32, and the kept tokens."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + length])
    head.pop("__metadata__", None)
    found: dict[str, Any] = {}
    for name, about in head.items():
        start, stop = (8 + length + offset for offset in about["data_offsets"])
        data = content[start:stop]
        if about["dtype"] == "I32":
            found[name] = np.frombuffer(data, "<i4")
        else:
            wide = np.frombuffer(data, "<u2").astype(np.uint32) << 16
            found[name] = wide.view(np.float32).reshape(about["shape"])
    kept = found.pop("kept_tokens")
    return found, kept


def told_of(figures: Mapping[str, Any], place: ExitPlace) -> dict[str, Any]:
    by_kind = {
        kind: found
        for kind, found in figures["curve"][-1]["exits"][place.name].items()
        if isinstance(found, dict)
    }
    return {
        "agreement": by_kind["chat"]["by_position"],
        "agreement_by_kind": by_kind,
        "device": figures["device"],
        "texts": figures["texts"],
        "learnt_tokens": figures["learnt_tokens"],
        "seconds": figures["seconds"],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
