"""The micro-profiler as the paper has it, kept as a choice to compare with (NSDI 2022, section 4.3).

Every kind of retraining is tried in every window: 5 epochs on 10 % of the window's data. One saturating curve
A(k) = w_0 + w_1 * k / (k + tau), w >= 0, is fitted to its accuracy per epoch by non-negative least squares and read at
all epochs; the seconds of an epoch are scaled by the amount of data. No history, no floor on the sample, no error bars.

One trial stands for all configurations that differ only in epochs and data fraction, which is kinder to its cost than
a trial for each. The paper also leaves out configurations that history shows far from the front; here none is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from profiler.costs import MIN_GPU_SECONDS, diverged, group_key
from profiler.curves import best_hyperbola
from profiler.records import ConfigEstimate, TrialChoice
from profiler.trials import representatives
from protocol.schema import DatasetRef, InferenceConfig, RetrainConfig, RetrainTrial, TrialResult

NUM_EPOCHS = 5
DATA_SHARE = 0.1
NUM_FRAMES = 60


def choose_all(
    retrain: Sequence[RetrainConfig], inference: Sequence[InferenceConfig], dataset: DatasetRef
) -> TrialChoice:
    """All trials of the paper's method; those of retrainings only where there is something to train on."""
    return TrialChoice(
        retrain=tuple(representatives(retrain).values()) if dataset.num_train > 0 else (),
        inference=tuple(inference),
        data_share=DATA_SHARE,
        num_epochs=NUM_EPOCHS,
        num_frames=NUM_FRAMES,
    )


def estimate_as_paper(
    trial: TrialResult | None, dataset: DatasetRef, retrain: Sequence[RetrainConfig]
) -> tuple[ConfigEstimate, ...]:
    """One row per configuration that was tried in this window; ``accuracy_error`` 0, as the method gives none."""
    found = {group_key(row.config): row for row in (trial.retrain if trial is not None else ())}
    rows = []
    for config in retrain:
        row = found.get(group_key(config))
        if row is None or row.num_samples <= 0 or not any(e.epoch > 0 for e in row.epochs):
            continue
        accuracy = extrapolate(row, config.epochs)
        epoch_s = float(np.mean([e.busy_s for e in row.epochs if e.epoch > 0]))
        samples = config.data_fraction * dataset.num_train
        seconds = max(config.epochs * epoch_s * samples / row.num_samples, MIN_GPU_SECONDS)
        rows.append(
            ConfigEstimate(
                config=config,
                source="trial",
                curve_accuracy=accuracy,
                curve_error=0.0,
                base_gpu_seconds=seconds,
                accuracy_after=accuracy,
                accuracy_error=0.0,
                gpu_seconds=seconds,
                held_out=accuracy,
            )
        )
    return tuple(rows)


def extrapolate(trial: RetrainTrial, epochs: int) -> float:
    """Accuracy after ``epochs`` epochs by the one curve that fits the trial's epochs best, 0..1."""
    points = [(e.epoch, e.accuracy) for e in trial.epochs if e.epoch == 0 or not diverged(e.loss)]
    return best_hyperbola([epoch for epoch, _ in points], [accuracy for _, accuracy in points], epochs)
