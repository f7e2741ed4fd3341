"""Votes of two models per road user, and their comparison on live frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from executor.learning import checkpoints, datasets, labeling
from executor.learning.canary import compare
from executor.learning.device import Device
from executor.learning.models import build_student
from executor.learning.pairing import Tracker, paired_counts, per_road_user, wilson
from executor.learning.retraining import retrain
from executor.learning.stepping import FreeStepper
from protocol.errors import CheckpointError
from protocol.messages import CanaryJob, LabelJob, RetrainJob
from protocol.schema import CheckpointRef, RetrainConfig, StudentSpec
from tests.executor import tiny_source

CPU = Device("cpu:0", torch.device("cpu"))
STREAM = tiny_source.spec(student=StudentSpec(head_width=8))


def boxes(*lefts: float) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.array([[x, 10, x + 20, 30] for x in lefts], np.float32)


def labels(*classes: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(classes, np.int64)


def test_a_road_user_keeps_its_number_while_it_moves_and_others_get_their_own() -> None:
    tracker = Tracker()
    assert tracker.follow(boxes(0, 200), labels(0, 1)).tolist() == [0, 1]
    assert tracker.follow(boxes(215, 12), labels(1, 0)).tolist() == [1, 0]
    assert tracker.follow(boxes(24, 228), labels(2, 1)).tolist() == [2, 1]  # another class is another road user
    assert tracker.follow(boxes(), labels()).tolist() == []
    assert tracker.follow(boxes(24), labels(2)).tolist() == [3]  # lost for a frame: counted anew


def test_every_road_user_has_one_vote() -> None:
    frame = np.array([0, 1, 2, 0, 1, 0, 2])
    where = np.concatenate([boxes(0, 5, 10), boxes(200, 205), np.full((2, 4), np.nan, np.float32)])
    kind = labels(0, 0, 0, 1, 1, 2, 2)
    new = per_road_user(np.array([True, True, False, True, False, False, True]), frame, where, kind)
    old = per_road_user(np.array([False, True, False, False, True, True, True]), frame, where, kind)
    counts = paired_counts(new, old)
    assert (counts.num_objects, counts.num_won, counts.num_lost) == (4, 1, 1)
    # The first one is seen in three crops, of which the new model gets two right and the old one one.
    assert (counts.won_weights, counts.lost_weights) == ((0, 0, 0, 1, 0, 0, 0, 0), (0, 0, 0, 1, 0, 0, 0, 0))
    none = np.zeros(0, np.int64)
    assert len(per_road_user(none.astype(np.bool_), none, np.zeros((0, 4), np.float32), none)) == 0


def test_labels_say_where_a_crop_was_and_files_keep_it(tmp_path: Path) -> None:
    found = labeling.look(tiny_source.TinySource(STREAM), STREAM, range(30), CPU, FreeStepper(), seed=1)
    crops = found.examples
    assert found.num_frames == 30
    assert not found.stopped
    users = per_road_user(np.ones(len(crops), np.bool_), crops.frame_index, crops.boxes, crops.labels)
    assert users.sum() == len(crops)
    assert len(users) < len(crops) / 3
    ref = datasets.save(tmp_path, crops, stream_id="s", window=0, classes=tiny_source.CLASSES)
    assert np.array_equal(datasets.load(tmp_path, ref, tiny_source.CLASSES).boxes, crops.boxes)


def test_a_measured_accuracy_has_an_interval_that_holds_the_truth() -> None:
    assert wilson(0.5, 0) == (0.0, 1.0)
    low, high = wilson(1.0, 10)
    assert 0.6 < low < 0.8
    assert high == pytest.approx(1.0)
    seed = 6
    draw = np.random.default_rng(seed)
    for truth in (0.3, 0.7, 0.9):
        for num in (20, 60):
            shares = draw.binomial(num, truth, 2000) / num
            held = [low <= truth <= high for low, high in (wilson(float(share), num) for share in shares)]
            assert np.mean(held) > 0.92, seed


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CheckpointRef, CheckpointRef]:
    """A store with an untrained and a trained model."""
    torch.set_num_threads(1)
    store = tmp_path_factory.mktemp("store")
    torch.manual_seed(1)
    untrained = checkpoints.save(
        store,
        build_student(STREAM.student, 3),
        stream_id=STREAM.stream_id,
        version=1,
        classes=tiny_source.CLASSES,
        crop_px=16,
    )
    job = LabelJob(job_id="label", stream=STREAM, share=1.0, window=0, from_s=-10.0, to_s=10.0)
    found = labeling.label(job, tiny_source.TinySource(STREAM), store, CPU, FreeStepper(), seed=1)
    assert found is not None
    retraining = RetrainJob(
        job_id="retrain",
        stream=STREAM,
        share=1.0,
        window=0,
        dataset=found.dataset,
        checkpoint=untrained,
        config=RetrainConfig(config_id="full", epochs=4, batch_size=16, head_width=8, learning_rate=3e-3),
        next_version=2,
    )
    result = retrain(retraining, store, CPU, FreeStepper(), lambda: None, lambda _: None)
    assert result.checkpoint is not None
    assert result.paired.num_won > result.paired.num_lost
    assert result.paired.num_objects < result.num_validation
    return store, untrained, result.checkpoint


def job(candidate: CheckpointRef, previous: CheckpointRef) -> CanaryJob:
    return CanaryJob(
        job_id="canary",
        stream=STREAM,
        share=1.0,
        window=1,
        from_s=20.0,
        to_s=40.0,
        label_fps=2.0,
        candidate=candidate,
        previous=previous,
    )


def test_models_are_compared_on_fresh_frames_in_either_direction(
    models: tuple[Path, CheckpointRef, CheckpointRef],
) -> None:
    store, old, new = models
    source = tiny_source.TinySource(STREAM)
    up = compare(job(new, old), source, store, CPU, FreeStepper(), 1, lambda: None)
    down = compare(job(old, new), source, store, CPU, FreeStepper(), 1, lambda: None)
    assert up.num_frames == 40
    assert up.accuracy_candidate == down.accuracy_previous > up.accuracy_previous
    assert (up.paired.num_won, up.paired.num_lost) == (down.paired.num_lost, down.paired.num_won)
    assert up.paired.num_won > up.paired.num_lost


def test_a_comparison_that_is_stopped_says_what_it_has_and_a_lost_model_is_named(
    models: tuple[Path, CheckpointRef, CheckpointRef],
) -> None:
    store, old, new = models
    source = tiny_source.TinySource(STREAM)
    few = compare(job(new, old), source, store, CPU, FreeStepper(stop_after=5), 1, lambda: None)
    assert 0 < few.num_frames < 10
    lost = CheckpointRef(path="checkpoints/tiny/none.safetensors", sha256="0" * 64, stream_id="tiny", version=9)
    with pytest.raises(CheckpointError, match="cannot be read"):
        compare(job(lost, old), source, store, CPU, FreeStepper(), 1, lambda: None)
