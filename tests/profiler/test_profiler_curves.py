"""Learning curves: bounded, rising, finite, and right where the truth is known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from profiler.curves import MIN_ERROR, effective_effort, fit_curve, flat_curve

points = st.lists(st.tuples(st.floats(0.0, 1e6), st.floats(-0.5, 1.5)), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(points, st.lists(st.floats(0.0, 1e8), min_size=2, max_size=8), st.sampled_from([None, 0.0, 0.5, 1.0]))
def test_any_points_give_a_bounded_rising_finite_curve(
    data: list[tuple[float, float]], at: list[float], ceiling: float | None
) -> None:
    curve = fit_curve([x for x, _ in data], [y for _, y in data], ceiling=ceiling)
    predictions = [curve.predict(x) for x in sorted(at)]
    for accuracy, error in predictions:
        assert 0.0 <= accuracy <= 1.0
        assert math.isfinite(error)
        assert error >= MIN_ERROR
    for (lower, _), (upper, _) in itertools.pairwise(predictions):
        assert upper >= lower - 1e-9


@settings(max_examples=80, deadline=None)
@given(st.floats(0, 100), st.floats(0, 1e5), st.floats(0, 10), st.floats(0, 1e4))
def test_effort_grows_with_epochs_and_samples_and_never_exceeds_samples_seen(
    epochs: float, samples: float, more_epochs: float, more_samples: float
) -> None:
    effort = effective_effort(epochs, samples)
    assert 0.0 <= effort <= epochs * samples + 1e-6
    assert effective_effort(epochs + more_epochs, samples) >= effort - 1e-9
    assert effective_effort(epochs, samples + more_samples) >= effort - 1e-9


TRUTHS: dict[str, Callable[[float], float]] = {
    "hyperbolic": lambda x: 0.9 - 0.45 / (1.0 + x / 150.0),
    "power": lambda x: 0.92 - 0.4 * (1.0 + x / 60.0) ** -0.5,
    "exponential": lambda x: 0.85 - 0.35 * math.exp(-x / 220.0),
    "flat": lambda x: 0.7,
    "saturated": lambda x: 0.99,
}


@pytest.mark.parametrize("truth", TRUTHS)
def test_known_curves_are_interpolated_closely_and_extrapolated_usefully(truth: str) -> None:
    efforts = [effective_effort(e, 100) for e in range(6)]
    curve = fit_curve(efforts, [TRUTHS[truth](x) for x in efforts], num_validation=400)
    assert abs(curve.predict(350.0)[0] - TRUTHS[truth](350.0)) < 0.01
    target = effective_effort(15, 300)
    assert abs(curve.predict(target)[0] - TRUTHS[truth](target)) < 0.06


@pytest.mark.parametrize("truth", TRUTHS)
def test_noisy_curves_have_a_small_median_error_and_an_honest_error_bar(truth: str) -> None:
    rng = np.random.default_rng(7)
    efforts = [effective_effort(e, 100) for e in range(5)]
    target = effective_effort(10, 200)
    errors, inside = [], 0
    for _ in range(60):
        measured = [rng.binomial(150, TRUTHS[truth](x)) / 150 for x in efforts]
        accuracy, error = fit_curve(efforts, measured, num_validation=150).predict(target)
        errors.append(abs(accuracy - TRUTHS[truth](target)))
        inside += errors[-1] <= 2.0 * error
    assert float(np.median(errors)) < 0.045
    assert inside >= 45


def test_two_points_are_enough_and_their_error_grows_with_the_distance() -> None:
    curve = fit_curve([0.0, 100.0], [0.5, 0.7])
    near, far = curve.predict(120.0), curve.predict(5000.0)
    assert 0.65 < near[0] < 0.8
    assert near[0] < far[0] <= 0.95
    assert far[1] > near[1]


def test_falling_accuracy_fits_flat_within_the_data() -> None:
    curve = fit_curve([0.0, 100.0, 200.0, 300.0], [0.8, 0.75, 0.7, 0.7])
    assert 0.68 < curve.predict(300.0)[0] < 0.8
    assert curve.predict(3000.0)[0] < 0.83
    assert curve.noise > 0.02


def test_one_point_or_no_effort_gives_a_flat_curve() -> None:
    assert fit_curve([50.0], [0.6]).predict(1e6)[0] == pytest.approx(0.6)
    assert fit_curve([0.0, 0.0], [0.5, 0.7]).predict(1e6)[0] == pytest.approx(0.6)
    assert flat_curve(1.4).predict(3.0)[0] == 1.0


def test_non_finite_points_are_dropped_and_useless_input_is_refused() -> None:
    clean = fit_curve([0.0, 100.0, 200.0], [0.4, 0.6, 0.7])
    dirty = fit_curve([0.0, 100.0, math.inf, 150.0, 200.0], [0.4, 0.6, 0.1, math.nan, 0.7])
    assert dirty.predict(400.0) == clean.predict(400.0)
    with pytest.raises(ValueError, match="finite point"):
        fit_curve([math.nan], [0.5])
    with pytest.raises(ValueError, match="2 efforts for 1"):
        fit_curve([0.0, 1.0], [0.5])


def test_a_lower_ceiling_lowers_the_extrapolation() -> None:
    low = fit_curve([0.0, 100.0], [0.5, 0.6], ceiling=0.62).predict(1e5)[0]
    high = fit_curve([0.0, 100.0], [0.5, 0.6], ceiling=0.95).predict(1e5)[0]
    assert low < high - 0.05
