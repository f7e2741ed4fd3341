"""A site's retrainings as one Gaussian process: learning curves with priors from the stream's and others' history.

Points are measured accuracies of models: of a window's serving model, of its trials, of its retrainings. With the
accuracy a of the serving model on the window's labels, trained fraction d and effort x (samples seen, repeats
discounted), the share of the way from a to a ceiling C that training goes is a saturating curve

    rho(d, x) = R(d) * x / (x + X(d)),     accuracy = a + (C - a) * rho + what the site, the stream, the window add

and everything that is added is Gaussian with mean 0. Covariance of two points (own terms only where they share it):

1. the ceiling, rho * rho' times variances of site, stream and window: one retraining tells of all configurations;
2. the reach of a kind of configuration, (C - a)(C' - a') k(d, x; d', x') of site and stream, k squared exponential:
   near configurations reach alike, over epochs, data fraction and trained fraction;
3. live against held-out accuracy: of site, stream and window (drift after the labels were made), and with rho;
4. how hard a window's held-out split is, common to all that is measured on it; "plain" accuracies have neither 3 nor 4,
   and both are smaller near 1, by sqrt(a (1 - a)) over its value at 0.7;
5. the luck of one training run, common to all measurements of its model; and the noise of each measurement.

Predictions are the conditional mean and variance. What a trial says, how much the past counts, and how wide an
estimate without any history is, all follow from the covariance. Its constants were fitted by marginal likelihood to
the retrainings of two city streams and rounded; three of them, and the two below, were then set on three streams
(benchmarks/bench_profiler_replay.py names them and reports on others). Since retrainings go only 0.7 of the way
(executor/learning/training.py), what they add of luck and of drift (``luck``, ``live_reach``, ``live_window``) is 0.7
of what was fitted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from profiler.costs import GroupKey, key_distance
from protocol.schema import Record

Array = npt.NDArray[np.float64]
Kind = Literal["live", "split", "plain"]

# Beyond so many points the solve takes longer than a decision may: the own stream's and the newest stay.
MAX_POINTS = 300


MIN_FOR_CEILING = 12
CEILING_QUANTILE = 0.8
# Residuals beyond so many standard deviations are pulled in: a scene that was cut tells nothing of the next window.
MAX_DEVIATION = 2.0
_USUAL_VARIANCE, _LEAST_ROOM = 0.21, 0.5


class Point(Record, frozen=True, kw_only=True):
    """One measurement (``accuracy`` None: one to be predicted) of one model.

    ``now``: accuracy of the serving model on the window's labels. ``effort`` 0 = the serving model itself. ``model``
    tells models of a window apart. ``kind``: live frames of the window, or the held-out split. ``noise``: standard
    error of the measurement.
    """

    stream_id: str
    window: int
    now: float
    key: GroupKey
    effort: float
    model: str
    kind: Kind
    accuracy: float = 0.0
    noise: float = 0.0


class ProcessConstants(Record, frozen=True, kw_only=True):
    """Standard deviations in accuracy, lengths in their units; see the numbered terms of the module."""

    ceiling: float = 0.7
    reach_head: float = 0.8
    reach_all: float = 1.1
    effort_head: float = 170.0
    effort_all: float = 170.0
    ceiling_site: float = 0.06
    ceiling_stream: float = 0.04
    ceiling_window: float = 0.055
    reach_site: float = 0.35
    reach_stream: float = 0.25
    length: float = 1.6
    live_site: float = 0.03
    live_stream: float = 0.03
    live_window: float = 0.07
    live_reach: float = 0.028
    split_window: float = 0.045
    luck: float = 0.035


CONSTANTS = ProcessConstants()


class _Columns:
    """Points as arrays."""

    def __init__(self, points: Sequence[Point], c: ProcessConstants) -> None:
        depth = np.array([p.key[1] for p in points])
        effort = np.array([p.effort for p in points])
        self.now = np.array([p.now for p in points])
        self.live = np.array([p.kind == "live" for p in points], dtype=np.float64)
        self.split = np.array([p.kind == "split" for p in points], dtype=np.float64)
        self.stream = np.array([p.stream_id for p in points])
        self.window = np.array([p.window for p in points])
        self.model = np.array([p.model for p in points])
        reach = c.reach_head + (c.reach_all - c.reach_head) * depth
        scale = c.effort_head * (c.effort_all / c.effort_head) ** depth
        # Accuracies near 1 (or 0) leave a window and its split less room to differ.
        self.room_to_vary = np.maximum(np.sqrt(self.now * (1.0 - self.now) / _USUAL_VARIANCE), _LEAST_ROOM)
        self.rho = reach * effort / (effort + scale)
        ceiling = np.maximum(c.ceiling, self.now + 0.25 * (1.0 - self.now))
        self.room = ceiling - self.now
        self.mean = self.now + self.room * self.rho
        self.log_effort = np.log(np.maximum(effort, 1.0))
        self.trained = (effort > 0.0).astype(np.float64)
        self.keys = [p.key for p in points]


def _distance(a: _Columns, b: _Columns) -> Array:
    """Squared distance of configurations: doublings of effort, and what key_distance says of the rest."""
    unique_a, place_a = _unique(a.keys)
    unique_b, place_b = _unique(b.keys)
    between = np.array([[key_distance(x, y) for y in unique_b] for x in unique_a])[np.ix_(place_a, place_b)]
    doublings = (a.log_effort[:, None] - b.log_effort[None, :]) / math.log(2.0)
    return np.asarray(between**2 + (0.5 * doublings) ** 2)


def _unique(keys: Sequence[GroupKey]) -> tuple[list[GroupKey], list[int]]:
    places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    return list(places), [places[key] for key in keys]


def _covariance(a: _Columns, b: _Columns, c: ProcessConstants) -> Array:
    same_stream = (a.stream[:, None] == b.stream[None, :]).astype(np.float64)
    same_window = same_stream * (a.window[:, None] == b.window[None, :])
    same_model = same_window * (a.model[:, None] == b.model[None, :]) * np.outer(a.trained, b.trained)
    live, split = np.outer(a.live, b.live), np.outer(a.split, b.split)
    rho = np.outer(a.rho, b.rho)
    near = np.exp(-0.5 * _distance(a, b) / c.length**2) * np.outer(a.room * a.trained, b.room * b.trained)
    varies = np.outer(a.room_to_vary, b.room_to_vary)
    return np.asarray(
        rho * (c.ceiling_site**2 + c.ceiling_stream**2 * same_stream + c.ceiling_window**2 * same_window)
        + near * (c.reach_site**2 + c.reach_stream**2 * same_stream)
        + varies * live * (c.live_site**2 + c.live_stream**2 * same_stream + c.live_window**2 * same_window)
        + varies * live * rho * c.live_reach**2
        + varies * split * same_window * c.split_window**2
        + same_model * c.luck**2
    )


def adapted(points: Sequence[Point], constants: ProcessConstants = CONSTANTS) -> ProcessConstants:
    """``constants`` with the ceiling of the site: what its better retrainings reached; needs a dozen of them."""
    reached = [p.accuracy for p in points if p.effort > 0.0]
    if len(reached) < MIN_FOR_CEILING:
        return constants
    return msgspec.structs.replace(constants, ceiling=float(np.quantile(reached, CEILING_QUANTILE)))


def thinned(own: Sequence[Point], others: Sequence[Point]) -> list[Point]:
    """At most ``MAX_POINTS``, the stream's own before those of others, the newest of either first."""
    newest = sorted(own, key=lambda p: -p.window)[:MAX_POINTS]
    return [*newest, *sorted(others, key=lambda p: -p.window)[: MAX_POINTS - len(newest)]]


def predict(
    points: Sequence[Point], wanted: Sequence[Point], constants: ProcessConstants = CONSTANTS
) -> tuple[Array, Array]:
    """(mean, standard deviation) of the accuracies of ``wanted``, each of shape (len(wanted),); what is measured of
    them (``accuracy``, ``noise``) is ignored. The split's hardness is part of what is wanted of kind "split"."""
    if not wanted:
        return np.zeros(0), np.zeros(0)
    to = _Columns(wanted, constants)
    prior = np.diag(_covariance(to, to, constants))
    if not points:
        return np.clip(to.mean, 0.0, 1.0), np.sqrt(prior)
    known = _Columns(points, constants)
    noise = np.array([max(p.noise, 0.01) ** 2 for p in points])
    matrix = _covariance(known, known, constants) + np.diag(noise)
    cross = _covariance(to, known, constants)
    residual = np.array([p.accuracy for p in points]) - known.mean
    spread = np.sqrt(np.diag(matrix))
    residual = np.clip(residual, -MAX_DEVIATION * spread, MAX_DEVIATION * spread)
    solved = np.linalg.solve(matrix, np.column_stack([residual, cross.T]))
    mean = to.mean + cross @ solved[:, 0]
    variance = prior - np.einsum("ij,ji->i", cross, solved[:, 1:])
    return np.clip(mean, 0.0, 1.0), np.sqrt(np.maximum(variance, 1e-6))


def log_likelihood(points: Sequence[Point], constants: ProcessConstants) -> float:
    """Log marginal likelihood of measured points; for fitting the constants."""
    known = _Columns(points, constants)
    noise = np.array([max(p.noise, 0.01) ** 2 for p in points])
    matrix = _covariance(known, known, constants) + np.diag(noise)
    residual = np.array([p.accuracy for p in points]) - known.mean
    sign, log_determinant = np.linalg.slogdet(matrix)
    if sign <= 0:
        return -math.inf
    return -0.5 * float(residual @ np.linalg.solve(matrix, residual) + log_determinant)
