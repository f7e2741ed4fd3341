"""Data sets, exemplar memory and golden labels."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from executor.learning import datasets, golden, labeling, memory, replay
from executor.learning.datasets import CropSet
from executor.learning.device import Device
from executor.learning.stepping import FreeStepper
from protocol.errors import InputError
from protocol.messages import LabelJob
from tests.executor import tiny_source

CPU = Device("cpu:0", torch.device("cpu"))


def crop_set(labels: list[int], px: int = 8, seed: int = 0) -> CropSet:
    draw = np.random.default_rng(seed)
    count = len(labels)
    return CropSet(
        draw.integers(0, 256, (count, px, px, 3)).astype(np.uint8),
        np.array(labels, np.int64),
        np.arange(count, dtype=np.int64),
        np.arange(count) % 4 == 3,
        np.zeros(count, np.bool_),
    )


# ---------------------------------------------------------------- data sets


def test_a_data_set_comes_back_as_it_was_written(tmp_path: Path) -> None:
    crops = crop_set([0, 1, 2, 1, 1, 0, 2, 2])
    ref = datasets.save(tmp_path, crops, stream_id="gate", window=3, classes=("a", "b", "c"))
    loaded = datasets.load(tmp_path, ref, ("a", "b", "c"))
    assert (ref.num_train, ref.num_validation, ref.class_counts) == (6, 2, (2, 3, 3))
    for name in ("crops", "labels", "frame_index", "is_validation", "is_exemplar", "stretch"):
        assert np.array_equal(getattr(loaded, name), getattr(crops, name))
    assert len(loaded.train) == 6
    assert loaded.validation.labels.tolist() == [1, 2]


def test_a_damaged_missing_or_foreign_data_set_is_named(tmp_path: Path) -> None:
    crops = crop_set([0, 1, 1, 0])
    ref = datasets.save(tmp_path, crops, stream_id="gate", window=0, classes=("a", "b"))
    with pytest.raises(InputError, match="classes"):
        datasets.load(tmp_path, ref, ("a", "x"))
    path = tmp_path / ref.path
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        datasets.load(tmp_path, ref, ("a", "b"))
    path.write_bytes(data[:50])
    with pytest.raises(InputError, match=r"w000000\.safetensors"):
        datasets.load(tmp_path, ref, ("a", "b"))
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        datasets.load(tmp_path, ref, ("a", "b"))


@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=300, unique=True))
def test_validation_frames_are_about_a_quarter_in_whole_blocks_of_time(frames: list[int]) -> None:
    held_out = set(datasets.validation_frames(np.array(frames, np.int64)).tolist())
    assert 0 < len(held_out) < len(frames)
    if len(frames) >= 8:
        assert 0.1 <= len(held_out) / len(frames) <= 0.4
    flags = [frame in held_out for frame in sorted(frames)]
    changes = sum(a != b for a, b in itertools.pairwise(flags))
    assert changes <= 3  # two blocks, the last of them at the end


# ---------------------------------------------------------------- exemplar memory


@pytest.mark.parametrize("seed", range(5))
def test_herding_takes_the_crop_that_brings_the_mean_nearest_every_time(seed: int) -> None:
    draw = np.random.default_rng(seed)
    features = draw.normal(size=(12, 4)).astype(np.float32)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    mean = unit.mean(axis=0)
    order = memory.herd(features, 5).tolist()
    assert len(set(order)) == 5
    for size in range(5):
        chosen = order[:size]
        distances = {
            index: float(np.linalg.norm(mean - unit[[*chosen, index]].mean(axis=0)))
            for index in range(12)
            if index not in chosen
        }
        assert distances[order[size]] == pytest.approx(min(distances.values()), abs=1e-6)


def num_bytes(crops: datasets.CropSet) -> int:
    return sum(tensor.nbytes for tensor in crops.tensors().values())


def test_the_memory_stays_within_its_bytes_and_always_trains() -> None:
    previous = crop_set([0] * 30 + [1] * 3 + [2] * 10)
    budget = 13 * (6 * 6 * 3 + 46) + 5
    kept = replay.exemplars(previous, budget, crop_px=6)
    assert kept.class_counts(3) == (5, 3, 5)
    assert kept.crops.shape == (13, 6, 6, 3)
    assert budget - 5 == num_bytes(kept)
    assert kept.is_exemplar.all()
    assert not kept.is_validation.any()
    assert len(replay.exemplars(crop_set([]), budget, 6)) == 0
    assert len(replay.exemplars(previous, 100, 6)) == 0


@given(st.lists(st.integers(0, 30), max_size=6), st.integers(0, 100))
def test_a_budget_is_shared_evenly_and_what_one_cannot_use_goes_to_others(available: list[int], total: int) -> None:
    parts = memory.fair_parts(available, total)
    assert sum(parts) == min(total, sum(available))
    assert all(0 <= part <= most for part, most in zip(parts, available, strict=True))
    unfilled = [part for part, most in zip(parts, available, strict=True) if part < most]
    assert not unfilled or max(parts) - min(unfilled) <= 1


@pytest.mark.parametrize("seed", range(3))
def test_old_scenes_keep_their_part_however_much_comes_after_them(seed: int) -> None:
    draw = np.random.default_rng(seed)
    budget = 60 * (16 * 16 * 3 + 46)
    looks = [(200, 40, 40), (40, 200, 40)]
    kept = crop_set([])
    for window in range(12):
        labels = draw.integers(0, 3, 100)
        crops = np.clip(draw.normal(looks[window > 0], 20.0, (100, 16, 16, 3)), 0, 255).astype(np.uint8)
        fresh = replace(crop_set(labels.tolist(), px=16), crops=crops).labelled_in(100 * window)
        kept = replay.exemplars(datasets.concatenate([kept, fresh] if window else [fresh]), budget, 16)
        assert len(kept) == 60
        assert num_bytes(kept) <= budget
        assert kept.class_counts(3) == (20, 20, 20)
    first = kept.stretch == 0
    # Eleven windows that look alike never push the first one out, nor its share of any class below three.
    assert kept.take(first).crops[..., 0].mean() > 150
    assert min(kept.take(first).class_counts(3)) >= memory.MIN_PER_STRETCH


@pytest.mark.parametrize(("px", "edge"), [(8, 4), (8, 8), (4, 8), (9, 5)])
def test_resizing_keeps_the_mean_colour(px: int, edge: int) -> None:
    crops = np.full((2, px, px, 3), (10, 100, 200), np.uint8)
    assert (replay.resize(crops, edge) == np.array([10, 100, 200])).all()
    assert replay.resize(crops, edge).shape == (2, edge, edge, 3)


# ---------------------------------------------------------------- golden labels


@given(st.floats(-50, 50), st.floats(0, 60), st.floats(0.5, 60), st.floats(0.05, 60))
def test_labelled_frames_lie_in_the_stretch_and_none_is_labelled_twice(
    from_s: float, length_s: float, fps: float, label_fps: float
) -> None:
    frames = labeling.frames_to_label(from_s, from_s + length_s, fps, label_fps)
    assert len(set(frames)) == len(frames)
    assert all(from_s - 1e-6 <= index / fps <= from_s + length_s + 1e-6 for index in frames)
    assert abs(len(frames) - length_s * min(fps, label_fps)) <= 2


def test_the_oracle_errs_at_its_rate_and_the_same_way_every_time() -> None:
    truth = np.arange(6, dtype=np.int64) % 4
    runs = [[golden.oracle_labels(truth, 0.1, 4, seed=7, frame_index=i) for i in range(-500, 1500)] for _ in range(2)]
    assert np.array_equal(runs[0], runs[1])
    wrong = np.mean(np.array(runs[0]) != truth)
    assert wrong == pytest.approx(0.1, abs=0.012)
    assert np.min(runs[0]) >= 0
    assert np.max(runs[0]) < 4
    other = [golden.oracle_labels(truth, 0.1, 4, seed=8, frame_index=i) for i in range(-500, 1500)]
    assert not np.array_equal(runs[0], other)
    assert np.array_equal(golden.oracle_labels(truth, 0.0, 4, 7, 3), truth)


def label_job(from_s: float, to_s: float, **options: object) -> LabelJob:
    stream = tiny_source.spec(**options)  # type: ignore[arg-type]
    return LabelJob(job_id="label", stream=stream, share=1.0, window=0, from_s=from_s, to_s=to_s)


def test_labelling_writes_a_data_set_split_by_time_and_carries_the_memory_over(tmp_path: Path) -> None:
    job = label_job(-4.0, 4.0)
    source = tiny_source.TinySource(job.stream)
    first = labeling.label(job, source, tmp_path, CPU, FreeStepper(), seed=1)
    assert first is not None
    assert first.num_frames == 32
    crops = datasets.load(tmp_path, first.dataset, tiny_source.CLASSES)
    assert crops.crops.shape[1:] == (16, 16, 3)
    assert not set(crops.train.frame_index) & set(crops.validation.frame_index)
    assert 0.1 < first.dataset.num_validation / len(crops) < 0.4
    job = LabelJob(job_id="b", stream=job.stream, share=1.0, window=1, from_s=4.0, to_s=8.0, exemplars=first.dataset)
    second = labeling.label(job, source, tmp_path, CPU, FreeStepper(), seed=1)
    assert second is not None
    crops = datasets.load(tmp_path, second.dataset, tiny_source.CLASSES)
    assert crops.is_exemplar.sum() == second.num_exemplars == 15
    assert second.exemplar_bytes == num_bytes(crops.take(crops.is_exemplar)) <= 1e6 * job.stream.exemplar_mb
    assert set(crops.stretch) == {-80, 80}
    assert not (crops.is_exemplar & crops.is_validation).any()


def test_labelling_consumes_the_golden_models_time() -> None:
    now = 0.0

    def busy_clock() -> float:  # every look at the clock finds a tenth of a millisecond gone
        nonlocal now
        now += 1e-4
        return now

    stepper = FreeStepper(busy_clock)
    assert golden.burn(CPU, 0.05, stepper) is False
    assert now == pytest.approx(0.05, rel=0.05)
    assert stepper.num_steps >= 5  # the worker gets chances to rest and to stop
    assert golden.burn(CPU, 0.05, FreeStepper(busy_clock, stop_after=2)) is True


def test_a_stop_ends_labelling_with_what_there_is(tmp_path: Path) -> None:
    job = label_job(0.0, 8.0)
    source = tiny_source.TinySource(job.stream)
    result = labeling.label(job, source, tmp_path, CPU, FreeStepper(stop_after=12), seed=1)
    assert result is not None
    assert 0 < result.num_frames < 32
    assert result.dataset.num_train > 0
    assert labeling.label(job, source, tmp_path, CPU, FreeStepper(stop_after=1), seed=1) is None


def test_a_stretch_without_objects_is_the_users_problem(tmp_path: Path) -> None:
    job = label_job(0.45, 0.46)  # frame 9 of the tiny source is empty
    with pytest.raises(InputError, match="no object"):
        labeling.label(job, tiny_source.TinySource(job.stream), tmp_path, CPU, FreeStepper(), seed=1)
