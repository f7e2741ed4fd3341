"""Students: small models that serve a stream and are retrained, in one form for both tasks.

A student is a chain of *blocks* and a *head*; retraining configurations say how many blocks, counted from the
output, are trained. Classifiers are here and in executor/learning/zoo.py, detectors in executor/learning/detectors.py.

Every classifier takes uint8 crops (n, px, px, 3), of any px from its ``min_px`` up, and gives logits
(n, num_classes): normalisation and memory layout are its own business.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar

import msgspec
import torch
from torch import Tensor, nn

from executor.learning import zoo
from executor.learning.weights import fill, read_state
from protocol.errors import InputError
from protocol.schema import StudentSpec, Task

# Mean and standard deviation of the ImageNet training set, which published backbone weights expect.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)

_EDGE_WIDTHS = (24, 48, 64, 64)
_DEFAULTS: dict[Task, str] = {"classification": "edge_cnn", "detection": "edge_detector"}
DETECTORS = ("edge_detector", "ssdlite320_mobilenet_v3_large")


class Student(nn.Module):
    """``blocks`` and ``head`` of a model for ``task``; subclasses say how they are joined."""

    task: ClassVar[Task]
    blocks: nn.Sequential
    head: nn.Module

    def __init__(self, architecture: str, num_classes: int, head_width: int) -> None:
        super().__init__()
        self.architecture = architecture
        self.num_classes = num_classes
        self.head_width = head_width

    def new_head(self, num_classes: int, head_width: int) -> nn.Module:
        """A head with random weights; ``head_width`` hidden units, 0 = none."""
        raise NotImplementedError

    def has_head(self, num_classes: int, head_width: int) -> bool:
        """Whether the head has this form already."""
        return self.num_classes == num_classes and self.head_width == head_width

    def moving(self) -> Iterator[str]:
        """Names, as in the state dict, of what training changes: trained weights, statistics of trained blocks."""
        yield from (name for name, parameter in self.named_parameters() if parameter.requires_grad)
        parts = {f"blocks.{position}": block for position, block in enumerate(self.blocks)} | {"head": self.head}
        for where, part in parts.items():
            if any(parameter.requires_grad for parameter in part.parameters()):
                yield from (f"{where}.{name}" for name, _ in part.named_buffers())

    def train(self, mode: bool = True) -> Student:
        """Training mode, except for frozen blocks: their batch statistics stay as they are."""
        super().train(mode)
        if mode:
            for block in self.blocks:
                if not any(parameter.requires_grad for parameter in block.parameters()):
                    block.eval()
        return self


class Classifier(Student):
    """``head(pool(blocks(crops)))``. ``feature_width``: channels that leave the last block."""

    task: ClassVar[Task] = "classification"

    def __init__(
        self,
        architecture: str,
        blocks: list[nn.Module],
        feature_width: int,
        num_classes: int,
        head_width: int,
        min_px: int = 8,
    ) -> None:
        super().__init__(architecture, num_classes, head_width)
        self.feature_width = feature_width
        self.min_px = min_px
        self.blocks = nn.Sequential(*blocks)
        self.head = self.new_head(num_classes, head_width)
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1) * 255.0, persistent=False)
        self.register_buffer("scale", 1.0 / (torch.tensor(_STD).view(1, 3, 1, 1) * 255.0), persistent=False)
        self.to(memory_format=torch.channels_last)  # twice as fast on a core for these small nets

    def new_head(self, num_classes: int, head_width: int) -> nn.Module:
        if head_width == 0:
            return nn.Linear(self.feature_width, num_classes)
        hidden = nn.Linear(self.feature_width, head_width)
        return nn.Sequential(hidden, nn.ReLU(), nn.Linear(head_width, num_classes))

    def features(self, crops: Tensor) -> Tensor:
        """Pooled features, float32 (n, feature_width), of uint8 or float (0..255) crops (n, px, px, 3)."""
        # The permuted view is already channels-last, the layout the convolutions run in.
        x = (crops.permute(0, 3, 1, 2).float() - self.get_buffer("mean")) * self.get_buffer("scale")
        return self.blocks(x).mean(dim=(2, 3))  # type: ignore[no-any-return]

    def forward(self, crops: Tensor) -> Tensor:
        """Logits, float32 (n, num_classes)."""
        return self.head(self.features(crops))  # type: ignore[no-any-return]


def named_spec(spec: StudentSpec, task: Task) -> StudentSpec:
    """``spec`` with its architecture named. Raises InputError for one that is unknown or does another task."""
    name = spec.architecture or _DEFAULTS[task]
    if task == "detection" and name not in DETECTORS:
        raise InputError(f"student.architecture: {name!r} is no student for detection; known: {', '.join(DETECTORS)}")
    if task == "classification" and name != "edge_cnn":
        if name in DETECTORS:
            raise InputError(f'student.architecture: {name!r} is a detector; set task = "detection" or take another')
        zoo.check_name(name)
    return msgspec.structs.replace(spec, architecture=name)


def build_student(spec: StudentSpec, num_classes: int, head_width: int | None = None) -> Student:
    """A new student; ``head_width`` overrides the spec's. Weights are random, drawn from torch's generator.

    With ``spec.checkpoint`` (a .safetensors or .pth state dict; torchvision's own names for its
    architectures) the backbone starts from that file and the head is new. Raises InputError naming the
    file when it cannot be read or does not fit, and for an architecture that is unknown or cannot be a student.
    """
    width = spec.head_width if head_width is None else head_width
    if spec.architecture in DETECTORS:
        from executor.learning.detectors import build_detector

        return build_detector(spec, num_classes, width)
    spec = named_spec(spec, "classification")
    origin = f"student.checkpoint {spec.checkpoint}"
    if spec.architecture == "edge_cnn":
        student = Classifier("edge_cnn", _edge_blocks(), _EDGE_WIDTHS[-1], num_classes, width)
        if spec.checkpoint:
            state = read_state(spec.checkpoint, "student.checkpoint")
            backbone = {name[7:]: tensor for name, tensor in state.items() if name.startswith("blocks.")}
            fill(student.blocks, backbone, origin, "edge_cnn")
        return student
    network = zoo.new_network(spec.architecture)
    if spec.checkpoint:
        # The published classifier is left out: its classes are others.
        wanted = zoo.backbone_names(network)
        fill(network, read_state(spec.checkpoint, "student.checkpoint"), origin, spec.architecture, wanted)
    blocks = zoo.take_apart(network)
    form = zoo.form_of(spec.architecture)
    return Classifier(spec.architecture, blocks, form.feature_width, num_classes, width, form.min_px)


def set_trainable(student: Student, trained_fraction: float) -> int:
    """Train the head and this share of the blocks, counted from the output; freeze the others.

    Any fraction above 0 trains at least one block. Returns the number of trained blocks.
    """
    num_trained = math.ceil(trained_fraction * len(student.blocks) - 1e-9)
    for position, block in enumerate(student.blocks):
        block.requires_grad_(position >= len(student.blocks) - num_trained)
    student.head.requires_grad_(True)
    return num_trained


def replace_head(student: Student, num_classes: int, head_width: int) -> bool:
    """Give the student a new random head of this form; one that has the form already is kept (False)."""
    if student.has_head(num_classes, head_width):
        return False
    device = next(student.parameters()).device
    student.head = student.new_head(num_classes, head_width).to(device)
    student.num_classes, student.head_width = num_classes, head_width
    return True


def _edge_blocks() -> list[nn.Module]:
    """Four 3x3 convolutions, three halvings: 85 000 parameters with a head of 64."""
    blocks: list[nn.Module] = []
    channels = 3
    for depth, width in enumerate(_EDGE_WIDTHS):
        layers: list[nn.Module] = [
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        if depth > 0:
            # ceil_mode: crops of 8 px and odd edges keep at least one position.
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        blocks.append(nn.Sequential(*layers))
        channels = width
    return blocks
