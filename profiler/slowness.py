"""How much longer than its busy seconds a retraining takes by the clock, learned from the site's latest ones.

Model, for a retraining that was busy for b seconds at a granted throughput of r (GPU-seconds by the execution model
over seconds elapsed):

    elapsed = t0 + f * b / r,   or in the planner's GPU-seconds:   work = t0 * r + f * b

1. t0 = w + t1, which no share shortens: waiting until its worker runs, whose share others may have to give up first;
   starting and reporting;
2. f: waiting for a core that others use as well, shares that are not what they are called;
3. w is the weighted median of what was seen outside of workers, so that the few retrainings that had to wait for
   seconds say nothing of the next one;
4. t1 and f: weighted least squares of relative errors of the seconds inside workers, those beyond ``_NOISE`` counting
   by their size and not by its square (Huber, by weighting anew);
5. newer windows count more, and the usual values count like a few retrainings. All belong to the machine at the moment
   and not to a stream: they are learned from all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from profiler.records import Outcome
from profiler.targets import SiteWindow
from protocol.plan import START_RATE
from protocol.schema import Record

USUAL_WAIT_S, USUAL_START_S, USUAL_FACTOR = 0.15, 0.1, 1.0
_START_SPREAD, _FACTOR_SPREAD = 0.8, 0.6
_NOISE = 0.1
# Weight of a window against the one after it: how busy a machine is changes; how long is waited changes by chance.
_DECAY, _WAIT_DECAY = 0.25, 0.7
_ROUNDS = 5
_MOST_START_S, _LEAST_FACTOR, _MOST_FACTOR = 5.0, 0.7, 4.0


class Slowness(Record, frozen=True, kw_only=True):
    """``start_s``: t0, seconds. ``factor``: f."""

    start_s: float = 0.0
    factor: float = 1.0

    def work_s(self, busy_s: float) -> float:
        """GPU-seconds that a retraining will take in the planner's currency."""
        return self.start_s * START_RATE + self.factor * busy_s


def learn_slowness(windows: Sequence[SiteWindow]) -> Slowness:
    """From all retrainings that were seen whole; nothing is added without any."""
    newest = max((w.order for w in windows), default=0)
    seen = [(w.order, outcome) for w in windows for outcome in w.history.outcomes if _counts(outcome)]
    if not seen:
        return Slowness()
    age = np.array([newest - order for order, _ in seen])
    runs = [(run, outcome.result) for _, outcome in seen if (run := outcome.run)]
    elapsed_s = np.array([run.elapsed_s for run, _ in runs])
    # Of a worker that did not tell how long it was at it, all of the time.
    inside_s = np.array([min(result.seconds or run.elapsed_s, run.elapsed_s) for run, result in runs])
    wait_s = _median([*(elapsed_s - inside_s), USUAL_WAIT_S], [*_WAIT_DECAY**age, 1.0])
    usual = np.array([[1.0 / _START_SPREAD, 0.0], [0.0, 1.0 / _FACTOR_SPREAD]])
    # What t1 and f are multiplied with to give the seconds inside, as a part of what they were.
    alone_s = np.array([result.busy_s * run.elapsed_s / run.work_s for run, result in runs])
    rows = np.column_stack([1.0 / inside_s, alone_s / inside_s])
    recent = _DECAY ** (0.5 * age) / _NOISE
    weight = recent
    for _ in range(_ROUNDS):
        wanted = np.concatenate([usual @ [USUAL_START_S, USUAL_FACTOR], weight])
        start_s, factor = np.linalg.lstsq(np.vstack([usual, weight[:, None] * rows]), wanted, rcond=None)[0]
        error = np.abs(rows @ [start_s, factor] - 1.0)
        weight = recent * np.minimum(1.0, np.sqrt(_NOISE / np.maximum(error, 1e-9)))
    return Slowness(
        start_s=float(np.clip(wait_s + start_s, 0.0, _MOST_START_S)),
        factor=float(np.clip(factor, _LEAST_FACTOR, _MOST_FACTOR)),
    )


def _median(values: Sequence[float], weights: Sequence[float]) -> float:
    order = np.argsort(values)
    total = np.cumsum(np.array(weights)[order])
    return float(np.array(values)[order][np.searchsorted(total, 0.5 * total[-1])])


def _counts(outcome: Outcome) -> bool:
    run, result = outcome.run, outcome.result
    done = max((e.epoch for e in result.epochs), default=0) >= result.config.epochs
    return run is not None and done and result.busy_s > 0.0 and run.work_s > 0.0 and run.elapsed_s > 0.0
