"""Classification: the source has the boxes, the student says what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from executor.learning import datasets, replay, training
from executor.learning.datasets import CropSet
from executor.learning.device import Device
from executor.learning.golden import Labels
from executor.learning.inference import CropClassifier, Objects, classified_right
from executor.learning.models import Student, named_spec
from executor.learning.pairing import per_road_user, road_users
from executor.learning.stepping import Stepper
from executor.learning.task import Task, exemplar_bytes
from executor.learning.training import Trainer, crop_trainer
from executor.streams.frames import Frame
from executor.streams.resize import cut_out
from protocol.schema import RetrainConfig, StreamSpec, StudentSpec


class Classification(Task[CropSet]):
    """An example is a crop. Accuracy is the share of crops that are named right."""

    examples_kind: ClassVar[type[CropSet]] = CropSet

    def student_spec(self, spec: StudentSpec) -> StudentSpec:
        return named_spec(spec, "classification")

    def examples(self, frame: Frame, labels: Labels, stream: StreamSpec) -> CropSet:
        own = labels.boxes is frame.boxes
        if len(labels) == 0:
            crops = np.zeros((0, stream.crop_px, stream.crop_px, 3), np.uint8)
        else:
            crops = frame.crops(stream.crop_px) if own else cut_out(frame.image(), labels.boxes, stream.crop_px)
        flags = np.zeros(len(labels), np.bool_)
        return CropSet(crops, labels.labels, np.full(len(labels), frame.index, np.int64), flags, flags, labels.boxes)

    def join(self, parts: Sequence[CropSet], stream: StreamSpec) -> CropSet:
        return datasets.concatenate([datasets.empty(stream.crop_px), *parts])

    def memory(self, previous: CropSet, stream: StreamSpec) -> CropSet:
        return replay.exemplars(previous, exemplar_bytes(stream), stream.crop_px)

    def subset(self, examples: CropSet, size: int, seed: int) -> CropSet:
        return training.subset(examples, size, seed)

    def trainer(
        self,
        student: Student,
        base: Student | None,
        config: RetrainConfig,
        examples: CropSet,
        device: Device,
        seed: int,
    ) -> Trainer:
        return crop_trainer(student, base, config, examples, device, seed)

    def evaluate(
        self, student: Student, examples: CropSet, device: Device, stepper: Stepper | None = None
    ) -> tuple[float, float]:
        return training.evaluate(student, examples, device, stepper)

    def serving_accuracy(
        self, student: Student, examples: CropSet, device: Device, stepper: Stepper | None = None
    ) -> float:
        return training.frame_mean_accuracy(student, examples, device, stepper)

    def points(
        self, student: Student, examples: CropSet, device: Device, stepper: Stepper | None = None
    ) -> NDArray[np.float64]:
        right = training.correctness(student, examples, device, stepper)
        return per_road_user(right, examples.frame_index, examples.boxes, examples.labels)

    def assess(
        self, student: Student, examples: CropSet, device: Device, stepper: Stepper | None = None
    ) -> tuple[float, NDArray[np.float64], float | None]:
        """All three from one look at the crops."""
        right, belief = training.correctness_and_belief(student, examples, device, stepper)
        points = per_road_user(right, examples.frame_index, examples.boxes, examples.labels)
        return datasets.frame_mean(right, examples.frame_index, examples.weight), points, belief

    def num_pieces(self, examples: CropSet) -> int:
        return len(np.unique(road_users(examples.frame_index, examples.boxes, examples.labels)))

    def analyser(self, student: Student, device: Device, version: int) -> CropClassifier:
        return CropClassifier(student, device, version)

    def judge(self, found: Objects | None, boxes: NDArray[np.float32], labels: NDArray[np.int64]) -> float | None:
        return classified_right(found, boxes, labels)
