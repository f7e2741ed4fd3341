"""What the zoo offers: measured models as retraining configurations with honest errors, and nothing learned wrongly."""

from __future__ import annotations

import random
import statistics

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.knowledge import SiteKnowledge
from profiler.microprofiler import estimate_in_detail
from profiler.records import Estimate, Outcome, StreamHistory, WindowHistory
from profiler.zoo import FIRST_OVERHEAD_S, GAIN_SPREAD, gain_of, measured, overhead_s, zoo_profiles
from protocol.schema import (
    CitySource,
    DatasetRef,
    EpochResult,
    InferenceConfig,
    InferenceTrial,
    PairedCounts,
    RetrainConfig,
    RetrainResult,
    RetrainRun,
    RetrainTrial,
    StreamSpec,
    TrialResult,
    ZooTrial,
)

SPEC = StreamSpec(stream_id="s0", source=CitySource(seed=0), classes=("car", "bus"))
INFERENCE = (InferenceConfig(config_id="full"),)
RETRAIN = (
    RetrainConfig(config_id="head", epochs=4, trained_fraction=0.0),
    RetrainConfig(config_id="all", epochs=8),
    RetrainConfig(config_id="long", epochs=30),
)
DATASET = DatasetRef(path="d", stream_id="s0", window=4, num_train=200, num_validation=60, class_counts=(150, 110))


def zoo_trial(number: int, accuracy: float, won: int, lost: int, objects: int = 60, now: float = 0.3) -> ZooTrial:
    return ZooTrial(
        number=number,
        accuracy=accuracy,
        accuracy_low=max(0.0, accuracy - 0.12),
        accuracy_high=min(1.0, accuracy + 0.1),
        accuracy_serving=now,
        paired=PairedCounts(num_objects=objects, num_won=won, num_lost=lost),
        confidence=0.8,
        busy_s=0.1,
    )


def trial(*zoo: ZooTrial, now: float = 0.3) -> TrialResult:
    def row(config: RetrainConfig, seconds: float) -> RetrainTrial:
        epochs = tuple(
            EpochResult(epoch=e, accuracy=min(1.0, now + 0.04 * e), loss=1.0, busy_s=0.05 + seconds * (e > 0))
            for e in range(4)
        )
        return RetrainTrial(config=config, num_samples=64, total_samples=200, startup_s=0.2, epochs=epochs)

    return TrialResult(
        stream_id="s0",
        window=4,
        accuracy_now=now,
        retrain=(row(RETRAIN[0], 0.1), row(RETRAIN[1], 0.5)),
        inference=(InferenceTrial(config=INFERENCE[0], busy_s_per_frame=0.01, accuracy=now, num_frames=30),),
        seconds=1.0,
        zoo=zoo,
    )


def estimate(found: TrialResult) -> Estimate:
    return estimate_in_detail(SPEC, found, DATASET, RETRAIN, INFERENCE, StreamHistory(stream_id="s0"))


def offers(found: TrialResult, **options: float) -> dict[str, tuple[float, float]]:
    profiles = zoo_profiles(
        estimate(found), found, DATASET, RETRAIN, StreamHistory(stream_id="s0"), SiteKnowledge(), **options
    )
    for profile in profiles:
        assert profile.config is not None
        assert profile.config.config_id == profile.retrain_id
    return {p.retrain_id: (p.accuracy_after, p.gpu_seconds) for p in profiles}


def test_a_model_that_was_measured_to_be_better_is_offered_for_the_price_of_a_few_looks() -> None:
    found = offers(trial(zoo_trial(3, 0.9, won=40, lost=2), zoo_trial(5, 0.2, won=1, lost=9)))
    after, seconds = found["zoo-3"]
    assert 0.75 < after < 0.9  # shrunk, not by much
    assert seconds == pytest.approx(FIRST_OVERHEAD_S + 0.4)
    assert not any(name.startswith("zoo-5") for name in found)


def test_retrainings_that_begin_from_the_best_model_are_offered_where_nothing_cheaper_reaches_as_much() -> None:
    found = trial(zoo_trial(3, 0.6, won=25, lost=4), zoo_trial(4, 0.5, won=20, lost=6))
    profiles = zoo_profiles(estimate(found), found, DATASET, RETRAIN, StreamHistory(stream_id="s0"), SiteKnowledge())
    plain = {p.retrain_id: p for p in estimate(found).profile.retrain}
    begun = [p for p in profiles if p.config is not None and p.config.epochs > 0]
    assert begun
    for profile in begun:
        assert profile.config is not None
        assert profile.config.base == 3
        other = plain[profile.retrain_id.removeprefix("zoo-3.")]
        assert other.config is not None
        assert profile.config == msgspec.structs.replace(other.config, config_id=profile.retrain_id, base=3)
        assert profile.accuracy_after > other.accuracy_after
        assert profile.gpu_seconds > other.gpu_seconds


def test_nothing_is_offered_where_the_serving_model_is_as_good() -> None:
    assert offers(trial(zoo_trial(3, 0.31, won=3, lost=2))) == {}
    assert offers(trial()) == {}


def test_a_gain_seen_on_few_road_users_counts_for_less() -> None:
    few, many = (
        measured(trial(zoo_trial(1, 0.8, won=round(0.6 * n), lost=round(0.1 * n), objects=n)))[0] for n in (5, 200)
    )
    assert few.gain < many.gain < 0.5
    assert few.gain_error > many.gain_error > 0.0


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 40))
def test_the_error_of_a_gain_is_positive_and_falls_with_the_number_of_votes(won: int, lost: int, ties: int) -> None:
    mean, error = gain_of(PairedCounts(num_objects=won + lost + ties, num_won=won, num_lost=lost))
    more_mean, less = gain_of(PairedCounts(num_objects=4 * (won + lost + ties), num_won=4 * won, num_lost=4 * lost))
    assert error > 0.0
    assert mean == pytest.approx(more_mean)
    assert less < error


def test_the_interval_of_a_gain_holds_the_true_one_as_often_as_it_says() -> None:
    seed = 5
    print("seed", seed)
    draw = random.Random(seed)
    inside, errors = 0, []
    for _ in range(2000):
        true = min(0.45, max(-0.45, draw.gauss(0.0, GAIN_SPREAD)))
        up = min(1.0, max(0.05, 0.15 + max(0.0, true)))
        down = up - true
        scale = max(1.0, up + down)
        up, down, true = up / scale, down / scale, true / scale
        votes = [draw.random() for _ in range(40)]
        won, lost = sum(v < up for v in votes), sum(up <= v < up + down for v in votes)
        now = 0.5
        row = msgspec.structs.replace(
            zoo_trial(1, 0.5, won, lost, 40, now), accuracy=min(1.0, max(0.0, now + (won - lost) / 40))
        )
        found = measured(trial(row, now=now))[0]
        inside += abs(found.gain - true) <= 1.2816 * found.gain_error
        errors.append(found.gain - true)
    assert 0.76 <= inside / 2000 <= 0.92
    assert abs(statistics.mean(errors)) < 0.01


def outcome(config: RetrainConfig, accuracy: float, run: RetrainRun | None = None, busy_s: float = 0.4) -> Outcome:
    epochs = tuple(EpochResult(epoch=e, accuracy=accuracy, loss=0.5, busy_s=0.1) for e in range(config.epochs + 1))
    from protocol.schema import CheckpointRef

    result = RetrainResult(
        stream_id="s0",
        window=3,
        config=config,
        checkpoint=CheckpointRef(path="c", sha256="0" * 64, stream_id="s0", version=4),
        accuracy_before=0.3,
        accuracy_after=accuracy,
        num_validation=60,
        epochs=epochs,
        busy_s=busy_s,
        seconds=1.0,
    )
    return Outcome(result=result, accuracy_predicted=0.8, seconds_predicted=1.0, promoted=True, run=run)


def test_what_a_take_over_needs_beyond_its_looks_is_learned() -> None:
    switch = msgspec.structs.replace(RETRAIN[1], config_id="zoo-3", epochs=0, base=3)
    run = RetrainRun(executor_id="e", device="cpu", share=0.5, elapsed_s=6.0, work_s=2.4)
    assert overhead_s([]) == FIRST_OVERHEAD_S
    assert overhead_s([outcome(switch, 0.9, run)] * 3) == pytest.approx(2.0)
    assert overhead_s([outcome(RETRAIN[1], 0.9, run)] * 3) == FIRST_OVERHEAD_S


@pytest.mark.parametrize("epochs", [0, 8])
def test_outcomes_that_began_from_the_zoo_teach_nothing_about_those_that_did_not(epochs: int) -> None:
    found = trial()
    first = estimate(found)
    window = WindowHistory(window=3, trial=found, estimate=msgspec.structs.replace(first, window=3))
    begun = msgspec.structs.replace(RETRAIN[1], config_id="zoo-3.all", epochs=epochs, base=3)
    with_zoo = msgspec.structs.replace(window, outcomes=(outcome(begun, 0.95),))

    def rows(history: WindowHistory) -> Estimate:
        past = StreamHistory(stream_id="s0", windows=(history,))
        return estimate_in_detail(SPEC, found, DATASET, RETRAIN, INFERENCE, past)

    for before, after in zip(rows(window).retrain, rows(with_zoo).retrain, strict=True):
        assert (before.accuracy_after, before.accuracy_error) == (after.accuracy_after, after.accuracy_error)
        if epochs == 0:  # training costs what it costs, wherever it begins
            assert before == after
    plain = msgspec.structs.replace(window, outcomes=(outcome(RETRAIN[1], 0.95),))
    assert rows(window).retrain != rows(plain).retrain
