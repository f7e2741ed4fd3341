"""What past retrainings of all streams say about the next one, before or without any trial.

Model: accuracy after a retraining, ridge regression over all past retrainings of a site,

    after = b_0 + b_1 * log(error before) + b_2 * log epochs + b_3 * log data fraction
            + b_4 * trained fraction + b_[configuration but for its epochs] + u_stream

1. log(error before): what a retraining gains is a share of the error that is left, so the last points come hardest;
2. u_stream: the stream's mean residual, shrunk by n / (n + 1) over its n past windows, as a window's retrainings
   err together;
3. the interval is conformal: a quantile of the absolute errors that the same method made on past windows, each
   predicted from the windows before it. The first window is predicted from the other streams, and half of a
   stream's mean error is taken off, as u_stream would take it off with one window of history.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from protocol.schema import Fraction, Record, RetrainConfig

Array = npt.NDArray[np.float64]
ConfigKey = tuple[int, float, int, float, float]

RIDGE = 0.3
MIN_OBSERVATIONS = 20
# With so many observations the regression counts half of what it counts with very many.
HALF_TRUSTED = 60
# Keeps the logarithm of a vanishing error finite; about the error of a label.
ERROR_FLOOR = 0.02
# Standard deviation of a normal distribution over the half-width of its 80 % interval.
ERROR_PER_HALF_WIDTH = 1.0 / 1.2816


class Observation(Record, frozen=True, kw_only=True):
    """One past retraining. ``window`` orders observations in time, over all streams of the site.

    ``weight``: how much it counts against one whose accuracies are well measured.
    """

    stream_id: str
    window: int
    config: RetrainConfig
    accuracy_before: Fraction
    accuracy_after: Fraction
    weight: float = 1.0


class AccuracyPrior(Record, frozen=True, kw_only=True):
    """A fitted regression. ``half_width``: half of the interval that holds the wanted share of outcomes."""

    coefficients: tuple[float, ...]
    groups: dict[ConfigKey, int]
    streams: dict[str, float]
    half_width: float
    num_observations: int

    @property
    def weight(self) -> float:
        """What it counts in a mean with the process: nearly nothing with a few observations, up to a half with many.

        It has as many coefficients as there are configurations: from two dozen retrainings of a busy site it said
        that streams at 0.96 would fall to 0.8.
        """
        return 0.5 / (1.0 + (HALF_TRUSTED / self.num_observations) ** 2)

    def blended(self, after: float, stream_id: str, accuracy_before: float, config: RetrainConfig) -> float:
        """``after``, what the process expects, averaged with what the regression does."""
        return after + self.weight * (self.predict(stream_id, accuracy_before, config)[0] - after)

    def predict(self, stream_id: str, accuracy_before: float, config: RetrainConfig) -> tuple[float, float]:
        """Expected accuracy after the retraining, in [0, 1], and half the width of its interval."""
        row = _features(accuracy_before, config, self.groups)
        accuracy = float(row @ np.array(self.coefficients)) + self.streams.get(stream_id, 0.0)
        accuracy = min(max(accuracy, 0.0), 1.0)
        return accuracy, self.half_width


def fit_prior(observations: Sequence[Observation], *, coverage: float = 0.8) -> AccuracyPrior | None:
    """Fit on past retrainings; None when there are fewer than ``MIN_OBSERVATIONS``.

    ``coverage``: share of coming retrainings that the interval is to hold.
    """
    if len(observations) < MIN_OBSERVATIONS:
        return None
    errors = _past_errors(observations)
    if not errors:
        return None
    # The finite-sample conformal rank; with few errors it is the largest one.
    rank = min(math.ceil(coverage * (len(errors) + 1)), len(errors))
    return _fit(observations, half_width=sorted(errors)[rank - 1])


def _past_errors(observations: Sequence[Observation]) -> list[float]:
    """Absolute errors made on every past window from what was known before it."""
    errors: list[float] = []
    windows = sorted({o.window for o in observations})
    for window in windows:
        past = [o for o in observations if o.window < window]
        now = [o for o in observations if o.window == window]
        if len(past) >= MIN_OBSERVATIONS:
            errors += _errors(_fit(past), now)
            continue
        for stream in {o.stream_id for o in now}:
            others = [o for o in now if o.stream_id != stream] + past
            if len(others) >= MIN_OBSERVATIONS:
                errors += _errors(_fit(others), [o for o in now if o.stream_id == stream], known_share=0.5)
    return errors


def _errors(prior: AccuracyPrior, observations: Sequence[Observation], *, known_share: float = 0.0) -> list[float]:
    """Absolute errors on observations of one window, less ``known_share`` of their mean."""
    predicted = [prior.predict(o.stream_id, o.accuracy_before, o.config)[0] for o in observations]
    errors = [o.accuracy_after - accuracy for o, accuracy in zip(observations, predicted, strict=True)]
    known = known_share * sum(errors) / len(errors) if errors else 0.0
    return [abs(error - known) for error in errors]


def _fit(observations: Sequence[Observation], half_width: float = 0.0) -> AccuracyPrior:
    keys = dict.fromkeys(_key(o.config) for o in observations)
    groups = {key: place for place, key in enumerate(keys)}
    x = np.array([_features(o.accuracy_before, o.config, groups) for o in observations])
    y = np.array([o.accuracy_after for o in observations])
    weights = np.array([o.weight for o in observations])
    penalty = np.full(x.shape[1], RIDGE)
    penalty[0] = 1e-9  # the mean level is not shrunk
    beta = np.linalg.solve(x.T @ (x * weights[:, None]) + np.diag(penalty), x.T @ (y * weights))
    residuals = y - x @ beta
    streams = {}
    for stream in dict.fromkeys(o.stream_id for o in observations):
        mine = np.array([o.stream_id == stream for o in observations])
        num_windows = len({o.window for o in observations if o.stream_id == stream})
        mean = float(np.average(residuals[mine], weights=weights[mine]))
        streams[stream] = mean * num_windows / (num_windows + 1)
    return AccuracyPrior(
        coefficients=tuple(float(b) for b in beta),
        groups=groups,
        streams=streams,
        half_width=half_width,
        num_observations=len(observations),
    )


def _features(accuracy_before: float, config: RetrainConfig, groups: dict[ConfigKey, int]) -> Array:
    row = np.zeros(5 + len(groups))
    row[:5] = (
        1.0,
        math.log(1.0 - min(accuracy_before, 1.0) + ERROR_FLOOR),
        math.log(config.epochs / 10.0),
        math.log(config.data_fraction),
        config.trained_fraction,
    )
    place = groups.get(_key(config))
    if place is not None:
        row[5 + place] = 1.0
    return row


def _key(config: RetrainConfig) -> ConfigKey:
    return (
        config.batch_size,
        config.trained_fraction,
        config.head_width,
        config.learning_rate,
        config.data_fraction,
    )
