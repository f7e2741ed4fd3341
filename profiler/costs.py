"""Retraining cost: GPU-seconds of a configuration from the busy seconds of short trials.

Model:  c = startup + n * prepare_s_per_sample + epochs * (n * seconds_per_sample + validation_s) + finish

with n = data_fraction * num_train samples; what is prepared is worked out once per sample. ``finish``: three passes
over the held-out split that a trial does not make (the model before training, both models for the gate). What whole
retrainings of the group took is known better than what its trial lets expect.

A retraining's cost is linear in epochs and samples (NSDI 2022 section 4.3 scales a trial's seconds the same way).
Configurations that differ only in epochs and data fraction share seconds_per_sample.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

import msgspec
import numpy as np

from protocol.schema import EpochResult, Record, RetrainConfig, RetrainResult, RetrainTrial

# What makes one optimisation step of one sample: (batch size, trained fraction, head width, learning rate).
GroupKey = tuple[int, float, int, float]

MIN_GPU_SECONDS = 1e-3
# Part of a start-up that does not depend on the data set: the worker and its device.
FIXED_S = 0.1
DIVERGED_LOSS = 1e9
# A forward pass costs one unit; the backward pass of the trained part about two more.
BACKWARD_UNITS = 2.0
_PASSES = 3.0
_LEAST_EPOCHS = 2


def diverged(loss: float) -> bool:
    """True for the loss of an epoch whose training blew up; 1e9 is what trainers report for one that is no number."""
    return not loss < DIVERGED_LOSS


def group_key(config: RetrainConfig) -> GroupKey:
    """Configurations with the same key differ only in epochs and data fraction and share one trial."""
    return (config.batch_size, config.trained_fraction, config.head_width, config.learning_rate)


class CostModel(Record, frozen=True, kw_only=True):
    """Costs of one group, busy seconds at share 1 on a GPU of speed 1.

    ``num_train``: training samples of the data set that they were measured on; reading, validating and what else is
    done with the whole set grows with it. 0 = not known, or of no matter.
    """

    startup_s: float
    seconds_per_sample: float
    validation_s: float
    prepare_s_per_sample: float = 0.0
    finish_s: float = 0.0
    num_train: int = 0

    def at(self, num_train: int) -> CostModel:
        """The same on a data set of another size."""
        if num_train <= 0 or self.num_train <= 0 or num_train == self.num_train:
            return self
        scale = num_train / self.num_train
        fixed_s = min(self.startup_s, FIXED_S)
        return msgspec.structs.replace(
            self,
            startup_s=fixed_s + scale * (self.startup_s - fixed_s),
            validation_s=scale * self.validation_s,
            finish_s=scale * self.finish_s,
            num_train=num_train,
        )

    def gpu_seconds(self, config: RetrainConfig, num_train: int) -> float:
        """Expected GPU-seconds of a retraining on ``num_train`` samples; always positive."""
        own = self.at(num_train)
        num_samples = config.data_fraction * num_train
        per_epoch = own.seconds_per_sample * _batched(num_samples, config) + own.validation_s
        once_s = own.startup_s + own.prepare_s_per_sample * num_samples + own.finish_s
        return max(once_s + config.epochs * per_epoch, MIN_GPU_SECONDS)

    def trial_seconds(self, num_samples: int, num_epochs: int) -> float:
        """Expected GPU-seconds of a trial on ``num_samples`` samples, the validation before it included."""
        per_epoch = self.seconds_per_sample * num_samples + self.validation_s
        once_s = self.startup_s + self.validation_s + self.prepare_s_per_sample * num_samples
        return once_s + num_epochs * per_epoch


def cost_model(trial: RetrainTrial) -> CostModel | None:
    """Costs seen in a trial, None when it holds no finished epoch with a positive time.

    The result of epoch 0 times a validation from the pictures on; those of later epochs may be quicker, where what the
    frozen layers make of a picture is remembered. The median over epochs keeps one descheduled epoch from counting.
    """
    trained = [e.busy_s for e in trial.epochs if e.epoch > 0 and e.busy_s > 0.0]
    if not trained or trial.num_samples <= 0:
        return None
    epoch_s = statistics.median(trained)
    whole_s = statistics.median([e.busy_s for e in trial.epochs if e.epoch == 0] or [0.0])
    validation_s = _validation_s(trial.epochs, epoch_s)
    num_samples = _batched(trial.num_samples, trial.config)
    return CostModel(
        startup_s=trial.startup_s,
        seconds_per_sample=(epoch_s - validation_s) / num_samples,
        validation_s=validation_s,
        prepare_s_per_sample=trial.prepare_s / trial.num_samples,
        finish_s=_PASSES * whole_s,
        num_train=round(trial.total_samples / trial.config.data_fraction),
    )


def cost_of_retraining(result: RetrainResult, num_train: int, prepare_s_per_sample: float = 0.0) -> CostModel | None:
    """Costs seen in a retraining on a set of ``num_train`` samples, None when it says too little.

    All that is not in an epoch counts as start-up, less what ``prepare_s_per_sample`` explains.
    """
    trained = [e.busy_s for e in result.epochs if e.epoch > 0]
    num_samples = round(result.config.data_fraction * num_train)
    too_few = not trained or len(trained) < min(_LEAST_EPOCHS, result.config.epochs)
    if too_few or num_samples < 1 or result.checkpoint is None:
        return None
    epoch_s = sum(trained) / len(trained)
    validation_s = _validation_s(result.epochs, epoch_s)
    around_s = max(0.0, result.busy_s - sum(trained))
    prepare_s = min(prepare_s_per_sample * num_samples, around_s)
    return CostModel(
        startup_s=around_s - prepare_s,
        seconds_per_sample=(epoch_s - validation_s) / _batched(num_samples, result.config),
        validation_s=validation_s,
        prepare_s_per_sample=prepare_s / num_samples,
        num_train=num_train,
    )


def _validation_s(epochs: Sequence[EpochResult], epoch_s: float) -> float:
    """Busy seconds of the validation in an epoch of ``epoch_s``: as timed; that of epoch 0 where none was told apart.

    The first validation may hold warm-up and exceed a whole epoch, and then says nothing.
    """
    timed = [e.validation_s for e in epochs if e.epoch > 0 and e.validation_s is not None]
    if timed:
        return min(statistics.median(timed), epoch_s)
    return min(sum(e.busy_s for e in epochs if e.epoch == 0), 0.5 * epoch_s)


def mean_cost(newest_first: Sequence[CostModel]) -> CostModel:
    """Mean of what was seen, on a data set of the newest one's size; the newest counts twice as much as the one before.

    Raises ValueError for none.
    """
    if not newest_first:
        raise ValueError("no cost to take the mean of")
    newest = newest_first[0]
    seen = [cost.at(newest.num_train) for cost in newest_first]
    weights = [0.5**age for age in range(len(seen))]

    def mean(values: Iterable[float]) -> float:
        return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)

    return CostModel(
        startup_s=mean(cost.startup_s for cost in seen),
        seconds_per_sample=mean(cost.seconds_per_sample for cost in seen),
        validation_s=mean(cost.validation_s for cost in seen),
        prepare_s_per_sample=mean(cost.prepare_s_per_sample for cost in seen),
        finish_s=mean(cost.finish_s for cost in seen),
        num_train=newest.num_train,
    )


def alike(cost: CostModel, tried: CostModel | None) -> bool:
    """Whether a cost may hold where ``tried`` was measured: seconds per sample within a factor of two, if at all known.

    Streams of one site may have other students, or crops of another size.
    """
    if tried is None or tried.seconds_per_sample <= 0.0 or cost.seconds_per_sample <= 0.0:
        return True
    return 0.5 <= cost.seconds_per_sample / tried.seconds_per_sample <= 2.0


def _batched(num_samples: float, config: RetrainConfig) -> float:
    """Samples that an epoch costs: a last batch that is not full costs less than a full one and more than its samples,
    the mean of both, in factors."""
    batch = config.batch_size
    return math.sqrt(num_samples * math.ceil(num_samples / batch) * batch)


def neighbour_cost(key: GroupKey, measured: Mapping[GroupKey, CostModel]) -> CostModel | None:
    """Costs of a group that was never measured: seconds per sample linear in the trained fraction.

    None when nothing was measured. With a single trained fraction measured, forward and backward units give the slope.
    """
    if not measured:
        return None
    fractions = np.array([k[1] for k in measured])
    # Preparing a sample is one forward pass through frozen layers, which another group pays in every epoch.
    seconds = np.array([m.seconds_per_sample + m.prepare_s_per_sample for m in measured.values()])
    if float(np.ptp(fractions)) > 1e-9:
        slope, base = np.polyfit(fractions, seconds, 1)
        predicted = float(base + slope * key[1])
    else:
        predicted = float(np.mean(seconds) * (1.0 + BACKWARD_UNITS * key[1]) / (1.0 + BACKWARD_UNITS * fractions[0]))
    return CostModel(
        startup_s=statistics.median(m.startup_s for m in measured.values()),
        seconds_per_sample=max(predicted, 0.25 * float(seconds.min())),
        validation_s=statistics.median(m.validation_s for m in measured.values()),
        finish_s=statistics.median(m.finish_s for m in measured.values()),
        num_train=round(statistics.median(m.num_train for m in measured.values())),
    )


def key_distance(a: GroupKey, b: GroupKey) -> float:
    """How unlike two groups are; 0 = the same. One unit is about a doubling of a knob or half of the backbone."""
    return (
        abs(math.log2(a[0] / b[0]))
        + 2.0 * abs(a[1] - b[1])
        + 0.5 * abs(math.log2((a[2] + 1) / (b[2] + 1)))
        + abs(math.log2(a[3] / b[3]))
    )
