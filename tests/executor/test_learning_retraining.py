"""Retraining and its trials, in this process, on a stream that is learned in seconds."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from executor.learning import checkpoints, datasets, labeling
from executor.learning.device import Device
from executor.learning.models import Student
from executor.learning.retraining import clearly_worse, retrain
from executor.learning.stepping import FreeStepper
from executor.learning.task import task_of
from executor.learning.training import CropTrainer, DivergedError, HeadTrainer, subset
from executor.learning.trials import run_trials
from protocol.errors import InputError
from protocol.messages import LabelJob, RetrainJob, TrialJob
from protocol.schema import (
    CheckpointRef,
    DatasetRef,
    EpochResult,
    InferenceConfig,
    RetrainConfig,
    RetrainResult,
    StudentSpec,
)
from tests.executor import tiny_source

CPU = Device("cpu:0", torch.device("cpu"))
STREAM = tiny_source.spec(student=StudentSpec(head_width=8))
FULL = RetrainConfig(config_id="full", epochs=4, batch_size=16, head_width=8, learning_rate=3e-3)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def dataset(store: Path) -> DatasetRef:
    job = LabelJob(job_id="label", stream=STREAM, share=1.0, window=0, from_s=-10.0, to_s=10.0)
    result = labeling.label(job, tiny_source.TinySource(STREAM), store, CPU, FreeStepper(), seed=1)
    assert result is not None
    return result.dataset


@pytest.fixture(scope="module")
def first(store: Path, dataset: DatasetRef) -> CheckpointRef:
    result, _ = run(store, dataset, None, FULL)
    assert result.checkpoint is not None
    return result.checkpoint


def run(
    store: Path,
    dataset: DatasetRef,
    checkpoint: CheckpointRef | None,
    config: RetrainConfig,
    stepper: FreeStepper | None = None,
) -> tuple[RetrainResult, list[EpochResult]]:
    job = RetrainJob(
        job_id="retrain",
        stream=STREAM,
        share=1.0,
        window=0,
        dataset=dataset,
        checkpoint=checkpoint,
        config=config,
        next_version=1 if checkpoint is None else checkpoint.version + 1,
        seed=5,
    )
    epochs: list[EpochResult] = []
    return retrain(job, store, CPU, stepper or FreeStepper(), lambda: None, epochs.append), epochs


def count_checkpoints(store: Path) -> int:
    return len(list(store.rglob("*.safetensors")))


def test_a_first_model_learns_the_stream_and_is_written(store: Path, dataset: DatasetRef) -> None:
    result, epochs = run(store, dataset, None, FULL)
    assert [epoch.epoch for epoch in epochs] == [0, 1, 2, 3, 4]
    assert result.epochs == tuple(epochs)
    assert result.accuracy_after > max(0.8, result.accuracy_before)
    assert result.checkpoint is not None
    _, manifest = checkpoints.load(store, result.checkpoint)
    assert (manifest.version, manifest.retrain_id, manifest.accuracy) == (1, "full", result.accuracy_after)
    assert result.num_validation == dataset.num_validation
    assert 0.0 < sum(epoch.busy_s for epoch in epochs) <= result.busy_s
    assert all(e.validation_s is not None and 0.0 < e.validation_s <= e.busy_s for e in epochs)
    assert all((e.validation_s == e.busy_s) == (e.epoch == 0) for e in epochs)


def test_the_same_job_gives_the_same_model(store: Path, dataset: DatasetRef, first: CheckpointRef) -> None:
    again, _ = run(store, dataset, None, FULL)
    assert again.checkpoint == first


def test_a_retraining_starts_from_the_serving_model(store: Path, dataset: DatasetRef, first: CheckpointRef) -> None:
    config = msgspec.structs.replace(FULL, epochs=1, learning_rate=1e-5)
    result, _ = run(store, dataset, first, config)
    _, manifest = checkpoints.load(store, first)
    assert result.accuracy_before == manifest.accuracy
    assert result.accuracy_after == pytest.approx(result.accuracy_before, abs=0.05)


def test_head_only_training_leaves_the_backbone_as_it_was(
    store: Path, dataset: DatasetRef, first: CheckpointRef
) -> None:
    result, _ = run(store, dataset, first, msgspec.structs.replace(FULL, epochs=1, trained_fraction=0.0, head_width=4))
    assert result.checkpoint is not None
    old, new = checkpoints.load(store, first)[0], checkpoints.load(store, result.checkpoint)[0]
    for name, tensor in old.blocks.state_dict().items():
        assert torch.equal(tensor, new.blocks.state_dict()[name]), name
    assert new.head_width == 4


def test_a_head_alone_is_trained_on_features_worked_out_once_with_the_same_result(
    store: Path, dataset: DatasetRef, first: CheckpointRef
) -> None:
    crops = datasets.load(store, dataset, tiny_source.CLASSES)
    validation = crops.validation
    config = msgspec.structs.replace(FULL, epochs=12, trained_fraction=0.0, head_width=32, learning_rate=1e-2)
    serving = checkpoints.load(store, first)[0]
    task = task_of(STREAM)
    accuracy, passes = {}, {}
    for kind in (CropTrainer, HeadTrainer):
        student = task.student_for(config, serving, STREAM, CPU, seed=5)
        trainer = kind(student, None, config, crops.train, CPU, 5)
        looks: list[int] = []
        for network in (student, trainer.average):
            network.blocks.register_forward_hook(lambda _module, _inputs, out, looks=looks: looks.append(len(out)))
        assert not trainer.remember(validation, FreeStepper())
        assert not trainer.prepare(FreeStepper())
        for _ in range(config.epochs):
            trainer.epoch(FreeStepper())
            accuracy[kind] = trainer.evaluate(validation)[0]
        passes[kind] = sum(looks)
        assert accuracy[kind] == pytest.approx(task.evaluate(trainer.average, validation, CPU)[0], abs=0.02)
        assert accuracy[kind] > 0.8
    assert accuracy[HeadTrainer] == pytest.approx(accuracy[CropTrainer], abs=0.06)
    # The same number of crops went through the backbone in every epoch; now it is once.
    assert passes[HeadTrainer] == pytest.approx(passes[CropTrainer] / config.epochs, rel=0.05)


def test_a_classifier_goes_part_of_the_way_from_the_model_that_it_began_from(
    store: Path, dataset: DatasetRef, first: CheckpointRef
) -> None:
    crops = datasets.load(store, dataset, tiny_source.CLASSES).train
    serving = checkpoints.load(store, first)[0]
    task = task_of(STREAM)
    config = msgspec.structs.replace(FULL, head_width=serving.head_width)

    def trained(base: Student | None, config: RetrainConfig) -> Student:
        trainer = task.trainer(task.student_for(config, serving, STREAM, CPU, seed=5), base, config, crops, CPU, 5)
        for _ in range(3):
            trainer.epoch(FreeStepper())
        return trainer.average

    whole, part = trained(None, config).state_dict(), trained(serving, config).state_dict()
    moved = 0
    for name, start in serving.state_dict().items():
        if start.is_floating_point():
            moved += not torch.equal(start, whole[name])
            assert torch.allclose(part[name], start + CropTrainer.way * (whole[name] - start), atol=1e-5), name
    assert moved > 5
    # A new head has nothing to keep, and the blocks behind it fit it alone.
    wider = msgspec.structs.replace(config, head_width=serving.head_width + 1)
    alone, beside = trained(None, wider).state_dict(), trained(serving, wider).state_dict()
    assert all(torch.equal(alone[name], beside[name]) for name in alone)


def test_a_stop_while_features_are_worked_out_leaves_no_checkpoint(
    store: Path, dataset: DatasetRef, first: CheckpointRef
) -> None:
    config = msgspec.structs.replace(FULL, trained_fraction=0.0)
    validation_steps = 2 * -(-dataset.num_validation // 64)
    result, seen = run(store, dataset, first, config, FreeStepper(stop_after=validation_steps + 2))
    assert result.checkpoint is None
    assert "no epoch was completed" in result.reason
    assert len(seen) == 1


def test_a_stop_keeps_the_best_epoch_so_far(store: Path, dataset: DatasetRef) -> None:
    _, epochs = run(store, dataset, None, FULL)
    counter = FreeStepper()
    run(store, dataset, None, msgspec.structs.replace(FULL, epochs=2), counter)
    result, seen = run(store, dataset, None, FULL, FreeStepper(stop_after=counter.num_steps + 2))
    assert [epoch.accuracy for epoch in seen] == [epoch.accuracy for epoch in epochs[:3]]
    assert result.checkpoint is not None
    assert result.accuracy_after == max(epoch.accuracy for epoch in seen[1:])
    assert "stopped in epoch 3 of 4" in result.reason


def test_a_stop_before_the_first_epoch_ends_leaves_no_checkpoint(store: Path, dataset: DatasetRef) -> None:
    before = count_checkpoints(store)
    result, seen = run(store, dataset, None, FULL, FreeStepper(stop_after=3))
    assert result.checkpoint is None
    assert result.accuracy_after == result.accuracy_before
    assert "no epoch was completed" in result.reason
    assert len(seen) == 1
    assert count_checkpoints(store) == before


@pytest.mark.parametrize("learning_rate", [10.0, 1e30])
def test_a_training_that_diverges_is_stopped_and_writes_nothing(
    store: Path, dataset: DatasetRef, first: CheckpointRef, learning_rate: float
) -> None:
    before = count_checkpoints(store)
    with pytest.raises(DivergedError, match="lower the learning rate"):
        run(store, dataset, first, msgspec.structs.replace(FULL, learning_rate=learning_rate))
    assert count_checkpoints(store) == before


@pytest.mark.parametrize(
    ("last", "best", "count", "worse"),
    [(0.70, 0.71, 1000, False), (0.60, 0.75, 1000, True), (0.70, 0.75, 20, False), (0.8, 0.8, 10, False)],
)
def test_the_last_epoch_is_kept_unless_it_is_clearly_worse(last: float, best: float, count: int, worse: bool) -> None:
    assert clearly_worse(last, best, count) is worse


def test_a_part_of_the_data_keeps_every_class_and_about_the_mix(store: Path, dataset: DatasetRef) -> None:
    crops = datasets.load(store, dataset, tiny_source.CLASSES).train
    part = subset(crops, 30, seed=1)
    assert len(part) == pytest.approx(30, abs=2)
    whole = crops.class_counts(3)
    for count, total in zip(part.class_counts(3), whole, strict=True):
        assert count == pytest.approx(30 * total / len(crops), abs=1)
    assert min(subset(crops, 3, seed=1).class_counts(3)) >= 1
    assert len(subset(crops, 10_000, seed=1)) == len(crops)


def test_a_data_set_too_small_to_learn_from_is_named(store: Path, dataset: DatasetRef) -> None:
    crops = datasets.load(store, dataset, tiny_source.CLASSES).train.take(torch.arange(3).numpy())
    ref = datasets.save(store, crops, stream_id="few", window=0, classes=tiny_source.CLASSES)
    with pytest.raises(InputError, match="label_fps"):
        run(store, ref, None, FULL)


# ---------------------------------------------------------------- trials


def trial_job(dataset: DatasetRef, first: CheckpointRef, *retrain_configs: RetrainConfig) -> TrialJob:
    return TrialJob(
        job_id="trial",
        stream=STREAM,
        share=1.0,
        window=0,
        dataset=dataset,
        checkpoint=first,
        retrain=retrain_configs,
        inference=tuple(
            InferenceConfig(config_id=f"r{px}-i{interval}", resolution_px=px, frame_interval=interval)
            for px in (32, 8)
            for interval in (1, 4, 16)
        ),
        data_share=0.2,
        num_epochs=2,
        num_frames=40,
        clip_end_s=9.0,
    )


def test_trials_measure_what_each_configuration_costs_and_is_worth(
    store: Path, dataset: DatasetRef, first: CheckpointRef
) -> None:
    few = msgspec.structs.replace(FULL, config_id="few", data_fraction=0.1)
    head = msgspec.structs.replace(FULL, config_id="head", trained_fraction=0.0)
    nan = msgspec.structs.replace(FULL, config_id="nan", learning_rate=1e30)
    job = trial_job(dataset, first, FULL, few, head, nan)
    source = tiny_source.TinySource(STREAM)
    result = run_trials(job, source, store, CPU, FreeStepper(), 1, lambda: None)
    assert result.accuracy_now == checkpoints.load(store, first)[1].accuracy
    assert 0.0 < result.accuracy_low < result.accuracy_now <= result.accuracy_high <= 1.0
    assert result.accuracy_high - result.accuracy_low < 0.5
    assert [trial.config.config_id for trial in result.retrain] == [
        "full",
        "few",
        "head",
    ]  # the diverged one is left out
    full = result.retrain[0]
    assert full.total_samples == dataset.num_train
    assert full.num_samples == pytest.approx(0.2 * dataset.num_train, abs=2)
    assert [epoch.epoch for epoch in full.epochs] == [0, 1, 2]
    assert full.epochs[0].accuracy == result.accuracy_now
    assert all(epoch.busy_s > 0 for epoch in full.epochs)
    assert result.retrain[1].total_samples == round(0.1 * dataset.num_train)
    assert result.retrain[1].num_samples <= result.retrain[1].total_samples + 2
    assert full.prepare_s < 0.01 < result.retrain[2].prepare_s + 0.01
    assert result.retrain[2].epochs[2].busy_s < full.epochs[2].busy_s
    assert all(trial.memory_bytes > 0 for trial in result.retrain)
    assert all(trial.memory_bytes > 0 for trial in result.inference)
    inference = {trial.config.config_id: trial for trial in result.inference}
    assert list(inference) == [config.config_id for config in job.inference]
    for px in (32, 8):
        every, fourth, sixteenth = (inference[f"r{px}-i{interval}"] for interval in (1, 4, 16))
        assert every.busy_s_per_frame > fourth.busy_s_per_frame > sixteenth.busy_s_per_frame > 0.0
        assert every.accuracy >= sixteenth.accuracy
        assert every.num_frames == 40
    assert inference["r32-i1"].accuracy > 0.8
    assert inference["r32-i16"].accuracy < inference["r32-i1"].accuracy - 0.1


def test_what_it_takes_to_fetch_every_frame_is_part_of_every_configuration(
    store: Path, dataset: DatasetRef, first: CheckpointRef
) -> None:
    clock = 0.0

    class Dear(tiny_source.TinySource):
        def frame(self, index: int) -> tiny_source.TinyFrame:
            nonlocal clock
            # The beginning of the clip has to be searched for; that is paid once and not per frame.
            clock += 5.0 if index == 140 else 0.01
            return super().frame(index)

    job = trial_job(dataset, first)
    result = run_trials(job, Dear(STREAM), store, CPU, FreeStepper(busy_clock=lambda: clock), 1, lambda: None)
    assert len(result.inference) == 6
    for trial in result.inference:
        assert trial.busy_s_per_frame == pytest.approx(0.01)


def test_a_stop_ends_the_trials_with_those_that_are_complete(
    store: Path, dataset: DatasetRef, first: CheckpointRef
) -> None:
    job = trial_job(dataset, first, FULL)
    counter = FreeStepper()
    source = tiny_source.TinySource(STREAM)
    run_trials(job, source, store, CPU, counter, 1, lambda: None)
    result = run_trials(job, source, store, CPU, FreeStepper(stop_after=counter.num_steps - 3), 1, lambda: None)
    assert result.retrain == ()
    assert len(result.inference) == 6
