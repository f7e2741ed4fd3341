"""What a retraining costs, from what its trial took."""

from __future__ import annotations

import math

import msgspec
import pytest

from profiler.costs import CostModel, cost_model, cost_of_retraining, group_key, mean_cost, neighbour_cost
from protocol.schema import CheckpointRef, EpochResult, RetrainConfig, RetrainResult, RetrainTrial

HEAD = RetrainConfig(config_id="head", epochs=10, trained_fraction=0.0, batch_size=8)


def trial(config: RetrainConfig, epoch_s: float, prepare_s: float) -> RetrainTrial:
    epochs = tuple(
        EpochResult(epoch=epoch, accuracy=0.5, loss=1.0, busy_s=epoch_s if epoch else 0.04) for epoch in range(3)
    )
    return RetrainTrial(
        config=config, num_samples=80, total_samples=400, startup_s=0.5, epochs=epochs, prepare_s=prepare_s
    )


def test_what_is_worked_out_once_is_paid_once_and_grows_with_the_samples() -> None:
    model = cost_model(trial(HEAD, epoch_s=0.08, prepare_s=0.8))
    assert model is not None
    assert model.prepare_s_per_sample == pytest.approx(0.01)
    # 0.5 to start, 400 samples prepared at 10 ms, ten epochs of 400 samples at half a millisecond and a validation, and
    # three more of these around them.
    assert model.gpu_seconds(HEAD, 400) == pytest.approx(0.5 + 4.0 + 10 * (400 * 0.0005 + 0.04) + 3 * 0.04)
    assert model.trial_seconds(80, 2) == pytest.approx(0.5 + 0.8 + 0.04 + 2 * 0.08)


def test_a_neighbour_pays_in_every_epoch_what_a_frozen_one_pays_once() -> None:
    model = cost_model(trial(HEAD, epoch_s=0.08, prepare_s=0.8))
    assert model is not None
    key = group_key(RetrainConfig(config_id="all", epochs=1, batch_size=8))
    found = neighbour_cost(key, {group_key(HEAD): model})
    assert found is not None
    assert found.seconds_per_sample == pytest.approx(3 * (0.01 + 0.0005), rel=1e-6)  # forward, and backward twice
    assert found.prepare_s_per_sample == 0.0


def retrained(config: RetrainConfig, num_train: int, *, startup_s: float, sample_s: float) -> RetrainResult:
    """A whole retraining: ``startup_s`` before and after its epochs, each of which is a pass and a validation."""
    epoch_s = config.data_fraction * num_train * sample_s + 0.04
    epochs = tuple(
        EpochResult(epoch=k, accuracy=0.5, loss=1.0, busy_s=epoch_s if k else 0.04) for k in range(config.epochs + 1)
    )
    checkpoint = CheckpointRef(path="c", sha256="0" * 64, stream_id="s", version=2)
    return RetrainResult(
        stream_id="s",
        window=1,
        config=config,
        checkpoint=checkpoint,
        accuracy_before=0.5,
        accuracy_after=0.6,
        num_validation=50,
        epochs=epochs,
        busy_s=startup_s + config.epochs * epoch_s,
        seconds=1.0,
    )


def test_a_whole_retraining_tells_what_others_of_its_group_cost() -> None:
    whole = RetrainConfig(config_id="whole", epochs=20, batch_size=8, data_fraction=0.5)
    other = RetrainConfig(config_id="other", epochs=5, batch_size=8)
    model = cost_of_retraining(retrained(whole, 400, startup_s=0.9, sample_s=0.001), 400)
    assert model is not None
    assert model.gpu_seconds(whole, 400) == pytest.approx(0.9 + 20 * (0.2 + 0.04))
    assert model.gpu_seconds(other, 400) == pytest.approx(0.9 + 5 * (0.4 + 0.04))


def test_preparation_grows_with_the_samples_where_a_trial_has_told_it_from_starting() -> None:
    model = cost_of_retraining(retrained(HEAD, 400, startup_s=4.5, sample_s=0.0005), 400, prepare_s_per_sample=0.01)
    assert model is not None
    assert model.startup_s == pytest.approx(0.5)
    # A quarter of the samples: the worker starts as before, all else that is done with the set is a quarter.
    # 100 samples are twelve batches of 8 and one of 4, which costs more than its samples and less than a whole one.
    samples = math.sqrt(100 * 104)
    assert model.gpu_seconds(HEAD, 100) == pytest.approx(0.1 + 0.4 / 4 + 1.0 + 10 * (samples * 0.0005 + 0.04 / 4))


@pytest.mark.parametrize("num_samples", [37, 400])
def test_a_retraining_is_estimated_to_cost_what_it_was_seen_to(num_samples: int) -> None:
    config = msgspec.structs.replace(HEAD, batch_size=32)
    result = retrained(config, num_samples, startup_s=0.5, sample_s=0.001)
    model = cost_of_retraining(result, num_samples)
    assert model is not None
    assert model.gpu_seconds(config, num_samples) == pytest.approx(result.busy_s)


def test_a_validation_that_was_timed_is_not_taken_for_that_from_the_pictures_on() -> None:
    # What frozen layers make of the held-out pictures is remembered: 40 ms at first, then 5.
    plain = trial(HEAD, epoch_s=0.05, prepare_s=0.8)
    timed = msgspec.structs.replace(
        plain, epochs=tuple(msgspec.structs.replace(e, validation_s=0.005 if e.epoch else 0.04) for e in plain.epochs)
    )
    guessed, known = cost_model(plain), cost_model(timed)
    assert guessed is not None
    assert known is not None
    assert guessed.validation_s == pytest.approx(0.025)
    assert known.validation_s == pytest.approx(0.005)
    assert known.finish_s == pytest.approx(3 * 0.04)
    assert known.gpu_seconds(HEAD, 400) == pytest.approx(0.5 + 4.0 + 10 * (400 * 0.045 / 80 + 0.005) + 3 * 0.04)


def test_a_retraining_that_was_cut_short_or_left_nothing_says_nothing_about_costs() -> None:
    result = retrained(HEAD, 400, startup_s=0.5, sample_s=0.001)
    assert cost_of_retraining(msgspec.structs.replace(result, checkpoint=None), 400) is None
    assert cost_of_retraining(msgspec.structs.replace(result, epochs=result.epochs[:2]), 400) is None
    assert cost_of_retraining(result, 0) is None


def test_the_newest_cost_counts_most() -> None:
    costs = [CostModel(startup_s=s, seconds_per_sample=0.001, validation_s=0.1) for s in (4.0, 1.0)]
    assert mean_cost(costs).startup_s == pytest.approx(3.0)
    with pytest.raises(ValueError, match="no cost"):
        mean_cost([])
