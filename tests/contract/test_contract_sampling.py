"""The contract of samplers and masks, against the numpy reference.

Two exact instruments, both independent of the random stream: at temperature 100 what survives the cuts
is nearly uniform, so enough draws show the whole candidate set; and greedy choice between two tokens
that a mask allows tips over where a bias makes their logits equal, which measures a penalty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from edgeinfer.sampling import MAX_SEED, SamplingParams
from edgeinfer_backends import sampling_reference as reference
from tests.contract.checked_runtime import CheckedRuntime
from tests.contract.driving import feed, ordinary_tokens, require, some_tokens

Load = Callable[..., CheckedRuntime]

PLAIN = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
HOT = replace(PLAIN, temperature=100.0)
GREEDY = replace(PLAIN, temperature=0.0)
NUM_KEPT = 12  # candidates that a cut leaves in these tests


class Prompted:
    """A runtime whose row 0 has the logits after a prompt."""

    def __init__(self, runtime: CheckedRuntime) -> None:
        self.runtime = runtime
        self.sequence = runtime.open()
        self.logits = feed(runtime, self.sequence, some_tokens(runtime, 20))
        self.ranked = [int(t) for t in np.argsort(-self.logits, kind="stable")]

    def draws(
        self,
        params: SamplingParams,
        count: int,
        seed: int = 1,
        mask: bytes | None = None,
        history: Sequence[int] = (),
    ) -> list[int]:
        """What one sampler draws from the row, again and again."""
        sampler = self.runtime.create_sampler(params, seed)
        for token in history:
            sampler.accept(token)
        drawn = [self.runtime.sample(0, sampler, mask) for _ in range(count)]
        sampler.close()
        return drawn

    def candidates(self, params: SamplingParams, mask: bytes | None = None) -> set[int]:
        """Every token that can be drawn. No penalties: each draw would change the next."""
        assert not params.has_penalties
        return set(self.draws(replace(params, temperature=100.0), 60 * NUM_KEPT, mask=mask))

    def expected(self, params: SamplingParams, mask: bytes | None = None) -> set[int]:
        return set(np.flatnonzero(reference.distribution(self.logits, params, mask=mask)).tolist())


@pytest.fixture
def row(load: Load) -> Prompted:
    return Prompted(load(context=256, sequences=1))


def mask_of(tokens: Sequence[int], vocab_size: int) -> bytes:
    allowed = np.zeros(-(-vocab_size // 8) * 8, dtype=np.uint8)
    allowed[list(tokens)] = 1
    return np.packbits(allowed, bitorder="little").tobytes()


# -- drawing ---------------------------------------------------------------------------------------


def test_greedy_is_argmax(row: Prompted) -> None:
    assert row.draws(GREEDY, 3) == [int(row.logits.argmax())] * 3
    with_cuts = SamplingParams(temperature=0.0, top_k=40, top_p=0.5, min_p=0.5, typical_p=0.2)
    assert row.draws(with_cuts, 3) == [int(row.logits.argmax())] * 3


def test_drawing_leaves_the_row_as_it_was(row: Prompted) -> None:
    row.draws(SamplingParams(repeat_penalty=2.0, top_k=5, logit_bias=((3, 5.0),)), 20)
    assert np.array_equal(row.runtime.logits(0), row.logits)


@pytest.mark.parametrize("seed", [0, 1, 12345, MAX_SEED])
def test_a_seed_repeats(row: Prompted, seed: int) -> None:
    assert row.draws(HOT, 30, seed) == row.draws(HOT, 30, seed)
    assert row.draws(HOT, 30, seed) != row.draws(HOT, 30, seed ^ 1)
    sampler = row.runtime.create_sampler(HOT, seed)
    assert sampler.seed == seed
    sampler.close()


def test_the_seed_given_is_the_one_used(row: Prompted) -> None:
    assert row.draws(replace(HOT, seed=5), 30, seed=6) == row.draws(HOT, 30, seed=6)


def test_samplers_do_not_share_a_random_stream(row: Prompted) -> None:
    alone = row.draws(HOT, 20, seed=3)
    one, other = (row.runtime.create_sampler(HOT, seed) for seed in (3, 4))
    drawn = []
    for _ in range(20):
        drawn.append(row.runtime.sample(0, one))
        row.runtime.sample(0, other)
    assert drawn == alone


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_sets_the_odds(row: Prompted, temperature: float) -> None:
    """Two tokens, biased to odds of 1 : 3; 3000 draws within five standard deviations."""
    one, other = row.ranked[:2]
    gap = float(row.logits[one] - row.logits[other])
    bias = ((one, -gap - temperature * float(np.log(3.0))),)
    params = replace(PLAIN, temperature=temperature, logit_bias=bias)
    drawn = row.draws(params, 3000, mask=mask_of([one, other], len(row.logits)))
    assert set(drawn) == {one, other}
    assert abs(drawn.count(one) / 3000 - 0.25) < 5 * (0.25 * 0.75 / 3000) ** 0.5


def test_draws_follow_the_reference_distribution(row: Prompted) -> None:
    params = SamplingParams(temperature=1.5, top_k=8, top_p=1.0, min_p=0.0)
    expected = reference.distribution(row.logits, params)
    drawn = np.bincount(row.draws(params, 4000), minlength=len(expected)) / 4000
    assert np.all(np.abs(drawn - expected) <= 5 * np.sqrt(expected * (1 - expected) / 4000))


@pytest.mark.parametrize(
    "params",
    [GREEDY, HOT, SamplingParams(), SamplingParams(repeat_penalty=1.5, logit_bias=((3, 5.0),))],
    ids=["greedy", "hot", "defaults", "penalties and a bias"],
)
@pytest.mark.parametrize("masked", [False, True], ids=["any token", "masked"])
def test_a_kept_row_is_drawn_from_as_the_row_was(
    row: Prompted, params: SamplingParams, masked: bool
) -> None:
    runtime, kept = row.runtime, row.logits.copy()
    mask = mask_of(row.ranked[1::2], len(kept)) if masked else None
    expected = row.draws(params, 20, seed=7, mask=mask)
    feed(runtime, row.sequence, [5])  # the row is gone
    sampler = runtime.create_sampler(params, 7)
    assert [runtime.sample(kept, sampler, mask) for _ in range(20)] == expected
    assert np.array_equal(kept, row.logits)


def test_a_row_of_another_vocabulary_is_refused(row: Prompted) -> None:
    sampler = row.runtime.create_sampler(HOT, 1)
    for shape in ((len(row.logits) - 1,), (len(row.logits) + 1,), (1, len(row.logits)), (0,)):
        with pytest.raises(ValueError):
            row.runtime.sample(np.zeros(shape, dtype=np.float32), sampler)


# -- cuts ------------------------------------------------------------------------------------------


def _threshold(values: npt.NDArray[np.float64], kept: int) -> float:
    return float(values[kept - 1] + values[kept]) / 2


def _top_p(logits: npt.NDArray[np.float64], kept: int) -> SamplingParams:
    held = np.cumsum(np.sort(reference.softmax(logits))[::-1])
    return replace(PLAIN, top_p=_threshold(held, kept - 1))


def _min_p(logits: npt.NDArray[np.float64], kept: int) -> SamplingParams:
    likeliest = np.sort(reference.softmax(logits))[::-1]
    return replace(PLAIN, min_p=_threshold(likeliest / likeliest[0], kept))


def _typical_p(logits: npt.NDArray[np.float64], kept: int) -> SamplingParams:
    probabilities = reference.softmax(logits)
    surprise = -np.log(probabilities)
    order = np.argsort(np.abs(surprise - np.sum(probabilities * surprise)))
    return replace(PLAIN, typical_p=_threshold(np.cumsum(probabilities[order]), kept - 1))


def _top_k(logits: npt.NDArray[np.float64], kept: int) -> SamplingParams:
    return replace(PLAIN, top_k=kept)


CUTS = pytest.mark.parametrize("cut", [_top_k, _top_p, _min_p, _typical_p], ids=lambda f: f.__name__[1:])
Cut = Callable[[npt.NDArray[np.float64], int], SamplingParams]


@CUTS
def test_a_cut_keeps_what_the_reference_keeps(row: Prompted, cut: Cut) -> None:
    params = cut(row.logits.astype(np.float64), NUM_KEPT)
    assert len(row.expected(params)) == NUM_KEPT
    assert row.candidates(params) == row.expected(params)


HARSH = {
    "top_k": replace(PLAIN, top_k=1),
    "top_p": replace(PLAIN, top_p=1e-6),
    "min_p": replace(PLAIN, min_p=1.0),
    "typical_p": replace(PLAIN, typical_p=1e-6),
}


@pytest.mark.parametrize("params", HARSH.values(), ids=HARSH.keys())
def test_the_harshest_cut_keeps_one_token(row: Prompted, params: SamplingParams) -> None:
    assert len(row.expected(params)) == 1
    assert row.candidates(params) == row.expected(params)


def test_cuts_work_one_after_another(row: Prompted) -> None:
    logits = row.logits.astype(np.float64)
    for first, second in ((20, 15), (15, 20)):
        params = replace(_top_k(logits, first), typical_p=0.9, min_p=_min_p(logits, second).min_p)
        assert row.candidates(params) == row.expected(params)
        params = replace(_top_k(logits, first), top_p=_top_p(logits, second).top_p)
        assert row.candidates(params) == row.expected(params)
        params = replace(_top_p(logits, first), min_p=_min_p(logits, second).min_p)
        assert row.candidates(params) == row.expected(params)


def test_settings_that_mean_off_cut_nothing(row: Prompted) -> None:
    """Each token alone, made likelier than all: none of them is out of reach."""
    for token in ordinary_tokens(row.runtime)[::17]:
        gap = min(100.0, float(row.logits.max() - row.logits[token]) + 1.0)
        params = replace(PLAIN, temperature=0.01, logit_bias=((token, gap),))
        assert row.draws(params, 1) == [token]


# -- what moves logits -----------------------------------------------------------------------------


def _tipping_bias(
    row: Prompted, params: SamplingParams, token: int, other: int, history: list[int]
) -> float:
    """The bias on `other` at which greedy choice between the two tips over, by the reference."""
    scores = row.logits.astype(np.float64)
    reference.subtract_penalties(scores, history, params)
    reference.subtract_dry(scores, history, params)
    return float(scores[token] - scores[other])


PENALTIES = {
    "repetition, divided": replace(GREEDY, repeat_penalty=1.3),
    "repetition below one": replace(GREEDY, repeat_penalty=0.8),
    "frequency": replace(GREEDY, frequency_penalty=0.7),
    "presence": replace(GREEDY, presence_penalty=1.1),
    "negative presence": replace(GREEDY, presence_penalty=-1.1),
    "all three": replace(GREEDY, repeat_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.4),
    "a short window": replace(GREEDY, frequency_penalty=0.7, presence_penalty=0.2, penalty_last_n=4),
    "no window": replace(GREEDY, frequency_penalty=0.7, penalty_last_n=0),
    "dry": replace(GREEDY, dry_multiplier=0.8),
    "dry, longer allowed": replace(GREEDY, dry_multiplier=0.8, dry_allowed_length=3),
    "dry, too long allowed": replace(GREEDY, dry_multiplier=0.8, dry_allowed_length=9),
    "dry, base one": replace(GREEDY, dry_multiplier=0.9, dry_base=1.0),
    "dry, short window": replace(GREEDY, dry_multiplier=0.8, dry_last_n=9),
    "dry and presence": replace(GREEDY, dry_multiplier=0.8, presence_penalty=0.5),
}


@pytest.mark.parametrize("params", PENALTIES.values(), ids=PENALTIES.keys())
def test_penalties_move_logits_as_the_reference_does(row: Prompted, params: SamplingParams) -> None:
    """Both for a likely token (positive logit) and an unlikely one (negative logit)."""
    words = sorted(_letters(row.runtime), key=lambda token: -row.logits[token])
    a, b, c, d, other = words[:5]
    for token in (a, words[-1]):
        # It ends in b c d, which the token followed before; c d alone, too.
        history = [a, b, c, d, token, c, b, c, a, c, d, token, a, b, c, d]
        tip = _tipping_bias(row, params, token, other, history)
        if abs(tip) > 99:
            pytest.skip("the logits of this model are too far apart to measure by a bias")
        for nudge, winner in ((-0.01, token), (0.01, other)):
            biased = replace(params, logit_bias=((other, tip + nudge),))
            mask = mask_of([token, other], len(row.logits))
            assert row.draws(biased, 1, history=history, mask=mask) == [winner]


def _letters(runtime: CheckedRuntime) -> list[int]:
    """Tokens that no set of DRY's sequence breakers holds."""
    pieces = {token: runtime.tokenizer.piece(token) for token in ordinary_tokens(runtime)}
    return [token for token, piece in pieces.items() if piece.isalpha()]


def test_a_strong_presence_penalty_draws_every_token_once(row: Prompted) -> None:
    params = replace(GREEDY, presence_penalty=10.0, frequency_penalty=10.0)
    likely = row.ranked[:8]
    assert row.draws(params, 8, mask=mask_of(likely, len(row.logits))) == likely


def test_tokens_out_of_the_window_are_forgotten(row: Prompted) -> None:
    params = replace(GREEDY, presence_penalty=10.0, frequency_penalty=10.0, penalty_last_n=2)
    likely = row.ranked[:3]
    drawn = row.draws(params, 9, mask=mask_of(likely, len(row.logits)))
    assert drawn == likely * 3


def test_logit_bias_adds_and_works_with_cuts(row: Prompted) -> None:
    lifted, banned = row.ranked[60], row.ranked[0]
    gap = float(row.logits[banned] - row.logits[lifted])
    assert row.draws(replace(GREEDY, logit_bias=((lifted, gap + 0.01),)), 1) == [lifted]
    assert row.draws(replace(GREEDY, logit_bias=((lifted, gap - 0.01),)), 1) == [banned]
    params = replace(PLAIN, top_k=NUM_KEPT, logit_bias=((lifted, 50.0), (banned, -100.0)))
    assert row.candidates(params) == {lifted, *row.ranked[1:NUM_KEPT]}


def test_tokens_outside_the_vocabulary_are_refused(row: Prompted) -> None:
    vocab_size = row.runtime.facts.vocab_size
    with pytest.raises(ValueError):
        row.runtime.create_sampler(replace(PLAIN, logit_bias=((vocab_size, 1.0),)), 1)
    sampler = row.runtime.create_sampler(replace(PLAIN, presence_penalty=1.0), 1)
    for token in (-1, vocab_size):
        with pytest.raises(ValueError):
            sampler.accept(token)
    for missing in (-1, 10**6):
        with pytest.raises(ValueError):
            row.runtime.sample(missing, sampler)


# -- masks -----------------------------------------------------------------------------------------

MASKED = {
    "greedy": GREEDY,
    "greedy with penalties": replace(GREEDY, repeat_penalty=1.5, dry_multiplier=1.0),
    "plain": PLAIN,
    "defaults": SamplingParams(),
    "top-k one": replace(PLAIN, top_k=1),
    "top-p": replace(PLAIN, top_p=0.1),
    "min-p": replace(PLAIN, min_p=0.9),
    "typical": replace(PLAIN, typical_p=0.1),
    "everything": SamplingParams(
        temperature=2.0,
        typical_p=0.9,
        repeat_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        dry_multiplier=1.0,
        logit_bias=((1, 30.0),),
    ),
}


@pytest.mark.parametrize("params", MASKED.values(), ids=MASKED.keys())
def test_only_tokens_of_the_mask_are_drawn(row: Prompted, params: SamplingParams) -> None:
    require(row.runtime, "token_masks")
    unlikely = row.ranked[-20:]
    for allowed in (unlikely, unlikely[:1], [row.ranked[3], *unlikely[:4]], row.ranked[1:]):
        drawn = row.draws(params, 30, mask=mask_of(allowed, len(row.logits)))
        assert set(drawn) <= set(allowed)


@CUTS
def test_cuts_are_made_among_the_tokens_of_the_mask(row: Prompted, cut: Cut) -> None:
    require(row.runtime, "token_masks")
    allowed = row.ranked[1::2][:30]
    params = cut(row.logits.astype(np.float64)[allowed], NUM_KEPT)
    mask = mask_of(allowed, len(row.logits))
    assert len(row.expected(params, mask)) == NUM_KEPT
    assert row.candidates(params, mask) == row.expected(params, mask)


def test_a_mask_may_be_longer_than_the_vocabulary(row: Prompted) -> None:
    require(row.runtime, "token_masks")
    token = row.ranked[5]
    mask = mask_of([token], len(row.logits)) + b"\xff" * 9
    assert set(row.draws(PLAIN, 20, mask=mask)) == {token}


def test_the_last_token_of_the_vocabulary_can_be_allowed(row: Prompted) -> None:
    require(row.runtime, "token_masks")
    last = len(row.logits) - 1
    assert row.draws(PLAIN, 3, mask=mask_of([last], len(row.logits))) == [last] * 3
    assert row.draws(GREEDY, 3, mask=mask_of([0], len(row.logits))) == [0] * 3


@pytest.mark.parametrize("params", [GREEDY, HOT], ids=["greedy", "drawn"])
def test_bad_masks_are_refused_and_count_for_nothing(row: Prompted, params: SamplingParams) -> None:
    require(row.runtime, "token_masks")
    params = replace(params, presence_penalty=5.0)
    size = len(row.logits)
    beyond = bytearray(-(-size // 8) + 1)
    beyond[-1] = 0xFF  # allows only what is no token
    expected = row.draws(params, 10)
    sampler = row.runtime.create_sampler(params, 1)
    drawn = []
    for _ in range(10):
        for mask in (bytes(-(-size // 8)), b"\xff" * (-(-size // 8) - 1), b"", bytes(beyond)):
            with pytest.raises(ValueError):
                row.runtime.sample(0, sampler, mask)
        drawn.append(row.runtime.sample(0, sampler))
    assert drawn == expected
