"""Labelled crops of one stream and window: one safetensors file, its digest inside.

Training and validation crops come from different *blocks of time*. Neighbouring frames show the same objects,
so a random split would measure memory instead of accuracy.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from executor.learning.files import inside, write_atomically
from protocol.errors import InputError
from protocol.schema import DatasetRef

VALIDATION_SHARE = 0.25
NUM_BLOCKS = 8  # two of them validate: the middle and the end of the window, the end being nearest to what comes


class Examples(Protocol):
    """Labelled things to learn from; what they are is the task's business (see executor.learning.task).

    ``frame_index`` int64 (N,); ``is_validation`` and ``is_exemplar`` bool (N,). Exemplars always train. ``weight``
    float32 (N,): how many frames of the labelled stretch the one that it came from stands for, up to a factor.
    ``stretch`` int64 (N,): first frame of the stretch in which it was labelled, which tells conditions apart.
    """

    @property
    def frame_index(self) -> NDArray[np.int64]: ...
    @property
    def weight(self) -> NDArray[np.float32]: ...
    @property
    def stretch(self) -> NDArray[np.int64]: ...
    @property
    def is_validation(self) -> NDArray[np.bool_]: ...
    @property
    def is_exemplar(self) -> NDArray[np.bool_]: ...
    @property
    def train(self) -> Self:
        """The training split, exemplars included."""
        ...

    @property
    def validation(self) -> Self:
        """The held-out split."""
        ...

    @property
    def pictures(self) -> NDArray[np.uint8]:
        """The examples as pictures, (N, h, w, 3)."""
        ...

    def __len__(self) -> int: ...
    def take(self, mask: NDArray[np.bool_] | NDArray[np.int64]) -> Self:
        """The examples that a mask or an index array picks."""
        ...

    def split(self, held_out: NDArray[np.bool_]) -> Self:
        """The same examples, those of the mask for validation and the others for training."""
        ...

    def weighted(self, weight: NDArray[np.float32]) -> Self:
        """The same examples with these weights (N,)."""
        ...

    def labelled_in(self, stretch: int) -> Self:
        """The same examples, all of them labelled in this stretch."""
        ...

    def class_counts(self, num_classes: int) -> tuple[int, ...]:
        """Labelled objects per class."""
        ...

    def tensors(self) -> dict[str, NDArray[Any]]:
        """What a file holds of it, by name."""
        ...

    @classmethod
    def from_tensors(cls, tensors: dict[str, NDArray[Any]]) -> Self:
        """The set that :meth:`tensors` describes. Raises KeyError when one is missing."""
        ...


E = TypeVar("E", bound=Examples)


@dataclass(frozen=True)
class CropSet:
    """N labelled crops. ``crops`` uint8 (N, px, px, 3), ``labels`` int64 (N,) indices into the stream's classes,
    ``frame_index`` int64 (N,), ``is_validation`` and ``is_exemplar`` bool (N,). Exemplars always train. ``boxes``
    float32 (N, 4): where in the frame each was, NaN where that is not known. ``weight`` float32 (N,) and ``stretch``
    int64 (N,), 0 where that is not known: see Examples."""

    crops: NDArray[np.uint8]
    labels: NDArray[np.int64]
    frame_index: NDArray[np.int64]
    is_validation: NDArray[np.bool_]
    is_exemplar: NDArray[np.bool_]
    boxes: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    weight: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    stretch: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        if len(self.stretch) != len(self.labels):
            object.__setattr__(self, "stretch", np.zeros(len(self.labels), np.int64))
        if len(self.boxes) != len(self.labels):
            object.__setattr__(self, "boxes", np.full((len(self.labels), 4), np.nan, np.float32))
        if len(self.weight) != len(self.labels):
            object.__setattr__(self, "weight", np.ones(len(self.labels), np.float32))

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, mask: NDArray[np.bool_] | NDArray[np.int64]) -> CropSet:
        """The crops that a mask or an index array picks."""
        return CropSet(
            self.crops[mask],
            self.labels[mask],
            self.frame_index[mask],
            self.is_validation[mask],
            self.is_exemplar[mask],
            self.boxes[mask],
            self.weight[mask],
            self.stretch[mask],
        )

    @property
    def train(self) -> CropSet:
        """The training split, exemplars included."""
        return self.take(~self.is_validation)

    @property
    def validation(self) -> CropSet:
        """The held-out split."""
        return self.take(self.is_validation)

    @property
    def pictures(self) -> NDArray[np.uint8]:
        """The crops."""
        return self.crops

    def split(self, held_out: NDArray[np.bool_]) -> CropSet:
        """The same crops, those of the mask for validation and the others for training."""
        return replace(self, is_validation=held_out)

    def weighted(self, weight: NDArray[np.float32]) -> CropSet:
        """The same crops with these weights."""
        return replace(self, weight=weight)

    def labelled_in(self, stretch: int) -> CropSet:
        """The same crops, all of them labelled in this stretch."""
        return replace(self, stretch=np.full(len(self), stretch, np.int64))

    def class_counts(self, num_classes: int) -> tuple[int, ...]:
        """Crops per class."""
        return tuple(int(count) for count in np.bincount(self.labels, minlength=num_classes))

    def tensors(self) -> dict[str, NDArray[Any]]:
        """What a file holds of it, by name."""
        return {
            "crops": self.crops,
            "labels": self.labels,
            "frame_index": self.frame_index,
            "is_validation": self.is_validation.astype(np.uint8),
            "is_exemplar": self.is_exemplar.astype(np.uint8),
            "boxes": self.boxes,
            "weight": self.weight,
            "stretch": self.stretch,
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, NDArray[Any]]) -> CropSet:
        """The set that :meth:`tensors` describes."""
        return cls(
            tensors["crops"],
            tensors["labels"],
            tensors["frame_index"],
            tensors["is_validation"].astype(np.bool_),
            tensors["is_exemplar"].astype(np.bool_),
            # Files of earlier releases do not say where a crop was, how its frame was drawn, nor when it was labelled.
            tensors.get("boxes", np.zeros((0, 4), np.float32)),
            tensors.get("weight", np.zeros(0, np.float32)),
            tensors.get("stretch", np.zeros(0, np.int64)),
        )


def empty(crop_px: int) -> CropSet:
    """A set of no crops."""
    none = np.zeros(0, np.int64)
    flags = np.zeros(0, np.bool_)
    return CropSet(np.zeros((0, crop_px, crop_px, 3), np.uint8), none, none, flags, flags)


def concatenate(parts: list[CropSet]) -> CropSet:
    """One set of several with the same crop edge."""
    return CropSet(
        np.concatenate([part.crops for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.frame_index for part in parts]),
        np.concatenate([part.is_validation for part in parts]),
        np.concatenate([part.is_exemplar for part in parts]),
        np.concatenate([part.boxes for part in parts]),
        np.concatenate([part.weight for part in parts]),
        np.concatenate([part.stretch for part in parts]),
    )


def validation_frames(frames: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which of the labelled ``frames`` (any order, repeats allowed) are held out: whole blocks of time.

    About a quarter; two frames or more always leave at least one on either side.
    """
    ordered = np.unique(frames)
    if len(ordered) < 2:
        return ordered[:0]
    if len(ordered) < NUM_BLOCKS:
        return ordered[-max(1, round(VALIDATION_SHARE * len(ordered))) :]
    block = np.arange(len(ordered)) * NUM_BLOCKS // len(ordered)
    return ordered[is_held_out_block(block)]


def is_held_out_block(block: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of the blocks of time (0 .. NUM_BLOCKS - 1) are held out."""
    held_out: NDArray[np.bool_] = (block + 1) % round(1 / VALIDATION_SHARE) == 0
    return held_out


def frame_mean(
    right: NDArray[np.bool_], frame_index: NDArray[np.int64], weight: NDArray[np.float32] | None = None
) -> float:
    """Share of a frame's crops that are ``right`` (n,), mean over frames (the measure of serving); 0 of no crops.

    ``weight`` (n,): of each crop's frame, None = all the same. With the weights of :mod:`executor.learning.sampling`
    this estimates the mean over all frames of the stretch, however the frames were drawn (Hajek's estimator: its bias
    is small beside its error).
    """
    if len(right) == 0:
        return 0.0
    _, first, frame, size = np.unique(frame_index, return_index=True, return_inverse=True, return_counts=True)
    each = np.bincount(frame, weights=right) / size
    return float(np.average(each, weights=None if weight is None else weight[first]))


def evenness(examples: Examples) -> float:
    """What frames of unequal weight are worth beside as many of equal weight, 0..1 (Kish, 1965); 1 of none."""
    _, first = np.unique(examples.frame_index, return_index=True)
    weight = examples.weight[first].astype(np.float64)
    return float(weight.sum() ** 2 / (len(weight) * (weight**2).sum())) if len(weight) else 1.0


def save(
    store: Path,
    examples: Examples,
    *,
    stream_id: str,
    window: int,
    classes: tuple[str, ...],
    label_s_per_frame: float = 0.0,
) -> DatasetRef:
    """Write the data set of a window, whole or not at all. Raises InputError when it cannot be written."""
    relative = f"datasets/{stream_id}/w{window:06d}.safetensors"
    path = inside(store, relative)
    if path is None:
        raise InputError(f'stream id "{stream_id}" leads out of the store {store}')
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in examples.tensors().items()}
    metadata = {"format": "ekya-dataset/1", "classes": ",".join(classes), "sha256": _digest(tensors)}
    try:
        write_atomically(path, safetensors.numpy.save(tensors, metadata=metadata))
    except OSError as error:
        raise InputError(f"data set {path}: cannot be written: {error}") from error
    num_validation = int(examples.is_validation.sum())
    return DatasetRef(
        path=relative,
        stream_id=stream_id,
        window=window,
        num_train=len(examples) - num_validation,
        num_validation=num_validation,
        class_counts=examples.class_counts(len(classes)),
        label_s_per_frame=label_s_per_frame,
    )


def load(store: Path, ref: DatasetRef, classes: tuple[str, ...]) -> CropSet:
    """The crops of ``ref``. Raises InputError as :func:`read` does."""
    return read(CropSet, store, ref, classes)


def read(kind: type[E], store: Path, ref: DatasetRef, classes: tuple[str, ...]) -> E:
    """The data set of ``ref``, examples of this kind.

    Raises InputError when it is missing, damaged, of another kind or of other classes than ``classes``.
    """
    path = inside(store, ref.path)
    if path is None:
        raise InputError(f"data set {ref.path}: leads out of the store {store}")
    tensors: dict[str, Any]
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"data set {path}: cannot be read ({error}); label the window again") from error
    if metadata.get("classes") != ",".join(classes):
        raise InputError(f"data set {path}: its classes are {metadata.get('classes')}, not {','.join(classes)}")
    if metadata.get("sha256") != _digest(tensors):
        raise InputError(f"data set {path}: damaged, its digest differs; label the window again")
    try:
        return kind.from_tensors(tensors)
    except KeyError as error:
        raise InputError(f"data set {path}: holds no {error}; it was made for another task") from error


def _digest(tensors: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tensor.shape};".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()
