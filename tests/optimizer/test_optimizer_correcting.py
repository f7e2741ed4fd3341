"""Retrainings whose epochs tell another story than their estimate: stopped, or told to the planner."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest

from optimizer import questions
from optimizer.config import CorrectionConfig
from optimizer.correcting import Assessment, assess
from optimizer.ports import Progressed, Received
from optimizer.simulator import Simulation
from optimizer.state import Retraining
from profiler.slowness import Slowness
from protocol import messages as m
from protocol.events import PlanSolved, RetrainCorrected, RetrainFinished, RetrainProgress
from protocol.plan import RetrainProfile
from protocol.schema import CheckpointRef, EpochResult, GpuSpec, PairedCounts, RetrainConfig, RetrainResult
from tests.optimizer.coordinator_world import TestWorld, simulation, site

CONFIG = CorrectionConfig()


def epochs(*accuracies: float, busy_s: float = 1.0) -> tuple[EpochResult, ...]:
    return tuple(
        EpochResult(epoch=k, accuracy=min(1.0, max(0.0, a)), loss=1.0, busy_s=busy_s if k else 0.1)
        for k, a in enumerate(accuracies)
    )


def judged(seen: tuple[EpochResult, ...], **changes: float | CorrectionConfig) -> Assessment:
    """A retraining of 10 epochs from 0.5 to 0.8 at a second an epoch, as the plan has it."""
    known: dict[str, object] = {"num_epochs": 10, "num_validation": 100, "accuracy_before": 0.5, "accuracy_after": 0.8}
    known |= {"gpu_seconds": 10.5, "told_after": 0.8, "told_seconds": 10.5, "config": CONFIG}
    return assess(seen, **(known | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("speed", [0.5, 2.0])
def test_what_no_share_shortens_is_reckoned_with_at_the_share_that_a_plan_gives(share: float, speed: float) -> None:
    start_s, busy_s, factor = 0.8, 1.5, 1.2
    wish = Retraining(
        executor_id="g",
        config=RetrainConfig(config_id="head", epochs=5),
        share=share,
        profile=RetrainProfile(
            retrain_id="head",
            gpu_seconds=Slowness(start_s=start_s, factor=factor).work_s(busy_s),
            accuracy_after=0.8,
            start_s=start_s,
        ),
    )
    expected_s = questions.expected_work(wish, GpuSpec(gpu_id="g", speed=speed)) / (speed * share)
    assert expected_s == pytest.approx(start_s + factor * busy_s / (speed * share))


def rising(gain: float, num: int, start: float = 0.5) -> list[float]:
    return [start + gain * (1 - math.exp(-k / 3.3)) / (1 - math.exp(-3.0)) for k in range(num + 1)]


def test_a_retraining_that_goes_as_predicted_is_left_alone() -> None:
    for num in range(1, 10):
        assert judged(epochs(*rising(0.3, num))).verdict == "go_on"


def test_one_that_makes_the_model_worse_is_stopped() -> None:
    found = judged(epochs(0.5, 0.3, 0.25, 0.2))
    assert found.verdict == "stop"
    assert found.accuracy_after < 0.5
    assert "gain of -" in found.reason


def test_one_that_has_levelled_off_is_stopped_because_the_rest_only_costs() -> None:
    flat = judged(epochs(0.5, 0.51, 0.51, 0.51, 0.51, 0.51, 0.51), accuracy_after=0.53, told_after=0.53)
    assert flat.verdict == "stop"
    assert "levelled off" in flat.reason
    last = judged(epochs(*[0.5, *[0.51] * 9]), accuracy_after=0.53, told_after=0.53)
    assert last.verdict == "go_on"  # nothing is saved any more


def test_one_that_is_better_or_worse_or_dearer_or_cheaper_than_thought_is_told() -> None:
    better = judged(epochs(*rising(0.48, 4)))
    assert better.verdict == "tell"
    assert better.accuracy_after > 0.88
    worse = judged(epochs(*rising(0.05, 5)))
    assert worse.verdict == "tell"
    assert worse.accuracy_after < 0.72
    dear = judged(epochs(*rising(0.3, 4), busy_s=2.0))
    assert dear.verdict == "tell"
    assert dear.gpu_seconds == pytest.approx(20.0, abs=1.5)
    cheap = judged(epochs(*rising(0.3, 4), busy_s=0.5))
    assert cheap.verdict == "tell"
    assert cheap.gpu_seconds < 7.0


def test_what_was_told_is_not_told_again() -> None:
    better = judged(epochs(*rising(0.48, 4)))
    assert judged(epochs(*rising(0.48, 4)), told_after=better.accuracy_after).verdict == "go_on"


def test_nothing_is_stopped_early_on_or_when_that_is_switched_off() -> None:
    assert judged(epochs(0.5, 0.2)).verdict == "go_on"
    never = judged(epochs(0.5, 0.3, 0.25, 0.2), config=CorrectionConfig(stop=False))
    assert never.verdict == "tell"


def test_few_labels_need_more_than_many_to_stop_a_retraining() -> None:
    sinking = epochs(0.5, 0.44, 0.42, 0.41)
    assert judged(sinking, num_validation=1000, accuracy_after=0.52, told_after=0.52).verdict == "stop"
    assert judged(sinking, num_validation=20, accuracy_after=0.52, told_after=0.52).verdict == "go_on"


def test_with_noisy_epochs_good_retrainings_are_rarely_stopped_and_bad_ones_mostly() -> None:
    seed = 3
    draw = np.random.default_rng(seed)

    def stopped(gain: float) -> bool:
        """Before the last fifth, where a stop costs nothing."""
        for num in range(1, 8):
            noise = draw.normal(0.0, 0.03, num + 1)
            noise[0] = 0.0
            if judged(epochs(*(np.array(rising(gain, num)) + noise))).verdict == "stop":
                return True
        return False

    assert sum(stopped(0.2) for _ in range(300)) / 300 < 0.02, seed
    assert sum(stopped(-0.25) for _ in range(300)) / 300 > 0.9, seed


# ---------------------------------------------------------------- in the coordinator


def progress(run: Simulation, *accuracies: float, busy_s: float = 1.5) -> RetrainProgress:
    """Tell the coordinator of epochs of s0's running retraining; returns the last event."""
    running = run.coordinator.state.streams["s0"].running
    assert running is not None
    for epoch in epochs(*accuracies, busy_s=busy_s):
        event = RetrainProgress(
            job_id=running.job.job_id, stream_id="s0", window=running.job.window, config=running.job.config, epoch=epoch
        )
        run.give(Progressed(event=event))
    return event


def until_retraining() -> tuple[Simulation, TestWorld]:
    run, world, _ = simulation(site(num_streams=1), num_windows=None)
    while not run.coordinator.state.streams["s0"].running:
        run.run(until_s=run.now + 0.5)
    run.run(until_s=run.now + 2.0)
    return run, world


def test_a_hopeless_retraining_leaves_the_plan_and_its_best_model_goes_to_the_gate() -> None:
    run, world = until_retraining()
    stream = run.coordinator.state.streams["s0"]
    running = stream.running
    assert running is not None
    assert running.retrain_id == "dear"
    progress(run, 0.5, 0.3, 0.25, 0.2, 0.2)
    corrected = [e for e in run.events if isinstance(e, RetrainCorrected)]
    assert corrected[-1].action == "stopped"
    run.run(until_s=run.now + 0.5)
    assert not run.executors["gpu0"].running  # the executor was told
    # The worker hands in its best epoch, as real ones do when they are stopped.
    result = RetrainResult(
        stream_id="s0",
        window=running.job.window,
        config=running.job.config,
        checkpoint=CheckpointRef(path="c", sha256="1" * 64, stream_id="s0", version=running.job.next_version),
        accuracy_before=0.5,
        accuracy_after=0.3,
        num_validation=20,
        epochs=running.epochs,
        busy_s=4.0,
        seconds=4.0,
        reason="stopped in epoch 4 of 20",
        paired=PairedCounts(num_objects=20, num_won=1, num_lost=8),
    )
    world.models["1" * 64] = (0.3, running.job.window)
    done = m.RetrainDone(event_id=77, executor_id="gpu0", job_id=running.job.job_id, result=result)
    run.give(Received(executor_id="gpu0", message=done))
    finished = [e for e in run.events if isinstance(e, RetrainFinished)][-1]
    assert not finished.promoted
    assert stream.running is None
    assert stream.settled


def test_a_worker_that_hands_nothing_in_is_given_up() -> None:
    run, _ = until_retraining()
    progress(run, 0.5, 0.3, 0.25, 0.2, 0.2)
    run.run(until_s=run.now + 12.0)
    assert run.coordinator.state.streams["s0"].running is None
    assert any(isinstance(e, PlanSolved) and "left nothing" in e.reason for e in run.events)


def test_a_retraining_that_turns_out_otherwise_has_the_rest_of_the_window_planned_anew() -> None:
    run, _ = until_retraining()
    before = len([e for e in run.events if isinstance(e, PlanSolved)])
    progress(run, 0.5, 0.52, 0.54, 0.56, 0.57, busy_s=4.0)
    run.run(until_s=run.now + 0.5)
    plans = [e for e in run.events if isinstance(e, PlanSolved)]
    assert len(plans) > before
    assert any("takes 6" in e.reason for e in plans)
    running = run.coordinator.state.streams["s0"].running
    if running is not None:  # the planner may have found that it is not worth going on
        # Four of its twenty epochs were heard of in no time; 16 of 4 GPU-seconds are to come.
        assert running.late_work_s == pytest.approx(64.0, abs=4.0)
        assert running.work_s == 30.0  # the history learns from what was predicted at the start


def test_epochs_that_come_twice_or_of_another_job_change_nothing() -> None:
    run, _ = until_retraining()
    event = progress(run, 0.5, 0.6)
    state = msgspec.msgpack.encode(run.coordinator.state)
    run.give(Progressed(event=event))
    other = msgspec.structs.replace(event, job_id="retrain/s0/w9/v9", epoch=epochs(0.1, 0.1, 0.1)[2])
    run.give(Progressed(event=other))
    assert msgspec.msgpack.encode(run.coordinator.state) == state
