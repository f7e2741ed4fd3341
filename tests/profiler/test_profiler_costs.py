"""What a retraining costs, from what its trial took."""

from __future__ import annotations

import pytest

from profiler.costs import cost_model, group_key, neighbour_cost
from protocol.schema import EpochResult, RetrainConfig, RetrainTrial

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
    # 0.5 to start, 400 samples prepared at 10 ms, ten epochs of 400 samples at half a millisecond and a validation.
    assert model.gpu_seconds(HEAD, 400) == pytest.approx(0.5 + 4.0 + 10 * (400 * 0.0005 + 0.04))
    assert model.trial_seconds(80, 2) == pytest.approx(0.5 + 0.8 + 0.04 + 2 * 0.08)


def test_a_neighbour_pays_in_every_epoch_what_a_frozen_one_pays_once() -> None:
    model = cost_model(trial(HEAD, epoch_s=0.08, prepare_s=0.8))
    assert model is not None
    key = group_key(RetrainConfig(config_id="all", epochs=1, batch_size=8))
    found = neighbour_cost(key, {group_key(HEAD): model})
    assert found is not None
    assert found.seconds_per_sample == pytest.approx(3 * (0.01 + 0.0005), rel=1e-6)  # forward, and backward twice
    assert found.prepare_s_per_sample == 0.0
