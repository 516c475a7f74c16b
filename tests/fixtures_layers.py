"""Models of tests/fixtures_families.py as layers that calibration text runs through.

layers = streamed(source_of_folder(write_folder(tmp_path / "model", config)))
logits = logits_of(layers, TOKENS)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeinfer.quantize.scaling import Link
from edgeinfer_models.conversion.model import SourceModel
from tests.fixtures_families import VOCAB

TEXTS = tuple(
    tuple(int(token) for token in np.random.default_rng(seed).integers(0, VOCAB, 32))
    for seed in range(8)
)
TOKENS = list(TEXTS[0][:20])


def streamed(source: SourceModel) -> Any:
    """These folders have no tokenizer."""
    import torch

    from edgeinfer_backends.torch.decoder import Decoder
    from edgeinfer_backends.torch.streamed_layers import StreamedLayers

    cpu = torch.device("cpu")
    with torch.device("meta"):
        decoder = Decoder(source.shape)
    decoder.set_context(256, cpu)
    return StreamedLayers(source, decoder, cpu, torch.float32, 256)


def logits_of(layers: Any, tokens: list[int]) -> np.ndarray:
    states = layers.embed([tokens])
    for layer in range(layers.num_layers):
        states = layers.run(layer, states)
    return layers.head(states)[0]


def any_scales(link: Link, *_: object) -> np.ndarray:
    """In the place of `best_scales`: large enough that one left out somewhere would be seen."""
    which, places = np.unique(link.rows, return_inverse=True)
    drawn = np.exp2(np.random.default_rng(len(which)).uniform(-1, 1, len(which)))
    return drawn[places].astype(np.float32)
