"""Earlier models on new labels, in this process, on a stream that is learned in seconds."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from executor.learning import checkpoints, datasets, framesets, labeling, reuse
from executor.learning.datasets import CropSet
from executor.learning.device import Device
from executor.learning.retraining import retrain
from executor.learning.stepping import FreeStepper
from executor.learning.trials import run_trials
from protocol.errors import InputError
from protocol.messages import LabelJob, RetrainJob, TrialJob
from protocol.schema import CheckpointRef, DatasetRef, EpochResult, RetrainConfig, RetrainResult, StudentSpec, ZooRef
from tests.executor import tiny_source

CPU = Device("cpu:0", torch.device("cpu"))
STREAM = tiny_source.spec(student=StudentSpec(head_width=8))
FULL = RetrainConfig(config_id="full", epochs=5, batch_size=16, head_width=8, learning_rate=3e-3)
SWITCH = msgspec.structs.replace(FULL, config_id="zoo-7", epochs=0, base=7)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("store")


def labelled(store: Path, from_s: float, window: int, exemplars: DatasetRef | None = None) -> DatasetRef:
    job = LabelJob(
        job_id="label", stream=STREAM, share=1.0, window=window, from_s=from_s, to_s=from_s + 12.0, exemplars=exemplars
    )
    result = labeling.label(job, tiny_source.TinySource(STREAM), store, CPU, FreeStepper(), seed=1)
    assert result is not None
    return result.dataset


@pytest.fixture(scope="module")
def old(store: Path) -> DatasetRef:
    return labelled(store, -12.0, 0)


@pytest.fixture(scope="module")
def new(store: Path, old: DatasetRef) -> DatasetRef:
    return labelled(store, 40.0, 1, old)


def run(
    store: Path, dataset: DatasetRef, serving: CheckpointRef | None, config: RetrainConfig, start: CheckpointRef | None
) -> tuple[RetrainResult, list[EpochResult]]:
    job = RetrainJob(
        job_id="retrain",
        stream=STREAM,
        share=1.0,
        window=1,
        dataset=dataset,
        checkpoint=serving,
        config=config,
        next_version=9,
        start=start,
    )
    epochs: list[EpochResult] = []
    return retrain(job, store, CPU, FreeStepper(), lambda: None, epochs.append), epochs


@pytest.fixture(scope="module")
def good(store: Path, old: DatasetRef) -> CheckpointRef:
    result, _ = run(store, old, None, FULL, None)
    assert result.checkpoint is not None
    assert result.accuracy_after > 0.8
    return result.checkpoint


@pytest.fixture(scope="module")
def bad(store: Path, old: DatasetRef) -> CheckpointRef:
    """A model of another scene: there every class looks like the next one."""
    crops = datasets.load(store, old, tiny_source.CLASSES)
    other = msgspec.structs.replace(STREAM, stream_id="other")
    wrong = CropSet(
        crops.crops, (crops.labels + 1) % 3, crops.frame_index, crops.is_validation, crops.is_exemplar, crops.boxes
    )
    ref = datasets.save(store, wrong, stream_id="other", window=0, classes=tiny_source.CLASSES)
    job = RetrainJob(
        job_id="other", stream=other, share=1.0, window=0, dataset=ref, checkpoint=None, config=FULL, next_version=1
    )
    result = retrain(job, store, CPU, FreeStepper(), lambda: None, lambda _: None)
    assert result.checkpoint is not None
    return result.checkpoint


def trial_job(dataset: DatasetRef, serving: CheckpointRef, *zoo: CheckpointRef, unseen: bool = True) -> TrialJob:
    return TrialJob(
        job_id="trial",
        stream=STREAM,
        share=1.0,
        window=1,
        dataset=dataset,
        checkpoint=serving,
        retrain=(),
        inference=(),
        data_share=0.0,
        num_epochs=1,
        num_frames=0,
        clip_end_s=52.0,
        unseen=unseen,
        zoo=tuple(ZooRef(number=number, checkpoint=ref) for number, ref in enumerate(zoo, 1)),
    )


def test_earlier_models_are_measured_on_the_new_labels_against_the_serving_one(
    store: Path, new: DatasetRef, good: CheckpointRef, bad: CheckpointRef
) -> None:
    source = tiny_source.TinySource(STREAM)
    result = run_trials(trial_job(new, bad, good, bad), source, store, CPU, FreeStepper(), 1, lambda: None)
    assert [row.number for row in result.zoo] == [1, 2]
    better, same = result.zoo
    assert better.accuracy > 0.8
    assert result.accuracy_now < 0.4
    assert better.accuracy_low < better.accuracy <= better.accuracy_high
    assert better.paired.num_won > 5 * max(1, better.paired.num_lost)
    assert same.accuracy == same.accuracy_serving == better.accuracy_serving == result.accuracy_now
    assert (same.paired.num_won, same.paired.num_lost) == (0, 0)
    assert better.confidence is not None
    assert 0.5 < better.confidence <= 1.0
    assert better.busy_s > 0.0
    fresh = datasets.load(store, new, tiny_source.CLASSES)
    assert better.paired.num_objects <= (~fresh.is_exemplar).sum()


def test_models_that_are_gone_damaged_or_of_other_classes_are_left_out(
    store: Path, new: DatasetRef, good: CheckpointRef, bad: CheckpointRef
) -> None:
    student, _ = checkpoints.load(store, good)
    alien = checkpoints.save(store, student, stream_id="alien", version=1, classes=("a", "b", "c"), crop_px=16)
    gone = msgspec.structs.replace(good, path="checkpoints/tiny/v000001-0.safetensors")
    damaged = msgspec.structs.replace(good, sha256=hashlib.sha256(b"").hexdigest())
    source = tiny_source.TinySource(STREAM)
    job = trial_job(new, bad, gone, alien, damaged, good)
    result = run_trials(job, source, store, CPU, FreeStepper(), 1, lambda: None)
    assert [row.number for row in result.zoo] == [4]
    trained_on = trial_job(new, bad, good, unseen=False)
    assert run_trials(trained_on, source, store, CPU, FreeStepper(), 1, lambda: None).zoo == ()


def test_taking_a_model_over_costs_two_looks_and_is_judged_on_all_new_labels(
    store: Path, new: DatasetRef, good: CheckpointRef, bad: CheckpointRef
) -> None:
    result, epochs = run(store, new, bad, SWITCH, good)
    assert epochs == []
    assert result.checkpoint is not None
    assert (result.checkpoint.version, result.checkpoint.stream_id) == (9, STREAM.stream_id)
    # The same weights: only the name is new.
    assert result.checkpoint.sha256 == good.sha256
    assert result.accuracy_after > 0.8
    assert result.accuracy_before < 0.4
    crops = datasets.load(store, new, tiny_source.CLASSES)
    assert result.num_validation == (~crops.is_exemplar).sum() > new.num_validation
    assert result.paired.num_won > 5 * max(1, result.paired.num_lost)
    worse, _ = run(store, new, good, SWITCH, bad)
    assert worse.paired.num_lost == result.paired.num_won


def test_a_retraining_from_an_earlier_model_is_compared_with_the_serving_one(
    store: Path, new: DatasetRef, good: CheckpointRef, bad: CheckpointRef
) -> None:
    config = msgspec.structs.replace(FULL, config_id="zoo-7.full", epochs=1, learning_rate=1e-5, base=7)
    result, epochs = run(store, new, bad, config, good)
    assert [epoch.epoch for epoch in epochs] == [0, 1]
    assert epochs[0].accuracy > 0.8  # where training began
    assert result.accuracy_before < 0.4  # what serves
    assert result.accuracy_after == pytest.approx(epochs[0].accuracy, abs=0.05)
    assert result.paired.num_won > 5 * max(1, result.paired.num_lost)


def test_a_model_for_another_number_of_classes_is_refused(store: Path, new: DatasetRef, good: CheckpointRef) -> None:
    student, _ = checkpoints.load(store, good)
    from executor.learning.models import replace_head

    replace_head(student, 2, 8)
    two = checkpoints.save(store, student, stream_id="two", version=1, classes=("a", "b"), crop_px=16)
    with pytest.raises(InputError, match="model 7 of the zoo was made for other classes"):
        run(store, new, good, SWITCH, two)


def test_conditions_tell_class_mix_light_and_picture(store: Path, new: DatasetRef) -> None:
    crops = datasets.load(store, new, tiny_source.CLASSES)
    found = reuse.conditions_of(crops, 3)
    assert sum(found.class_mix) == pytest.approx(1.0, abs=1e-3)
    assert (len(found.light), len(found.layout)) == (4, 48)
    dark = reuse.conditions_of(
        CropSet(crops.crops // 4, crops.labels, crops.frame_index, crops.is_validation, crops.is_exemplar), 3
    )
    assert dark.class_mix == found.class_mix
    assert max(dark.light[:3]) < min(found.light[:3])
    assert reuse.conditions_of(crops.take(np.zeros(len(crops), np.bool_)), 3).layout == ()
    frames = framesets.FrameSet(
        np.full((2, 30, 50, 3), 128, np.uint8),
        np.zeros((1, 4), np.float32),
        np.array([2]),
        np.array([0]),
        np.array([0, 1]),
        np.zeros(2, np.bool_),
        np.zeros(2, np.bool_),
    )
    seen = reuse.conditions_of(frames, 3)
    assert seen.class_mix == (0.0, 0.0, 1.0)
    assert seen.layout == pytest.approx([128 / 255] * 48, abs=1e-3)


def test_after_a_change_of_scene_only_the_labels_behind_it_count() -> None:
    draw = np.random.default_rng(3)

    def scene(first: int, frames: int, colour: int, label: int) -> CropSet:
        count = 4 * frames
        crops = np.clip(draw.normal(colour, 30, (count, 16, 16, 3)), 0, 255).astype(np.uint8)
        labels = np.where(draw.random(count) < 0.8, label, draw.integers(0, 3, count)).astype(np.int64)
        flags = np.zeros(count, np.bool_)
        return CropSet(crops, labels, first + np.repeat(np.arange(frames), 4), flags, flags)

    day, night, again = scene(0, 20, 160, 0), scene(20, 12, 60, 1), scene(32, 8, 160, 0)
    assert len(reuse.after_last_cut(day, 3)) == len(day)
    cut = reuse.after_last_cut(datasets.concatenate([day, night]), 3)
    assert abs(len(cut) - len(night)) <= 4
    assert set(cut.frame_index) <= set(range(19, 32))
    twice = reuse.after_last_cut(datasets.concatenate([day, night, again]), 3)
    assert abs(len(twice) - len(again)) <= 4
    # Too little is there of the new scene to judge models by.
    assert len(reuse.after_last_cut(datasets.concatenate([day, scene(20, 1, 60, 1)]), 3)) == 80 + 4
