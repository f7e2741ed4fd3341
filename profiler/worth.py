"""What a trial is worth: how likely it is to change the plan, and by how much (value of information).

Utility of a configuration, a cheap stand-in for the planner; T is the window, share the GPU share it is likely to get:

    u = (after - now) * max(0, 1 - seconds / (share * T)) - price * seconds / T,        "no retraining": u = 0

A trial of a group of configurations moves the estimate of its best one by a normal amount of standard deviation

    s = sigma^2 / sqrt(sigma^2 + e^2),      sigma^2 = error^2 - luck^2

(error: of the estimate without the trial; luck: that of one training run, which no trial takes away; e: error of a
trial). With m the group's utility and b the best one of
all others, the plan is expected to gain

    worth = s * (phi(z) - |z| * Phi(-|z|)),   z = (m - b) / s

by knowing more: a lot where two are close and uncertain, nothing where one is far ahead. Knowledge gradient of Frazier,
Powell and Dayanik (2008), for one measurement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

from profiler.costs import CostModel, GroupKey, group_key
from profiler.records import ConfigEstimate
from protocol.schema import Record

# GPU share that a retraining is assumed to get.
LIKELY_SHARE = 0.5
# What the fit of a short trial leaves unknown about a long retraining, besides the noise of its validation.
TRIAL_ERROR = 0.06
# Standard deviation of what no trial takes away: the luck of one training run, and what its model meets when live.
LUCK = 0.055
# Strong drift makes what was learned before it this much more uncertain.
DRIFT_SPREAD = 1.0

_NORMAL = NormalDist()


class TrialWorth(Record, frozen=True, kw_only=True):
    """``gain``: expected rise of the stream's window-averaged accuracy (0..1) by trying the group."""

    key: GroupKey
    gain: float
    seconds: float

    @property
    def rate(self) -> float:
        """Gain per busy second of the trial."""
        return self.gain / max(self.seconds, 1e-6)


def trial_worths(
    expected: Sequence[ConfigEstimate],
    accuracy_now: float,
    costs: Mapping[GroupKey, CostModel],
    *,
    window_s: float,
    num_validation: int,
    num_samples: int,
    num_epochs: int,
    drift: float = 0.0,
    price: float = 0.0,
) -> tuple[TrialWorth, ...]:
    """Worth of trying each group of ``expected`` (estimates without a trial of this window), best rate first.

    ``drift`` 0..1 widens what is not known; ``price``: accuracy-seconds that a GPU-second is worth elsewhere. Groups
    without a known cost are left out.
    """
    utility: dict[GroupKey, tuple[float, float, float]] = {}
    for row in expected:
        key = group_key(row.config)
        left = max(0.0, 1.0 - row.gpu_seconds / (LIKELY_SHARE * window_s))
        value = (row.accuracy_after - accuracy_now) * left - price * row.gpu_seconds / window_s
        if key not in utility or value > utility[key][0]:
            sigma = math.sqrt(max(0.0, row.accuracy_error**2 - LUCK**2))
            utility[key] = (value, sigma * (1.0 + DRIFT_SPREAD * drift), left)
    noise = math.hypot(TRIAL_ERROR, math.sqrt(accuracy_now * (1.0 - accuracy_now) / max(1, num_validation)))
    found = []
    for key, (value, sigma, left) in utility.items():
        cost = costs.get(key)
        if cost is None:
            continue
        others = max((v for other, (v, _, _) in utility.items() if other != key), default=0.0)
        spread = left * sigma**2 / math.hypot(sigma, noise) if sigma > 0.0 else 0.0
        found.append(
            TrialWorth(
                key=key,
                gain=expected_gain(value - max(others, 0.0), spread),
                seconds=cost.trial_seconds(num_samples, num_epochs),
            )
        )
    return tuple(sorted(found, key=lambda worth: -worth.rate))


def expected_gain(lead: float, spread: float) -> float:
    """E[max(lead + spread * N(0, 1), 0)] - max(lead, 0): what is gained by choosing after the measurement."""
    if spread <= 0.0:
        return 0.0
    z = abs(lead) / spread
    return spread * max(0.0, _NORMAL.pdf(z) - z * _NORMAL.cdf(-z))


def mix_distance(before: Sequence[int], now: Sequence[int]) -> float:
    """Total variation distance 0..1 of two class mixes, less what two samples of one mix differ by on average."""
    n, m = sum(before), sum(now)
    if not n or not m or len(before) != len(now):
        return 0.0
    p, q = [count / n for count in before], [count / m for count in now]
    distance = 0.5 * sum(abs(a - b) for a, b in zip(p, q, strict=True))
    pooled = [(a + b) / (n + m) for a, b in zip(before, now, strict=True)]
    chance = 0.5 * sum(math.sqrt(2.0 / math.pi * r * (1.0 - r) * (1.0 / n + 1.0 / m)) for r in pooled)
    return max(0.0, distance - chance)
