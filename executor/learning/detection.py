"""Detection: the student finds the objects of a frame and names them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from executor.learning import framesets, precision
from executor.learning.detectors import Detector, Truth
from executor.learning.device import Device
from executor.learning.framesets import FrameSet
from executor.learning.golden import Labels
from executor.learning.inference import Objects
from executor.learning.matching import frame_f1
from executor.learning.models import Student, named_spec
from executor.learning.stepping import Stepper
from executor.learning.task import Task, exemplar_bytes
from executor.learning.training import Trainer
from executor.streams.frames import Frame
from protocol.errors import InputError
from protocol.schema import RetrainConfig, StreamSpec, StudentSpec

_SCALES = (1.0, 5 / 6, 2 / 3)
_MIN_EDGE = 64
_VALIDATION_BATCH = 16
_DIVERGED_LOSS = 1e4  # that of an untrained detector is about ten


class Detection(Task[FrameSet]):
    """An example is a frame, scaled down. Accuracy is the mean F1 of its frames."""

    examples_kind: ClassVar[type[FrameSet]] = FrameSet

    def student_spec(self, spec: StudentSpec) -> StudentSpec:
        return named_spec(spec, "detection")

    def examples(self, frame: Frame, labels: Labels, stream: StreamSpec) -> FrameSet:
        return framesets.one_frame(frame.image(), Objects(labels.boxes, labels.labels), frame.index, stream.frame_px)

    def join(self, parts: Sequence[FrameSet], stream: StreamSpec) -> FrameSet:
        return framesets.join(parts, stream.frame_px)

    def memory(self, previous: FrameSet, stream: StreamSpec) -> FrameSet:
        return framesets.exemplars(previous, exemplar_bytes(stream), stream.frame_px)

    def subset(self, examples: FrameSet, size: int, seed: int) -> FrameSet:
        return framesets.subset(examples, size, seed)

    def trainer(
        self,
        student: Student,
        base: Student | None,
        config: RetrainConfig,
        examples: FrameSet,
        device: Device,
        seed: int,
    ) -> Trainer:
        return FrameTrainer(_detector(student), base, config, examples, device, seed)

    def evaluate(
        self, student: Student, examples: FrameSet, device: Device, stepper: Stepper | None = None
    ) -> tuple[float, float]:
        if len(examples) == 0:
            return 0.0, 0.0
        scores: list[float] = []
        loss = 0.0
        for start, found, batch_loss in _batches(_detector(student), examples, device, stepper):
            loss += batch_loss * len(found)
            scores += [score for score in _scores(examples, start, found) if score is not None]
        return float(np.mean(scores)) if scores else 0.0, loss / len(examples)

    def serving_accuracy(
        self, student: Student, examples: FrameSet, device: Device, stepper: Stepper | None = None
    ) -> float:
        total = weights = 0.0
        for start, found, _ in _batches(_detector(student), examples, device, stepper):
            for number, score in enumerate(_scores(examples, start, found), start):
                if score is not None:
                    weight = float(examples.weight[number])
                    total, weights = total + weight * score, weights + weight
        return total / weights if weights else 0.0

    def points(
        self, student: Student, examples: FrameSet, device: Device, stepper: Stepper | None = None
    ) -> NDArray[np.float64]:
        """F1 per frame, 0 for those that are not scored: what a frame has to say, it says of both models."""
        points = np.zeros(len(examples), np.float64)
        for start, found, _ in _batches(_detector(student), examples, device, stepper):
            for number, score in enumerate(_scores(examples, start, found), start):
                points[number] = score or 0.0
        return points

    def mean_average_precision(
        self, student: Student, examples: FrameSet, device: Device, stepper: Stepper | None = None
    ) -> float | None:
        found = [each for _, batch, _ in _batches(_detector(student), examples, device, stepper) for each in batch]
        return precision.mean_average_precision(found, [examples.objects(number) for number in range(len(examples))])

    def analyser(self, student: Student, device: Device, version: int) -> FrameDetector:
        return FrameDetector(_detector(student), device, version)

    def judge(self, found: Objects | None, boxes: NDArray[np.float32], labels: NDArray[np.int64]) -> float | None:
        return frame_f1(found, boxes, labels)


class FrameDetector:
    """Finds the objects of whole frames."""

    def __init__(self, student: Detector, device: Device, version: int) -> None:
        self.version = version
        self._student = student.eval().to(device.torch_device)
        self._torch_device = device.torch_device

    def analyse(self, frame: Frame, resolution_px: int) -> Objects:
        return self.find(frame.image(), resolution_px)

    def find(self, picture: NDArray[np.uint8], resolution_px: int) -> Objects:
        """The objects of a picture, uint8 (h, w, 3), looked at with its longer edge at ``resolution_px``."""
        height, width = picture.shape[:2]
        small, factor = framesets.scaled(picture, resolution_px)
        with torch.inference_mode():
            (found,) = self._student.detect(_planes(torch.from_numpy(small[None]).to(self._torch_device)))
        limit = np.array([width, height, width, height], np.float32)
        return Objects(np.minimum(found.boxes / np.float32(factor), limit), found.labels, found.scores)

    def warm_up(self, resolution_px: int) -> None:
        """Run once at this resolution, so that the first frame does not pay for set-up."""
        self.find(np.zeros((resolution_px * 3 // 4, resolution_px, 3), np.uint8), resolution_px)


class FrameTrainer(Trainer):
    """Trains a detector on ``frames``; those that show rare classes are drawn more often."""

    def __init__(
        self,
        student: Detector,
        base: Student | None,
        config: RetrainConfig,
        frames: FrameSet,
        device: Device,
        seed: int,
    ) -> None:
        self._detector = student
        self._frames = torch.from_numpy(frames.frames).to(device.torch_device)
        self._truth = _truth(frames, device)
        edge = max(frames.frames.shape[1:3])
        edges = tuple(max(_MIN_EDGE, round(scale * edge)) for scale in _SCALES)
        counts = np.bincount(frames.labels)
        rarity = np.ones(len(frames))
        np.maximum.at(rarity, frames.owner, np.sqrt(counts.max(initial=1) / counts[frames.labels]))
        super().__init__(student, base, config, np.minimum(rarity, 3.0), edges, _DIVERGED_LOSS, device, seed)

    def evaluate(self, examples: FrameSet, stepper: Stepper | None = None) -> tuple[float, float]:
        return Detection().evaluate(self.average, examples, self._device, stepper)

    def group_loss(self, group: Tensor, edge: int) -> Tensor:
        x = _planes(self._frames[group])
        height, width = x.shape[2:]
        factor = edge / max(height, width)
        size = (max(1, round(height * factor)), max(1, round(width * factor)))
        x = (framesets.resized(x, size) * self.gain(len(x))).clamp_(0.0, 255.0)
        truth = [(boxes * factor, labels) for boxes, labels in (self._truth[number] for number in group.tolist())]
        if self.mirrored():
            x = x.flip(3)
            truth = [(_mirrored(boxes, size[1]), labels) for boxes, labels in truth]
        return self._detector.loss(x, truth)


def _detector(student: Student) -> Detector:
    if not isinstance(student, Detector):
        raise InputError(f"a {student.architecture} does not detect; the stream's model is one for classification")
    return student


def _planes(frames: Tensor) -> Tensor:
    return frames.permute(0, 3, 1, 2).float()


def _mirrored(boxes: Tensor, width: int) -> Tensor:
    return torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)


def _truth(frames: FrameSet, device: Device) -> list[Truth]:
    objects = [frames.objects(number) for number in range(len(frames))]
    return [
        (
            torch.from_numpy(each.boxes.copy()).to(device.torch_device),
            torch.from_numpy(each.labels.copy()).to(device.torch_device),
        )
        for each in objects
    ]


def _batches(
    student: Detector, examples: FrameSet, device: Device, stepper: Stepper | None
) -> Iterator[tuple[int, list[Objects], float]]:
    """(first frame, what was found in each, mean loss) batch by batch; the student is put into evaluation mode."""
    student.eval()
    truth = _truth(examples, device)
    for start in range(0, len(examples), _VALIDATION_BATCH):
        batch = slice(start, start + _VALIDATION_BATCH)
        with torch.inference_mode():
            frames = _planes(torch.from_numpy(examples.frames[batch]).to(device.torch_device))
            yield start, student.detect(frames), float(student.loss(frames, truth[batch]))
        if stepper is not None:
            stepper.step()  # a stop takes effect after the validation, or its epoch would be lost


def _scores(examples: FrameSet, start: int, found: list[Objects]) -> list[float | None]:
    true = [examples.objects(number) for number in range(start, start + len(found))]
    return [frame_f1(each, truth.boxes, truth.labels) for each, truth in zip(found, true, strict=True)]
