"""Prediction intervals that hold: conformal, on the system's own past errors, of the site and of the stream.

Data: past estimates with a scale sigma_i (what the estimator itself thinks its error is) and the error e_i that came
out. Score: s_i = |e_i| / sigma_i. The interval of a new estimate is  accuracy +- q * sigma,  q the weighted quantile of
the scores at the wanted level:

1. weights (`Weights`): 1 for the stream's own errors, ``site`` for those of other streams, times ``decay`` per window
   of age; one more weight at infinity stands for the coming error. Split conformal gives it 1; with the few errors that
   a stream has, that made intervals too wide on the streams they were tuned on (92 % instead of 80), so it is a half;
2. before there are errors, ``PRIOR_SCORES`` normal scores stand in, so that q begins at the normal quantile and sigma
   alone says how wide the interval is: wide, without history.

Normalised conformal prediction: Papadopoulos et al. (2002); weights: Barber et al., "Conformal prediction beyond
exchangeability" (2023).
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from statistics import NormalDist

from protocol.schema import Record

LEVEL = 0.8
# Half-width of the LEVEL interval of a normal distribution in standard deviations.
Z = NormalDist().inv_cdf(0.5 + 0.5 * LEVEL)
PRIOR_SCORES = 8
MIN_FACTOR, MAX_FACTOR = 0.3, 4.0


class Weights(Record, frozen=True, kw_only=True):
    """What past errors count; see the module. ``prior``: of each normal score, ``coming``: of the coming error.

    ``number``: 0 = ``decay`` is per window of age; else per so many newer errors, however many windows they are from.
    """

    decay: float = 0.85
    number: int = 0
    site: float = 0.5
    prior: float = 0.25
    coming: float = 0.5


USUAL = Weights()


class PastError(Record, frozen=True, kw_only=True):
    """One estimate that has met its outcome. ``age``: windows since then, 0 = the last one."""

    stream_id: str
    age: int
    error: float
    scale: float


def factor(errors: Sequence[PastError], stream_id: str, *, level: float = LEVEL, weights: Weights = USUAL) -> float:
    """What the estimator's own error has to be multiplied with so that the interval ``level`` holds so often.

    Interval: accuracy +- factor * Z * scale (Z for ``level`` = 0.8). 1 = the estimator is right about itself.
    """
    scored = [
        (abs(e.error) / max(e.scale, 1e-6), weights.decay**age * (1.0 if e.stream_id == stream_id else weights.site))
        for e, age in zip(errors, _ages(errors, weights.number), strict=True)
    ]
    normal = NormalDist()
    scored += [
        (normal.inv_cdf(0.5 + 0.5 * (place + 0.5) / PRIOR_SCORES), weights.prior) for place in range(PRIOR_SCORES)
    ]
    scored.sort()
    # The coming error has a weight of its own, as one that may lie anywhere above.
    wanted = level * (sum(weight for _, weight in scored) + weights.coming)
    total = 0.0
    for score, weight in scored:
        total += weight
        if total >= wanted:
            return min(max(score / normal.inv_cdf(0.5 + 0.5 * level), MIN_FACTOR), MAX_FACTOR)
    return MAX_FACTOR if errors else min(scored[-1][0] / normal.inv_cdf(0.5 + 0.5 * level), MAX_FACTOR)


def _ages(errors: Sequence[PastError], number: int) -> list[float]:
    if not number:
        return [e.age for e in errors]
    ages = sorted(e.age for e in errors)
    return [bisect.bisect_left(ages, e.age) / number for e in errors]
