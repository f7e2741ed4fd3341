"""Estimates of retraining configurations: curves, their corrections, the site's experience, and their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from profiler.corrections import DECAY, cost_ratio, reached_best, retraining_costs, shrunk_mean
from profiler.costs import CostModel, GroupKey, alike, cost_model, diverged, group_key, key_distance, neighbour_cost
from profiler.curves import LearningCurve, effective_effort, fit_curve, likely_ceiling
from profiler.intervals import Weights, factor
from profiler.knowledge import SiteKnowledge
from profiler.monotone import rising
from profiler.outcomes import held_out_errors, worth_errors
from profiler.points import noise, trial_points, wanted, window_points
from profiler.process import Kind, adapted, predict, thinned
from profiler.records import ConfigEstimate, EstimateSource, StreamHistory
from protocol.schema import DatasetRef, Record, RetrainConfig, RetrainTrial, TrialResult

# Standard error added when a curve is carried over from an earlier window (per window of age, up to four) or taken
# from another configuration (per unit of distance).
ERROR_PER_AGE = 0.02
ERROR_PER_DISTANCE = 0.03
MAX_ERROR = 0.5
# Estimates without an error that a stream is assumed to have had, when its own mean error is taken off.
HABIT_STRENGTH = 2.0
# Weight of the configuration's own trial curve, beside the process, in what the held-out split will say. Both were
# measured on that split; together they are better than either (benchmarks/bench_profiler_replay.py).
CURVE_WEIGHT = 0.35
# Two models are measured on the same crops and mostly right about the same ones: part of the sampling noise that is a
# model's own, and not in what was measured before on the split.
OWN_NOISE = 0.5
# How far held-out accuracies are off depends on the scene of a window, and gets less with every window that is known:
# the newest dozen of errors, of whatever stream, tell nearly all.
SPLIT_WEIGHTS = Weights(decay=0.1, number=12, site=1.0, prior=0.15, coming=0.3)
FRESH_START_DROP = 0.08
# Part of the error left after a short trial that long training still removes: little for a head alone, much for a
# whole small network (benchmarks/bench_profiler_city.py).
HEAD_GAIN = 0.15
DEPTH_GAIN = 0.4


class _Curve(Record, frozen=True, kw_only=True):
    """A curve to read a configuration's accuracy from. ``start``: accuracy when its trial began."""

    curve: LearningCurve
    start: float
    source: EstimateSource
    extra_error: float


class _Expected(Record, frozen=True, kw_only=True):
    """Of one configuration: accuracy on frames to come, and what the window's held-out split will say; their errors."""

    after: float
    error: float
    held_out: float
    held_out_error: float


def estimate_retrain(
    trial: TrialResult | None,
    dataset: DatasetRef,
    retrain: Sequence[RetrainConfig],
    accuracy_now: float,
    history: StreamHistory,
    site: SiteKnowledge,
) -> tuple[ConfigEstimate, ...]:
    """One row per configuration whose cost is known or can be told from others'; see the module."""
    curves: dict[GroupKey, _Curve] = {}
    costs: dict[GroupKey, CostModel] = {}
    past = [window.trial for window in history.windows if window.trial is not None]
    # Newest last, so that it wins; this window's own trials come at the very end.
    for age, result in [*((len(past) - i, t) for i, t in enumerate(past)), *([(0, trial)] if trial else [])]:
        for key, group in _by_group(result.retrain).items():
            fitted = _fit(group, dataset.num_validation, reached_best(group[0].config, history))
            cost = next((c for c in map(cost_model, group) if c is not None), None)
            if fitted is None or cost is None:
                continue
            curves[key] = _Curve(
                curve=fitted,
                start=_began_at(group, result.accuracy_now),
                source="past_trial" if age else "trial",
                extra_error=ERROR_PER_AGE * math.sqrt(min(age, 4)),
            )
            costs[key] = cost

    # The stream's own retrainings know best, then those of others where its trials do not contradict them.
    known_costs = {**site.costs, **costs}
    own = retraining_costs(history.windows, known_costs)
    known_costs |= {key: cost for key, cost in site.retrained.items() if alike(cost, costs.get(key))}
    known_costs |= own
    expected = _expected(trial, dataset, retrain, accuracy_now, history, site)
    # The process takes the serving model's accuracy for exact; on a handful of labels it is anything but.
    now_error = noise(accuracy_now, dataset.num_train + dataset.num_validation)
    me = history.stream_id
    ages = list(enumerate(reversed(history.windows)))
    own_errors = [e for age, w in ages for e in worth_errors(me, age, w, site.gaps)]
    # What the stream's past estimates were too low by: whatever the process has no term for.
    habit, _ = shrunk_mean(((e.error, DECAY**e.age) for e in own_errors), HABIT_STRENGTH)
    widened = factor([*own_errors, *(e for e in site.errors if e.stream_id != me)], me)
    split_errors = [e for age, w in ages for e in held_out_errors(me, age, w)]
    split_errors += [e for e in site.held_out_errors if e.stream_id != me]
    split_widened = factor(split_errors, me, weights=SPLIT_WEIGHTS)
    rows = []
    for config in retrain:
        key = group_key(config)
        cost = known_costs.get(key) or neighbour_cost(key, known_costs)
        if cost is None:
            continue
        effort = effective_effort(config.epochs, config.data_fraction * dataset.num_train)
        found = curves.get(key) or _nearest(key, curves)
        after = expected[config].after + habit
        scale = math.hypot(expected[config].error, now_error)
        held_out, split_error = expected[config].held_out, expected[config].held_out_error
        accuracy, error = after, scale
        source: EstimateSource = "site" if site.points else "assumed"
        if found is not None:
            # The curve alone, as it is read without the process: kept beside the estimate to compare the two.
            accuracy, error = found.curve.predict(effort)
            if found.source == "trial":
                held_out = (1.0 - CURVE_WEIGHT) * held_out + CURVE_WEIGHT * accuracy
                split_error *= 1.0 - CURVE_WEIGHT
            if found.start != accuracy_now:
                accuracy = _carry_over(accuracy, found.start, accuracy_now)
            error, source = math.hypot(error, found.extra_error), found.source
        split_scale = math.hypot(split_error, OWN_NOISE * noise(held_out, dataset.num_validation))
        base = cost.gpu_seconds(config, dataset.num_train)
        rows.append(
            ConfigEstimate(
                config=config,
                source=source,
                curve_accuracy=_clip(accuracy),
                curve_error=error,
                base_gpu_seconds=base,
                accuracy_after=_clip(after),
                accuracy_error=min(scale * widened, MAX_ERROR),
                gpu_seconds=site.slowness.work_s(base * cost_ratio(config, history, known_costs)),
                scale=scale,
                start_s=site.slowness.start_s,
                held_out=_clip(held_out),
                held_out_scale=split_scale,
                held_out_error=min(split_scale * split_widened, MAX_ERROR),
            )
        )
    return tuple(rows)


def _expected(
    trial: TrialResult | None,
    dataset: DatasetRef,
    retrain: Sequence[RetrainConfig],
    accuracy_now: float,
    history: StreamHistory,
    site: SiteKnowledge,
) -> dict[RetrainConfig, _Expected]:
    """The process, averaged with the regression where there is one and frames to come are asked about.

    The two err differently (one knows this window's trials and models' luck, the other is linear and stiff), and with
    hundreds of retrainings their mean is better than either on published measurements.
    """
    live, order = site.gaps is not None, len(history.windows)
    own = [
        point
        for place, window in enumerate(history.windows)
        for point in window_points(history.stream_id, place, window, live=live)
    ]
    if trial is not None:
        own += trial_points(history.stream_id, order, accuracy_now, trial, dataset.num_validation)
    points = thinned(own, [p for p in site.points if p.stream_id != history.stream_id])
    kinds: tuple[Kind, Kind] = ("live" if live else "plain", "split")
    targets = [
        p for kind in kinds for p in wanted(history.stream_id, order, accuracy_now, retrain, dataset.num_train, kind)
    ]
    means, errors = (np.split(values, 2) for values in predict(points, targets, adapted(points)))
    after = {config: float(mean) for config, mean in zip(retrain, means[0], strict=True)}
    if site.prior is not None:
        after = {c: site.prior.blended(a, history.stream_id, accuracy_now, c) for c, a in after.items()}
    # Neither process nor regression is monotone by construction.
    after = rising(after, _no_longer)
    held_out = rising(dict(zip(retrain, means[1].tolist(), strict=True)), _no_longer)
    return {
        config: _Expected(
            after=after[config], error=float(error), held_out=held_out[config], held_out_error=float(split_error)
        )
        for config, error, split_error in zip(retrain, *errors, strict=True)
    }


def _no_longer(a: RetrainConfig, b: RetrainConfig) -> bool:
    """Of one group, with no more epochs and no more data."""
    return group_key(a) == group_key(b) and a.epochs <= b.epochs and a.data_fraction <= b.data_fraction


def _by_group(trials: Sequence[RetrainTrial]) -> dict[GroupKey, list[RetrainTrial]]:
    groups: dict[GroupKey, list[RetrainTrial]] = {}
    for trial in sorted(trials, key=lambda t: -len(t.epochs) * t.num_samples):
        groups.setdefault(group_key(trial.config), []).append(trial)
    return groups


def _fit(trials: Sequence[RetrainTrial], num_validation: int, reached: float | None) -> LearningCurve | None:
    points = []
    for trial in trials:
        # A diverged epoch's accuracy is chance; the curve keeps what was reached before it.
        epochs = [epoch for epoch in trial.epochs if epoch.epoch == 0 or not diverged(epoch.loss)]
        if len(epochs) > 2 and epochs[0].epoch == 0 and epochs[1].accuracy < epochs[0].accuracy - FRESH_START_DROP:
            # Training began below the serving model (a new head): epoch 0 is no point of its curve.
            epochs = epochs[1:]
        points += [(effective_effort(epoch.epoch, trial.num_samples), epoch.accuracy) for epoch in epochs]
    if not points:
        return None
    efforts, accuracies = zip(*points, strict=True)
    # Where the curve may end: as far as this student got before, but never below what the trial itself reached. A
    # trial that begins with a dip is expected to come back above the serving model, which it started from.
    gain = HEAD_GAIN + DEPTH_GAIN * trials[0].config.trained_fraction
    start = max(epoch.accuracy for trial in trials for epoch in trial.epochs)
    ceiling = likely_ceiling(start, gain) if reached is None else max(reached, *accuracies)
    return fit_curve(efforts, accuracies, ceiling=ceiling, num_validation=num_validation)


def _began_at(group: Sequence[RetrainTrial], accuracy_now: float) -> float:
    """Accuracy of the serving model on the split that the trials of ``group`` were validated on.

    The curve is read against it: ``accuracy_now`` may come from many more labels than that split holds.
    """
    begun = [epoch.accuracy for trial in group for epoch in trial.epochs[:1] if epoch.epoch == 0]
    return begun[0] if begun else accuracy_now


def _carry_over(accuracy: float, start: float, now: float) -> float:
    """The same share of the remaining error is removed (or added back) as in the window of the trial."""
    if accuracy < start:
        return now * accuracy / start
    return now + (1.0 - now) * (accuracy - start) / max(1.0 - start, 1e-6)


def _nearest(key: GroupKey, curves: dict[GroupKey, _Curve]) -> _Curve | None:
    if not curves:
        return None
    # This window's trials are preferred to carried-over ones at the same distance.
    nearest = min(curves, key=lambda k: (key_distance(key, k), curves[k].extra_error))
    found = curves[nearest]
    extra = math.hypot(found.extra_error, ERROR_PER_DISTANCE * math.sqrt(max(key_distance(key, nearest), 1.0)))
    return _Curve(curve=found.curve, start=found.start, source="neighbour", extra_error=extra)


def _clip(accuracy: float) -> float:
    return min(max(accuracy, 0.0), 1.0)
