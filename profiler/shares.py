"""How training throughput falls with the GPU share: phi, learned from retrainings that really ran.

Model: a retraining with cost c (GPU-seconds at share 1) took t seconds at the constant share r, so

    log(t / c) = alpha - beta * log r,      phi(r) = r ** beta

1. alpha is what the device is slower or faster than assumed (contention, start-up); the cost ratio takes care of it;
2. beta = 1 is a share that is honoured exactly (pacing); beta < 1 is the sub-linear curve of a GPU, where half of the
   multiprocessors give more than half of the throughput; beta = 0 is a model that waits for its host and needs no more
   than the smallest share, which small students on a large GPU do;
3. ridge regression towards alpha = 0, beta = 1: a few retrainings at one share say nothing about beta.

A curve is used when it was measured at shares a factor of 1.5 apart and differs from r by more than twice its error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from protocol.schema import Record

MIN_RUNS = 4
MIN_SPAN = math.log(1.5)
MIN_EXPONENT, MAX_EXPONENT = 0.0, 1.0
# Weight of the assumption beta = 1, in squared log shares; noise of a log time is about 0.1.
PRIOR_WEIGHT = 0.5
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class ShareRun(Record, frozen=True, kw_only=True):
    """One retraining at a constant share: seconds it took, and what it costs at share 1."""

    share: float
    seconds: float
    gpu_seconds: float


class ShareCurve(Record, frozen=True, kw_only=True):
    """phi at ``points`` (share, throughput over that of share 1), ascending; ``error`` of the exponent."""

    points: tuple[tuple[float, float], ...]
    exponent: float
    error: float
    num: int

    @property
    def differs(self) -> bool:
        """Whether it is known to differ from throughput in proportion to the share."""
        return abs(self.exponent - 1.0) > 2.0 * self.error


def fit_share_curve(runs: Sequence[ShareRun]) -> ShareCurve | None:
    """phi from runs of one kind of device; None when they are too few or all at about the same share."""
    usable = [r for r in runs if 0.0 < r.share <= 1.0 and r.seconds > 0.0 and r.gpu_seconds > 0.0]
    if len(usable) < MIN_RUNS:
        return None
    x = -np.log([r.share for r in usable])
    if float(np.ptp(x)) < MIN_SPAN:
        return None
    # What is explained is the deviation from phi(r) = r.
    y = np.log([r.seconds / r.gpu_seconds for r in usable]) - x
    x = x - x.mean()
    y = y - np.median(y)
    # One run that was held up (a busy machine, a stopped worker) must not bend the curve.
    y = np.clip(y, -3.0 * _spread(y), 3.0 * _spread(y))
    slope = float(x @ y / (x @ x + PRIOR_WEIGHT))
    residual = y - y.mean() - slope * x
    noise = math.sqrt(float(residual @ residual) / max(1, len(usable) - 2))
    error = max(noise, 0.02) / math.sqrt(float(x @ x) + PRIOR_WEIGHT)
    exponent = min(max(1.0 + slope, MIN_EXPONENT), MAX_EXPONENT)
    return ShareCurve(
        points=tuple((share, round(share**exponent, 4)) for share in SHARES),
        exponent=exponent,
        error=error,
        num=len(usable),
    )


def _spread(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    return max(1.4826 * float(np.median(np.abs(values))), 0.05)
