"""How good and how quick the estimates are.

``python benchmarks/bench_profiler.py`` prints the tables, ``pytest benchmarks/bench_profiler.py`` holds their
bounds. The published measurements are read from the folder in EKYA_PROFILES (default: ../shared/data/profiles
beside the checkout); what needs them is skipped where they are missing.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from rich.console import Console
from rich.table import Table

from profiler.costs import cost_model, group_key
from profiler.curves import effective_effort, fit_curve
from profiler.intervals import PastError, Z, factor
from profiler.microprofiler import EstimatorKnobs, estimate_in_detail
from profiler.priors import Observation, fit_prior
from profiler.process import Point, adapted, predict, thinned
from profiler.records import StreamHistory, WindowHistory
from protocol.schema import EpochResult, Record, RetrainConfig, RetrainTrial
from tests.profiler.profiler_world import INFERENCE, RETRAIN, SPEC, World

PROFILES = Path(os.environ.get("EKYA_PROFILES", Path(__file__).parents[2] / "shared" / "data" / "profiles"))
PUBLISHED = PROFILES / "cityscapes_retraining.csv"
DATA_SHARES = (0.1, 0.5, 1.0)

needs_published = pytest.mark.skipif(not PUBLISHED.exists(), reason=f"{PUBLISHED} is not there")


class Score(Record, frozen=True, kw_only=True):
    """Absolute errors of a method; ``coverage`` of its 80 % interval, None = it gives none."""

    method: str
    median: float
    ninetieth: float
    coverage: float | None
    num: int


class PublishedRow(Record, frozen=True, kw_only=True):
    observation: Observation
    predicted: float
    gpu_seconds: float
    gpu_seconds_predicted: float
    seconds_per_epoch: float


def read_published() -> list[PublishedRow]:
    """The published retrainings; configurations 0 to 2 train the last layer, 3 to 5 all of them."""
    rows = []
    with PUBLISHED.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            number, epochs = int(row["config"]), int(row["epochs"])
            config = RetrainConfig(
                config_id=f"c{number}-e{epochs}",
                epochs=epochs,
                batch_size=64,
                data_fraction=DATA_SHARES[number % 3],
                trained_fraction=1.0 if number >= 3 else 0.0,
                head_width=1024 if number >= 3 else 64,
            )
            rows.append(
                PublishedRow(
                    observation=Observation(
                        stream_id=row["city"],
                        window=int(row["window"]),
                        config=config,
                        accuracy_before=float(row["accuracy_before"]),
                        accuracy_after=float(row["accuracy_after"]),
                    ),
                    predicted=float(row["accuracy_after_predicted"]),
                    gpu_seconds=float(row["gpu_seconds"]),
                    gpu_seconds_predicted=float(row["gpu_seconds_predicted"]),
                    seconds_per_epoch=float(row["seconds_per_epoch"]),
                )
            )
    return rows


def score(method: str, errors: Sequence[float], covered: Sequence[bool] | None = None) -> Score:
    return Score(
        method=method,
        median=float(np.median(errors)),
        ninetieth=float(np.quantile(errors, 0.9)),
        coverage=None if covered is None else float(np.mean(covered)),
        num=len(errors),
    )


# ---------------------------------------------------------------- published measurements


def walk_forward(rows: Sequence[PublishedRow]) -> list[Score]:
    """Windows 2 and 3 of every city predicted with only past windows as history, no trial at all."""
    observations = [row.observation for row in rows]
    ours, covered, plain, published = [], [], [], []
    both: list[float] = []
    held: list[bool] = []
    past_errors: list[PastError] = []
    for window in (1, 2, 3):
        past = [o for o in observations if o.window < window]
        now = [o for o in observations if o.window == window]
        points = thinned([], [_point(o) for o in past])
        means, errors = predict(points, [_point(o) for o in now], adapted(points))
        prior = fit_prior(past)
        if prior is None:
            continue  # the first window of the table has nothing before it
        widened = factor([msgspec.structs.replace(e, age=window - 1 - e.age) for e in past_errors], "")
        for o, mean, error in zip(now, means, errors, strict=True):
            accuracy = prior.blended(float(mean), o.stream_id, o.accuracy_before, o.config)
            if window > 1:
                both.append(abs(accuracy - o.accuracy_after))
                held.append(both[-1] <= Z * widened * float(error))
            # ``age`` holds the window until the age is known.
            past_errors.append(
                PastError(stream_id="", age=window, error=o.accuracy_after - accuracy, scale=float(error))
            )
        past_errors = [e for e in past_errors if e.age < 4]
    for window in (2, 3):
        past = [o for o in observations if o.window < window]
        prior = fit_prior(past)
        assert prior is not None
        ridge = _plain_ridge(past)
        for row in rows:
            o = row.observation
            if o.window != window:
                continue
            accuracy, half_width = prior.predict(o.stream_id, o.accuracy_before, o.config)
            ours.append(abs(accuracy - o.accuracy_after))
            covered.append(ours[-1] <= half_width)
            plain.append(abs(ridge(o) - o.accuracy_after))
            published.append(abs(row.predicted - o.accuracy_after))
    return [
        score("published micro-profiler (trials)", published),
        score("plain ridge, half of the city's residual", plain),
        score("site prior alone, no trial", ours, covered),
        score("this project: process and prior, no trial", both, held),
    ]


def _point(o: Observation) -> Point:
    """As a point of the process; the published split is not small, and its size is not told: a point of error."""
    return Point(
        stream_id=o.stream_id,
        window=o.window,
        now=o.accuracy_before,
        key=group_key(o.config),
        effort=effective_effort(o.config.epochs, 1000 * o.config.data_fraction),
        model=o.config.config_id,
        kind="plain",
        accuracy=o.accuracy_after,
        noise=0.01,
    )


def _plain_ridge(past: Sequence[Observation]) -> Callable[[Observation], float]:
    kinds = sorted({(o.config.trained_fraction, o.config.data_fraction) for o in past})

    def features(o: Observation) -> list[float]:
        kind = (o.config.trained_fraction, o.config.data_fraction)
        return [1.0, o.accuracy_before, math.log(o.config.epochs), *(float(kind == k) for k in kinds)]

    x, y = np.array([features(o) for o in past]), np.array([o.accuracy_after for o in past])
    beta = np.linalg.solve(x.T @ x + 0.1 * np.eye(x.shape[1]), x.T @ y)
    rest = y - x @ beta
    habit = {
        city: 0.5 * float(np.mean([r for r, o in zip(rest, past, strict=True) if o.stream_id == city]))
        for city in {o.stream_id for o in past}
    }
    return lambda o: min(float(np.array(features(o)) @ beta) + habit.get(o.stream_id, 0.0), 1.0)


def longer_runs(rows: Sequence[PublishedRow]) -> list[Score]:
    """30 epochs predicted from before, 5 and 15 epochs of the same configuration: the curve alone."""
    found: dict[tuple[str, int, float, float], dict[int, Observation]] = {}
    for row in rows:
        o = row.observation
        key = (o.stream_id, o.window, o.config.trained_fraction, o.config.data_fraction)
        found.setdefault(key, {})[o.config.epochs] = o
    fitted, kept = [], []
    for runs in found.values():
        first = runs[5]
        efforts = [effective_effort(e, 1000 * first.config.data_fraction) for e in (0, 5, 15, 30)]
        curve = fit_curve(efforts[:3], [first.accuracy_before, first.accuracy_after, runs[15].accuracy_after])
        fitted.append(abs(curve.predict(efforts[3])[0] - runs[30].accuracy_after))
        kept.append(abs(runs[15].accuracy_after - runs[30].accuracy_after))
    return [score("last point kept", kept), score("learning curve", fitted)]


def costs(rows: Sequence[PublishedRow]) -> list[Score]:
    """Relative error of GPU-seconds of 30 epochs from the start-up and one epoch's time of the 5-epoch run."""
    short = {_run(row): row for row in rows if row.observation.config.epochs == 5}
    ours, published = [], []
    for row in rows:
        o = row.observation
        if o.config.epochs != 30:
            continue
        seen = short[_run(row)]
        num = round(1000 * o.config.data_fraction)
        trial = RetrainTrial(
            config=seen.observation.config,
            num_samples=num,
            total_samples=num,
            startup_s=max(seen.gpu_seconds - 5 * seen.seconds_per_epoch, 0.0),
            epochs=(EpochResult(epoch=1, accuracy=0.5, loss=1.0, busy_s=seen.seconds_per_epoch),),
        )
        cost = cost_model(trial)
        assert cost is not None
        ours.append(abs(cost.gpu_seconds(o.config, 1000) / row.gpu_seconds - 1.0))
        published.append(abs(row.gpu_seconds_predicted / row.gpu_seconds - 1.0))
    return [score("published micro-profiler", published), score("cost model, 5 epochs seen", ours)]


def _run(row: PublishedRow) -> tuple[str, int, float, float]:
    o = row.observation
    return o.stream_id, o.window, o.config.trained_fraction, o.config.data_fraction


# ---------------------------------------------------------------- known truth

CURVES: dict[str, Callable[[float], float]] = {
    "hyperbolic": lambda x: 0.9 - 0.45 / (1.0 + x / 150.0),
    "power": lambda x: 0.92 - 0.4 * (1.0 + x / 60.0) ** -0.5,
    "exponential": lambda x: 0.85 - 0.35 * math.exp(-x / 220.0),
    "flat": lambda x: 0.7,
    "saturated": lambda x: 0.985,
}


def known_curves(*, num_seeds: int = 60) -> list[Score]:
    """Trials of 4 epochs on 48 to 100 samples, 100 held-out samples; truth at 10 epochs on 300 samples."""
    rng = np.random.default_rng(5)
    scores = []
    for name, truth in CURVES.items():
        errors, covered = [], []
        for _ in range(num_seeds):
            num = int(rng.integers(48, 100))
            efforts = [effective_effort(e, num) for e in range(5)]
            curve = fit_curve(efforts, [rng.binomial(100, truth(x)) / 100 for x in efforts], num_validation=100)
            accuracy, error = curve.predict(effective_effort(10, 300))
            errors.append(abs(accuracy - truth(effective_effort(10, 300))))
            covered.append(errors[-1] <= 1.2816 * error)
        scores.append(score(name, errors, covered))
    return scores


def windows_of_history(*, num_seeds: int = 8) -> list[Score]:
    """Estimates of 12 configurations from 2 trials, by windows of history; retrainings fall short by 8 points."""
    scores = []
    for windows in (0, 1, 2, 3, 5):
        errors, covered = [], []
        for seed in range(num_seeds):
            world = World(seed, bias=-0.08)
            history = _played(world, windows)
            trial = world.trial(windows, (RETRAIN[4], RETRAIN[10]))
            made = estimate_in_detail(SPEC, trial, world.dataset(windows), RETRAIN, INFERENCE, history)
            for row in made.retrain:
                errors.append(abs(row.accuracy_after - world.after(row.config)))
                covered.append(errors[-1] <= 1.2816 * row.accuracy_error)
        scores.append(score(f"{windows} windows of history", errors, covered))
    return scores


def _played(world: World, windows: int) -> StreamHistory:
    history = StreamHistory(stream_id="north")
    for window in range(windows):
        trial = world.trial(window, (RETRAIN[4], RETRAIN[10]))
        made = estimate_in_detail(SPEC, trial, world.dataset(window), RETRAIN, INFERENCE, history)
        row = WindowHistory(
            window=window, trial=trial, estimate=made, outcomes=(world.outcome(window, RETRAIN[3 + 8 * (window % 2)]),)
        )
        history = StreamHistory(stream_id="north", windows=(*history.windows, row))
    return history


# ---------------------------------------------------------------- bounds


@needs_published
def test_without_a_trial_past_windows_predict_better_than_the_published_method_and_a_plain_ridge() -> None:
    published, plain, ours, both = walk_forward(read_published())
    assert both.median <= 0.031
    assert both.ninetieth <= 0.073
    assert both.median < min(published.median, plain.median)
    assert both.ninetieth < min(published.ninetieth, plain.ninetieth)
    assert ours.median <= 0.032
    assert ours.ninetieth <= 0.073
    assert ours.median < min(published.median, plain.median)
    assert ours.ninetieth < min(published.ninetieth, plain.ninetieth)
    assert ours.coverage is not None
    assert 0.75 <= ours.coverage <= 0.85


@needs_published
def test_the_cost_of_30_epochs_follows_from_5() -> None:
    published, ours = costs(read_published())
    assert ours.median < 0.15
    assert ours.median < published.median


@needs_published
def test_longer_runs_are_predicted_no_worse_than_by_the_last_point() -> None:
    kept, fitted = longer_runs(read_published())
    assert fitted.median < kept.median + 0.01


def test_known_curves_are_found_from_short_noisy_trials() -> None:
    scores = known_curves()
    assert float(np.median([s.median for s in scores])) < 0.045
    assert float(np.mean([s.coverage or 0.0 for s in scores])) > 0.7


def test_estimates_stay_close_whether_there_is_history_or_not() -> None:
    scores = windows_of_history()
    assert max(s.median for s in scores) < 0.06
    assert max(s.ninetieth for s in scores) < 0.13


def test_time_of_one_learning_curve(benchmark: BenchmarkFixture) -> None:
    efforts = [effective_effort(e, 60) for e in range(5)]
    benchmark(fit_curve, efforts, [0.5, 0.6, 0.65, 0.68, 0.7], num_validation=100)


def test_time_of_one_streams_estimate_with_five_windows_of_history(benchmark: BenchmarkFixture) -> None:
    world = World(0)
    history = _played(world, 5)
    trial = world.trial(5, (RETRAIN[4], RETRAIN[10]))
    benchmark(
        estimate_in_detail,
        SPEC,
        trial,
        world.dataset(5),
        RETRAIN,
        INFERENCE,
        history,
        knobs=EstimatorKnobs(),
    )


# ---------------------------------------------------------------- tables


def show(title: str, scores: Sequence[Score], console: Console) -> None:
    table = Table(title=title, title_justify="left")
    for name, justify in (("", "left"), ("median |error|", "right"), ("90th percentile", "right")):
        table.add_column(name, justify="right" if justify == "right" else "left", no_wrap=True)
    table.add_column("80 % interval covers", justify="right")
    table.add_column("n", justify="right")
    for s in scores:
        coverage = "–" if s.coverage is None else f"{100 * s.coverage:.1f} %"
        table.add_row(s.method, f"{s.median:.4f}", f"{s.ninetieth:.4f}", coverage, str(s.num))
    console.print(table)


def main() -> None:
    console = Console(width=110)
    if PUBLISHED.exists():
        rows = read_published()
        show("Published retrainings, windows 2 and 3, accuracy after", walk_forward(rows), console)
        show("Published retrainings, 30 epochs from 5 and 15, accuracy", longer_runs(rows), console)
        show("Published retrainings, GPU-seconds of 30 epochs, relative", costs(rows), console)
    show("Known curves, 4 epochs on 48 to 100 samples", known_curves(), console)
    show("Known world, 12 configurations from 2 trials", windows_of_history(), console)


if __name__ == "__main__":
    main()
