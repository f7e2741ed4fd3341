"""What a site may throw at the profiler: no crash, a sensible estimate, a wide interval."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from profiler.history import History
from profiler.microprofiler import EstimatorKnobs, estimate_in_detail
from profiler.paper import extrapolate
from profiler.records import Estimate, StreamHistory
from profiler.service import SiteProfiler
from protocol.plan import StreamProfile
from protocol.schema import DatasetRef, EpochResult, RetrainTrial, StreamSpec, TrialResult
from tests.profiler.profiler_world import INFERENCE, RETRAIN, SPEC, World

NOTHING = StreamHistory(stream_id="north")
TRIED = (RETRAIN[4], RETRAIN[10])


def site(path: Path) -> SiteProfiler:
    return SiteProfiler(History(path), RETRAIN, INFERENCE, num_streams=2, budget_gpu_s=5.0, window_s=60.0)


def usable(profile: StreamProfile) -> None:
    """Every number is one, accuracies lie in [0, 1], costs and shares are positive."""
    assert 0.0 <= profile.accuracy_now <= 1.0
    for retrain in profile.retrain:
        assert 0.0 <= retrain.accuracy_after <= 1.0
        assert 0.0 < retrain.gpu_seconds < 1e6
        assert 0.0 < retrain.accuracy_error <= 0.5
    for inference in profile.inference:
        assert inference.gpu_share_needed > 0.0
        assert 0.0 <= inference.relative_accuracy <= 1.0


def known_site(path: Path, windows: int = 4) -> tuple[SiteProfiler, World]:
    world, profiler = World(21), site(path)
    for window in range(windows):
        dataset = world.dataset(window)
        profiler.choose(SPEC, window, dataset)
        profiler.estimate(SPEC, world.trial(window, TRIED), dataset)
        outcome = world.outcome(window, RETRAIN[3 + 8 * (window % 2)])
        profiler.retrained(SPEC, outcome.result, 0.8, 5.0, True)
        profiler.window_closed("north", window, 0.7, 0.7)
    return profiler, world


def test_without_any_history_the_interval_is_wide_and_history_narrows_it(tmp_path: Path) -> None:
    profiler, world = known_site(tmp_path / "h.sqlite", windows=6)
    known = profiler.estimate(SPEC, world.trial(6, TRIED), world.dataset(6))
    fresh = estimate_in_detail(SPEC, world.trial(6, TRIED), world.dataset(6), RETRAIN, INFERENCE, NOTHING).profile
    usable(fresh)
    # The 80 % interval of a first estimate is a good 20 points wide.
    assert min(2 * 1.2816 * r.accuracy_error for r in fresh.retrain) > 0.15
    assert sum(r.accuracy_error for r in known.retrain) < sum(r.accuracy_error for r in fresh.retrain)


def test_a_class_never_seen_before_is_new_drift_and_trials_come_back(tmp_path: Path) -> None:
    profiler, world = known_site(tmp_path / "h.sqlite")
    same = world.dataset(4)
    new = msgspec.structs.replace(same, class_counts=(30, 40, 230))
    before = profiler.choose(SPEC, 4, same)
    usable(profiler.estimate(SPEC, world.trial(4, before.retrain), same))
    after = profiler.choose(SPEC, 5, new)
    usable(profiler.estimate(SPEC, world.trial(5, after.retrain), new))
    shifted = msgspec.structs.replace(same, window=6, class_counts=(270, 15, 15))
    assert len(profiler.choose(SPEC, 6, shifted).retrain) >= len(before.retrain)


@pytest.mark.parametrize("counts", [(300, 0), (0, 300), (300,)])
def test_labels_of_one_class_only_are_estimated_like_any_other(tmp_path: Path, counts: tuple[int, ...]) -> None:
    profiler, world = known_site(tmp_path / "h.sqlite")
    dataset = msgspec.structs.replace(world.dataset(4), class_counts=counts)
    choice = profiler.choose(SPEC, 4, dataset)
    perfect = world.trial(4, TRIED)
    rows = tuple(
        msgspec.structs.replace(r, epochs=tuple(msgspec.structs.replace(e, accuracy=1.0) for e in r.epochs))
        for r in perfect.retrain
    )
    usable(profiler.estimate(SPEC, msgspec.structs.replace(perfect, accuracy_now=1.0, retrain=rows), dataset))
    assert choice.num_epochs >= 1


def empty_dataset(window: int, *, train: int = 0, validation: int = 0) -> DatasetRef:
    return DatasetRef(
        path="north/e",
        stream_id="north",
        window=window,
        num_train=train,
        num_validation=validation,
        class_counts=(train + validation, 0),
    )


@pytest.mark.parametrize("with_history", [False, True])
def test_an_empty_window_offers_no_retraining_and_still_serves(tmp_path: Path, with_history: bool) -> None:
    profiler, _ = known_site(tmp_path / "h.sqlite", windows=3 if with_history else 0)
    choice = profiler.choose(SPEC, 7, empty_dataset(7))
    assert choice.retrain == ()
    nothing = TrialResult(stream_id="north", window=7, accuracy_now=0.0, retrain=(), inference=(), seconds=0.1)
    profile = profiler.estimate(SPEC, nothing, empty_dataset(7))
    usable(profile)
    assert profile.retrain == ()
    assert profile.inference


def test_three_labels_are_believed_hardly_at_all(tmp_path: Path) -> None:
    world = World(9, num_train=2, num_validation=1)
    trial = world.trial(0, TRIED, num_samples=2)
    lucky = tuple(
        msgspec.structs.replace(r, epochs=tuple(msgspec.structs.replace(e, accuracy=1.0) for e in r.epochs))
        for r in trial.retrain
    )
    few = msgspec.structs.replace(trial, accuracy_now=0.6, retrain=lucky)
    made = estimate_in_detail(SPEC, few, world.dataset(0), RETRAIN, INFERENCE, NOTHING)
    usable(made.profile)
    assert max(row.accuracy_after for row in made.retrain) < 0.85  # one crop that was right is no 100 %
    assert min(2 * 1.2816 * r.accuracy_error for r in made.retrain) > 0.4


def test_labels_that_are_all_wrong_promise_nothing(tmp_path: Path) -> None:
    profiler, world = known_site(tmp_path / "h.sqlite")
    trial = world.trial(4, TRIED)
    rows = tuple(
        msgspec.structs.replace(r, epochs=tuple(msgspec.structs.replace(e, accuracy=0.0) for e in r.epochs))
        for r in trial.retrain
    )
    wrong = msgspec.structs.replace(trial, accuracy_now=0.0, retrain=rows)
    before = profiler.estimate(SPEC, world.trial(3, TRIED), world.dataset(3))
    profile = profiler.estimate(SPEC, wrong, world.dataset(4))
    usable(profile)
    assert max(r.accuracy_after for r in profile.retrain) < max(r.accuracy_after for r in before.retrain)
    # One such window does not spoil what is known for the next.
    after = profiler.estimate(SPEC, world.trial(5, TRIED), world.dataset(5))
    assert max(r.accuracy_after for r in after.retrain) > 0.65


def test_a_stream_that_comes_back_after_hours_is_estimated_from_what_was_known(tmp_path: Path) -> None:
    profiler, world = known_site(tmp_path / "h.sqlite")
    late = world.dataset(5000)
    choice = profiler.choose(SPEC, 5000, late, drift=1.0)
    assert choice.retrain  # all that was known is old: something is tried
    usable(profiler.estimate(SPEC, world.trial(5000, choice.retrain), late))
    usable(profiler.estimate(SPEC, world.trial(5001, ()), world.dataset(5001)))


def test_a_new_stream_of_a_known_site_is_estimated_without_any_trial(tmp_path: Path) -> None:
    profiler, world = known_site(tmp_path / "h.sqlite", windows=5)
    other = StreamSpec(stream_id="south", source=SPEC.source, classes=SPEC.classes)
    nothing = msgspec.structs.replace(world.trial(5, ()), stream_id="south")
    dataset = msgspec.structs.replace(world.dataset(5), stream_id="south")
    profile = profiler.estimate(other, nothing, dataset)
    usable(profile)
    assert [r.retrain_id for r in profile.retrain] == [c.config_id for c in RETRAIN]
    after = [world.after(c) for c in RETRAIN]
    errors = [abs(r.accuracy_after - truth) for r, truth in zip(profile.retrain, after, strict=True)]
    assert float(np.median(errors)) < 0.12
    costs = [r.gpu_seconds / world.gpu_seconds(c) for r, c in zip(profile.retrain, RETRAIN, strict=True)]
    assert float(np.median(np.abs(np.log(costs)))) < 0.3


# ---------------------------------------------------------------- the paper's method


def test_the_papers_method_tries_everything_and_remembers_nothing(tmp_path: Path) -> None:
    knobs = EstimatorKnobs(method="paper")
    profiler = SiteProfiler(
        History(tmp_path / "h.sqlite"), RETRAIN, INFERENCE, num_streams=1, budget_gpu_s=0.1, estimator_knobs=knobs
    )
    world = World(4)
    seen = []
    for window in range(3):
        choice = profiler.choose(SPEC, window, world.dataset(window))
        assert {c.trained_fraction for c in choice.retrain} == {0.0, 1.0}
        assert (choice.data_share, choice.num_epochs) == (0.1, 5)
        trial = msgspec.structs.replace(World(4).trial(0, choice.retrain, num_samples=30, num_epochs=5), window=window)
        profile = profiler.estimate(SPEC, trial, world.dataset(window))
        seen.append([(r.accuracy_after, r.gpu_seconds, r.accuracy_error) for r in profile.retrain])
        profiler.retrained(SPEC, world.outcome(window, RETRAIN[3]).result, 0.8, 5.0, True)
    assert seen[0] == seen[1] == seen[2]
    assert all(error == 0.0 for _, _, error in seen[0])


def test_the_papers_curve_saturates_and_stays_within_bounds() -> None:
    trial = RetrainTrial(
        config=RETRAIN[4],
        num_samples=30,
        total_samples=300,
        startup_s=0.1,
        epochs=tuple(EpochResult(epoch=k, accuracy=0.9 - 0.5 / (1 + k), loss=0.5, busy_s=0.1) for k in range(6)),
    )
    values = [extrapolate(trial, epochs) for epochs in (1, 5, 10, 40)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(0.9 - 0.5 / 41, abs=0.02)
    rising = msgspec.structs.replace(
        trial, epochs=tuple(EpochResult(epoch=k, accuracy=0.1 + 0.15 * k, loss=0.5, busy_s=0.1) for k in range(6))
    )
    assert extrapolate(rising, 100) == 1.0


def test_an_estimate_says_where_it_comes_from() -> None:
    world = World(6)
    made: Estimate = estimate_in_detail(SPEC, world.trial(0, TRIED), world.dataset(0), RETRAIN, INFERENCE, NOTHING)
    assert {row.source for row in made.retrain} == {"trial"}
    assert all(row.scale > 0.0 for row in made.retrain)
    # One factor between the estimator's own error and what is reported, the same for the whole stream.
    ratios = {round(row.accuracy_error / row.scale, 6) for row in made.retrain}
    assert len(ratios) == 1
