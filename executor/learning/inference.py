"""Serving a stream: analyse the frames that the configuration asks for, carry the result over to the others.

A frame that was skipped or dropped is judged by the last result, so that sampling costs what it really costs.
Accuracy of a frame for classification = share of its objects with the right class, the classes carried over by
box overlap; for detection see executor/learning/matching.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from executor.learning.device import Device
from executor.learning.models import Student
from executor.streams.frames import Frame
from protocol.schema import InferenceConfig

# Least overlap (intersection over union) at which two boxes of different frames are taken for one object;
# the usual value of box trackers (SORT, Bewley et al., ICIP 2016).
MIN_OVERLAP = 0.3


@dataclass(frozen=True)
class Objects:
    """What was found in a frame: ``boxes`` float32 (n, 4) x0, y0, x1, y1 in pixels, ``labels`` int64 (n,).

    ``scores`` float32 (n,) 0..1: how sure the model is of each; None where nobody knows. ``look`` float32 (4,): mean
    red, green and blue of the crops and the spread of their brightness, 0..1; None without crops.
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    scores: NDArray[np.float32] | None = None
    look: NDArray[np.float32] | None = None


class Analyser(Protocol):
    """A model with all that is needed to look at a frame. A detector returns boxes of its own."""

    version: int

    def analyse(self, frame: Frame, resolution_px: int) -> Objects:
        """The objects of a frame, looked at with ``resolution_px``."""
        ...

    def warm_up(self, resolution_px: int) -> None:
        """Run once at this resolution, so that the first frame does not pay for set-up."""
        ...


# (result that holds, the frame's true boxes (n, 4) and labels (n,)) -> accuracy of the frame, None: nothing to score.
Judge = Callable[["Objects | None", NDArray[np.float32], NDArray[np.int64]], float | None]


class CropClassifier:
    """Classifies the crops at the frame's own boxes, all objects of a frame in one batch."""

    def __init__(self, student: Student, device: Device, version: int) -> None:
        self.version = version
        self._student = student.eval().to(device.torch_device)
        self._torch_device = device.torch_device
        self._min_px = int(getattr(student, "min_px", 0))  # some families need more than is asked for

    def analyse(self, frame: Frame, resolution_px: int) -> Objects:
        if len(frame.boxes) == 0:
            return Objects(frame.boxes, np.zeros(0, np.int64))
        crops = frame.crops(max(resolution_px, self._min_px))
        labels, scores = self.classify(crops)
        return Objects(frame.boxes, labels, scores, look_of(crops))

    def classify(self, crops: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(classes int64, beliefs in them float32), both (n,), of uint8 crops (n, px, px, 3)."""
        with torch.inference_mode():
            logits = self._student(torch.from_numpy(crops).to(self._torch_device))
            scores, labels = logits.softmax(1).max(1)
        return labels.cpu().numpy(), scores.cpu().numpy()

    def warm_up(self, resolution_px: int) -> None:
        """Run once at this resolution, so that the first frame does not pay for set-up."""
        px = max(resolution_px, self._min_px)
        self.classify(np.zeros((4, px, px, 3), np.uint8))


def look_of(crops: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What crops (n, px, px, 3) look like, float32 (4,): mean red, green, blue; spread of brightness over pixels."""
    # Every fourth row and column says the same at a sixteenth of the price.
    pixels = crops[:, ::4, ::4].astype(np.float32) / 255.0
    return np.append(pixels.mean((0, 1, 2)), pixels.mean(3).std()).astype(np.float32)


def overlaps(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Intersection over union of boxes (n, 4) and (m, 4): float32 (n, m)."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.prod(np.clip(high - low, 0.0, None), axis=2)
    area_a = np.prod(np.clip(a[:, 2:] - a[:, :2], 0.0, None), axis=1)
    area_b = np.prod(np.clip(b[:, 2:] - b[:, :2], 0.0, None), axis=1)
    union = area_a[:, None] + area_b[None, :] - shared
    overlap: NDArray[np.float32] = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0.0)
    return overlap


def carry_over(last: Objects | None, boxes: NDArray[np.float32]) -> NDArray[np.int64]:
    """Labels for ``boxes`` (n, 4) from an earlier result, each of its objects used once; -1 where none overlaps."""
    labels = np.full(len(boxes), -1, np.int64)
    if last is None or len(last.labels) == 0 or len(boxes) == 0:
        return labels
    overlap = overlaps(boxes, last.boxes)
    for _ in range(min(overlap.shape)):
        here, there = np.unravel_index(int(overlap.argmax()), overlap.shape)
        if overlap[here, there] < MIN_OVERLAP:
            break
        labels[here] = last.labels[there]
        overlap[here, :] = -1.0
        overlap[:, there] = -1.0
    return labels


def frame_accuracy(found: NDArray[np.int64], truth: NDArray[np.int64]) -> float | None:
    """Share of objects with the right class; None for a frame without objects, which is not scored."""
    return None if len(truth) == 0 else float((found == truth).mean())


def classified_right(found: Objects | None, boxes: NDArray[np.float32], labels: NDArray[np.int64]) -> float | None:
    """The judge of classification: classes carried over from ``found`` to the true boxes."""
    if found is not None and found.boxes is boxes:
        return frame_accuracy(found.labels, labels)  # classified at the frame's own boxes: nothing to match
    return frame_accuracy(carry_over(found, boxes), labels)


@dataclass(frozen=True)
class Outcome:
    """What became of one frame. ``accuracy`` None: nothing to score. ``found``: by looking at this very frame."""

    analysed: bool
    num_objects: int
    accuracy: float | None
    found: Objects | None = None


class InferenceEngine:
    """The serving state of one stream: model, configuration and the last result."""

    def __init__(self, analyser: Analyser, config: InferenceConfig, judge: Judge = classified_right) -> None:
        self.analyser = analyser
        self.config = config
        self._judge = judge
        self._last: Objects | None = None
        self._seen: int | None = None

    def is_due(self, index: int) -> bool:
        """Whether the configuration asks for this frame to be analysed.

        One in ``frame_interval``; when a live stream has lost the very frame, the next one is analysed in its place.
        """
        interval = self.config.frame_interval
        return index % interval == 0 or (self._seen is not None and index // interval > self._seen // interval)

    def process(self, frame: Frame, *, dropped: bool = False) -> Outcome:
        """Analyse the frame when it is due; judge it by the result that then holds."""
        analysed = not dropped and self.is_due(frame.index)
        self._seen = frame.index
        if analysed:
            self._last = self.analyser.analyse(frame, self.config.resolution_px)
        accuracy = self._judge(self._last, frame.boxes, frame.labels)
        return Outcome(analysed, len(frame.labels), accuracy, self._last if analysed else None)
