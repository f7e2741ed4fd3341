"""Which trials are made: sizes, sharing, pruning, revival, budget."""

from __future__ import annotations

import math

import msgspec
import pytest

from profiler.costs import group_key
from profiler.microprofiler import estimate_in_detail
from profiler.records import StreamHistory, TrialChoice, WindowHistory
from profiler.trials import TrialKnobs, choose_trials
from protocol.schema import RetrainConfig
from tests.profiler.profiler_world import INFERENCE, RETRAIN, SPEC, World

NOTHING = StreamHistory(stream_id="north")
HEAD_KEY, FULL_KEY = group_key(RETRAIN[0]), group_key(RETRAIN[11])


def keys(choice: TrialChoice) -> set[object]:
    return {group_key(config) for config in choice.retrain}


def with_window(history: StreamHistory, world: World, configs: tuple[RetrainConfig, ...]) -> StreamHistory:
    window = len(history.windows)
    trial = world.trial(window, configs)
    made = estimate_in_detail(SPEC, trial, world.dataset(window), RETRAIN, INFERENCE, history)
    row = WindowHistory(window=window, trial=trial, estimate=made, realised=0.7)
    return StreamHistory(stream_id="north", windows=(*history.windows, row))


def gains(history: StreamHistory, head: float, full: float) -> StreamHistory:
    """The same history, its newest estimate saying that the groups gain ``head`` and ``full``."""
    last = history.windows[-1]
    assert last.estimate is not None
    rows = tuple(
        msgspec.structs.replace(
            row,
            accuracy_after=last.estimate.accuracy_validated + (head if group_key(row.config) == HEAD_KEY else full),
        )
        for row in last.estimate.retrain
    )
    changed = msgspec.structs.replace(last, estimate=msgspec.structs.replace(last.estimate, retrain=rows))
    return StreamHistory(stream_id="north", windows=(*history.windows[:-1], changed))


@pytest.mark.parametrize(("num_train", "expected"), [(5000, 500), (300, 64), (30, 30), (1, 1), (0, 0)])
def test_the_sample_is_a_tenth_of_the_data_with_a_floor(num_train: int, expected: int) -> None:
    choice = choose_trials(RETRAIN, INFERENCE, World(0, num_train=num_train).dataset(0), NOTHING, budget_gpu_s=1.0)
    assert round(choice.data_share * num_train) == expected
    assert bool(choice.retrain) == (expected > 0)


def test_the_first_window_tries_every_group_once_and_measures_all_inference() -> None:
    choice = choose_trials(RETRAIN, INFERENCE, World(0).dataset(0), NOTHING, budget_gpu_s=0.0)
    assert len(choice.retrain) == 2
    assert keys(choice) == {HEAD_KEY, FULL_KEY}
    assert all(config.epochs == 20 for config in choice.retrain)
    assert choice.inference == INFERENCE
    assert choice.gpu_seconds is None


def test_trials_are_never_longer_than_the_longest_configuration() -> None:
    short = (RetrainConfig(config_id="one", epochs=1),)
    choice = choose_trials(short, INFERENCE, World(0).dataset(0), NOTHING, budget_gpu_s=9.0)
    assert choice.num_epochs == 1


@pytest.mark.parametrize("budget", [0.0, 0.3, 0.8, 1.5, 4.0, 8.0, 20.0, math.inf])
def test_later_windows_keep_the_budget(budget: float) -> None:
    world = World(1)
    history = with_window(NOTHING, world, (RETRAIN[4], RETRAIN[10]))
    choice = choose_trials(RETRAIN, INFERENCE, world.dataset(1), history, budget_gpu_s=budget)
    assert choice.gpu_seconds is not None
    assert choice.gpu_seconds <= budget
    if budget == 0.0:
        assert choice.empty
        assert set(choice.postponed) | set(choice.pruned) == {c.config_id for c in RETRAIN}
    if budget >= 20.0:
        assert choice.num_frames == TrialKnobs().max_frames
        assert not choice.postponed


def test_a_tight_budget_cuts_samples_then_epochs_then_groups() -> None:
    world = World(1)
    history = gains(with_window(NOTHING, world, (RETRAIN[4], RETRAIN[10])), 0.1, 0.1)
    dataset = world.dataset(1)
    choices = [choose_trials(RETRAIN, (), dataset, history, budget_gpu_s=b) for b in (math.inf, 2.3, 1.5, 0.5)]
    samples = [round(c.data_share * dataset.num_train) for c in choices]
    assert [(n, c.num_epochs, len(c.retrain)) for n, c in zip(samples, choices, strict=True)] == [
        (128, 4, 2),
        (64, 4, 2),
        (64, 2, 2),
        (64, 2, 1),
    ]


def test_a_group_far_from_the_front_is_pruned_and_revived_later() -> None:
    world = World(2)
    history = with_window(NOTHING, world, (RETRAIN[4], RETRAIN[10]))
    assert FULL_KEY in keys(
        choose_trials(RETRAIN, (), world.dataset(1), gains(history, head=0.2, full=0.1), budget_gpu_s=math.inf)
    )
    history = gains(with_window(history, world, (RETRAIN[4], RETRAIN[10])), head=0.2, full=0.1)
    chosen = []
    for window in range(2, 9):
        choice = choose_trials(RETRAIN, INFERENCE, world.dataset(window), history, budget_gpu_s=math.inf)
        chosen.append(FULL_KEY in keys(choice))
        assert HEAD_KEY in keys(choice)
        if not chosen[-1]:
            assert {c.config_id for c in RETRAIN if group_key(c) == FULL_KEY} == set(choice.pruned)
        history = gains(with_window(history, world, choice.retrain), head=0.2, full=0.1)
    # The trial of window 1 is four windows old when window 6 is planned.
    assert chosen == [False, False, False, False, True, False, False]


def test_a_fall_of_live_accuracy_revives_pruned_groups_at_once() -> None:
    world = World(3)
    history = with_window(with_window(NOTHING, world, (RETRAIN[4], RETRAIN[10])), world, (RETRAIN[4], RETRAIN[10]))
    first, last = gains(history, head=0.2, full=0.1).windows
    steady = StreamHistory(
        stream_id="north",
        windows=(msgspec.structs.replace(first, realised=0.7), msgspec.structs.replace(last, realised=0.69)),
    )
    fallen = StreamHistory(
        stream_id="north",
        windows=(msgspec.structs.replace(first, realised=0.7), msgspec.structs.replace(last, realised=0.5)),
    )
    dataset = world.dataset(2)
    assert FULL_KEY not in keys(choose_trials(RETRAIN, INFERENCE, dataset, steady, budget_gpu_s=math.inf))
    assert FULL_KEY in keys(choose_trials(RETRAIN, INFERENCE, dataset, fallen, budget_gpu_s=math.inf))


def test_a_new_inference_configuration_is_measured_whatever_the_budget() -> None:
    world = World(4)
    history = with_window(NOTHING, world, (RETRAIN[4], RETRAIN[10]))
    new = msgspec.structs.replace(INFERENCE[0], config_id="new", frame_interval=3)
    assert choose_trials(RETRAIN, INFERENCE, world.dataset(1), history, budget_gpu_s=0.0).inference == ()
    choice = choose_trials(RETRAIN, (*INFERENCE, new), world.dataset(1), history, budget_gpu_s=0.0)
    assert choice.inference == (*INFERENCE, new)
    assert choice.num_frames == TrialKnobs().min_frames


def test_the_golden_models_time_counts_for_inference_measurements() -> None:
    world = World(5)
    history = with_window(NOTHING, world, (RETRAIN[4], RETRAIN[10]))
    dataset = world.dataset(1)
    free = choose_trials((), INFERENCE, dataset, history, budget_gpu_s=2.5)
    dear = choose_trials((), INFERENCE, dataset, history, budget_gpu_s=2.5, label_s_per_frame=0.02)
    assert 0 < dear.num_frames < free.num_frames


@pytest.mark.parametrize("budget", [-1.0, math.nan])
def test_an_impossible_budget_is_refused(budget: float) -> None:
    with pytest.raises(ValueError, match="budget_gpu_s"):
        choose_trials(RETRAIN, INFERENCE, World(0).dataset(0), NOTHING, budget_gpu_s=budget)
