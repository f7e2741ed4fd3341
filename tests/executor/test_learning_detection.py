"""Detection: the same jobs as classification, on whole frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torchvision
from numpy.typing import NDArray
from safetensors.torch import save_file

from executor.learning import checkpoints, framesets, labeling, precision
from executor.learning.detection import Detection, FrameDetector
from executor.learning.detectors import Detector, EdgeDetector, _targets
from executor.learning.device import Device
from executor.learning.framesets import FrameSet
from executor.learning.inference import InferenceEngine, Objects
from executor.learning.loading import load_analyser
from executor.learning.matching import frame_f1, matched
from executor.learning.models import build_student, named_spec, replace_head, set_trainable
from executor.learning.retraining import retrain
from executor.learning.stepping import FreeStepper
from executor.learning.task import task_of
from executor.learning.trials import run_trials
from protocol.errors import CheckpointError, InputError
from protocol.messages import LabelJob, RetrainJob, TrialJob
from protocol.schema import CheckpointRef, DatasetRef, InferenceConfig, RetrainConfig, StudentSpec
from tests.executor import tiny_source

CPU = Device("cpu:0", torch.device("cpu"))
TASK = Detection()
STREAM = msgspec.structs.replace(
    tiny_source.spec(student=StudentSpec(head_width=16)), task="detection", frame_px=128, exemplar_mb=0.16
)
FULL = RetrainConfig(config_id="full", epochs=14, batch_size=8, head_width=16, learning_rate=5e-3)
ARCHITECTURES = ("edge_detector", "ssdlite320_mobilenet_v3_large")


class Painted(tiny_source.TinyFrame):
    """The tiny source's objects, drawn."""

    def image(self) -> NDArray[np.uint8]:
        picture = np.full((240, 640, 3), 128, np.uint8)
        colours = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]], np.uint8)
        for (x0, y0, x1, y1), label in zip(self.boxes.astype(int), self.labels, strict=True):
            picture[y0:y1, x0:x1] = colours[label]
        return picture


class PaintedSource(tiny_source.TinySource):
    def frame(self, index: int) -> Painted:
        return Painted(index)


SOURCE = PaintedSource(STREAM)


def boxes(*rows: tuple[float, float, float, float]) -> NDArray[np.float32]:
    return np.array(rows, np.float32).reshape(-1, 4)


def found(rows: NDArray[np.float32], labels: list[int], scores: list[float] | None = None) -> Objects:
    return Objects(rows, np.array(labels, np.int64), None if scores is None else np.array(scores, np.float32))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def dataset(store: Path) -> DatasetRef:
    job = LabelJob(job_id="label", stream=STREAM, share=1.0, window=0, from_s=-12.0, to_s=12.0)
    result = labeling.label(job, SOURCE, store, CPU, FreeStepper(), seed=1)
    assert result is not None
    return result.dataset


@pytest.fixture(scope="module")
def first(store: Path, dataset: DatasetRef) -> CheckpointRef:
    job = RetrainJob(
        job_id="r", stream=STREAM, share=1.0, window=0, dataset=dataset, checkpoint=None, config=FULL, next_version=1
    )
    result = retrain(job, store, CPU, FreeStepper(), lambda: None, lambda _: None)
    assert result.checkpoint is not None
    assert result.accuracy_before < 0.2
    assert result.accuracy_after > 0.75
    return result.checkpoint


# ---------------------------------------------------------------- the measure


def test_f1_matches_every_true_box_once_surest_first() -> None:
    true = boxes((0, 0, 10, 10), (20, 0, 30, 10))
    labels = np.array([0, 1])
    exact = found(true, [0, 1], [0.9, 0.8])
    assert frame_f1(exact, true, labels) == 1.0
    assert frame_f1(found(true, [1, 1], [0.9, 0.8]), true, labels) == 0.5  # one of a wrong class
    twice = found(boxes((0, 0, 10, 10), (1, 0, 11, 10), (20, 0, 30, 10)), [0, 0, 1], [0.9, 0.8, 0.7])
    assert frame_f1(twice, true, labels) == pytest.approx(2 * 2 / 5)
    assert frame_f1(found(boxes(), []), true, labels) == 0.0
    assert frame_f1(None, true, labels) == 0.0
    assert frame_f1(exact, boxes(), np.zeros(0, np.int64)) is None


def test_an_overlap_below_three_tenths_is_no_hit() -> None:
    true = boxes((0, 0, 10, 10))
    for shift, hit in ((5.0, True), (5.5, False)):  # overlaps of 0.333 and 0.290
        moved = found(true + np.array([shift, 0, shift, 0], np.float32), [0], [1.0])
        assert matched(moved, true, np.array([0])).tolist() == [hit]


def test_a_surer_detection_takes_the_box_that_it_shares_with_another() -> None:
    true = boxes((0, 0, 10, 10), (4, 0, 14, 10))
    pair = found(boxes((2, 0, 12, 10), (0, 0, 10, 10)), [0, 0], [0.5, 0.9])
    assert matched(pair, true, np.array([0, 0])).all()


def test_mean_average_precision_is_cocos() -> None:
    pytest.importorskip("torchmetrics")
    pytest.importorskip("pycocotools")
    true = [found(boxes((0, 0, 40, 40), (50, 0, 90, 40)), [0, 1]), found(boxes((0, 0, 40, 40)), [0])]
    assert precision.mean_average_precision(true, true) == pytest.approx(1.0)
    # One box of class 0 at an overlap of 0.82: found at overlaps up to 0.8, 7 of 10. Class 1 is right at all of them.
    close = [
        found(boxes((0, 0, 40, 33), (50, 0, 90, 40)), [0, 1], [0.9, 0.8]),
        found(boxes((0, 0, 40, 33)), [0], [0.7]),
    ]
    assert precision.mean_average_precision(close, true) == pytest.approx((0.7 + 1.0) / 2, abs=1e-3)
    nothing = found(boxes(), [])
    assert precision.mean_average_precision([nothing, nothing], true) == pytest.approx(0.0)
    assert precision.mean_average_precision([nothing], [nothing]) is None


def test_without_the_libraries_there_is_no_mean_average_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "available", lambda: False)
    true = [found(boxes((0, 0, 40, 40)), [0])]
    assert precision.mean_average_precision(true, true) is None


# ---------------------------------------------------------------- data


def test_frames_are_scaled_with_their_boxes_and_padded_to_one_size() -> None:
    wide = framesets.one_frame(np.full((100, 200, 3), 9, np.uint8), found(boxes((20, 40, 60, 80)), [2]), 5, 100)
    tall = framesets.one_frame(np.full((200, 150, 3), 7, np.uint8), found(boxes(), []), 6, 100)
    both = framesets.join([wide, tall], 100)
    assert both.frames.shape == (2, 100, 100, 3)
    assert both.boxes.tolist() == [[10.0, 20.0, 30.0, 40.0]]
    assert both.frames[0, 49, 99].tolist() == [9, 9, 9]
    assert both.frames[0, 50:].max() == 0
    assert both.frames[1, :, 75:].max() == 0
    assert both.objects(0).labels.tolist() == [2]
    assert both.objects(1).labels.tolist() == []
    larger = framesets.join([both], 200)
    assert larger.boxes.tolist() == [[20.0, 40.0, 60.0, 80.0]]


def test_a_part_of_a_frame_set_keeps_each_frames_objects() -> None:
    draw = np.random.default_rng(3)
    parts = []
    for index in range(20):
        count = int(draw.integers(0, 4))
        rows = np.sort(draw.uniform(0, 90, (count, 4)).astype(np.float32).reshape(count, 2, 2), axis=1).reshape(
            count, 4
        )
        parts.append(
            framesets.one_frame(np.zeros((80, 100, 3), np.uint8), found(rows, [index % 3] * count), index, 100)
        )
    whole = framesets.join(parts, 100)
    picked = whole.take(np.array([7, 2, 19, 7]))
    for number, source in enumerate((7, 2, 19, 7)):
        assert np.array_equal(picked.objects(number).boxes, parts[source].boxes)
    assert np.array_equal(whole.take(whole.frame_index % 2 == 1).frame_index, np.arange(1, 20, 2))
    again = FrameSet.from_tensors(whole.tensors())
    assert np.array_equal(again.owner, whole.owner)
    few = framesets.subset(whole, 4, seed=1)
    assert 4 <= len(few) <= 6
    assert set(few.labels) == set(whole.labels)


def test_labelling_keeps_frames_split_by_time_and_carries_a_memory_of_fixed_size(
    store: Path, dataset: DatasetRef
) -> None:
    frames = TASK.read(store, dataset, STREAM.classes)
    assert frames.frames.shape[1:] == (48, 128, 3)
    assert not set(frames.train.frame_index) & set(frames.validation.frame_index)
    assert (dataset.num_train, dataset.num_validation) == (len(frames.train), len(frames.validation))
    assert sum(dataset.class_counts) == len(frames.labels)
    job = LabelJob(job_id="b", stream=STREAM, share=1.0, window=1, from_s=12.0, to_s=16.0, exemplars=dataset)
    result = labeling.label(job, SOURCE, store, CPU, FreeStepper(), seed=1)
    assert result is not None
    frames = TASK.read(store, result.dataset, STREAM.classes)
    assert 3 <= frames.is_exemplar.sum() <= 9
    assert not (frames.is_exemplar & frames.is_validation).any()
    with pytest.raises(InputError, match="another task"):
        task_of(tiny_source.spec()).read(store, result.dataset, STREAM.classes)


# ---------------------------------------------------------------- students


def detector(architecture: str, num_classes: int = 3) -> Detector:
    torch.manual_seed(0)
    student = build_student(StudentSpec(architecture=architecture, head_width=16), num_classes)
    assert isinstance(student, Detector)
    return student


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_detector_learns_and_finds_at_any_size(architecture: str) -> None:
    student = detector(architecture)
    student.train()
    frames = torch.rand(2, 3, 72, 128) * 255
    truth = [(torch.tensor([[10.0, 10.0, 50.0, 40.0]]), torch.tensor([1])), (torch.zeros(0, 4), torch.zeros(0).long())]
    loss = student.loss(frames, truth)
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss)
    assert all(parameter.grad is not None for parameter in student.parameters())
    student.eval()
    for shape in ((64, 64), (72, 128), (101, 67)):
        with torch.inference_mode():
            results = student.detect(torch.zeros(2, 3, *shape))
        assert len(results) == 2
        assert all(len(each.labels) == len(each.boxes) for each in results)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_seven_to_nine_tenths_of_the_layers_can_be_frozen(architecture: str, fraction: float) -> None:
    student = detector(architecture)
    num_trained = set_trainable(student, fraction)
    assert 0 < num_trained <= 0.3 * len(student.blocks) + 1
    before = {name: value.clone() for name, value in student.state_dict().items()}
    config = RetrainConfig(config_id="x", epochs=1, batch_size=4, trained_fraction=fraction, learning_rate=1e-2)
    frames = framesets.join([TASK.examples(Painted(i), labels_of(Painted(i)), STREAM) for i in range(4)], 128)
    trainer = TASK.trainer(student, None, config, frames, CPU, 0)
    trainer.epoch(FreeStepper())
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    frozen = tuple(f"blocks.{number}." for number in range(len(student.blocks) - num_trained))
    assert any(name.startswith("head.") for name in changed)
    assert any(name.startswith(f"blocks.{len(student.blocks) - 1}.") for name in changed)
    assert not any(name.startswith(frozen) for name in changed)
    moved = trainer.average.state_dict()
    assert all(torch.isfinite(value).all() for value in moved.values())


def labels_of(frame: Painted) -> Any:
    from executor.learning.golden import Labels

    count = len(frame.labels)
    return Labels(frame.boxes, frame.labels, np.ones(count, np.float32), frame.labels + 1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_detector_survives_its_checkpoint(tmp_path: Path, architecture: str) -> None:
    student = detector(architecture).eval()
    ref = checkpoints.save(tmp_path, student, stream_id="tiny", version=1, classes=tiny_source.CLASSES, crop_px=128)
    stream = msgspec.structs.replace(STREAM, student=StudentSpec(architecture=architecture))
    served = load_analyser(tmp_path, ref, stream, CPU, 96)
    assert isinstance(served, FrameDetector)
    again, manifest = checkpoints.load(tmp_path, ref)
    assert (manifest.task, manifest.architecture) == ("detection", architecture)
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in again.state_dict().items())
    with pytest.raises(CheckpointError, match="model for detection, the stream is for classification"):
        load_analyser(tmp_path, ref, tiny_source.spec(), CPU, 16)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_new_head_knows_other_classes(architecture: str) -> None:
    student = detector(architecture)
    assert replace_head(student, 3, 16) is False
    assert replace_head(student, 5, 16) is True
    with torch.inference_mode():
        student.eval().detect(torch.zeros(1, 3, 64, 64))
    assert student.num_classes == 5


def test_the_ssd_starts_from_a_published_state_dict(tmp_path: Path) -> None:
    torch.manual_seed(4)
    published = torchvision.models.get_model(ARCHITECTURES[1], weights=None, weights_backbone=None)
    path = tmp_path / "ssd.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in published.state_dict().items()}, path)
    student = build_student(StudentSpec(architecture=ARCHITECTURES[1], checkpoint=str(path)), 3)
    first = published.state_dict()["backbone.features.0.0.0.weight"]
    assert torch.equal(student.state_dict()["blocks.0.0.weight"], first)
    with pytest.raises(InputError, match="no weights of edge_detector"):
        build_student(StudentSpec(architecture="edge_detector", checkpoint=str(path)), 3)


def test_a_student_of_the_other_task_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="'resnet18' is no student for detection; known: edge_detector"):
        named_spec(StudentSpec(architecture="resnet18"), "detection")
    with pytest.raises(InputError, match=r"'edge_detector' is a detector; set task = \"detection\""):
        named_spec(StudentSpec(architecture="edge_detector"), "classification")
    assert named_spec(StudentSpec(), "detection").architecture == "edge_detector"


def test_the_small_detectors_targets_peak_at_the_centres_of_their_class() -> None:
    truth = [(torch.tensor([[8.0, 8.0, 40.0, 24.0], [60.0, 0.0, 64.0, 8.0]]), torch.tensor([2, 0]))]
    heat, cells, weight = _targets(truth, 3, 16, 20)
    assert heat.shape == (1, 3, 16, 20)
    assert [(c, y, x) for _, c, y, x in (heat == 1.0).nonzero().tolist()] == [(0, 1, 15), (2, 4, 6)]
    assert heat[0, 1].max() == 0.0
    assert cells[0, 4, 6].tolist() == [2.0, 2.0, 10.0, 6.0]
    assert weight[0, 4, 6] == 1.0
    assert weight[0, 15, 0] == 0.0


def test_the_small_detector_is_small() -> None:
    assert 50_000 < sum(parameter.numel() for parameter in EdgeDetector(4, 32).parameters()) < 250_000


# ---------------------------------------------------------------- jobs


def test_a_detector_is_trained_retrained_and_served(store: Path, dataset: DatasetRef, first: CheckpointRef) -> None:
    config = msgspec.structs.replace(FULL, config_id="part", epochs=1, trained_fraction=0.2)
    job = RetrainJob(
        job_id="r", stream=STREAM, share=1.0, window=0, dataset=dataset, checkpoint=first, config=config, next_version=2
    )
    result = retrain(job, store, CPU, FreeStepper(), lambda: None, lambda _: None)
    assert result.accuracy_before == checkpoints.load(store, first)[1].accuracy
    assert result.accuracy_after > 0.6
    if precision.available():
        assert result.map_before is not None
        assert result.map_after is not None
        assert 0.1 < result.map_before <= 1.0
    old, new = checkpoints.load(store, first)[0], checkpoints.load(store, result.checkpoint or first)[0]
    assert torch.equal(old.state_dict()["blocks.0.0.weight"], new.state_dict()["blocks.0.0.weight"])
    analyser = load_analyser(store, first, STREAM, CPU, 128)
    engine = InferenceEngine(analyser, InferenceConfig(config_id="x", frame_interval=2, resolution_px=128), TASK.judge)
    outcomes = [engine.process(SOURCE.frame(index)) for index in range(300, 340)]
    assert [outcome.analysed for outcome in outcomes[:4]] == [True, False, True, False]
    scores = [outcome.accuracy for outcome in outcomes if outcome.accuracy is not None]
    assert len(scores) == 36  # every tenth frame is empty
    assert np.mean(scores) > 0.7
    rare = InferenceEngine(analyser, InferenceConfig(config_id="y", frame_interval=50, resolution_px=128), TASK.judge)
    stale = [rare.process(SOURCE.frame(index)).accuracy for index in range(300, 340)]
    assert np.mean([score for score in stale if score is not None]) < np.mean(scores) - 0.1


def test_trials_of_a_detector_measure_both_kinds_of_configurations(
    store: Path, dataset: DatasetRef, first: CheckpointRef
) -> None:
    job = TrialJob(
        job_id="trial",
        stream=STREAM,
        share=1.0,
        window=0,
        dataset=dataset,
        checkpoint=first,
        retrain=(FULL, msgspec.structs.replace(FULL, config_id="part", trained_fraction=0.2)),
        inference=tuple(
            InferenceConfig(config_id=f"r{px}-i{interval}", resolution_px=px, frame_interval=interval)
            for px in (128, 64)
            for interval in (1, 8)
        ),
        data_share=0.3,
        num_epochs=1,
        num_frames=16,
        clip_end_s=20.0,
    )
    result = run_trials(job, SOURCE, store, CPU, FreeStepper(), 1, lambda: None)
    assert [trial.config.config_id for trial in result.retrain] == ["full", "part"]
    assert result.accuracy_now == checkpoints.load(store, first)[1].accuracy
    inference = {trial.config.config_id: trial for trial in result.inference}
    assert inference["r128-i1"].accuracy > 0.7
    assert inference["r128-i1"].busy_s_per_frame > inference["r128-i8"].busy_s_per_frame > 0.0
    assert inference["r64-i1"].busy_s_per_frame < inference["r128-i1"].busy_s_per_frame


def test_a_model_for_crops_does_not_train_on_frames(store: Path, dataset: DatasetRef) -> None:
    frames = TASK.read(store, dataset, STREAM.classes)
    student = build_student(StudentSpec(), 3)
    with pytest.raises(InputError, match="does not detect"):
        TASK.evaluate(student, frames, CPU)
