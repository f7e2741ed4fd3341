"""Gate, shadow and canary as decisions on votes; and what they do to simulated retrainings."""

from __future__ import annotations

import itertools
import math

import msgspec
import numpy as np
import pytest

from optimizer import gate
from optimizer.config import GateConfig
from protocol.schema import VOTE_WEIGHTS, CheckpointRef, PairedCounts
from tests.optimizer.gate_world import NEW, follow, result

CONFIG = GateConfig()


def votes(won: int, lost: int, num_objects: int = 40) -> PairedCounts:
    return PairedCounts(num_objects=num_objects, num_won=won, num_lost=lost)


def weighed(won: tuple[int, ...], lost: tuple[int, ...]) -> PairedCounts:
    """So many votes of one part, of two, ..."""
    return PairedCounts(num_objects=40, num_won=sum(won), num_lost=sum(lost), won_weights=won, lost_weights=lost)


@pytest.mark.parametrize(("won", "lost"), [(0, 1), (3, 0), (7, 2), (2, 7), (6, 6), (11, 4)])
def test_the_confidence_is_that_of_the_sign_test_by_enumeration(won: int, lost: int) -> None:
    n = won + lost
    tails = [sum(coins) for coins in itertools.product((0, 1), repeat=n)]
    expected = sum(1.0 if k < won else 0.5 if k == won else 0.0 for k in tails) / len(tails)
    assert gate.confidence_better(votes(won, lost)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("won", "lost"), [((1, 0, 2), (0, 1)), ((), (0, 0, 3)), ((2, 2), (1, 1, 1)), ((0, 0, 1), (4,)), ((1,), (1,))]
)
def test_votes_of_different_weight_are_tested_by_flipping_their_sides(
    won: tuple[int, ...], lost: tuple[int, ...]
) -> None:
    counts = weighed(won, lost)
    parts = [part for votes_of in (won, lost) for part, num in enumerate(votes_of, 1) for _ in range(num)]
    ahead = sum(part * num for part, num in enumerate(won, 1)) - sum(part * num for part, num in enumerate(lost, 1))
    sums = [
        sum(side * part for side, part in zip(sides, parts, strict=True))
        for sides in itertools.product((-1, 1), repeat=len(parts))
    ]
    expected = sum(1.0 if s < ahead else 0.5 if s == ahead else 0.0 for s in sums) / len(sums)
    assert gate.confidence_better(counts) == pytest.approx(expected)
    contrary = gate.confidence_better(gate.swapped(counts))
    assert contrary == pytest.approx(1.0 - expected)
    assert gate.lead(counts) == pytest.approx(ahead / VOTE_WEIGHTS)


def test_one_road_user_that_waits_for_long_outweighs_two_that_pass() -> None:
    counts = weighed((0, 0, 0, 0, 0, 0, 0, 1), (2,))
    assert gate.lead(counts) > 0.0
    confidence = gate.confidence_better(counts)
    assert confidence is not None
    assert confidence > 0.5
    assert gate.e_value(counts) > 1.0 > gate.e_value(gate.swapped(counts))


def test_votes_whose_weights_are_not_told_weigh_a_whole_one() -> None:
    told = weighed((0, 0, 0, 0, 0, 0, 0, 5), (0, 0, 0, 0, 0, 0, 0, 2))
    plain = votes(5, 2, told.num_objects)
    assert gate.confidence_better(plain) == gate.confidence_better(told)
    assert gate.e_value(plain) == gate.e_value(told)
    both = gate.add(plain, weighed((1,), ()))
    assert (both.num_won, both.won_weights) == (6, (1, 0, 0, 0, 0, 0, 0, 5))


def test_the_confidence_goes_on_smoothly_where_the_normal_takes_over() -> None:
    exact, normal = gate.confidence_better(votes(520, 480, 2000)), gate.confidence_better(votes(521, 480, 2000))
    assert exact is not None
    assert normal is not None
    assert 0.0 < normal - exact < 0.02


def test_without_a_vote_there_is_no_confidence_and_a_margin_costs_some() -> None:
    assert gate.confidence_better(votes(0, 0)) is None
    plain, strict = gate.confidence_better(votes(6, 2, 100)), gate.confidence_better(votes(6, 2, 100), margin=0.02)
    assert plain is not None
    assert strict is not None
    assert strict < plain


def test_an_e_value_bets_fairly_and_pays_for_evidence() -> None:
    for n in (1, 5, 12):
        mean = sum(math.comb(n, k) * gate.e_value(votes(k, n - k)) for k in range(n + 1)) / 2**n
        assert mean == pytest.approx(1.0)
    assert gate.e_value(votes(10, 0)) > 50
    assert gate.e_value(votes(0, 10)) < 1
    assert math.isfinite(gate.e_value(votes(10_000, 0)))


def test_bets_are_lost_however_often_one_looks() -> None:
    seed = 4
    draw = np.random.default_rng(seed)
    alarms = 0
    for _ in range(2000):
        sides, parts = draw.random(60) < 0.5, draw.integers(0, VOTE_WEIGHTS, 60)
        seen = np.zeros((60, 2, VOTE_WEIGHTS), dtype=np.int64)
        seen[np.arange(60), sides.astype(int), parts] = 1
        looks = (weighed(tuple(won), tuple(lost)) for won, lost in seen.cumsum(0).tolist())
        alarms += any(gate.e_value(look) >= 1 / 0.05 for look in looks)
    assert alarms / 2000 <= 0.05, seed


@pytest.mark.parametrize(
    ("paired", "decision"),
    [
        (votes(6, 1), "promoted"),
        (votes(3, 2), "on_trial"),
        (votes(2, 3), "on_trial"),
        (votes(1, 8), "refused"),
        (votes(0, 0), "refused"),
        (votes(0, 0, 5), "on_trial"),
        (PairedCounts(), "on_trial"),
    ],
)
def test_the_gate_promotes_refuses_or_looks_again(paired: PairedCounts, decision: str) -> None:
    assert gate.judge_retraining(result(paired), CONFIG, 1).decision == decision


@pytest.mark.parametrize("paired", [votes(3, 2), votes(3, 3), votes(0, 0, 5), PairedCounts()])
def test_without_the_benefit_of_the_doubt_or_a_canary_what_is_not_proven_is_refused(paired: PairedCounts) -> None:
    for strict in (GateConfig(benefit_of_doubt=False), GateConfig(canary_s=0.0)):
        assert gate.judge_retraining(result(paired), strict, 1).decision == "refused"


def test_a_model_that_is_missing_or_old_is_refused_with_the_reason() -> None:
    assert "no model" in gate.judge_retraining(result(votes(9, 0), checkpoint=None), CONFIG, 1).reason
    assert "not newer" in gate.judge_retraining(result(votes(9, 0)), CONFIG, NEW.version).reason


def test_a_model_on_trial_is_promoted_by_fresh_labels_and_never_on_a_tie() -> None:
    held_out = votes(3, 2)
    assert gate.judge_shadow(held_out, votes(0, 0), CONFIG, over=False) is None
    promoted = gate.judge_shadow(held_out, votes(6, 1), CONFIG, over=False)
    refused = gate.judge_shadow(held_out, votes(1, 12), CONFIG, over=False)
    assert promoted is not None
    assert promoted.decision == "promoted"
    assert refused is not None
    assert refused.decision == "refused"
    for fresh, decision in ((votes(2, 3), "refused"), (votes(2, 2), "promoted"), (votes(3, 3), "promoted")):
        verdict = gate.judge_shadow(held_out, fresh, CONFIG, over=True)
        assert verdict is not None
        assert verdict.decision == decision


def test_a_canary_ends_early_when_the_case_is_clear_and_at_its_end_in_any_case() -> None:
    assert gate.judge_canary(votes(1, 2), CONFIG, proven=True, over=False) is None
    cases = [
        (votes(0, 9), True, False, "rolled_back"),
        (votes(9, 0), False, False, "kept"),
        (votes(0, 0), True, True, "kept"),
        (votes(2, 3), True, True, "kept"),
        (votes(2, 3), False, True, "rolled_back"),
        (votes(2, 6), True, True, "rolled_back"),
    ]
    for fresh, proven, over, decision in cases:
        verdict = gate.judge_canary(fresh, CONFIG, proven=proven, over=over)
        assert verdict is not None
        assert verdict.decision == decision, (fresh, proven)


def test_a_gate_that_is_switched_off_lets_everything_pass() -> None:
    off = msgspec.structs.replace(CONFIG, always_promote=True)
    assert gate.judge_retraining(result(votes(0, 9)), off, 1).decision == "promoted"
    assert gate.judge_retraining(result(votes(0, 9), checkpoint=None), off, 1).decision == "refused"


def test_of_200_retrainings_on_wrong_labels_none_stays_live_longer_than_one_canary() -> None:
    """Half fool the gate (the held-out labels are wrong too), half are simply worse; losses of 15 to 60 points."""
    seed = 11
    draw = np.random.default_rng(seed)
    fates = []
    for number in range(200):
        loss = float(draw.uniform(0.15, 0.6))
        fates.append(follow(draw, 0.3 if number % 2 else -loss, -loss, CONFIG))
    assert not [fate for fate in fates if fate.decision == "kept"], seed
    assert max(fate.live_s for fate in fates) <= CONFIG.canary_s
    rolled_back = [fate.live_s for fate in fates if fate.decision == "rolled_back"]
    assert len(rolled_back) > 60, "the gate was hardly fooled: the test says nothing"
    assert np.median(rolled_back) <= 30.0


def test_of_healthy_retrainings_few_that_are_better_by_two_points_are_refused() -> None:
    """Gains of 2 to 30 points, as city streams have them after a drift."""
    seed = 12
    draw = np.random.default_rng(seed)
    gains = draw.uniform(0.02, 0.30, 1000)
    lost = [gain for gain in gains if follow(draw, float(gain), float(gain), CONFIG).decision != "kept"]
    assert len(lost) / len(gains) < 0.05, seed
    assert np.median(lost) < 0.08  # what is lost was hardly worth having


def test_a_reference_is_only_promoted_with_its_hash() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"path": "c", "sha256": "", "stream_id": "s", "version": 2}, CheckpointRef)
