"""Detectors as students: a small one for cores and torchvision's SSDLite, in one form.

A detector takes float frames (n, 3, h, w), 0..255, of any size from 32 px up. In training it gives a loss, in service
the objects of each frame, boxes in pixels of the frame it was given.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, ClassVar

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.ssdlite import SSDLiteHead

from executor.learning.inference import Objects
from executor.learning.models import Student
from executor.learning.weights import fill, read_state
from protocol.schema import StudentSpec, Task

MIN_SCORE = 0.3
_MAX_OBJECTS = 100
_SAME_OBJECT = 0.5  # overlap at which two detections of one class are one object

# (boxes float (n, 4), labels int64 (n,)) of a frame, on the frame's device.
Truth = tuple[Tensor, Tensor]


class Detector(Student):
    """A student that finds objects."""

    task: ClassVar[Task] = "detection"

    def loss(self, frames: Tensor, truth: list[Truth]) -> Tensor:
        """Mean loss per frame, a scalar. The mode decides how batch norms behave and nothing else."""
        raise NotImplementedError

    def detect(self, frames: Tensor) -> list[Objects]:
        """The objects of each frame, surest first, those below a score of MIN_SCORE left out."""
        raise NotImplementedError


def build_detector(spec: StudentSpec, num_classes: int, head_width: int) -> Detector:
    """A new detector with random weights; ``spec.checkpoint`` as for classifiers. Raises InputError."""
    origin = f"student.checkpoint {spec.checkpoint}"
    if spec.architecture == "edge_detector":
        edge = EdgeDetector(num_classes, head_width)
        if spec.checkpoint:
            state = read_state(spec.checkpoint, "student.checkpoint")
            backbone = {name[7:]: tensor for name, tensor in state.items() if name.startswith("blocks.")}
            fill(edge.blocks, backbone, origin, spec.architecture)
        return edge
    network: nn.Module = torchvision.models.get_model(
        spec.architecture, weights=None, weights_backbone=None, num_classes=num_classes + 1
    )
    if spec.checkpoint:
        wanted = {name for name in network.state_dict() if name.startswith("backbone.")}
        fill(network, read_state(spec.checkpoint, "student.checkpoint"), origin, spec.architecture, wanted)
    return SsdDetector(network, num_classes, head_width)


# ---------------------------------------------------------------- the small one

_STRIDE = 4
_WIDTHS = (16, 32, 48, 48, 64, 64)
_NECK = 48
_EVEN = 16  # frames are padded to multiples of it
# Of a box's extent: how far around its centre cells learn the box (TTFNet, Liu et al., AAAI 2020).
_SPREAD = 0.54 / 6.0
_MIN_SPREAD = 0.35  # cells
_BOX_WEIGHT = 5.0
_PRIOR = -2.2  # logit of a cell being a centre before anything is learned


class EdgeDetector(Detector):
    """Anchor-free: a heat map of centres per class and the distances to the box's edges, at stride 4.

    Six convolutions (three more halvings), two that bring coarse features back to fine ones, and the head.
    """

    def __init__(self, num_classes: int, head_width: int) -> None:
        super().__init__("edge_detector", num_classes, head_width)
        strides = (2, 2, 2, 1, 2, 1)
        channels = (3, *_WIDTHS[:-1])
        convolutions = [_conv(c, w, stride) for c, w, stride in zip(channels, _WIDTHS, strides, strict=True)]
        self.blocks = nn.Sequential(
            *convolutions, _Merge(_WIDTHS[5], _WIDTHS[3], _NECK), _Merge(_NECK, _WIDTHS[1], _NECK)
        )
        self.head = self.new_head(num_classes, head_width)
        self.to(memory_format=torch.channels_last)

    def new_head(self, num_classes: int, head_width: int) -> nn.Module:
        out = nn.Conv2d(head_width or _NECK, num_classes + 4, 1)
        nn.init.normal_(out.weight, std=0.01)
        with torch.no_grad():
            assert out.bias is not None
            out.bias[:num_classes] = _PRIOR
            out.bias[num_classes:] = 1.0
        return nn.Sequential(_conv(_NECK, head_width, 1), out) if head_width else nn.Sequential(out)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """(logits (n, classes, h / 4, w / 4), distances left, top, right, bottom in cells (n, 4, h / 4, w / 4))."""
        height, width = frames.shape[2:]
        frames = functional.pad(frames, (0, -width % _EVEN, 0, -height % _EVEN))
        x = (frames / 128.0 - 1.0).contiguous(memory_format=torch.channels_last)
        taken = []
        for block in self.blocks[:6]:
            x = block(x)
            taken.append(x)
        x = self.blocks[6](x, taken[3])
        out = self.head(self.blocks[7](x, taken[1]))
        return out[:, : self.num_classes], out[:, self.num_classes :].clamp(-4.0, 5.0).exp()

    def loss(self, frames: Tensor, truth: list[Truth]) -> Tensor:
        logits, distances = self(frames)
        heat, boxes, weight = _targets(truth, self.num_classes, logits.shape[2], logits.shape[3])
        probability = logits.sigmoid()
        # The focal loss of CornerNet (Law and Deng, ECCV 2018): cells near a centre are blamed less.
        sure = functional.logsigmoid(logits) * (1 - probability) ** 2
        unsure = functional.logsigmoid(-logits) * probability**2 * (1 - heat) ** 4
        num_objects = max(1, sum(len(labels) for _, labels in truth))
        focal = -torch.where(heat == 1.0, sure, unsure).sum() / num_objects
        if float(weight.sum()) == 0.0:
            return focal
        here = weight > 0.0
        found = _boxes(distances).permute(0, 2, 3, 1)[here]
        overlap = torchvision.ops.generalized_box_iou_loss(found, boxes[here], reduction="none")
        total: Tensor = focal + _BOX_WEIGHT * (overlap * weight[here]).sum() / weight.sum()
        return total

    def detect(self, frames: Tensor) -> list[Objects]:
        logits, distances = self(frames)
        probability = logits.sigmoid()
        # A centre is a peak of its class's heat.
        peak = functional.max_pool2d(probability, 3, stride=1, padding=1) == probability
        scores = (probability * peak).flatten(1)
        best, place = scores.topk(min(_MAX_OBJECTS, scores.shape[1]), dim=1)
        cells = logits.shape[2] * logits.shape[3]
        boxes = _boxes(distances).flatten(2) * _STRIDE
        height, width = frames.shape[2:]
        results = []
        for number in range(len(frames)):
            keep = best[number] >= MIN_SCORE
            labels = place[number][keep] // cells
            found = boxes[number][:, place[number][keep] % cells].T
            found = torchvision.ops.clip_boxes_to_image(found, (height, width))
            results.append(_objects(found, best[number][keep], labels))
        return results


class _Merge(nn.Module):
    """Coarse features brought to the size of finer ones and mixed with them."""

    def __init__(self, coarse: int, fine: int, width: int) -> None:
        super().__init__()
        self.lateral = nn.Conv2d(fine, width, 1)
        self.down = nn.Conv2d(coarse, width, 1)
        self.mix = _conv(width, width, 1)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        up = functional.interpolate(self.down(coarse), scale_factor=2.0, mode="nearest")
        return self.mix(functional.relu(up + self.lateral(fine)))  # type: ignore[no-any-return]


def _conv(channels: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    )


def _boxes(distances: Tensor) -> Tensor:
    """Distances (n, 4, h, w) as boxes x0, y0, x1, y1 in cells, (n, 4, h, w)."""
    height, width = distances.shape[2:]
    x = torch.arange(width, device=distances.device) + 0.5
    y = (torch.arange(height, device=distances.device) + 0.5)[:, None]
    left, top, right, bottom = distances.unbind(1)
    return torch.stack([x - left, y - top, x + right, y + bottom], dim=1)


def _targets(truth: list[Truth], num_classes: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """(heat (n, classes, h, w), boxes in cells (n, h, w, 4), weight of a cell's box (n, h, w)) of true boxes."""
    device = truth[0][0].device
    most = max(1, *(len(labels) for _, labels in truth)) if truth else 1
    padded = torch.zeros(len(truth), most, 4, device=device)
    classes = torch.full((len(truth), most), -1, dtype=torch.int64, device=device)
    for number, (boxes, labels) in enumerate(truth):
        padded[number, : len(labels)] = boxes / _STRIDE
        classes[number, : len(labels)] = labels
    size = (padded[..., 2:] - padded[..., :2]).clamp(min=0.0)
    centre = ((padded[..., :2] + padded[..., 2:]) / 2.0).floor()
    centre = torch.minimum(centre.clamp(min=0.0), centre.new_tensor([width - 1.0, height - 1.0]))
    spread = (size * _SPREAD).clamp(min=_MIN_SPREAD)
    x = torch.arange(width, device=device, dtype=torch.float32)
    y = torch.arange(height, device=device, dtype=torch.float32)
    across = torch.exp(-((x - centre[..., :1]) ** 2) / (2 * spread[..., :1] ** 2))
    down = torch.exp(-((y - centre[..., 1:]) ** 2) / (2 * spread[..., 1:] ** 2))
    hill = down[..., :, None] * across[..., None, :]  # (n, objects, h, w)
    hill = torch.where((hill < 0.05) | (classes < 0)[..., None, None], 0.0, hill)
    heat = torch.stack(
        [torch.where((classes == label)[..., None, None], hill, 0.0).amax(1) for label in range(num_classes)], dim=1
    )
    # Where two objects claim a cell the nearer centre has it, and the smaller object if both are as near.
    claim = hill / (1.0 + 1e-3 * size.prod(-1))[..., None, None]
    owner = claim.argmax(1)
    weight = hill.gather(1, owner[:, None])[:, 0]
    frames = torch.arange(len(truth), device=device)[:, None, None]
    return heat, padded[frames, owner], weight


# ---------------------------------------------------------------- torchvision's


class SsdDetector(Detector):
    """``ssdlite320_mobilenet_v3_large``: its backbone's layers are the blocks, its SSD head is the head."""

    def __init__(self, network: Any, num_classes: int, head_width: int) -> None:
        super().__init__("ssdlite320_mobilenet_v3_large", num_classes, head_width)
        fine, coarse = network.backbone.features
        self._num_fine = len(fine)
        self._num_coarse = len(coarse)
        self.blocks = nn.Sequential(*fine, *coarse, *network.backbone.extra)
        self.head = network.head
        # Not registered: its layers are those above, it only knows how to put them together.
        self._network = (network,)
        network.score_thresh, network.detections_per_img = MIN_SCORE, _MAX_OBJECTS
        network.backbone = _Levels(self)

    def new_head(self, num_classes: int, head_width: int) -> nn.Module:
        del head_width
        network: Any = self._network[0]
        # The output convolutions tell how many channels each level has.
        regression: Any = self.head.get_submodule("regression_head")
        channels = [level[0][0].in_channels for level in regression.module_list]
        anchors = network.anchor_generator.num_anchors_per_location()
        head: nn.Module = SSDLiteHead(channels, anchors, num_classes + 1, _norm)
        return head

    def has_head(self, num_classes: int, head_width: int) -> bool:
        return self.num_classes == num_classes

    def levels(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Features at all levels, fine first."""
        found: OrderedDict[str, Tensor] = OrderedDict()
        last_fine, last_coarse = self._num_fine - 1, self._num_fine + self._num_coarse - 1
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == last_fine or number >= last_coarse:
                found[str(len(found))] = x
        return found

    def loss(self, frames: Tensor, truth: list[Truth]) -> Tensor:
        targets = [{"boxes": boxes, "labels": labels + 1} for boxes, labels in truth]
        losses = self._run(True, frames, targets)
        total: Tensor = sum(losses.values(), start=frames.new_zeros(()))
        return total

    def detect(self, frames: Tensor) -> list[Objects]:
        found = self._run(False, frames, None)
        return [_objects(each["boxes"], each["scores"], each["labels"] - 1) for each in found]

    def _run(self, training: bool, frames: Tensor, targets: list[dict[str, Tensor]] | None) -> Any:
        network: Any = self._network[0]
        network.head = self.head  # which may have been replaced
        edge = max(32, round(max(frames.shape[2:]) / 32) * 32)
        network.transform.fixed_size = (edge, edge)
        network.training = network.transform.training = training
        return network(list(frames / 255.0), targets)


class _Levels(nn.Module):
    """The backbone as torchvision's SSD calls it."""

    def __init__(self, owner: SsdDetector) -> None:
        super().__init__()
        self._owner = (owner,)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return self._owner[0].levels(x)


def _norm(width: int) -> nn.Module:
    return nn.BatchNorm2d(width, eps=0.001, momentum=0.03)


def _objects(boxes: Tensor, scores: Tensor, labels: Tensor) -> Objects:
    keep = torchvision.ops.batched_nms(boxes.float(), scores.float(), labels, _SAME_OBJECT)
    return Objects(
        boxes[keep].float().cpu().numpy().astype(np.float32),
        labels[keep].cpu().numpy().astype(np.int64),
        scores[keep].float().cpu().numpy().astype(np.float32),
    )
