"""What past windows of a stream teach: cost ratios, what was reached, the gap between validation and live accuracy.

All are weighted means over past errors, newest first, shrunk towards "no correction" as if ``PRIOR_STRENGTH``
unbiased observations had been made before: one odd window moves little, a steady error is unlearned in a few.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from profiler.costs import CostModel, GroupKey, cost_of_retraining, diverged, group_key, mean_cost
from profiler.records import Outcome, StreamHistory, WindowHistory
from protocol.schema import RetrainConfig

DECAY = 0.8
PRIOR_STRENGTH = 2.0
MAX_LIVE_CORRECTION = 0.2
MAX_COST_RATIO = 4.0
LOGIT_FLOOR = 0.02


def logit(accuracy: float) -> float:
    """log(a / (1 - a)), finite also for 0 and 1."""
    bounded = min(max(accuracy, LOGIT_FLOOR), 1.0 - LOGIT_FLOOR)
    return math.log(bounded / (1.0 - bounded))


def from_logit(value: float) -> float:
    """The accuracy of a logit."""
    return 1.0 / (1.0 + math.exp(-value))


def shrunk_mean(pairs: Iterable[tuple[float, float]], strength: float = PRIOR_STRENGTH) -> tuple[float, float]:
    """Mean of (value, weight) pairs shrunk to 0, and the sum of weights."""
    total, weights = 0.0, 0.0
    for value, weight in pairs:
        total += value * weight
        weights += weight
    return total / (weights + strength), weights


def live_correction(history: StreamHistory) -> float:
    """Live accuracy less what was predicted without a correction, from closed windows; shrunk and bounded.

    Validation crops come from the window before and are labelled by an imperfect golden model, live frames are
    what comes next: the two differ by a stream's own habit, which this learns.
    """
    errors = []
    for age, window in enumerate(reversed(history.windows)):
        if window.realised is None or window.predicted is None:
            continue
        applied = window.estimate.live_correction if window.estimate is not None else 0.0
        errors.append((window.realised - (window.predicted - applied), DECAY**age))
    correction, _ = shrunk_mean(errors)
    return max(-MAX_LIVE_CORRECTION, min(MAX_LIVE_CORRECTION, correction))


def reached_best(config: RetrainConfig, history: StreamHistory) -> float | None:
    """Accuracy that retrainings of past windows got to: of the configuration's group, else of any; None = none yet."""
    key = group_key(config)
    for own in (True, False):
        best = [
            (max(found), DECAY**age)
            for age, window in enumerate(reversed(history.windows))
            if (found := [r for o in window.outcomes if (r := _reached_by(o, key if own else None)) is not None])
        ]
        if best:
            return sum(value * weight for value, weight in best) / sum(weight for _, weight in best)
    return None


def _reached_by(outcome: Outcome, key: GroupKey | None) -> float | None:
    return reached_accuracy(outcome) if key is None or group_key(outcome.result.config) == key else None


def retraining_costs(
    windows: Iterable[WindowHistory], trials: Mapping[GroupKey, CostModel]
) -> dict[GroupKey, CostModel]:
    """Costs of groups of configurations as whole retrainings of ``windows`` (oldest first) showed them.

    ``trials``: costs from trials, which tell preparation from start-up.
    """
    found: dict[GroupKey, list[CostModel]] = {}
    for window in windows:
        for outcome in window.outcomes:
            key = group_key(outcome.result.config)
            prepare_s = trials[key].prepare_s_per_sample if key in trials else 0.0
            cost = cost_of_retraining(outcome.result, window.estimate.num_train if window.estimate else 0, prepare_s)
            if cost is not None and outcome.run is not None:
                found.setdefault(key, []).append(cost)
    return {key: mean_cost(seen[::-1]) for key, seen in found.items()}


def cost_ratio(
    config: RetrainConfig, history: StreamHistory, costs: Mapping[GroupKey, CostModel] | None = None
) -> float:
    """Realised over predicted busy seconds (geometric mean, shrunk to 1), the stream's and then the group's.

    What the clock adds to busy seconds belongs to the machine and not to the stream (profiler/slowness.py).
    Predicted by ``costs``, as the next retraining will be; where these know nothing of it, as it was at the time.
    """
    key = group_key(config)
    errors: list[tuple[float, float]] = []
    own: list[tuple[float, float]] = []
    for age, window in enumerate(reversed(history.windows)):
        for outcome in window.outcomes:
            base_s, busy_s = _base_seconds(window, outcome, costs or {}), outcome.result.busy_s
            if base_s is None or not _all_epochs_done(outcome) or busy_s <= 0.0:
                continue
            error = (math.log(busy_s / base_s), DECAY**age)
            errors.append(error)
            if group_key(outcome.result.config) == key:
                own.append(error)
    # Costs are nearly deterministic, so a single observation is trusted more than one of accuracy.
    pooled, _ = shrunk_mean(errors, 0.5)
    rest, _ = shrunk_mean(((error - pooled, weight) for error, weight in own), 0.5)
    bound = math.log(MAX_COST_RATIO)
    return math.exp(max(-bound, min(bound, pooled + rest)))


def reached_accuracy(outcome: Outcome) -> float | None:
    """Held-out accuracy that the retraining was worth; None when it says nothing about the configuration.

    A retraining cut short tells nothing, and one that began from a model of the zoo nothing about those that begin from
    the serving one; one that diverged was worth what served before it.
    """
    result = outcome.result
    if result.config.base > 0:
        return None
    if any(diverged(epoch.loss) for epoch in result.epochs):
        return result.accuracy_before
    if result.checkpoint is None or not _all_epochs_done(outcome):
        return None
    return result.accuracy_after


def _all_epochs_done(outcome: Outcome) -> bool:
    return max((e.epoch for e in outcome.result.epochs), default=0) >= outcome.result.config.epochs


def _base_seconds(window: WindowHistory, outcome: Outcome, costs: Mapping[GroupKey, CostModel]) -> float | None:
    estimate, config = window.estimate, outcome.result.config
    if estimate is None or config.epochs < 1:
        return None  # a model that was taken over as it is tells nothing of what training costs
    cost = costs.get(group_key(config))
    if cost is not None and estimate.num_train > 0:
        return cost.gpu_seconds(config, estimate.num_train)
    return next((row.base_gpu_seconds for row in estimate.retrain if row.config == config), None)
