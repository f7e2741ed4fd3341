"""Labelled whole frames, scaled down: what a detector learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from executor.learning.inference import Objects
from executor.learning.memory import Features, choose

_EMBEDDING = (6, 8)
# What a frame takes besides its pixels (frame, stretch, two flags, weight), and an object (box, class, its frame).
_BYTES_BESIDE, _BYTES_OF_OBJECT = 2 * 8 + 2 + 4, 16 + 2 * 8


@dataclass(frozen=True)
class FrameSet:
    """N frames with M labelled objects.

    ``frames`` uint8 (N, h, w, 3), smaller ones padded with black at the right and the bottom; ``boxes`` float32 (M, 4)
    x0, y0, x1, y1 in pixels of ``frames``; ``labels`` int64 (M,) indices into the stream's classes; ``owner`` int64
    (M,) the object's frame, ascending; ``frame_index`` int64 (N,); ``is_validation`` and ``is_exemplar`` bool (N,);
    ``weight`` float32 (N,) and ``stretch`` int64 (N,), 0 where that is not known: see executor.learning.datasets.
    """

    frames: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    owner: NDArray[np.int64]
    frame_index: NDArray[np.int64]
    is_validation: NDArray[np.bool_]
    is_exemplar: NDArray[np.bool_]
    weight: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    stretch: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        if len(self.weight) != len(self.frame_index):
            object.__setattr__(self, "weight", np.ones(len(self.frame_index), np.float32))
        if len(self.stretch) != len(self.frame_index):
            object.__setattr__(self, "stretch", np.zeros(len(self.frame_index), np.int64))

    def __len__(self) -> int:
        return len(self.frame_index)

    def take(self, mask: NDArray[np.bool_] | NDArray[np.int64]) -> FrameSet:
        """The frames that a mask or an index array picks, in its order, with their objects."""
        picked = np.flatnonzero(mask) if mask.dtype == np.bool_ else np.asarray(mask, np.int64)
        first = np.searchsorted(self.owner, np.arange(len(self) + 1))
        objects = [np.arange(first[number], first[number + 1]) for number in picked]
        chosen = np.concatenate([np.zeros(0, np.int64), *objects])
        owner = np.repeat(np.arange(len(picked)), [len(part) for part in objects])
        return FrameSet(
            self.frames[picked],
            self.boxes[chosen],
            self.labels[chosen],
            owner.astype(np.int64),
            self.frame_index[picked],
            self.is_validation[picked],
            self.is_exemplar[picked],
            self.weight[picked],
            self.stretch[picked],
        )

    @property
    def train(self) -> FrameSet:
        """The training split, exemplars included."""
        return self.take(~self.is_validation)

    @property
    def validation(self) -> FrameSet:
        """The held-out split."""
        return self.take(self.is_validation)

    @property
    def pictures(self) -> NDArray[np.uint8]:
        """The frames."""
        return self.frames

    def split(self, held_out: NDArray[np.bool_]) -> FrameSet:
        """The same frames, those of the mask for validation and the others for training."""
        return replace(self, is_validation=held_out)

    def weighted(self, weight: NDArray[np.float32]) -> FrameSet:
        """The same frames with these weights."""
        return replace(self, weight=weight)

    def labelled_in(self, stretch: int) -> FrameSet:
        """The same frames, all of them labelled in this stretch."""
        return replace(self, stretch=np.full(len(self), stretch, np.int64))

    def objects(self, number: int) -> Objects:
        """The true objects of a frame."""
        low, high = np.searchsorted(self.owner, [number, number + 1])
        return Objects(self.boxes[low:high], self.labels[low:high])

    def class_counts(self, num_classes: int) -> tuple[int, ...]:
        """Labelled objects per class."""
        return tuple(int(count) for count in np.bincount(self.labels, minlength=num_classes))

    def tensors(self) -> dict[str, NDArray[Any]]:
        """What a file holds of it, by name."""
        return {
            "frames": self.frames,
            "boxes": self.boxes,
            "labels": self.labels,
            "owner": self.owner,
            "frame_index": self.frame_index,
            "is_validation": self.is_validation.astype(np.uint8),
            "is_exemplar": self.is_exemplar.astype(np.uint8),
            "weight": self.weight,
            "stretch": self.stretch,
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, NDArray[Any]]) -> FrameSet:
        """The set that :meth:`tensors` describes. Raises KeyError when one is missing."""
        return cls(
            tensors["frames"],
            tensors["boxes"],
            tensors["labels"],
            tensors["owner"],
            tensors["frame_index"],
            tensors["is_validation"].astype(np.bool_),
            tensors["is_exemplar"].astype(np.bool_),
            tensors.get("weight", np.zeros(0, np.float32)),
            tensors.get("stretch", np.zeros(0, np.int64)),  # files of earlier releases hold none
        )


def scaled(picture: NDArray[np.uint8], edge: int) -> tuple[NDArray[np.uint8], float]:
    """A picture (h, w, 3) with its longer edge at ``edge``, and the factor: area mean downwards, bilinear upwards."""
    height, width = picture.shape[:2]
    factor = edge / max(height, width)
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    if size == (height, width):
        return picture, 1.0
    planes = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float()
    result: NDArray[np.uint8] = resized(planes, size)[0].round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return result, factor


def resized(planes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Float (n, 3, h, w) at another size: area mean downwards, bilinear upwards."""
    if tuple(planes.shape[2:]) == size:
        return planes
    if size[0] <= planes.shape[2] and size[1] <= planes.shape[3]:
        return functional.adaptive_avg_pool2d(planes, size)
    return functional.interpolate(planes, size=size, mode="bilinear", align_corners=False)


def one_frame(picture: NDArray[np.uint8], found: Objects, index: int, edge: int) -> FrameSet:
    """A set of one frame, scaled to ``edge``. Frames without objects are kept: what is not there is news too."""
    small, factor = scaled(picture, edge)
    count = len(found.labels)
    return FrameSet(
        small[None],
        (found.boxes * np.float32(factor)).reshape(-1, 4),
        found.labels,
        np.zeros(count, np.int64),
        np.array([index], np.int64),
        np.zeros(1, np.bool_),
        np.zeros(1, np.bool_),
    )


def join(parts: Sequence[FrameSet], edge: int) -> FrameSet:
    """One set of several; frames of another edge are scaled to ``edge``, then padded to one size."""
    parts = [_at_edge(part, edge) for part in parts if len(part)]
    if not parts:
        none, flags = np.zeros(0, np.int64), np.zeros(0, np.bool_)
        return FrameSet(
            np.zeros((0, edge, edge, 3), np.uint8), np.zeros((0, 4), np.float32), none, none, none, flags, flags
        )
    height = max(part.frames.shape[1] for part in parts)
    width = max(part.frames.shape[2] for part in parts)
    frames = np.zeros((sum(map(len, parts)), height, width, 3), np.uint8)
    starts = np.cumsum([0] + [len(part) for part in parts])
    for part, start in zip(parts, starts, strict=False):
        frames[start : start + len(part), : part.frames.shape[1], : part.frames.shape[2]] = part.frames
    return FrameSet(
        frames,
        np.concatenate([part.boxes for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.owner + start for part, start in zip(parts, starts, strict=False)]),
        np.concatenate([part.frame_index for part in parts]),
        np.concatenate([part.is_validation for part in parts]),
        np.concatenate([part.is_exemplar for part in parts]),
        np.concatenate([part.weight for part in parts]),
        np.concatenate([part.stretch for part in parts]),
    )


def _at_edge(part: FrameSet, edge: int) -> FrameSet:
    height, width = part.frames.shape[1:3]
    if max(height, width) == edge:
        return part
    pictures = [scaled(frame, edge)[0] for frame in part.frames]
    return replace(part, frames=np.stack(pictures), boxes=part.boxes * np.float32(edge / max(height, width)))


def exemplars(previous: FrameSet, max_bytes: int, edge: int) -> FrameSet:
    """The memory to carry over: frames of ``edge`` that take at most ``max_bytes``, chosen by executor.learning.memory.

    A frame stands for the rarest class that it shows; frames without objects are not kept.
    """
    counts = np.bincount(previous.labels)
    rarest = np.full(len(previous), -1, np.int64)
    # The most frequent class first, so that rarer ones overwrite it.
    for label in sorted(np.unique(previous.labels), key=lambda label: -counts[label]):
        rarest[previous.owner[previous.labels == label]] = label
    shown = np.flatnonzero(rarest >= 0)
    if len(shown) == 0:
        return join([], edge)
    objects = np.bincount(previous.owner, minlength=len(previous))
    height, width = previous.frames.shape[1:3]
    factor = edge / max(height, width)
    pixels = 3 * max(1, round(height * factor)) * max(1, round(width * factor))
    size = max_bytes // int(pixels + _BYTES_BESIDE + _BYTES_OF_OBJECT * objects.max())
    picked = shown[choose(rarest[shown], previous.stretch[shown], _layout(previous.frames[shown]), size)]
    memory = previous.take(picked)
    count = len(memory)
    memory = replace(memory, is_validation=np.zeros(count, np.bool_), is_exemplar=np.ones(count, np.bool_))
    return join([memory], edge)


def subset(examples: FrameSet, size: int, seed: int) -> FrameSet:
    """``size`` frames, or few more so that every class is seen, fixed by ``seed``."""
    if size >= len(examples):
        return examples
    order = np.random.default_rng(seed).permutation(len(examples))
    picked = set(order[:size].tolist())
    rank = np.argsort(order)
    for label in np.unique(examples.labels):
        members = np.unique(examples.owner[examples.labels == label])
        if not picked & set(members.tolist()):
            picked.add(int(members[rank[members].argmin()]))
    return examples.take(np.array(sorted(picked), np.int64))


def _layout(frames: NDArray[np.uint8]) -> Features:
    planes = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    small = functional.adaptive_avg_pool2d(planes, _EMBEDDING)
    return small.reshape(len(frames), -1).numpy().astype(np.float32) / 255.0
