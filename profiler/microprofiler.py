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

from typing import Literal

from profiler.corrections import from_logit, live_correction, logit
from profiler.costs import GroupKey, group_key
from profiler.knowledge import SiteKnowledge
from profiler.paper import estimate_as_paper
from profiler.quality import measure_inference
from profiler.records import ConfigEstimate, Estimate, InferenceEstimate, StreamHistory
from profiler.retraining import estimate_retrain
from profiler.targets import Gaps
from protocol.plan import InferenceProfile, RetrainProfile, StreamProfile
from protocol.schema import (
    DatasetRef,
    InferenceConfig,
    Record,
    RetrainConfig,
    StreamSpec,
    TrialResult,
)

MIN_SHARE = 1e-4

ProfilingMethod = Literal["calibrated", "paper"]


class EstimatorKnobs(Record, frozen=True, kw_only=True):
    """Choices of the estimator.

    ``share_safety``: factor on the measured GPU share of inference, head-room for bursts of objects.
    ``method``: "paper" = the micro-profiler of the paper (profiler/paper.py), for comparison.
    ``use_history``: False = only this window's trials are known.
    ``correct_live``: learn the difference between validation and live accuracy.
    ``assumed_share``: GPU share of an inference configuration at frame interval 1 that could never be measured
    (its trials failed); generous, so that the stream is served.
    """

    share_safety: float = 1.1
    method: ProfilingMethod = "calibrated"
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
    site: SiteKnowledge | None = None,
    knobs: EstimatorKnobs | None = None,
) -> StreamProfile:
    """The profile of :func:`estimate_in_detail` alone."""
    return estimate_in_detail(spec, trial, dataset, retrain, inference, history, site=site, knobs=knobs).profile


def estimate_in_detail(
    spec: StreamSpec,
    trial: TrialResult | None,
    dataset: DatasetRef,
    retrain: tuple[RetrainConfig, ...],
    inference: tuple[InferenceConfig, ...],
    history: StreamHistory,
    *,
    site: SiteKnowledge | None = None,
    knobs: EstimatorKnobs | None = None,
) -> Estimate:
    """Estimate what every configuration costs and is worth on ``dataset``.

    ``trial`` None or without some configurations: those are predicted from history or neighbours.
    ``site``: what all streams of the site together have taught. A retraining configuration whose cost nothing says
    anything about is left out ("no retraining" is always a choice besides), and so are all of them when ``dataset``
    holds no training samples. Raises ValueError without any inference configuration.
    """
    knobs = knobs or EstimatorKnobs()
    if not inference:
        raise ValueError(f"stream {spec.stream_id} has no inference configuration to estimate")
    paper = knobs.method == "paper"
    known = history if knobs.use_history and not paper else StreamHistory(stream_id=spec.stream_id)
    validated = trial.accuracy_now if trial is not None else last_accuracy(known)
    learned = site if site is not None and knobs.use_history and not paper else SiteKnowledge()
    if learned.gaps is not None and learned.gaps != Gaps():
        # What retrained models reach on live frames is in their estimates already; the serving model has a gap as well.
        now, live = from_logit(logit(validated) + learned.gaps.serving), 0.0
    else:
        now = validated
        live = live_correction(known) if knobs.correct_live else 0.0
    rows: tuple[ConfigEstimate, ...] = ()
    if dataset.num_train > 0:
        rows = (
            estimate_as_paper(trial, dataset, retrain)
            if paper
            else estimate_retrain(trial, dataset, retrain, validated, known, learned)
        )
    measured = measure_inference(inference, trial, known, assumed_busy_s=knobs.assumed_share / spec.fps)
    retrain_memory, inference_memory = _memory(trial, known)
    profile = StreamProfile(
        stream_id=spec.stream_id,
        accuracy_now=_clip(now + live),
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
                start_s=row.start_s,
                held_out=row.held_out,
                held_out_error=row.held_out_error,
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
        num_train=dataset.num_train,
        num_validation=dataset.num_validation,
    )


def _share_needed(row: InferenceEstimate, spec: StreamSpec, knobs: EstimatorKnobs) -> float:
    return max(spec.fps * row.busy_s_per_frame * knobs.share_safety, MIN_SHARE)


def _latency(row: InferenceEstimate, share: float) -> float:
    """From a frame's arrival to its result with just the share needed, seconds, until it is measured while serving.

    The skipped frames of ``busy_s_per_frame`` cost next to nothing: what is busy is the analysed one of an interval.
    """
    return row.busy_s_per_frame * row.config.frame_interval / min(1.0, share)


def last_accuracy(history: StreamHistory) -> float:
    """Accuracy of the serving model as last measured on labels; 0.5 when it never was."""
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
