"""Learning curves: accuracy over training effort, fitted by non-negative least squares and extrapolated.

Data: points (x_i, y_i), x effective effort (samples seen, repeats discounted), y validation accuracy.
Model, one per family f and scale tau of a saturating term phi_f(x / tau), phi(0) = 0, phi -> 1, increasing:

    A(x) = w_0 + w_1 * phi_f(x / tau),   w >= 0

1. least squares in w with w >= 0 (NNLS), so that A never falls with effort;
2. one weak extra row, w_0 + w_1 = ceiling: two to four points do not say where a curve ends;
3. the curves of all families and scales are averaged with weights that fall with their residuals. The average
   rises too, and their spread is what the data cannot say about the extrapolation.

Fitting a saturating curve to early epochs by NNLS is the method of NSDI 2022 section 4.3 (after Optimus,
EuroSys 2018); the average over curves and the standard error are not in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from protocol.schema import Record

Array = npt.NDArray[np.float64]
Family = Literal["hyperbolic", "power", "exponential"]

# Repeating the same samples is worth less and less; after about this many repeats a further epoch adds 1/e of a fresh
# one (Muennighoff et al., NeurIPS 2023, find a constant of about 15 for repeated data).
REPEATS_WORTH = 15.0
NUM_SCALES = 8
MIN_EFFORT = 1e-6
# Prior on where a curve ends: this part of the best point's error is still removed, give or take.
REMAINING_GAIN = 0.35
CEILING_ERROR = 0.15
# A validation accuracy is never known better than this, whatever the residuals say.
MIN_ERROR = 0.005
DEFAULT_NOISE = 0.02
# Standard error added per doubling of effort beyond the last point.
ERROR_PER_DOUBLING = 0.008


def effective_effort(epochs: float, num_samples: float) -> float:
    """Samples' worth of training in ``epochs`` passes over ``num_samples`` samples; 0 for no training.

    Grows with both arguments; the first epoch counts in full, repeats with decaying worth.
    """
    if epochs <= 0.0 or num_samples <= 0.0:
        return 0.0
    if epochs <= 1.0:
        return epochs * num_samples
    return num_samples * (1.0 + REPEATS_WORTH * -math.expm1(-(epochs - 1.0) / REPEATS_WORTH))


class Component(Record, frozen=True, kw_only=True):
    """One curve of the average: ``start`` + ``gain`` * phi(x / ``scale``)."""

    family: Family
    start: float
    gain: float
    scale: float
    weight: float  # in the average; the weights of a curve add up to 1


class LearningCurve(Record, frozen=True, kw_only=True):
    """A fitted curve. ``noise``: standard deviation of one measured point; ``last_effort``: largest x seen."""

    components: tuple[Component, ...]
    noise: float
    last_effort: float
    num_points: int

    def predict(self, effort: float) -> tuple[float, float]:
        """Accuracy at ``effort`` and its standard error; the accuracy lies in [0, 1] and never falls with effort."""
        x = max(effort, 0.0)
        values = np.array([_evaluate(component, x) for component in self.components])
        weights = np.array([component.weight for component in self.components])
        mean = float(np.clip(weights @ values, 0.0, 1.0))
        spread = float(weights @ (values - weights @ values) ** 2)
        doublings = math.log2(x / self.last_effort) if self.last_effort > 0.0 and x > self.last_effort else 0.0
        variance = self.noise**2 / max(self.num_points, 1) + spread + (ERROR_PER_DOUBLING * doublings) ** 2
        return mean, max(math.sqrt(variance), MIN_ERROR)


_PHI: dict[Family, Callable[[Array], Array]] = {
    "hyperbolic": lambda t: t / (1.0 + t),
    "power": lambda t: 1.0 - 1.0 / np.sqrt(1.0 + t),
    "exponential": lambda t: -np.expm1(-t),
}


def _evaluate(component: Component, x: float) -> float:
    term = float(_PHI[component.family](np.array(x / component.scale)))
    # Clipping before averaging keeps one runaway curve from dragging the average along.
    return min(max(component.start + component.gain * term, 0.0), 1.0)


def flat_curve(accuracy: float, noise: float = DEFAULT_NOISE) -> LearningCurve:
    """The curve that stays at ``accuracy`` whatever the effort."""
    start = min(max(accuracy, 0.0), 1.0)
    component = Component(family="exponential", start=start, gain=0.0, scale=1.0, weight=1.0)
    return LearningCurve(components=(component,), noise=noise, last_effort=0.0, num_points=1)


def likely_ceiling(best: float, gain: float = REMAINING_GAIN) -> float:
    """Accuracy that endless training reaches when it still removes the part ``gain`` of the error left at ``best``."""
    return best + gain * (1.0 - best)


def fit_curve(
    efforts: Sequence[float],
    accuracies: Sequence[float],
    *,
    ceiling: float | None = None,
    num_validation: int = 0,
) -> LearningCurve:
    """Fit a learning curve to points (effort >= 0, accuracy); non-finite points are dropped.

    ``ceiling``: accuracy that endless training is expected to reach (weak prior; None = somewhat
    better than the best point).
    ``num_validation``: samples behind each accuracy, for the binomial part of the noise; 0 = unknown.
    Raises ValueError when the lengths differ or no finite point is left.
    """
    if len(efforts) != len(accuracies):
        raise ValueError(f"{len(efforts)} efforts for {len(accuracies)} accuracies")
    x_all, y_all = np.asarray(efforts, dtype=np.float64), np.asarray(accuracies, dtype=np.float64)
    good = np.isfinite(x_all) & np.isfinite(y_all) & (x_all >= 0.0)
    x, y = x_all[good], np.clip(y_all[good], 0.0, 1.0)
    if x.size == 0:
        raise ValueError("a learning curve needs at least one finite point with effort >= 0")
    binomial = _binomial_noise(float(np.mean(y)), num_validation)
    if x.size == 1 or float(x.max()) <= MIN_EFFORT:
        return flat_curve(float(np.mean(y)), max(binomial, DEFAULT_NOISE))

    best = float(y.max())
    end = min(max(ceiling if ceiling is not None else likely_ceiling(best), 0.0), 1.0)
    # Late points say more about where the curve goes than the first ones.
    weight = 0.5 + 0.5 * x / float(x.max())
    first = max(float(x[x > 0.0].min()), 1e-3 * float(x.max()))
    scales = np.geomspace(first / 4.0, float(x.max()) * 8.0, NUM_SCALES)
    bases = [
        (family, float(scale), np.column_stack([np.ones_like(x), phi(x / scale)]))
        for family, phi in _PHI.items()
        for scale in scales
    ]

    floor = max(binomial, MIN_ERROR)
    if x.size <= 3 and num_validation == 0:
        floor = max(floor, DEFAULT_NOISE)  # two parameters through three points leave no residual to learn from
    free = [nnls(basis * weight[:, None], y * weight)[1] for _, _, basis in bases]
    noise = max(min(free) / math.sqrt(max(x.size - 2, 1)), floor)

    prior = noise / CEILING_ERROR
    fits, squares = [], []
    for _, _, basis in bases:
        rows = np.vstack([basis * weight[:, None], [[prior, prior]]])
        w, residual = nnls(rows, np.append(y * weight, prior * end))
        fits.append(w)
        squares.append(residual**2)
    likelihood = np.exp(-(np.array(squares) - min(squares)) / (2.0 * noise**2))
    shares = likelihood / likelihood.sum()
    components = tuple(
        Component(family=family, start=float(w[0]), gain=float(w[1]), scale=scale, weight=float(share))
        for (family, scale, _), w, share in zip(bases, fits, shares, strict=True)
    )
    return LearningCurve(components=components, noise=noise, last_effort=float(x.max()), num_points=int(x.size))


def best_hyperbola(epochs: Sequence[float], accuracies: Sequence[float], at: float) -> float:
    """w_0 + w_1 * k / (k + tau), w >= 0, of least squared error over a grid of tau, read at ``at`` epochs, 0..1."""
    x, y = np.asarray(epochs, dtype=np.float64), np.asarray(accuracies, dtype=np.float64)
    scales = np.geomspace(0.25, 64.0, 25)
    fits = [(float(tau), *nnls(np.column_stack([np.ones_like(x), x / (x + tau)]), y)) for tau in scales]
    tau, weights, _ = min(fits, key=lambda fit: fit[2])
    return float(np.clip(weights[0] + weights[1] * at / (at + tau), 0.0, 1.0))


def _binomial_noise(accuracy: float, num_validation: int) -> float:
    if num_validation <= 0:
        return 0.0
    p = (accuracy * num_validation + 1.0) / (num_validation + 2.0)
    return math.sqrt(p * (1.0 - p) / num_validation)
