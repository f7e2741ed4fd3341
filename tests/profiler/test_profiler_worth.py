"""The worth of trials, the window's budget, and intervals that hold."""

from __future__ import annotations

import math

import numpy as np
import pytest

from profiler.costs import CostModel, group_key
from profiler.intervals import PastError, Z, factor
from profiler.records import ConfigEstimate
from profiler.slowness import Slowness
from profiler.trials import Budget, Prospect, TrialKnobs, worth_trying
from profiler.worth import LUCK, expected_gain, mix_distance, trial_worths
from protocol.schema import DatasetRef, RetrainConfig

COST = CostModel(startup_s=0.1, seconds_per_sample=0.001, validation_s=0.02)


def row(name: str, rate: float, after: float, error: float, seconds: float = 10.0) -> ConfigEstimate:
    return ConfigEstimate(
        config=RetrainConfig(config_id=name, epochs=5, learning_rate=rate),
        source="past_trial",
        curve_accuracy=after,
        curve_error=error,
        base_gpu_seconds=seconds,
        accuracy_after=after,
        accuracy_error=error,
        gpu_seconds=seconds,
    )


def worths(*rows: ConfigEstimate, drift: float = 0.0, price: float = 0.0, window_s: float = 200.0) -> dict[str, float]:
    costs = {group_key(r.config): COST for r in rows}
    names = {group_key(r.config): r.config.config_id for r in rows}
    found = trial_worths(
        rows,
        0.6,
        costs,
        window_s=window_s,
        num_validation=60,
        num_samples=64,
        num_epochs=4,
        drift=drift,
        price=price,
    )
    return {names[w.key]: w.gain for w in found}


@pytest.mark.parametrize(("lead", "spread"), [(0.0, 0.1), (0.05, 0.1), (-0.05, 0.1), (0.3, 0.1)])
def test_the_expected_gain_is_what_a_simulation_of_the_choice_gives(lead: float, spread: float) -> None:
    draws = lead + spread * np.random.default_rng(3).normal(size=400_000)
    simulated = float(np.maximum(draws, 0.0).mean()) - max(lead, 0.0)
    assert expected_gain(lead, spread) == pytest.approx(simulated, abs=3e-4)


def test_a_close_race_of_uncertain_configurations_is_worth_a_trial_and_a_clear_one_is_not() -> None:
    close = worths(row("a", 0.001, 0.80, 0.08), row("b", 0.002, 0.79, 0.08))
    clear = worths(row("a", 0.001, 0.90, 0.03), row("b", 0.002, 0.62, 0.03))
    assert min(close.values()) > 0.005
    assert max(clear.values()) < 0.001


def test_what_is_known_exactly_is_never_tried() -> None:
    assert set(worths(row("a", 0.001, 0.8, 0.0), row("b", 0.002, 0.8, 0.0)).values()) == {0.0}


def test_a_trial_takes_the_luck_of_a_training_run_from_nobody() -> None:
    rows = row("a", 0.001, 0.80, LUCK), row("b", 0.002, 0.80, LUCK)
    assert set(worths(*rows).values()) == {0.0}
    assert min(worths(row("a", 0.001, 0.80, 2 * LUCK), row("b", 0.002, 0.80, 2 * LUCK)).values()) > 0.005


def test_drift_makes_a_trial_worth_more() -> None:
    rows = row("a", 0.001, 0.80, 0.08), row("b", 0.002, 0.74, 0.08)
    assert worths(*rows, drift=1.0)["b"] > 1.5 * worths(*rows)["b"]


def test_a_retraining_that_fills_the_window_is_not_worth_a_trial() -> None:
    short = worths(row("a", 0.001, 0.65, 0.1, seconds=5.0))
    long = worths(row("a", 0.001, 0.65, 0.1, seconds=99.0))
    assert long["a"] < 0.1 * short["a"]


def test_a_price_on_gpu_seconds_takes_a_dear_configuration_out_of_the_race() -> None:
    rows = row("cheap", 0.001, 0.70, 0.08, seconds=5.0), row("dear", 0.002, 0.76, 0.08, seconds=60.0)
    assert worths(*rows, price=1.0)["dear"] < worths(*rows)["dear"]


def prospect(*rows: ConfigEstimate, wait_share: float | None = None, price: float = 0.0) -> Prospect:
    return Prospect(expected=rows, accuracy_now=0.6, window_s=200.0, wait_share=wait_share, price=price)


def test_a_trial_that_a_retraining_waits_for_costs_what_the_stream_loses_meanwhile() -> None:
    alone = prospect(row("a", 0.001, 0.8, 0.05), row("b", 0.002, 0.7, 0.05))
    assert alone.cost(4.0) == 0.0
    waited = prospect(row("a", 0.001, 0.8, 0.05), row("b", 0.002, 0.7, 0.05), wait_share=0.2)
    # 4 s at a fifth of a GPU are 20 s of 200 without the 0.2 that the best one is expected to bring.
    assert waited.cost(4.0) == pytest.approx(0.2 * 20.0 / 200.0)
    busy = Prospect(
        expected=waited.expected, accuracy_now=0.6, window_s=200.0, wait_share=0.2, slowness=Slowness(factor=2.0)
    )
    assert busy.cost(4.0) == pytest.approx(2 * waited.cost(4.0)), "on a busy machine a trial takes twice as long"
    hopeless = prospect(row("a", 0.001, 0.5, 0.05), wait_share=0.2)
    assert hopeless.cost(4.0) == 0.0, "nothing is lost by waiting where nothing helps"
    assert prospect(row("a", 0.001, 0.8, 0.05), wait_share=0.2, price=1.0).cost(4.0) > waited.cost(4.0)


@pytest.mark.parametrize("wait_share", [None, 0.5, 0.01])
def test_what_is_not_worth_waiting_for_is_not_tried(wait_share: float | None) -> None:
    rows = row("a", 0.001, 0.80, 0.08), row("b", 0.002, 0.78, 0.08)
    costs = {group_key(r.config): COST for r in rows}
    expected = prospect(*rows, wait_share=wait_share)
    dataset = DatasetRef(path="d", stream_id="s", window=1, num_train=300, num_validation=60, class_counts=(150, 150))
    found = worth_trying(list(costs), expected, costs, dataset, 64, 4, TrialKnobs())
    assert bool(found) == (wait_share != 0.01), "at a hundredth of a GPU a trial costs more than it can bring"


def test_class_mixes_that_differ_by_chance_alone_have_hardly_any_distance() -> None:
    draw = np.random.default_rng(5)
    same = [
        mix_distance(draw.multinomial(200, (0.5, 0.3, 0.2)).tolist(), draw.multinomial(200, (0.5, 0.3, 0.2)).tolist())
        for _ in range(200)
    ]
    assert float(np.mean(same)) < 0.02
    assert mix_distance((180, 10, 10), (20, 90, 90)) > 0.6
    assert mix_distance((), (10, 10)) == 0.0
    assert mix_distance((0, 0), (10, 10)) == 0.0


def test_what_one_stream_leaves_of_the_budget_is_there_for_those_after_it() -> None:
    budget = Budget(10.0, 5)
    assert budget.allowance(1, "a") == pytest.approx(4.0)  # at most twice its part
    budget.spend(1, "a", 0.0)
    budget.spend(1, "b", 0.0)
    budget.spend(1, "c", 0.0)
    assert budget.allowance(1, "d") == pytest.approx(5.0)
    budget.spend(1, "d", 10.0)
    assert budget.allowance(1, "e") == 0.0
    assert budget.allowance(2, "a") == pytest.approx(4.0)


# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize("wrong_by", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("shape", ["normal", "heavy"])
def test_intervals_hold_their_level_however_wrong_the_estimator_is_about_itself(wrong_by: float, shape: str) -> None:
    draw = np.random.default_rng(11)
    covered = []
    for _ in range(150):
        scales = draw.uniform(0.02, 0.1, 61)
        noise = draw.normal(size=61) if shape == "normal" else draw.standard_t(3, size=61)
        errors = wrong_by * scales * noise
        past = [PastError(stream_id="s", age=i // 6, error=errors[i], scale=scales[i]) for i in range(60)]
        half_width = factor(past, "s") * Z * scales[60]
        covered.append(abs(errors[60]) <= half_width)
    assert 0.7 <= float(np.mean(covered)) <= 0.92


def test_without_errors_the_interval_is_somewhat_wider_than_the_estimator_says() -> None:
    assert 1.0 <= factor([], "s") <= 2.0


def test_a_streams_own_errors_count_for_more_than_those_of_its_neighbours() -> None:
    calm = [PastError(stream_id="n", age=0, error=0.02, scale=0.05) for _ in range(20)]
    wild = [PastError(stream_id="s", age=0, error=0.15, scale=0.05) for _ in range(10)]
    assert factor([*calm, *wild], "s") > factor([*calm, *wild], "n")
    assert math.isfinite(factor([*calm, *wild], "other"))
