"""Frames that are labelled: every one has a chance, the weights undo unequal chances, doubt and rarity attract."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executor.learning import checkpoints, datasets
from executor.learning.datasets import NUM_BLOCKS, frame_mean
from executor.learning.device import Device
from executor.learning.inference import Objects
from executor.learning.labeling import label
from executor.learning.models import build_student
from executor.learning.sampling import chances, draw, frame_worth, rarity_of
from executor.learning.stepping import FreeStepper
from executor.learning.task import task_of
from protocol.messages import LabelJob
from tests.executor.tiny_source import CLASSES, TinySource, spec

CPU = Device("cpu", torch.device("cpu"))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0.0, 100.0) | st.just(0.0), min_size=1, max_size=80), st.integers(1, 80), st.floats(0.1, 1.0))
def test_chances_sum_up_to_the_number_and_the_uniform_part_bounds_them_from_below(
    worth: list[float], num: int, even: float
) -> None:
    found = chances(np.array(worth), num, even)
    least = min(num, len(worth))
    assert found.sum() == pytest.approx(least)
    assert (found <= 1.0 + 1e-9).all()
    assert (found >= even * least / len(worth) - 1e-9).all()
    order = np.argsort(worth)
    assert (np.diff(found[order]) >= -1e-9).all(), "more worth, no smaller chance"


@settings(max_examples=150, deadline=None)
@given(st.integers(-300, 300), st.integers(0, 400), st.integers(0, 60), st.floats(0.1, 1.0), st.integers(0, 10**6))
def test_a_draw_has_the_number_lies_in_the_stretch_and_stands_for_all_of_it(
    first: int, length: int, num: int, uniform_share: float, seed: int
) -> None:
    sample = draw(
        first,
        first + length,
        num,
        uniform_share,
        lambda f: np.abs(np.sin(np.asarray(f, np.float64))),
        np.random.default_rng(seed),
    )
    assert len(sample.frames) == min(num, length)
    assert (np.diff(sample.frames) > 0).all()
    assert ((sample.frames >= first) & (sample.frames < first + length)).all()
    assert (sample.weight > 0.0).all()
    if sample.held_out is not None:
        block = (sample.frames - first) * NUM_BLOCKS // length
        assert (datasets.is_held_out_block(block) == sample.held_out).all()
        assert len(set(sample.weight[sample.held_out].tolist())) == 1, "held-out frames all had the same chance"
        assert abs(sample.held_out.sum() - num / 4) <= 0.51


def test_a_weighted_mean_is_right_on_average_where_a_plain_one_is_not() -> None:
    first, last = 0, 240
    draws = np.random.default_rng(4)
    truth = 0.5 + 0.5 * np.sin(np.arange(last) / 17.0)  # accuracy of every frame
    worth = (1.0 - truth) ** 2  # bad frames are drawn more often
    plain, weighted, summed = [], [], []
    for _ in range(1500):
        sample = draw(first, last, 24, 0.4, lambda f: worth[np.asarray(f)], draws)
        plain.append(truth[sample.frames].mean())
        weighted.append(np.average(truth[sample.frames], weights=sample.weight))
        summed.append((truth[sample.frames] * sample.weight).sum() / last)
    assert abs(np.mean(summed) - truth.mean()) < 0.005, "seed 4: without any bias"
    # Dividing by the weights drawn, as the number of frames that can be scored is not known, costs a little of that.
    assert abs(np.mean(weighted) - truth.mean()) < 0.02
    assert abs(np.mean(weighted) - truth.mean()) < 0.3 * np.std(weighted)
    assert np.mean(plain) < truth.mean() - 0.06


def test_frames_of_worth_are_drawn_more_often_and_the_others_still_are() -> None:
    counts = np.zeros(160)
    for seed in range(400):
        sample = draw(
            0, 160, 20, 0.4, lambda f: np.asarray(np.asarray(f) % 16 < 4, np.float64), np.random.default_rng(seed)
        )
        counts[sample.frames] += 1
    block = np.arange(160) * NUM_BLOCKS // 160
    learned = ~datasets.is_held_out_block(block)
    good = np.arange(160) % 16 < 4
    assert counts[learned & good].mean() > 2.5 * counts[learned & ~good].mean()
    assert counts.min() > 0


def test_doubt_number_and_rarity_of_objects_make_a_frame_worth_labelling() -> None:
    def frame(labels: list[int], scores: list[float]) -> Objects:
        return Objects(np.zeros((len(labels), 4), np.float32), np.array(labels), np.array(scores, np.float32))

    rarity = rarity_of((100, 100, 4), 3)
    assert rarity.tolist() == [1.0, 1.0, 3.0]
    sure = frame_worth(frame([0, 1], [0.99, 0.99]), rarity)
    assert frame_worth(frame([], []), rarity) == 0.0
    assert sure < frame_worth(frame([0, 1, 0], [0.99, 0.99, 0.99]), rarity)
    assert sure < frame_worth(frame([0, 1], [0.99, 0.5]), rarity)
    assert sure < frame_worth(frame([0, 2], [0.99, 0.99]), rarity)
    assert rarity_of((), 2).tolist() == [1.0, 1.0]


def test_weights_count_frames_and_not_crops() -> None:
    right = np.array([True, True, True, False])
    frames = np.array([1, 1, 1, 2])
    assert frame_mean(right, frames, np.ones(4, np.float32)) == pytest.approx(0.5)
    assert frame_mean(right, frames, np.array([1, 1, 1, 3], np.float32)) == pytest.approx(0.25)


def model(store: Path) -> LabelJob:
    stream = msgspec.structs.replace(spec(), label_fps=10.0)
    student = build_student(task_of(stream).student_spec(stream.student), len(CLASSES))
    ref = checkpoints.save(
        store,
        student,
        stream_id="tiny",
        version=1,
        classes=CLASSES,
        crop_px=16,
        retrain_id="first",
        window=0,
        accuracy=0.5,
    )
    return LabelJob(
        job_id="label/1",
        stream=stream,
        share=1.0,
        window=1,
        from_s=0.0,
        to_s=20.0,
        checkpoint=ref,
        num_frames=24,
        uniform_share=0.4,
    )


def test_a_label_job_keeps_to_its_frames_splits_by_time_and_measures_the_serving_model(tmp_path: Path) -> None:
    job = model(tmp_path)
    source = TinySource(job.stream)
    result = label(job, source, tmp_path, CPU, FreeStepper(), 3)
    assert result is not None
    assert result.num_frames == 24
    crops = datasets.load(tmp_path, result.dataset, CLASSES)
    assert set(np.unique(crops.weight[crops.is_validation])) <= {np.float32(100 / 6)}
    assert len(np.unique(crops.weight)) > 2, "others were drawn with unequal chances"
    assert result.agreement is not None
    assert result.agreement_low <= result.agreement <= result.agreement_high
    assert 0 < result.num_pieces < len(crops)
    again = label(job, source, tmp_path, CPU, FreeStepper(), 3)
    assert again is not None
    assert (datasets.load(tmp_path, again.dataset, CLASSES).frame_index == crops.frame_index).all()


def test_a_damaged_serving_model_costs_the_choice_of_frames_and_not_the_labels(tmp_path: Path) -> None:
    job = model(tmp_path)
    assert job.checkpoint is not None
    (tmp_path / job.checkpoint.path).write_bytes(b"damaged")
    result = label(job, TinySource(job.stream), tmp_path, CPU, FreeStepper(), 3)
    assert result is not None
    assert result.num_frames == 24
    assert result.agreement is None
    assert len(np.unique(datasets.load(tmp_path, result.dataset, CLASSES).weight)) == 1
