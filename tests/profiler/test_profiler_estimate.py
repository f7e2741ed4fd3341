"""The estimator end to end: trials of a world with known truth in, a stream's profile out."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.corrections import live_correction
from profiler.history import History
from profiler.microprofiler import EstimatorKnobs, estimate, estimate_in_detail
from profiler.monotone import rising
from profiler.records import StreamHistory, WindowHistory
from protocol.schema import EpochResult, TrialResult
from tests.profiler.profiler_world import INFERENCE, RETRAIN, SPEC, TRUE_QUALITY, World, no_more

HEAD, FULL = RETRAIN[4], RETRAIN[10]
NOTHING = StreamHistory(stream_id="north")


def play(world: World, windows: int, *, history: StreamHistory = NOTHING) -> StreamHistory:
    """Past windows in which two configurations were really run."""
    for window in range(windows):
        trial = world.trial(window, (HEAD, FULL))
        made = estimate_in_detail(SPEC, trial, world.dataset(window), RETRAIN, INFERENCE, history)
        outcomes = (world.outcome(window, RETRAIN[3]), world.outcome(window, RETRAIN[11]))
        row = WindowHistory(window=window, trial=trial, estimate=made, outcomes=outcomes)
        history = StreamHistory(stream_id="north", windows=(*history.windows, row))
    return history


@pytest.mark.parametrize("seed", range(3))
def test_two_trials_estimate_all_twelve_configurations(seed: int) -> None:
    world = World(seed)
    profile = estimate(SPEC, world.trial(0, (HEAD, FULL)), world.dataset(0), RETRAIN, INFERENCE, NOTHING)
    assert [r.retrain_id for r in profile.retrain] == [c.config_id for c in RETRAIN]
    errors = [abs(r.accuracy_after - world.after(c)) for r, c in zip(profile.retrain, RETRAIN, strict=True)]
    costs = [r.gpu_seconds / world.gpu_seconds(c) for r, c in zip(profile.retrain, RETRAIN, strict=True)]
    assert float(np.median(errors)) < 0.09
    assert max(abs(math.log(ratio)) for ratio in costs) < math.log(1.1)
    assert max(r.gpu_seconds for r in profile.retrain) > 10 * min(r.gpu_seconds for r in profile.retrain)
    assert all(r.accuracy_error > 0 for r in profile.retrain)


@pytest.mark.parametrize("windows", [0, 3])
@pytest.mark.parametrize("bias", [-0.2, 0.1])
def test_more_epochs_and_more_data_are_never_estimated_worse_within_a_group(windows: int, bias: float) -> None:
    world = World(4, bias=bias)
    history = play(world, windows)
    trial = world.trial(windows, (HEAD, FULL))
    profile = estimate(SPEC, trial, world.dataset(windows), RETRAIN, INFERENCE, history)
    after = {c: r.accuracy_after for c, r in zip(RETRAIN, profile.retrain, strict=True)}
    assert all(after[a] <= after[b] + 1e-9 for a in RETRAIN for b in RETRAIN if no_more(a, b))


@given(st.lists(st.floats(0.0, 1.0), min_size=len(RETRAIN), max_size=len(RETRAIN)))
def test_estimates_are_made_to_rise_and_stay_as_they_are_where_they_do(values: list[float]) -> None:
    drawn = dict(zip(RETRAIN, values, strict=True))
    risen = rising(drawn, no_more)
    for a in RETRAIN:
        group = [drawn[b] for b in RETRAIN if a.trained_fraction == b.trained_fraction]
        assert min(group) - 1e-9 <= risen[a] <= max(group) + 1e-9
        assert all(risen[a] <= risen[b] + 1e-9 for b in RETRAIN if no_more(a, b))
    assert rising(risen, no_more) == pytest.approx(risen)


def test_history_unlearns_a_steady_error_of_accuracy_and_cost() -> None:
    first: list[float] = []
    later: list[float] = []
    for seed in range(6):
        world = World(seed, bias=-0.12, slowdown=1.5)
        history = play(world, 4)
        for knobs, errors in ((EstimatorKnobs(use_history=False), first), (EstimatorKnobs(), later)):
            trial = world.trial(4, (HEAD, FULL))
            profile = estimate(SPEC, trial, world.dataset(4), RETRAIN, INFERENCE, history, knobs=knobs)
            errors += [r.accuracy_after - world.after(c) for r, c in zip(profile.retrain, RETRAIN, strict=True)]
            costs = [r.gpu_seconds / world.gpu_seconds(c) for r, c in zip(profile.retrain, RETRAIN, strict=True)]
            assert float(np.median(costs)) == pytest.approx(1.5 if knobs.use_history else 1.0, rel=0.12)
    assert abs(float(np.median(later))) < 0.8 * abs(float(np.median(first)))
    assert float(np.median(np.abs(later))) < 0.06


def test_intervals_widen_with_the_spread_of_past_errors() -> None:
    world = World(1)
    steady = play(world, 8)
    erratic_windows = []
    for number, window in enumerate(steady.windows):
        sign = 0.15 if number % 2 else -0.15
        outcomes = tuple(
            msgspec.structs.replace(
                o,
                result=msgspec.structs.replace(
                    o.result, accuracy_after=min(max(o.result.accuracy_after + sign, 0.0), 1.0)
                ),
            )
            for o in window.outcomes
        )
        erratic_windows.append(msgspec.structs.replace(window, outcomes=outcomes))
    erratic = StreamHistory(stream_id="north", windows=tuple(erratic_windows))
    trial = world.trial(8, (HEAD, FULL))
    narrow = estimate(SPEC, trial, world.dataset(8), RETRAIN, INFERENCE, steady)
    wide = estimate(SPEC, trial, world.dataset(8), RETRAIN, INFERENCE, erratic)
    assert sum(r.accuracy_error for r in wide.retrain) > 1.3 * sum(r.accuracy_error for r in narrow.retrain)


def test_a_group_without_a_trial_is_carried_over_from_an_earlier_window() -> None:
    world = World(2)
    history = play(world, 2)
    made = estimate_in_detail(SPEC, world.trial(2, (HEAD,)), world.dataset(2), RETRAIN, INFERENCE, history)
    sources = {row.config.trained_fraction: row.source for row in made.retrain}
    assert sources == {0.0: "trial", 1.0: "past_trial"}
    row = next(r for r in made.retrain if r.config == RETRAIN[11])
    assert abs(row.accuracy_after - world.after(RETRAIN[11])) < 0.1


def test_a_group_never_tried_is_taken_from_its_neighbour_with_a_wider_error() -> None:
    world = World(3)
    made = estimate_in_detail(SPEC, world.trial(0, (HEAD,)), world.dataset(0), RETRAIN, INFERENCE, NOTHING)
    own = {r.config: r for r in made.retrain if r.source == "trial"}
    other = {r.config: r for r in made.retrain if r.source == "neighbour"}
    assert len(own) == len(other) == 6
    assert other[RETRAIN[11]].accuracy_error > own[RETRAIN[5]].accuracy_error
    # Forward and backward of the whole network cost about three times the forward pass alone.
    assert 1.5 < other[RETRAIN[11]].gpu_seconds / own[RETRAIN[5]].gpu_seconds < 4.0


def test_inference_profiles_carry_measured_cost_and_accuracy_relative_to_the_best() -> None:
    world = World(5)
    profile = estimate(SPEC, world.trial(0, (HEAD,), num_frames=400), world.dataset(0), RETRAIN, INFERENCE, NOTHING)
    by_id = {i.inference_id: i for i in profile.inference}
    assert by_id["i1-r32"].relative_accuracy == 1.0
    for config in INFERENCE:
        row = by_id[config.config_id]
        assert row.relative_accuracy == pytest.approx(TRUE_QUALITY[config], abs=0.06)
        assert row.gpu_share_needed == pytest.approx(10.0 * world.busy_s_per_frame(config) * 1.1)
        assert row.memory_bytes == 500
    assert {r.config.trained_fraction: r.memory_bytes for r in profile.retrain if r.config} == {0.0: 1000, 1.0: 1000}


def test_on_few_frames_more_effort_is_never_taken_to_be_worse() -> None:
    world = World(6)
    rows = world.trial(0, (HEAD,), num_frames=20).inference
    lucky = tuple(msgspec.structs.replace(row, accuracy=0.9 if row.config.frame_interval == 5 else 0.6) for row in rows)
    trial = msgspec.structs.replace(world.trial(0, (HEAD,)), inference=lucky)
    profile = estimate(SPEC, trial, world.dataset(0), RETRAIN, INFERENCE, NOTHING)
    quality = {i.inference_id: i.relative_accuracy for i in profile.inference}
    assert quality["i1-r32"] >= quality["i2-r32"] >= quality["i5-r32"]
    many = msgspec.structs.replace(
        trial, inference=tuple(msgspec.structs.replace(row, num_frames=2000) for row in lucky)
    )
    profile = estimate(SPEC, many, world.dataset(0), RETRAIN, INFERENCE, NOTHING)
    assert {i.inference_id: i.relative_accuracy for i in profile.inference}["i5-r32"] == 1.0


def test_the_last_inference_measurement_is_kept_when_none_is_made() -> None:
    world = World(7)
    history = play(world, 1)
    trial = world.trial(1, (HEAD, FULL), inference=())
    kept = estimate(SPEC, trial, world.dataset(1), RETRAIN, INFERENCE, history)
    before = estimate(SPEC, None, world.dataset(0), RETRAIN, INFERENCE, history)
    assert kept.inference == before.inference


def test_live_accuracy_that_is_steadily_lower_than_predicted_lowers_the_estimates() -> None:
    world = World(8)
    history = NOTHING
    for window in range(5):
        trial = world.trial(window, (HEAD, FULL), num_samples=60)
        made = estimate_in_detail(SPEC, trial, world.dataset(window), RETRAIN, INFERENCE, history)
        row = WindowHistory(
            window=window,
            trial=trial,
            estimate=made,
            predicted=0.7 + made.live_correction,
            realised=0.6,
        )
        history = StreamHistory(stream_id="north", windows=(*history.windows, row))
    correction = live_correction(history)
    assert -0.1 <= correction < -0.05
    corrected = estimate(SPEC, trial, world.dataset(5), RETRAIN, INFERENCE, history)
    plain = estimate(
        SPEC, trial, world.dataset(5), RETRAIN, INFERENCE, history, knobs=EstimatorKnobs(correct_live=False)
    )
    assert corrected.accuracy_now == pytest.approx(plain.accuracy_now + correction)
    assert corrected.retrain[0].accuracy_after == pytest.approx(plain.retrain[0].accuracy_after + correction)


def test_a_diverged_trial_does_not_drag_the_curve_and_a_diverged_retraining_is_penalised() -> None:
    world = World(9)
    trial = world.trial(0, (HEAD, FULL))
    broken = msgspec.structs.replace(
        trial.retrain[1],
        epochs=(
            *trial.retrain[1].epochs[:3],
            EpochResult(epoch=3, accuracy=0.02, loss=math.nan, busy_s=0.2),
        ),
    )
    profile = estimate(
        SPEC,
        msgspec.structs.replace(trial, retrain=(trial.retrain[0], broken)),
        world.dataset(0),
        RETRAIN,
        INFERENCE,
        NOTHING,
    )
    assert profile.retrain[11].accuracy_after > 0.6

    healthy = play(world, 3)
    diverged = []
    for window in healthy.windows:
        bad = window.outcomes[1]
        epochs = (EpochResult(epoch=1, accuracy=0.1, loss=math.inf, busy_s=0.3),)
        result = msgspec.structs.replace(bad.result, checkpoint=None, accuracy_after=0.1, epochs=epochs, reason="NaN")
        diverged.append(
            msgspec.structs.replace(window, outcomes=(window.outcomes[0], msgspec.structs.replace(bad, result=result)))
        )
    after = StreamHistory(stream_id="north", windows=tuple(diverged))
    trial = world.trial(3, (HEAD, FULL))
    good = estimate(SPEC, trial, world.dataset(3), RETRAIN, INFERENCE, healthy)
    worse = estimate(SPEC, trial, world.dataset(3), RETRAIN, INFERENCE, after)
    assert worse.retrain[11].accuracy_after < good.retrain[11].accuracy_after - 0.05


def test_a_new_head_that_starts_low_is_judged_by_its_own_rise() -> None:
    world = World(13)
    trial = world.trial(0, (FULL,))
    rise = (0.6, 0.35, 0.5, 0.58, 0.64)
    epochs = tuple(
        msgspec.structs.replace(epoch, accuracy=level)
        for epoch, level in zip(trial.retrain[0].epochs, rise, strict=True)
    )
    fresh = msgspec.structs.replace(trial, retrain=(msgspec.structs.replace(trial.retrain[0], epochs=epochs),))
    profile = estimate(SPEC, fresh, world.dataset(0), RETRAIN, INFERENCE, NOTHING)
    after = {c: r.accuracy_after for c, r in zip(RETRAIN, profile.retrain, strict=True)}
    assert after[RETRAIN[11]] > 0.66
    assert after[RETRAIN[6]] < after[RETRAIN[11]] - 0.02


@pytest.mark.parametrize("case", ["no trial, no history", "no samples", "failed trials", "one class, all right"])
def test_hardly_any_information_still_gives_a_usable_profile(case: str) -> None:
    world = World(10)
    trial: TrialResult | None = None
    if case == "no samples":
        world.num_train = 0
        trial = msgspec.structs.replace(world.trial(0, ()), inference=())
    elif case == "failed trials":
        rows = tuple(msgspec.structs.replace(row, epochs=()) for row in world.trial(0, (HEAD, FULL)).retrain)
        trial = msgspec.structs.replace(world.trial(0, ()), retrain=rows, inference=())
    elif case == "one class, all right":
        world.accuracy_now = 1.0
        rows = tuple(
            msgspec.structs.replace(row, epochs=tuple(msgspec.structs.replace(e, accuracy=1.0) for e in row.epochs))
            for row in World(0).trial(0, (HEAD, FULL)).retrain
        )
        trial = msgspec.structs.replace(world.trial(0, ()), retrain=rows)
    profile = estimate(SPEC, trial, world.dataset(0), RETRAIN, INFERENCE, NOTHING)
    assert len(profile.inference) == len(INFERENCE)
    assert max(i.relative_accuracy for i in profile.inference) == 1.0
    assert all(0.0 < i.gpu_share_needed < math.inf for i in profile.inference)
    if case == "one class, all right":
        assert all(r.accuracy_after > 0.97 for r in profile.retrain)
    else:
        assert profile.retrain == ()


def test_a_profile_survives_the_wire_and_the_history_file_gives_the_same_estimate(tmp_path: Path) -> None:
    world = World(11)
    history = play(world, 2)
    with History(tmp_path / "h.sqlite") as store:
        for row in history.windows:
            assert row.trial is not None
            assert row.estimate is not None
            store.record_trial(row.trial, time_s=0.0)
            store.record_estimate(row.estimate, time_s=0.0)
            for outcome in row.outcomes:
                store.record_outcome(outcome, time_s=0.0)
        restored = store.view("north")
    trial = world.trial(2, (HEAD, FULL))
    profile = estimate(SPEC, trial, world.dataset(2), RETRAIN, INFERENCE, history)
    assert estimate(SPEC, trial, world.dataset(2), RETRAIN, INFERENCE, restored) == profile
    assert msgspec.json.decode(msgspec.json.encode(profile), type=type(profile)) == profile


def test_no_inference_configuration_is_refused() -> None:
    world = World(12)
    with pytest.raises(ValueError, match="north has no inference configuration"):
        estimate(SPEC, None, world.dataset(0), RETRAIN, (), NOTHING)
