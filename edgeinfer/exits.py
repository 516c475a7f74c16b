"""Early exits, as whoever trains them and the backend that computes agree on them.

An *exit* lets a model draft for itself: its own first layers, then one new layer (or a few) with a norm,
then the model's own head, reduced to the *kept* tokens. A *place* is where one leaves the model and how
many layers it has of its own. Texts are rows of tokens of equal length, each from position 0 on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from edgeinfer.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgeinfer_models.tokenizer import Tokenizer

    Floats = npt.NDArray[np.float32]
    Tokens = npt.NDArray[np.int32]
    Kinds = npt.NDArray[np.uint8]

# What a token of a text is: put there by a template, written as a question, written as an answer.
FORCED, ASKED, ANSWERED = 0, 1, 2


@dataclass(frozen=True, order=True)
class ExitPlace:
    """layer: how many of the model's layers come before the exit. new_layers: of its own."""

    layer: int
    new_layers: int = 1

    @property
    def name(self) -> str:
        return f"{self.layer}" if self.new_layers == 1 else f"{self.layer}x{self.new_layers}"

    @staticmethod
    def parse(text: str) -> ExitPlace:
        """ "8", or "8x2" for two new layers. Raises UsageError."""
        found = re.fullmatch(r"(\d{1,4})(?:x(\d{1,2}))?", text.strip())
        if found is None or int(found[1]) < 1 or found[2] == "0":
            raise UsageError(f"'{text}' is no place of an exit; write 8, or 8x2 for two new layers")
        return ExitPlace(int(found[1]), int(found[2] or 1))


@dataclass(frozen=True)
class Turns:
    """What a chat template puts between two turns, the mark of a turn's end first, which the model
    writes itself. Where a text is no chat, `after_text` goes on in place of an end."""

    after_question: tuple[int, ...]
    after_answer: tuple[int, ...]
    after_text: tuple[int, ...]


@dataclass(frozen=True)
class Opening:
    """How a text begins; the model writes the rest. asks: it begins inside a question; otherwise it is
    plain text, and all that is written counts as an answer. temperature: of answers; 0: greedy.
    (Questions are drawn at 1: greedy ones would all be the same.)"""

    tokens: tuple[int, ...]
    asks: bool
    temperature: float


@dataclass(frozen=True)
class ExitRecipe:
    """How exits are trained; the defaults are what the starter's was trained with.

    target_tokens: the likeliest tokens of the model's distribution that are learnt; what is left counts
    as nothing. sharpness: the power that their probabilities are raised to. hard_share: how much of the
    loss is only about the likeliest one. question_weight: of a token of a question;
    one of an answer has 1."""

    learning_rate: float = 1.5e-3
    warm_up: float = 0.03  # as a share of the training
    weight_decay: float = 0.01
    least_rate: float = 0.02  # of learning_rate, at the end
    batch_texts: int = 64
    target_tokens: int = 32
    sharpness: float = 1.0
    hard_share: float = 0.2
    question_weight: float = 0.5
    seed: int = 1

    def rate_at(self, done: float) -> float:
        """The learning rate after that share (0 to 1) of the training: up, then down a half cosine."""
        import math

        if done < self.warm_up:
            return self.learning_rate * max(done / self.warm_up, 0.02)
        fallen = 0.5 + 0.5 * math.cos(math.pi * min((done - self.warm_up) / (1.0 - self.warm_up), 1.0))
        return self.learning_rate * (self.least_rate + (1.0 - self.least_rate) * fallen)


@dataclass(frozen=True)
class Predictions:
    """Of texts of shape (n, length): at each position the likeliest next token, by the whole model and
    by each exit. (The last position of a text says what nobody wrote.)"""

    model: Tokens
    exits: Mapping[ExitPlace, Tokens]


class ExitTrainer(Protocol):
    """One loaded model, its texts' hidden states, and exits that learn from them. Not thread-safe.

    In this order: `prepare_writing`, `write` as often as wanted, `end_writing`; `begin`, `capture` for
    every piece of the texts; then `step` and `predict` in any order."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def device_name(self) -> str: ...

    def prepare_writing(self, texts: int, length: int, turns: Turns) -> None:
        """Room for so many texts at once."""
        ...

    def write(
        self, openings: Sequence[Opening], seed: int, going_on: Callable[[int], bool]
    ) -> tuple[Tokens, Kinds]:
        """Let the model write: (texts, length) each. openings: as many as were prepared for. going_on:
        is given the number of positions done; False ends it early, with what is there: shorter rows."""
        ...

    def end_writing(self) -> None:
        """Give back its memory."""
        ...

    def texts_that_fit(self, places: Sequence[ExitPlace], recipe: ExitRecipe, length: int) -> int:
        """How many texts of that length can be captured in the memory that there is."""
        ...

    def begin(
        self,
        places: Sequence[ExitPlace],
        kept: Tokens,
        recipe: ExitRecipe,
        *,
        texts: int,
        held_out: int,
        length: int,
    ) -> None:
        """New exits, and room for so many texts. kept: the tokens of their head, ascending. Raises
        UsageError."""
        ...

    def capture(self, tokens: Tokens, kinds: Kinds, *, held_out: bool) -> None:
        """Read texts with the whole model and keep what exits learn from: its states and its
        distribution."""
        ...

    def step(self, done: float) -> None:
        """Learn from the next `batch_texts` captured texts, in an order drawn anew each time all have
        been. done: share of the training, which decides the learning rate."""
        ...

    def losses(self) -> Mapping[ExitPlace, float]:
        """Of the last step, which this waits for; {} before the first."""
        ...

    def predict(self) -> Predictions:
        """For the texts that were held out."""
        ...

    def weights(self, place: ExitPlace) -> Mapping[str, Floats]:
        """Of an exit's own tensors: `layers.0.…` and `norm.weight`."""
        ...

    def state(self) -> Mapping[str, Floats]:
        """All that learning goes on from: weights and the optimizer's numbers."""
        ...

    def restore(self, state: Mapping[str, Floats]) -> None:
        """After `begin` with the same places and tokens kept. Raises ValueError."""
        ...

    def close(self) -> None: ...
