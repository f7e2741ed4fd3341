"""The micro-profiler: from short trials and history to a stream's profile.

What the accuracies mean: a planner multiplies ``accuracy_now`` or ``accuracy_after`` (a) with ``relative_accuracy``
(q). Both a's are held-out accuracies of the model when analysed with the *best* inference configuration, so that
configuration has q = 1 and all others are relative to it; a * q is the live accuracy with another one.

Method (NSDI 2022 section 4.3): train each configuration for a few epochs on a small sample, fit a saturating curve
to its validation accuracy, extrapolate to all epochs and data. Beyond the paper: configurations that differ only in
epochs and data fraction share one trial; errors of past estimates correct the new ones and give them their
standard errors; what has no trial in this window is carried over from an earlier one or from a neighbour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from profiler.corrections import accuracy_correction, cost_ratio, from_logit, live_correction, logit, reached_best
from profiler.costs import CostModel, GroupKey, cost_model, diverged, group_key, key_distance, neighbour_cost
from profiler.curves import MIN_ERROR, LearningCurve, effective_effort, fit_curve, likely_ceiling
from profiler.priors import ERROR_PER_HALF_WIDTH, AccuracyPrior
from profiler.quality import measure_inference
from profiler.records import ConfigEstimate, Estimate, EstimateSource, InferenceEstimate, StreamHistory
from protocol.plan import InferenceProfile, RetrainProfile, StreamProfile
from protocol.schema import (
    DatasetRef,
    InferenceConfig,
    Record,
    RetrainConfig,
    RetrainTrial,
    StreamSpec,
    TrialResult,
)

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
MIN_SHARE = 1e-4


class EstimatorKnobs(Record, frozen=True, kw_only=True):
    """Choices of the estimator.

    ``share_safety``: factor on the measured GPU share of inference, head-room for bursts of objects.
    ``use_history``: False = the paper's micro-profiler, which only knows this window's trials.
    ``correct_live``: learn the difference between validation and live accuracy.
    ``assumed_share``: GPU share of an inference configuration at frame interval 1 that could never be measured
    (its trials failed); generous, so that the stream is served.
    """

    share_safety: float = 1.1
    use_history: bool = True
    correct_live: bool = True
    assumed_share: float = 0.5


def estimate(
    spec: StreamSpec,
    trial: TrialResult | None,
    dataset: DatasetRef,
    retrain: tuple[RetrainConfig, ...],
    inference: tuple[InferenceConfig, ...],
    history: StreamHistory,
    *,
    prior: AccuracyPrior | None = None,
    knobs: EstimatorKnobs | None = None,
) -> StreamProfile:
    """The profile of :func:`estimate_in_detail` alone."""
    return estimate_in_detail(spec, trial, dataset, retrain, inference, history, prior=prior, knobs=knobs).profile


def estimate_in_detail(
    spec: StreamSpec,
    trial: TrialResult | None,
    dataset: DatasetRef,
    retrain: tuple[RetrainConfig, ...],
    inference: tuple[InferenceConfig, ...],
    history: StreamHistory,
    *,
    prior: AccuracyPrior | None = None,
    knobs: EstimatorKnobs | None = None,
) -> Estimate:
    """Estimate what every configuration costs and is worth on ``dataset``.

    ``trial`` None or without some configurations: those are predicted from history or neighbours.
    ``prior``: what past retrainings of all streams of the site say, weighed in by its precision. A retraining
    configuration whose cost nothing says anything about is left out ("no retraining" is always a choice
    besides), and so are all of them when ``dataset`` holds no training samples. Raises ValueError without any
    inference configuration.
    """
    knobs = knobs or EstimatorKnobs()
    if not inference:
        raise ValueError(f"stream {spec.stream_id} has no inference configuration to estimate")
    known = history if knobs.use_history else StreamHistory(stream_id=spec.stream_id)
    validated = trial.accuracy_now if trial is not None else _last_accuracy(known)
    live = live_correction(known) if knobs.correct_live else 0.0
    rows = () if dataset.num_train <= 0 else _estimate_retrain(trial, dataset, retrain, validated, known, prior)
    measured = measure_inference(inference, trial, known, assumed_busy_s=knobs.assumed_share / spec.fps)
    retrain_memory, inference_memory = _memory(trial, known)
    profile = StreamProfile(
        stream_id=spec.stream_id,
        accuracy_now=_clip(validated + live),
        inference=tuple(
            InferenceProfile(
                inference_id=row.config.config_id,
                gpu_share_needed=_share_needed(row, spec, knobs),
                latency_s=_latency(row, _share_needed(row, spec, knobs)),
                relative_accuracy=row.relative_accuracy,
                memory_bytes=inference_memory.get(row.config, max(inference_memory.values(), default=0)),
                config=row.config,
            )
            for row in measured
        ),
        retrain=tuple(
            RetrainProfile(
                retrain_id=row.config.config_id,
                accuracy_after=_clip(row.accuracy_after + live),
                gpu_seconds=row.gpu_seconds,
                memory_bytes=retrain_memory.get(group_key(row.config), max(retrain_memory.values(), default=0)),
                accuracy_error=row.accuracy_error,
                config=row.config,
            )
            for row in rows
        ),
        min_accuracy=spec.min_accuracy,
        weight=spec.weight,
    )
    return Estimate(
        profile=profile,
        window=dataset.window,
        accuracy_validated=validated,
        live_correction=live,
        retrain=rows,
        inference=measured,
    )


def _share_needed(row: InferenceEstimate, spec: StreamSpec, knobs: EstimatorKnobs) -> float:
    return max(spec.fps * row.busy_s_per_frame * knobs.share_safety, MIN_SHARE)


def _latency(row: InferenceEstimate, share: float) -> float:
    """From a frame's arrival to its result with just the share needed, seconds, until it is measured while serving.

    The skipped frames of ``busy_s_per_frame`` cost next to nothing: what is busy is the analysed one of an interval.
    """
    return row.busy_s_per_frame * row.config.frame_interval / min(1.0, share)


class _Curve(Record, frozen=True, kw_only=True):
    """A curve to read a configuration's accuracy from. ``start``: accuracy when its trial began."""

    curve: LearningCurve
    start: float
    source: EstimateSource
    extra_error: float


def _estimate_retrain(
    trial: TrialResult | None,
    dataset: DatasetRef,
    retrain: Sequence[RetrainConfig],
    accuracy_now: float,
    history: StreamHistory,
    prior: AccuracyPrior | None,
) -> tuple[ConfigEstimate, ...]:
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

    rows = []
    for config in retrain:
        key = group_key(config)
        found = curves.get(key) or _nearest(key, curves)
        cost = costs.get(key) or neighbour_cost(key, costs)
        if found is None or cost is None:
            continue
        effort = effective_effort(config.epochs, config.data_fraction * dataset.num_train)
        accuracy, error = found.curve.predict(effort)
        if found.start != accuracy_now:
            accuracy = _carry_over(accuracy, found.start, accuracy_now)
        error = math.hypot(error, found.extra_error)
        base = cost.gpu_seconds(config, dataset.num_train)
        after, after_error = _blend(accuracy, error, config, history)
        if prior is not None:
            expected, half_width = prior.predict(history.stream_id, accuracy_now, config)
            after, after_error = _weigh((after, after_error), (expected, half_width * ERROR_PER_HALF_WIDTH))
        rows.append(
            ConfigEstimate(
                config=config,
                source=found.source,
                curve_accuracy=accuracy,
                curve_error=error,
                base_gpu_seconds=base,
                accuracy_after=after,
                accuracy_error=after_error,
                gpu_seconds=base * cost_ratio(config, history),
            )
        )
    return tuple(rows)


def _blend(accuracy: float, error: float, config: RetrainConfig, history: StreamHistory) -> tuple[float, float]:
    """Curve estimate corrected by past errors, then weighed by precision against what the configuration reached."""
    learned = accuracy_correction(config, history)
    corrected = from_logit(logit(accuracy) + learned.bias)
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


def _last_accuracy(history: StreamHistory) -> float:
    for window in reversed(history.windows):
        promoted = [o.result.accuracy_after for o in window.outcomes if o.promoted]
        if promoted:
            return promoted[-1]
        if window.trial is not None:
            return window.trial.accuracy_now
        if window.estimate is not None:
            return window.estimate.accuracy_validated
    return 0.5


def _memory(
    trial: TrialResult | None, history: StreamHistory
) -> tuple[dict[GroupKey, int], dict[InferenceConfig, int]]:
    """Largest memory seen per retraining group and per inference configuration."""
    retrain: dict[GroupKey, int] = {}
    inference: dict[InferenceConfig, int] = {}
    for result in [*(w.trial for w in history.windows), trial]:
        if result is None:
            continue
        for row in result.retrain:
            key = group_key(row.config)
            retrain[key] = max(retrain.get(key, 0), row.memory_bytes)
        for measured in result.inference:
            inference[measured.config] = max(inference.get(measured.config, 0), measured.memory_bytes)
    return retrain, inference


def _clip(accuracy: float) -> float:
    return min(max(accuracy, 0.0), 1.0)
