"""What a retraining will measure on its window's held-out split when it ends: estimate, interval, past errors."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from profiler.intervals import Z
from profiler.microprofiler import EstimatorKnobs, estimate, estimate_in_detail
from profiler.outcomes import held_out_errors
from profiler.process import predict
from profiler.records import ConfigEstimate, StreamHistory, WindowHistory
from protocol.schema import RetrainResult, TrialResult
from tests.profiler.profiler_world import INFERENCE, RETRAIN, SPEC, World, no_more

HEAD, FULL = RETRAIN[4], RETRAIN[10]
NOTHING = StreamHistory(stream_id="north")


def shifted(trial: TrialResult, by: float) -> TrialResult:
    """The same trials on a split that is easier by so much; what serving is worth is as before."""
    rows = [
        msgspec.structs.replace(
            row,
            epochs=tuple(msgspec.structs.replace(e, accuracy=min(1.0, max(0.0, e.accuracy + by))) for e in row.epochs),
        )
        for row in trial.retrain
    ]
    return msgspec.structs.replace(trial, retrain=tuple(rows))


def estimated(world: World, trial: TrialResult, history: StreamHistory = NOTHING) -> dict[str, ConfigEstimate]:
    made = estimate_in_detail(
        SPEC, trial, world.dataset(len(history.windows)), RETRAIN, INFERENCE, history, knobs=EstimatorKnobs()
    )
    return {row.config.config_id: row for row in made.retrain}


def test_a_hard_split_is_expected_to_stay_hard_and_says_less_of_the_frames_to_come() -> None:
    world = World(3)
    trial = world.trial(0, (HEAD, FULL))
    easy, hard = estimated(world, shifted(trial, 0.06)), estimated(world, shifted(trial, -0.06))
    for config in RETRAIN:
        a, b = easy[config.config_id], hard[config.config_id]
        assert a.held_out is not None
        assert b.held_out is not None
        assert a.held_out - b.held_out > 0.04
        assert a.held_out - b.held_out > 1.5 * (a.accuracy_after - b.accuracy_after)


def played(world: World, windows: int) -> Iterator[tuple[ConfigEstimate, RetrainResult, int]]:
    """(estimate, outcome, window) of two retrainings in each of ``windows``, each with a split of its own."""
    history = NOTHING
    for window in range(windows):
        ease = float(world.rng.normal(0.0, 0.08))
        trial = shifted(world.trial(window, (HEAD, FULL)), ease)
        made = estimate_in_detail(SPEC, trial, world.dataset(window), RETRAIN, INFERENCE, history)
        rows = {row.config: row for row in made.retrain}
        outcomes = []
        for config in (RETRAIN[3], RETRAIN[9]):
            outcome = world.outcome(window, config)
            after = min(1.0, max(0.0, outcome.result.accuracy_after + ease))
            result = msgspec.structs.replace(
                outcome.result, accuracy_before=world.accuracy_now + ease, accuracy_after=after
            )
            outcomes.append(msgspec.structs.replace(outcome, result=result))
            yield rows[config], result, window
        row = WindowHistory(window=window, trial=trial, estimate=made, outcomes=tuple(outcomes))
        history = StreamHistory(stream_id="north", windows=(*history.windows, row))


def test_it_is_nearer_to_what_is_measured_than_the_estimate_of_frames_to_come_and_intervals_hold() -> None:
    late = [
        (row, result.accuracy_after)
        for seed in range(8)
        for row, result, window in played(World(seed), 8)
        if window >= 3
    ]
    errors = np.array([abs((row.held_out or 0.0) - after) for row, after in late])
    others = np.array([abs(row.accuracy_after - after) for row, after in late])
    held = np.array([error <= Z * row.held_out_error for error, (row, _) in zip(errors, late, strict=True)])
    assert float(np.median(errors)) < 0.05
    assert float(errors.mean()) < float(others.mean())
    assert 0.7 <= float(held.mean()) <= 0.95


def test_more_epochs_and_more_data_never_measure_worse_within_a_group() -> None:
    world = World(4)
    rows = estimated(world, world.trial(0, (HEAD, FULL)))
    for a in RETRAIN:
        for b in RETRAIN:
            if no_more(a, b):
                assert (rows[a.config_id].held_out or 0.0) <= (rows[b.config_id].held_out or 0.0) + 1e-9


def test_few_held_out_labels_make_the_interval_wide() -> None:
    few, many = World(5, num_validation=10), World(5, num_validation=400)
    narrow = estimated(many, many.trial(0, (HEAD, FULL)))
    for name, row in estimated(few, few.trial(0, (HEAD, FULL))).items():
        assert row.held_out_error > 1.5 * narrow[name].held_out_error


def test_errors_are_learned_only_where_something_was_said_and_something_came_of_it() -> None:
    world = World(6)
    made = estimate_in_detail(SPEC, world.trial(0, (HEAD, FULL)), world.dataset(0), RETRAIN, INFERENCE, NOTHING)
    outcome = world.outcome(0, RETRAIN[3])
    row = next(r for r in made.retrain if r.config == RETRAIN[3])
    window = WindowHistory(window=0, estimate=made, outcomes=(outcome,))
    (error,) = held_out_errors("north", 2, window)
    assert error.error == pytest.approx(outcome.result.accuracy_after - (row.held_out or 0.0))
    assert (error.age, error.scale) == (2, row.held_out_scale)
    cut = msgspec.structs.replace(outcome, result=msgspec.structs.replace(outcome.result, epochs=()))
    assert not list(held_out_errors("north", 2, msgspec.structs.replace(window, outcomes=(cut,))))
    unsaid = msgspec.structs.replace(
        made, retrain=tuple(msgspec.structs.replace(r, held_out=None) for r in made.retrain)
    )
    assert not list(held_out_errors("north", 2, msgspec.structs.replace(window, estimate=unsaid)))


def test_the_papers_method_says_the_same_of_both_and_no_interval() -> None:
    world = World(7)
    knobs = EstimatorKnobs(method="paper")
    profile = estimate(SPEC, world.trial(0, (HEAD, FULL)), world.dataset(0), RETRAIN, INFERENCE, NOTHING, knobs=knobs)
    assert profile.retrain
    assert all(row.held_out == row.accuracy_after and row.held_out_error == 0.0 for row in profile.retrain)


def test_nothing_to_predict_is_nothing() -> None:
    mean, error = predict([], [])
    assert mean.shape == error.shape == (0,)
