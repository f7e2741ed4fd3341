"""Golden models: what labels are taken for. One interface for the oracle and for torchvision's models.

A detection model finds boxes of its own, so it labels any source, one without truth included. A classification
model names what is in the source's boxes. The class ids of a published model are mapped to the site's classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor, nn

from executor.learning.device import Device
from executor.learning.stepping import Stepper
from executor.learning.weights import fill, read_state
from executor.streams.frames import Frame
from protocol.errors import InputError
from protocol.schema import OracleGolden, RecordedSource, StreamSpec, TorchvisionGolden

_SLICE_S = 0.005  # of device time between two chances to rest or stop
_NUM_PUBLISHED = {"detection": 91, "classification": 1000}
# Two boxes of one site class that overlap by more are one object: models know finer classes than a site does.
_SAME_OBJECT = 0.5
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_CROP_PX = 224


@dataclass(frozen=True)
class Labels:
    """What a golden model says of a frame, n objects.

    ``boxes`` float32 (n, 4) x0, y0, x1, y1 in pixels of the frame; ``labels`` int64 (n,) indices into the stream's
    classes; ``scores`` float32 (n,) 0..1; ``ids`` int64 (n,) the category ids that sample lists carry.
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    scores: NDArray[np.float32]
    ids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


class Golden(Protocol):
    """A golden model, ready to label. Not shared between threads."""

    def label(self, frame: Frame) -> Labels | None:
        """The objects of a frame; None when a stop was requested before the model was through with it."""
        ...


def open_golden(stream: StreamSpec, device: Device, stepper: Stepper, seed: int) -> Golden:
    """The golden model of a stream, on the device. ``seed`` fixes the oracle's errors.

    Raises InputError naming field or file: an unknown model, weights that are missing, damaged or of another
    model, a class map that maps nothing.
    """
    try:
        if isinstance(stream.golden, OracleGolden):
            return _Oracle(stream, stream.golden, device, stepper, seed)
        if stream.golden.model in torchvision.models.list_models(module=torchvision.models.detection):
            return DetectionGolden(stream.golden, stream.classes, device)
        return ClassificationGolden(stream.golden, stream.classes, device)
    except InputError as error:
        raise InputError(f"stream {stream.stream_id}: {error}") from error


def oracle_labels(
    truth: NDArray[np.int64], error_rate: float, num_classes: int, seed: int, frame_index: int
) -> NDArray[np.int64]:
    """``truth`` (n,) with each label replaced by a wrong class with probability ``error_rate``.

    Deterministic in (seed, frame index), whatever other frames are labelled.
    """
    draw = np.random.default_rng([seed, frame_index & 0xFFFFFFFF, 1 if frame_index < 0 else 0])
    wrong = draw.random(len(truth)) < error_rate
    shift = draw.integers(1, num_classes, len(truth))
    return np.where(wrong, (truth + shift) % num_classes, truth).astype(np.int64)


def burn(device: Device, seconds: float, stepper: Stepper) -> bool:
    """Keep the device busy for ``seconds`` of device time. True when a stop was requested meanwhile."""
    work = torch.ones(64, 64, device=device.torch_device)
    until = stepper.busy_s() + seconds
    while (left := until - stepper.busy_s()) > 0.0:
        slice_end = stepper.busy_s() + min(_SLICE_S, left)
        while stepper.busy_s() < slice_end:
            work = torch.clamp(work @ work, max=1.0)
        if stepper.step():
            return True
    return False


class _Oracle:
    """Reads the source's truth, errs at its rate, and burns what a large model would cost."""

    def __init__(self, stream: StreamSpec, golden: OracleGolden, device: Device, stepper: Stepper, seed: int) -> None:
        self._golden, self._device, self._stepper, self._seed = golden, device, stepper, seed
        self._num_classes = len(stream.classes)
        self._ids = _ids_of(stream)

    def label(self, frame: Frame) -> Labels | None:
        if burn(self._device, self._golden.seconds_per_frame, self._stepper):
            return None
        labels = oracle_labels(frame.labels, self._golden.error_rate, self._num_classes, self._seed, frame.index)
        return Labels(frame.boxes, labels, np.ones(len(labels), np.float32), self._ids[labels])


def _ids_of(stream: StreamSpec) -> NDArray[np.int64]:
    """Per class a category id that the stream's own class map maps to it; its number from 1 without such a map."""
    ids = np.arange(1, len(stream.classes) + 1, dtype=np.int64)
    if isinstance(stream.source, RecordedSource):
        for number, name in reversed(stream.source.class_map.items()):
            if name in stream.classes and number.isdigit():
                ids[stream.classes.index(name)] = int(number)
    return ids


class DetectionGolden:
    """A torchvision detector. Raises InputError as :func:`open_golden` says."""

    def __init__(self, spec: TorchvisionGolden, classes: tuple[str, ...], device: Device) -> None:
        self._torch_device = device.torch_device
        self._min_score = spec.min_score
        self._model = _build(spec, "detection").to(device.torch_device)
        self._table = class_table(spec, classes, "detection")
        if spec.input_px:
            transform: Any = self._model.get_submodule("transform")
            if transform.fixed_size is not None:
                transform.fixed_size = (spec.input_px, spec.input_px)
            else:
                transform.min_size, transform.max_size = (spec.input_px,), 2 * spec.input_px

    def label(self, frame: Frame) -> Labels:
        return self.label_image(frame.image())

    def label_image(self, image: NDArray[np.uint8]) -> Labels:
        """The objects in an RGB picture, uint8 (height, width, 3)."""
        picture = torch.from_numpy(np.ascontiguousarray(image)).to(self._torch_device)
        with torch.inference_mode():
            (found,) = self._model([picture.permute(2, 0, 1).float() / 255.0])
            labels = self._table.to(self._torch_device)[found["labels"].clamp(max=len(self._table) - 1)]
            boxes: Tensor = torchvision.ops.clip_boxes_to_image(found["boxes"], (image.shape[0], image.shape[1]))
            wide, high = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
            keep = (found["scores"] >= self._min_score) & (labels >= 0) & (wide >= 1.0) & (high >= 1.0)
            boxes, labels = boxes[keep], labels[keep]
            scores, ids = found["scores"][keep], found["labels"][keep]
            chosen = torchvision.ops.batched_nms(boxes, scores, labels, _SAME_OBJECT)
        return Labels(
            boxes[chosen].float().cpu().numpy(),
            labels[chosen].cpu().numpy(),
            scores[chosen].float().cpu().numpy(),
            ids[chosen].cpu().numpy(),
        )


class ClassificationGolden:
    """A torchvision classifier, looking into the source's own boxes. Probabilities of a site class's ids are summed."""

    def __init__(self, spec: TorchvisionGolden, classes: tuple[str, ...], device: Device) -> None:
        self._torch_device = device.torch_device
        self._min_score = spec.min_score
        self._model = _build(spec, "classification").to(device.torch_device)
        self._table = class_table(spec, classes, "classification")
        self._num_classes = len(classes)
        self._px = spec.input_px or _published_px(spec.model)

    def label(self, frame: Frame) -> Labels:
        if len(frame.boxes) == 0:
            none = np.zeros(0, np.int64)
            return Labels(np.zeros((0, 4), np.float32), none, np.zeros(0, np.float32), none)
        crops = torch.from_numpy(frame.crops(self._px)).to(self._torch_device)
        mean = torch.tensor(_MEAN, device=self._torch_device).view(1, 3, 1, 1)
        std = torch.tensor(_STD, device=self._torch_device).view(1, 3, 1, 1)
        with torch.inference_mode():
            probability = self._model((crops.permute(0, 3, 1, 2).float() / 255.0 - mean) / std).softmax(1).cpu()
        kept = torch.nonzero(self._table >= 0).flatten()
        kept = kept[kept < probability.shape[1]]
        per_class = torch.zeros(len(probability), self._num_classes)
        per_class.index_add_(1, self._table[kept], probability[:, kept])
        scores, labels = per_class.max(1)
        likeliest = kept[torch.where(self._table[kept] == labels[:, None], probability[:, kept], -1.0).argmax(1)]
        sure = (scores >= self._min_score).numpy()
        return Labels(
            frame.boxes[sure], labels.numpy()[sure], scores.numpy()[sure].astype(np.float32), likeliest.numpy()[sure]
        )


def class_table(spec: TorchvisionGolden, classes: tuple[str, ...], kind: str) -> Tensor:
    """The model's class id -> index into ``classes``, -1 for what is dropped: int64 (ids,). Raises InputError."""
    names = _published_categories(spec.model)
    num_classes = spec.num_classes or _NUM_PUBLISHED[kind]
    table = torch.full((num_classes,), -1, dtype=torch.int64)
    for key, name in spec.class_map.items():
        if not name:
            continue
        if name not in classes:
            raise InputError(f"golden.class_map[{key!r}]: {name!r} is not among the classes {', '.join(classes)}")
        if not key.isdigit() and key not in names:
            raise InputError(f"golden.class_map: {key!r} is neither a class id nor a class name of {spec.model}")
        number = int(key) if key.isdigit() else names.index(key)
        if number >= num_classes:
            raise InputError(
                f"golden.class_map: {spec.model} with golden.num_classes = {num_classes} has class ids 0 to "
                f"{num_classes - 1}, not {key}; map the ids of your own weights"
            )
        table[number] = classes.index(name)
    if not bool((table >= 0).any()):
        raise InputError("golden.class_map: maps no class of the model to one of the site; at least one is needed")
    return table


def check_model_name(name: str) -> str:
    """ "detection" or "classification"; raises InputError for a name that torchvision does not know as either."""
    kinds = {"detection": torchvision.models.detection, "classification": torchvision.models}
    for kind, module in kinds.items():
        if name in torchvision.models.list_models(module=module):
            return kind
    known = torchvision.models.list_models(module=torchvision.models.detection)
    raise InputError(
        f"golden.model: torchvision {torchvision.__version__} has no detection or classification model "
        f"{name!r}; detectors: {', '.join(known)}"
    )


def check_weights(spec: TorchvisionGolden) -> Any:
    """The published weights that ``spec`` names, not downloaded yet. Raises InputError when there are none."""
    try:
        return torchvision.models.get_model_weights(spec.model)[spec.weights]
    except KeyError:
        names = ", ".join(entry.name for entry in torchvision.models.get_model_weights(spec.model))
        raise InputError(f"golden.weights: {spec.model} has no weights {spec.weights!r}; published: {names}") from None


def _build(spec: TorchvisionGolden, kind: str) -> nn.Module:
    check_model_name(spec.model)
    # Detection builders would download an ImageNet backbone of their own accord.
    options: dict[str, Any] = {"weights_backbone": None} if kind == "detection" else {}
    if spec.weights_file:
        state = read_state(spec.weights_file, "golden.weights_file")
        num_classes = spec.num_classes or _NUM_PUBLISHED[kind]
        with torch.random.fork_rng(devices=[]):
            model: nn.Module = torchvision.models.get_model(
                spec.model, weights=None, num_classes=num_classes, **options
            )
        fill(
            model,
            state,
            f"golden.weights_file {spec.weights_file}",
            f"{spec.model} with golden.num_classes = {num_classes}",
        )
        return model.eval()
    weights = check_weights(spec)
    try:
        published: nn.Module = torchvision.models.get_model(spec.model, weights=weights, progress=False, **options)
    except (OSError, RuntimeError) as error:  # no way to the server, no room, a file cut short
        raise InputError(
            f"golden.weights: {spec.weights} of {spec.model} cannot be downloaded ({error}); "
            "name a local file in golden.weights_file"
        ) from error
    return published.eval()


def _published_categories(name: str) -> list[str]:
    for weights in torchvision.models.get_model_weights(name):
        categories = weights.meta.get("categories")
        if categories:
            return list(categories)
    return []


def _published_px(name: str) -> int:
    for weights in torchvision.models.get_model_weights(name):
        size = getattr(weights.transforms(), "crop_size", None)
        if size:
            return int(size[0])
    return _CROP_PX
