"""What the runtime needs of an mlx-lm model: hidden states of some tokens, logits of some rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgeinfer_backends.mlx.rotation import Rotation, rotation_of

if TYPE_CHECKING:
    import mlx.core as mx


class MlxModel:
    """The class of mlx-lm, unmodified, called in its two halves, so that a prompt's other rows do not
    cost a vocabulary each."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.num_layers = len(model.layers)
        self.hidden_size = int(model.args.hidden_size)

    def hidden(self, tokens: Sequence[int], cache: Sequence[Any] | None) -> mx.array:
        """After the last norm; shape (n, hidden size)."""
        import mlx.core as mx

        states: mx.array = self._model.model(mx.array([list(tokens)], dtype=mx.int32), cache=cache)
        return states[0]

    def logits(self, hidden: mx.array) -> mx.array:
        """hidden: shape (rows, hidden size). Returns (rows, vocabulary), float32."""
        import mlx.core as mx

        if self._model.args.tie_word_embeddings:
            found: mx.array = self._model.model.embed_tokens.as_linear(hidden)
        else:
            found = self._model.lm_head(hidden)
        return found.astype(mx.float32)

    def rotations(self, head_size: int) -> list[Rotation] | None:
        """Of each layer's RoPE; None if one of them has none."""
        found = [rotation_of(layer.self_attn.rope, head_size) for layer in self._model.layers]
        rotations = [rotation for rotation in found if rotation is not None]
        return rotations if len(rotations) == len(found) else None

    def weight_groups(self) -> list[list[mx.array]]:
        """All weights: those of each layer, then the rest."""
        from mlx.utils import tree_flatten

        layers = [list(dict(tree_flatten(each.parameters())).values()) for each in self._model.layers]
        everything = dict(tree_flatten(self._model.parameters()))
        rest = [array for name, array in everything.items() if not name.startswith("model.layers.")]
        return [*layers, rest]

    def evaluate(self, arrays: Sequence[mx.array]) -> None:
        import mlx.core as mx

        mx.eval(list(arrays))

    @property
    def num_bytes(self) -> int:
        return sum(int(array.nbytes) for group in self.weight_groups() for array in group)

    @property
    def scale_types(self) -> set[str]:
        """Types of the scales of quantized weights; empty without any."""
        from mlx.utils import tree_flatten

        named = dict(tree_flatten(self._model.parameters()))
        return {str(array.dtype) for name, array in named.items() if name.endswith(".scales")}
