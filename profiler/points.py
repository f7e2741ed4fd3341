"""From what is remembered of windows to the points of the process (profiler/process.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from profiler.corrections import reached_accuracy
from profiler.costs import GroupKey, diverged, group_key
from profiler.curves import effective_effort
from profiler.process import Kind, Point
from profiler.records import LiveAccuracy, WindowHistory
from protocol.schema import RetrainConfig, RetrainTrial, TrialResult

# Crops in a frame, about: live accuracies are counted in frames, and neighbouring frames show the same objects.
INDEPENDENT_PER_FRAME = 1.0
MIN_LIVE_FRAMES = 20
# The last epochs of a trial say what it came to; they are of one model and err alike.
TRIAL_EPOCHS = 2


def noise(accuracy: float, num: float) -> float:
    """Standard error of an accuracy measured on ``num`` independent objects; finite for 0 and 1 and for none."""
    p = (accuracy * num + 1.0) / (num + 2.0)
    return math.sqrt(p * (1.0 - p) / max(num, 1.0))


def window_points(stream_id: str, order: int, window: WindowHistory, *, live: bool) -> list[Point]:
    """All that was measured in a past window. ``order`` tells windows apart; ``live``: live accuracy counts as well."""
    estimate = window.estimate
    if estimate is None or estimate.num_train <= 0:
        return []
    now, found = estimate.accuracy_validated, []
    split: Kind = "split"

    def add(key: GroupKey, effort: float, model: str, kind: Kind, accuracy: float, error: float) -> None:
        found.append(
            Point(
                stream_id=stream_id,
                window=order,
                now=now,
                key=key,
                effort=effort,
                model=model,
                kind=kind,
                accuracy=accuracy,
                noise=error,
            )
        )

    versions = {}
    others = {o.result.checkpoint.version for o in window.outcomes if o.result.config.base and o.result.checkpoint}
    for place, outcome in enumerate(window.outcomes):
        result, reached = outcome.result, reached_accuracy(outcome)
        key, model = group_key(result.config), f"retraining-{place}"
        if result.checkpoint is not None:
            versions[result.checkpoint.version] = (key, config_effort(result.config, estimate.num_train), model)
        if reached is None:
            continue
        effort = config_effort(result.config, estimate.num_train)
        add(key, 0.0, "serving", split, result.accuracy_before, noise(result.accuracy_before, result.num_validation))
        add(key, effort, model, split, reached, noise(reached, result.num_validation))
    if window.trial is not None:
        found += trial_points(stream_id, order, now, window.trial, estimate.num_validation)
    if live and estimate.retrain:
        default = group_key(estimate.retrain[0].config)
        for row in window.live:
            if row.num_frames >= MIN_LIVE_FRAMES and row.version not in others:
                key, effort, model = versions.get(row.version, (default, 0.0, "serving"))
                add(key, effort, model, "live", row.accuracy, _live_noise(row))
    return found


def trial_points(stream_id: str, order: int, now: float, trial: TrialResult, num_validation: int) -> list[Point]:
    """What the trials of a window measured on its held-out split: the serving model, and where short trainings got."""
    found = []
    for row in trial.retrain:
        epochs = [e for e in row.epochs if e.epoch > 0 and not diverged(e.loss)][-TRIAL_EPOCHS:]
        before = [e for e in row.epochs if e.epoch == 0][:1] if row is trial.retrain[0] else []
        for epoch in (*before, *epochs):
            found.append(
                Point(
                    stream_id=stream_id,
                    window=order,
                    now=now,
                    key=group_key(row.config),
                    effort=trial_effort(row, epoch.epoch),
                    model=f"trial-{group_key(row.config)}" if epoch.epoch else "serving",
                    kind="split",
                    accuracy=epoch.accuracy,
                    noise=noise(epoch.accuracy, num_validation),
                )
            )
    return found


def config_effort(config: RetrainConfig, num_train: int) -> float:
    """Effort of a whole retraining on a window of so many training samples."""
    return effective_effort(config.epochs, config.data_fraction * num_train)


def trial_effort(trial: RetrainTrial, epochs: int) -> float:
    """Effort of a trial after so many epochs."""
    return effective_effort(epochs, trial.num_samples)


def wanted(
    stream_id: str, order: int, now: float, retrain: Sequence[RetrainConfig], num_train: int, kind: Kind
) -> list[Point]:
    """One point to be predicted per configuration: a model that is not trained yet. ``kind`` "split": on the window's
    own held-out split."""
    return [
        Point(
            stream_id=stream_id,
            window=order,
            now=now,
            key=group_key(config),
            effort=config_effort(config, num_train),
            model=f"wanted-{config.config_id}",
            kind=kind,
        )
        for config in retrain
    ]


def _live_noise(row: LiveAccuracy) -> float:
    return noise(row.accuracy, INDEPENDENT_PER_FRAME * row.num_frames)
