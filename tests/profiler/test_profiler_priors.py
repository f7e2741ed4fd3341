"""The site-wide prior: learns from all streams, transfers, and keeps its intervals honest."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np
import pytest

from profiler.history import History
from profiler.knowledge import SiteKnowledge
from profiler.microprofiler import estimate_in_detail
from profiler.priors import MIN_OBSERVATIONS, Observation, fit_prior
from profiler.records import StreamHistory
from protocol.schema import RetrainConfig
from tests.profiler.profiler_world import INFERENCE, RETRAIN, SPEC, World


def observe(seed: int, num_windows: int, *, noise: float = 0.03, num_streams: int = 8) -> list[Observation]:
    """Retrainings of a site whose streams differ by a constant and whose gain is a share of the error left."""
    rng = np.random.default_rng(seed)
    habit = rng.normal(0, 0.03, num_streams)
    rows = []
    for window in range(num_windows):
        for stream in range(num_streams):
            before = float(rng.uniform(0.5, 0.85))
            for config in RETRAIN:
                share = 0.25 + 0.2 * config.trained_fraction + 0.05 * math.log(config.epochs * config.data_fraction)
                after = before + share * (1.0 - before) + habit[stream] + rng.normal(0, noise)
                rows.append(
                    Observation(
                        stream_id=f"s{stream}",
                        window=window,
                        config=config,
                        accuracy_before=before,
                        accuracy_after=float(np.clip(after, 0.0, 1.0)),
                    )
                )
    return rows


@pytest.mark.parametrize("seed", range(3))
def test_the_next_window_is_predicted_to_the_noise_and_intervals_cover(seed: int) -> None:
    rows = observe(seed, 5)
    prior = fit_prior([o for o in rows if o.window < 4])
    assert prior is not None
    errors, covered = [], 0
    coming = [o for o in rows if o.window == 4]
    for o in coming:
        accuracy, half_width = prior.predict(o.stream_id, o.accuracy_before, o.config)
        errors.append(abs(accuracy - o.accuracy_after))
        covered += errors[-1] <= half_width
    assert float(np.median(errors)) < 0.03
    assert 0.68 <= covered / len(coming) <= 0.92


def test_a_configuration_and_a_stream_never_seen_are_predicted_from_the_others() -> None:
    prior = fit_prior(observe(1, 4))
    assert prior is not None
    unseen = RetrainConfig(config_id="new", epochs=12, data_fraction=0.6, trained_fraction=0.5)
    low, _ = prior.predict("nowhere", 0.6, RETRAIN[0])
    middle, _ = prior.predict("nowhere", 0.6, unseen)
    high, _ = prior.predict("nowhere", 0.6, RETRAIN[11])
    assert low < middle < high
    assert all(0.0 <= prior.predict("s1", before, unseen)[0] <= 1.0 for before in (0.0, 0.3, 0.999, 1.0))


def test_too_few_retrainings_give_no_prior() -> None:
    assert fit_prior([]) is None
    assert fit_prior(observe(1, 1)[: MIN_OBSERVATIONS - 1]) is None
    one_stream = observe(2, 1, num_streams=1)
    assert fit_prior(one_stream * 3) is None


def test_the_history_hands_out_observations_of_all_streams_in_order_over_runs(tmp_path: Path) -> None:
    world = World(0)
    path = tmp_path / "h.sqlite"
    for run in ("a", "b"):
        with History(path, run=run) as history:
            for window in range(3):
                for stream in ("north", "south"):
                    outcome = world.outcome(window, RETRAIN[window])
                    result = msgspec.structs.replace(outcome.result, stream_id=stream)
                    history.record_outcome(msgspec.structs.replace(outcome, result=result), time_s=0.0)
            rows = history.observations()
            few = history.observations(max_windows=2)
    assert [o.window for o in rows] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert {o.stream_id for o in rows} == {"north", "south"}
    assert len(few) == 4
    assert {o.config for o in few} == {RETRAIN[1], RETRAIN[2]}


def test_a_prior_sharpens_estimates_from_noisy_trials() -> None:
    plain: list[float] = []
    informed: list[float] = []
    for seed in range(6):
        world = World(seed, num_validation=25)
        rng = np.random.default_rng(100 + seed)
        past = [
            Observation(
                stream_id=stream,
                window=window,
                config=config,
                accuracy_before=world.accuracy_now,
                accuracy_after=float(np.clip(world.after(config) + rng.normal(0, 0.02), 0, 1)),
            )
            for window in range(9)
            for stream in ("north", "south")
            for config in RETRAIN
        ]
        prior = fit_prior(past)
        assert prior is not None
        trial = world.trial(0, (RETRAIN[4], RETRAIN[10]))
        for given, errors in ((None, plain), (prior, informed)):
            made = estimate_in_detail(
                SPEC,
                trial,
                world.dataset(0),
                RETRAIN,
                INFERENCE,
                StreamHistory(stream_id="north"),
                site=SiteKnowledge(prior=given),
            )
            errors += [abs(row.accuracy_after - world.after(row.config)) for row in made.retrain]
    assert float(np.median(informed)) < 0.6 * float(np.median(plain))


def test_a_prior_of_few_retrainings_hardly_counts_and_one_of_many_counts_as_much_as_the_process() -> None:
    few, many = fit_prior(observe(2, 3, num_streams=1)), fit_prior(observe(2, 5))
    assert few is not None
    assert many is not None
    assert few.num_observations == 36
    assert few.weight < 0.15
    assert 0.45 < many.weight < 0.5
