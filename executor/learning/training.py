"""One student in training: batches, scales, epochs, validation. Shared by retraining and its trials.

Inference runs at several resolutions, so every batch is cut in groups and each group is scaled to another edge.
The mix is the same in every batch: what a crop costs does not depend on luck, and a short trial can be scaled up.

What is measured and kept is a running mean of the weights over about an epoch (Polyak averaging). Single epochs
on a few hundred crops go up and down by ten points and more; their mean is both better and steadier, without a
learning rate schedule that would tie the first epochs to how many are to come.

A classifier then goes only part of the way from the model that it began from to that mean (interpolated weights,
Wortsman et al., CVPR 2022, "Robust fine-tuning"). A window's labels are of a handful of road users in one light: all
the way is better on them and worse on those that come next.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from executor.learning.datasets import CropSet, frame_mean
from executor.learning.device import Device
from executor.learning.models import Classifier, Student, build_student, replace_head, set_trainable
from executor.learning.stepping import Stepper
from protocol.schema import EpochResult, RetrainConfig, StudentSpec

_SCALES = (1.0, 2 / 3, 1 / 2, 1 / 3)
_MIN_EDGE = 8
_MIN_GROUP = 4  # batch statistics of fewer crops are noise
_VALIDATION_BATCH = 64
_BRIGHTNESS = 0.2
_CROP_BRIGHTNESS = 1.5  # the largest factor, and one over it the smallest
_CROP_CONTRAST = 0.2
_WAY = 0.7  # measured, as light and contrast are: docs/learning.md
_MIN_HORIZON = 8  # batches
_DIVERGED_LOSS = 100.0  # times ln(num_classes), the loss of guessing


class DivergedError(FloatingPointError):
    """The loss is not finite or has run away; the weights are worthless."""


def student_for(
    config: RetrainConfig, serving: Student | None, spec: StudentSpec, num_classes: int, device: Device, seed: int
) -> Student:
    """The student that a configuration starts from: a copy of ``serving`` (None: a new one), its head and
    trained blocks as configured, on the device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if serving is None:
            student = build_student(spec, num_classes, config.head_width)
        else:
            student = copy.deepcopy(serving)
            replace_head(student, num_classes, config.head_width)
    # With nothing pretrained behind it a new student has to train every block, whatever the configuration says.
    new = serving is None and not spec.checkpoint
    set_trainable(student, 1.0 if new else config.trained_fraction)
    return student.to(device.torch_device)


def subset(crops: CropSet, size: int, seed: int) -> CropSet:
    """About ``size`` crops (at least one of every class), the class mix kept, fixed by ``seed``."""
    if size >= len(crops):
        return crops
    draw = np.random.default_rng(seed)
    picked: list[NDArray[np.int64]] = []
    for label in np.unique(crops.labels):
        members = np.flatnonzero(crops.labels == label)
        count = max(1, round(size * len(members) / len(crops)))
        picked.append(draw.permutation(members)[:count])
    return crops.take(np.sort(np.concatenate(picked)))


def _batches(
    student: Student, crops: CropSet, device: Device, stepper: Stepper | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits, labels) of ``crops`` in order, batch by batch, at full edge; the student is put into evaluation mode."""
    student.eval()
    for start in range(0, len(crops), _VALIDATION_BATCH):
        batch = slice(start, start + _VALIDATION_BATCH)
        with torch.inference_mode():
            logits = student(torch.from_numpy(crops.crops[batch]).to(device.torch_device))
            yield logits, torch.from_numpy(crops.labels[batch]).to(device.torch_device)
        if stepper is not None:
            stepper.step()  # a stop takes effect after the validation, or its epoch would be lost


def evaluate(student: Student, crops: CropSet, device: Device, stepper: Stepper | None = None) -> tuple[float, float]:
    """(accuracy, mean cross-entropy) of the student on ``crops`` at full edge; (0, 0) of no crops."""
    if len(crops) == 0:
        return 0.0, 0.0
    num_right, loss = 0, 0.0
    for logits, labels in _batches(student, crops, device, stepper):
        num_right += int((logits.argmax(1) == labels).sum())
        loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
    return num_right / len(crops), loss / len(crops)


def correctness(student: Student, crops: CropSet, device: Device, stepper: Stepper | None = None) -> NDArray[np.bool_]:
    """Which crops the student classifies right, bool (N,)."""
    right = [(logits.argmax(1) == labels).cpu().numpy() for logits, labels in _batches(student, crops, device, stepper)]
    return np.concatenate([np.zeros(0, np.bool_), *right])


def correctness_and_belief(
    student: Student, crops: CropSet, device: Device, stepper: Stepper | None = None
) -> tuple[NDArray[np.bool_], float]:
    """:func:`correctness`, and the student's mean belief (0..1) in what it says; 0 of no crops."""
    right, belief = [np.zeros(0, np.bool_)], 0.0
    for logits, labels in _batches(student, crops, device, stepper):
        beliefs, said = logits.softmax(1).max(1)
        right.append((said == labels).cpu().numpy())
        belief += float(beliefs.sum())
    return np.concatenate(right), min(1.0, belief / max(1, len(crops)))


def frame_mean_accuracy(student: Student, crops: CropSet, device: Device, stepper: Stepper | None = None) -> float:
    """Share of a frame's crops classified right, weighted mean over frames of ``crops`` (the measure of serving)."""
    return frame_mean(correctness(student, crops, device, stepper), crops.frame_index, crops.weight)


def even_batches(order: NDArray[np.int64], batch_size: int) -> list[NDArray[np.int64]]:
    """``order`` in batches of about ``batch_size``, all of one size or one more, none of a single example.

    A last batch of one has no batch statistics: normalisation layers refuse it where its map is one pixel. A set of
    a single example is taken twice.
    """
    if len(order) == 1:
        return [np.repeat(order, 2)]
    return np.array_split(order, max(1, min(math.ceil(len(order) / batch_size), len(order) // 2)))


def epoch_result(
    epoch: int, measured: tuple[float, float], start_s: float, trained_s: float, end_s: float
) -> EpochResult:
    """An epoch that began at ``start_s`` busy seconds, its validation at ``trained_s``, and ended at ``end_s``.

    ``measured``: (accuracy, loss). A model that is broken is reported by its accuracy: NaN may not travel on the wire.
    """
    accuracy, loss = measured
    return EpochResult(
        epoch=epoch,
        accuracy=accuracy,
        loss=loss if math.isfinite(loss) else 1e9,
        busy_s=max(0.0, end_s - start_s),
        validation_s=max(0.0, end_s - trained_s),
    )


class Trainer(ABC):
    """Trains ``student``, a copy of ``base``, in place with ``config``; Adam, fixed seed. ``average`` is the result.

    Examples are drawn with replacement and with probabilities in proportion to ``weight`` (N,), and looked at with
    ``edges``. A loss above ``diverged_loss`` has run away. ``way``: how far to go from ``base``. All of the way is gone
    by a new student (``base`` None), and by one with a new head, which has nothing to keep.
    """

    way: ClassVar[float] = 1.0

    def __init__(
        self,
        student: Student,
        base: Student | None,
        config: RetrainConfig,
        weight: NDArray[np.float64],
        edges: tuple[int, ...],
        diverged_loss: float,
        device: Device,
        seed: int,
    ) -> None:
        self._student, self._device = student, device
        self._batch_size = config.batch_size
        self._weight = weight / weight.sum()
        self._draw = np.random.default_rng(seed)
        self._num_batches = 0
        self.average = copy.deepcopy(student).eval()
        self._pairs = _moving(self.average, student)
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []  # of average: itself, where it began, the running mean
        if self.way < 1.0 and base is not None and base.has_head(student.num_classes, student.head_width):
            self._parts = [(part, part.clone(), part.clone()) for part, _ in self._pairs]
            self._pairs = [(mean, value) for (_, _, mean), (_, value) in zip(self._parts, self._pairs, strict=True)]
        self._horizon = max(_MIN_HORIZON, math.ceil(len(weight) / config.batch_size))
        parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)
        self._edges = edges
        self._diverged_loss = diverged_loss

    @abstractmethod
    def evaluate(self, examples: Any, stepper: Stepper | None = None) -> tuple[float, float]:
        """(accuracy, loss) of ``average`` on ``examples``, as the task measures them."""

    def remember(self, validation: Any, stepper: Stepper) -> bool:
        """What has to be worked out once of what every epoch is measured on. True: a stop was requested."""
        return False

    def prepare(self, stepper: Stepper) -> bool:
        """What has to be worked out once of the training examples. True: a stop was requested before its end."""
        return False

    @abstractmethod
    def group_loss(self, group: Tensor, edge: int) -> Tensor:
        """Mean loss of the examples with these indices, looked at with ``edge``; a scalar."""

    def epoch(self, stepper: Stepper) -> bool:
        """Train one pass. True when a stop was requested before its end. Raises DivergedError."""
        self._student.train()
        order = self._draw.choice(len(self._weight), size=len(self._weight), p=self._weight)
        for picked in even_batches(order, self._batch_size):
            self.batch(torch.from_numpy(picked))
            if stepper.step():
                return True
        with torch.no_grad():
            for part, start, mean in self._parts:
                torch.lerp(start, mean, self.way, out=part)
        return False

    def batch(self, picked: Tensor) -> float:
        """One optimiser step on the examples with these indices; returns the mean loss."""
        picked = picked.to(self._device.torch_device)
        num_groups = max(1, min(len(self._edges), len(picked) // _MIN_GROUP))
        self._optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for position, group in enumerate(torch.tensor_split(picked, num_groups)):
            # Batches too small for all scales take turns, so that none is left out.
            edge = self._edges[(position + self._num_batches * (num_groups < len(self._edges))) % len(self._edges)]
            loss = self.group_loss(group, edge) * (len(group) / len(picked))
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if not math.isfinite(total) or total > self._diverged_loss:
            raise DivergedError(f"loss {total:g} after {self._num_batches} steps; lower the learning rate")
        self._optimizer.step()
        self._num_batches += 1
        # The first batches count for more, or the mean would lag behind by the weights it started from.
        pace = max(1.0 / self._horizon, 9.0 / (10.0 + self._num_batches))
        with torch.no_grad():
            for mean, value in self._pairs:
                mean.lerp_(value, pace)
        return total

    def gain(self, count: int) -> Tensor:
        """Random brightness per example, float (count, 1, 1, 1) on the device."""
        return self._factors(self._draw.uniform(1.0 - _BRIGHTNESS, 1.0 + _BRIGHTNESS, count))

    def _factors(self, factors: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(factors.astype(np.float32)).to(self._device.torch_device).view(-1, 1, 1, 1)

    def mirrored(self) -> bool:
        """Whether this group is looked at in the mirror."""
        return bool(self._draw.random() < 0.5)


class CropTrainer(Trainer):
    """Trains a classifier on ``crops``.

    Crops are drawn with weight 1/sqrt(crops of their class): between the stream's own class mix, which serving wants,
    and equal classes, which keeps the rare ones alive.
    """

    way = _WAY

    def __init__(
        self, student: Student, base: Student | None, config: RetrainConfig, crops: CropSet, device: Device, seed: int
    ) -> None:
        self._crops = torch.from_numpy(crops.crops).to(device.torch_device)
        self._labels = torch.from_numpy(crops.labels).to(device.torch_device)
        counts = np.bincount(crops.labels)
        edge, least = crops.crops.shape[1], max(_MIN_EDGE, int(getattr(student, "min_px", _MIN_EDGE)))
        edges = tuple(max(least, round(scale * edge)) for scale in _SCALES)
        diverged_loss = _DIVERGED_LOSS * math.log(max(2, student.num_classes))
        weight = 1.0 / np.sqrt(counts[crops.labels])
        super().__init__(student, base, config, weight, edges, diverged_loss, device, seed)

    def evaluate(self, examples: CropSet, stepper: Stepper | None = None) -> tuple[float, float]:
        return evaluate(self.average, examples, self._device, stepper)

    def group_loss(self, group: Tensor, edge: int) -> Tensor:
        logits = self._student(self._augmented(self._crops[group], edge))
        return nn.functional.cross_entropy(logits, self._labels[group])

    def _augmented(self, crops: Tensor, edge: int) -> Tensor:
        """Scaled to ``edge``, light and contrast changed per crop, half of the groups mirrored.

        Float (n, edge, edge, 3).
        """
        x = crops.permute(0, 3, 1, 2).float()
        if edge != crops.shape[1]:
            x = nn.functional.interpolate(x, size=(edge, edge), mode="area")
        x = x * self._factors(np.exp(self._draw.uniform(-1.0, 1.0, len(x)) * math.log(_CROP_BRIGHTNESS)))
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        contrast = self._factors(self._draw.uniform(1.0 - _CROP_CONTRAST, 1.0 + _CROP_CONTRAST, len(x)))
        x = torch.lerp(mean, x, contrast).clamp_(0.0, 255.0)
        if self.mirrored():
            x = x.flip(3)
        return x.permute(0, 2, 3, 1)


class HeadTrainer(CropTrainer):
    """Trains the head alone: what the frozen blocks make of a crop is worked out once and kept.

    Every crop is looked at with one edge, in one brightness and one mirroring, drawn once; over many crops all of them
    are seen. That is what a head needs, which has few weights, and an epoch costs next to nothing.
    """

    def __init__(
        self, student: Student, base: Student | None, config: RetrainConfig, crops: CropSet, device: Device, seed: int
    ) -> None:
        super().__init__(student, base, config, crops, device, seed)
        self._features = torch.zeros(0)
        self._known: tuple[CropSet, Tensor] | None = None
        self._looks = self._edges
        self._edges = self._edges[:1]  # batches are not cut into groups: there is nothing left to scale

    def prepare(self, stepper: Stepper) -> bool:
        self._student.eval()
        order = torch.from_numpy(self._draw.permutation(len(self._crops)))
        found = torch.zeros(len(order), self._classifier.feature_width, device=self._device.torch_device)
        for part, edge in zip(torch.tensor_split(order, len(self._looks)), self._looks, strict=True):
            for group in torch.split(part.to(self._device.torch_device), _VALIDATION_BATCH):
                with torch.no_grad():
                    found[group] = self._classifier.features(self._augmented(self._crops[group], edge))
                if stepper.step():
                    return True
        self._features = found
        return False

    def remember(self, validation: CropSet, stepper: Stepper) -> bool:
        parts = []
        self._student.eval()
        for start in range(0, len(validation), _VALIDATION_BATCH):
            batch = torch.from_numpy(validation.crops[start : start + _VALIDATION_BATCH])
            with torch.inference_mode():
                parts.append(self._classifier.features(batch.to(self._device.torch_device)))
            if stepper.step():
                return True
        self._known = (validation, torch.cat(parts)) if parts else None
        return False

    def evaluate(self, examples: CropSet, stepper: Stepper | None = None) -> tuple[float, float]:
        if self._known is None or self._known[0] is not examples:
            return super().evaluate(examples, stepper)
        with torch.inference_mode():
            logits = self.average.head(self._known[1])
            labels = torch.from_numpy(examples.labels).to(self._device.torch_device)
            loss = float(nn.functional.cross_entropy(logits, labels))
            return float((logits.argmax(1) == labels).float().mean()), loss

    def group_loss(self, group: Tensor, edge: int) -> Tensor:
        del edge
        if len(self._features) == 0:
            raise RuntimeError("prepare() comes before the first epoch")
        return nn.functional.cross_entropy(self._student.head(self._features[group]), self._labels[group])

    @property
    def _classifier(self) -> Classifier:
        assert isinstance(self._student, Classifier)
        return self._student


def crop_trainer(
    student: Student, base: Student | None, config: RetrainConfig, crops: CropSet, device: Device, seed: int
) -> CropTrainer:
    """What trains this student: with every block frozen there is a much cheaper way."""
    frozen = not any(parameter.requires_grad for parameter in student.blocks.parameters())
    kind = HeadTrainer if frozen and isinstance(student, Classifier) else CropTrainer
    return kind(student, base, config, crops, device, seed)


def _moving(average: Student, student: Student) -> list[tuple[Tensor, Tensor]]:
    """(mean, value) of everything that training changes: trained weights, statistics of trained blocks."""
    mean, value = average.state_dict(), student.state_dict()
    return [
        (mean[name], value[name])
        for name in sorted(student.moving())
        if name in value and value[name].is_floating_point()
    ]
