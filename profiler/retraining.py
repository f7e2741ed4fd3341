"""Estimates of retraining configurations: curves, their corrections, the site's experience, and their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

from profiler.corrections import accuracy_correction, cost_ratio, from_logit, logit, reached_best
from profiler.costs import CostModel, GroupKey, cost_model, diverged, group_key, key_distance, neighbour_cost
from profiler.curves import MIN_ERROR, LearningCurve, effective_effort, fit_curve, likely_ceiling
from profiler.intervals import factor
from profiler.priors import ERROR_PER_HALF_WIDTH
from profiler.records import ConfigEstimate, EstimateSource, StreamHistory
from profiler.site import SiteKnowledge
from profiler.targets import worth
from protocol.schema import DatasetRef, Record, RetrainConfig, RetrainTrial, TrialResult

# Standard error added when a curve is carried over from an earlier window (per window of age, up to four) or taken
# from another configuration (per unit of distance).
ERROR_PER_AGE = 0.02
ERROR_PER_DISTANCE = 0.03
# Weight of a curve's own standard error against the spread of past errors, in observations.
CURVE_ERROR_STRENGTH = 2.0
MAX_ERROR = 0.5
FRESH_START_DROP = 0.08
# Part of the error left after a short trial that long training still removes: little for a head alone, much for a
# whole small network (benchmarks/bench_profiler_city.py).
HEAD_GAIN = 0.15
DEPTH_GAIN = 0.4
# Where neither a trial nor another stream says anything: half of that gain after so many epochs, give or take this.
ASSUMED_EPOCHS = 6.0
ASSUMED_ERROR = 0.15


class _Curve(Record, frozen=True, kw_only=True):
    """A curve to read a configuration's accuracy from. ``start``: accuracy when its trial began."""

    curve: LearningCurve
    start: float
    source: EstimateSource
    extra_error: float


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

    known_costs = {**site.costs, **costs}
    rows = []
    for config in retrain:
        key = group_key(config)
        cost = known_costs.get(key) or neighbour_cost(key, known_costs)
        if cost is None:
            continue
        effort = effective_effort(config.epochs, config.data_fraction * dataset.num_train)
        found = curves.get(key) or _nearest(key, curves)
        if found is not None:
            accuracy, error = found.curve.predict(effort)
            if found.start != accuracy_now:
                accuracy = _carry_over(accuracy, found.start, accuracy_now)
            error, source = math.hypot(error, found.extra_error), found.source
        else:
            accuracy, error = _assumed(config, effort, dataset.num_train, accuracy_now)
            source = "site" if site.prior is not None else "assumed"
        after, scale = _blend(accuracy, error, config, history, site)
        if site.prior is not None:
            expected, half_width = site.prior.predict(history.stream_id, accuracy_now, config)
            after, scale = _weigh((after, scale), (expected, half_width * ERROR_PER_HALF_WIDTH))
        base = cost.gpu_seconds(config, dataset.num_train)
        rows.append(
            ConfigEstimate(
                config=config,
                source=source,
                curve_accuracy=accuracy,
                curve_error=error,
                base_gpu_seconds=base,
                accuracy_after=_clip(after),
                accuracy_error=min(scale * factor(site.errors, history.stream_id), MAX_ERROR),
                gpu_seconds=base * cost_ratio(config, history),
                scale=scale,
            )
        )
    return tuple(rows)


def _assumed(config: RetrainConfig, effort: float, num_train: int, accuracy_now: float) -> tuple[float, float]:
    """Accuracy that training of this depth and effort may get to, and its wide error: nothing was measured."""
    reach = HEAD_GAIN + DEPTH_GAIN * config.trained_fraction
    part = effort / (effort + ASSUMED_EPOCHS * max(num_train, 1))
    return accuracy_now + reach * part * (1.0 - accuracy_now), ASSUMED_ERROR


def _blend(
    accuracy: float, error: float, config: RetrainConfig, history: StreamHistory, site: SiteKnowledge
) -> tuple[float, float]:
    """Curve estimate corrected by past errors, then weighed by precision against what the configuration reached."""
    gap = site.gaps.retrained if site.gaps is not None else 0.0
    learned = accuracy_correction(config, history, lambda w, o: worth(w, o, site.gaps), gap)
    corrected = from_logit(logit(accuracy) + gap + learned.bias)
    variance = error**2
    if learned.spread is not None:
        # The slope of the accuracy over its logit takes the spread back to points.
        spread = max(learned.spread * corrected * (1.0 - corrected), MIN_ERROR)
        variance = (CURVE_ERROR_STRENGTH * error**2 + learned.weight * spread**2) / (
            CURVE_ERROR_STRENGTH + learned.weight
        )
    if learned.level is not None:
        corrected, error = _weigh((corrected, math.sqrt(variance)), learned.level)
    else:
        error = math.sqrt(variance)
    return _clip(corrected), min(error, MAX_ERROR)


def _weigh(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    """Mean of two (value, standard error) by their precisions, and its standard error."""
    mine, theirs = 1.0 / max(a[1] ** 2, 1e-9), 1.0 / max(b[1] ** 2, 1e-9)
    return (mine * a[0] + theirs * b[0]) / (mine + theirs), math.sqrt(1.0 / (mine + theirs))


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
