"""Student models: a small CNN for cores and three torchvision classifiers, in one form.

Every student takes uint8 crops (n, px, px, 3), of any px from 8 up, and gives logits (n, num_classes):
normalisation and memory layout are its own business. A student is a chain of *blocks*, a pooling and a
*head*; retraining configurations say how many blocks, counted from the output, are trained.

Detection models are not here yet; they belong behind ``inference.Analyser``, which returns boxes as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import msgspec
import torch
import torchvision
from torch import Tensor, nn

from executor.learning.weights import fill, read_state
from protocol.errors import InputError
from protocol.schema import StudentSpec, Task

# Mean and standard deviation of the ImageNet training set, which published backbone weights expect.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)

_EDGE_WIDTHS = (24, 48, 64, 64)


class Student(nn.Module):
    """``head(pool(blocks(crops)))``. ``feature_width``: channels that leave the last block."""

    task: ClassVar[Task] = "classification"

    def __init__(
        self, architecture: str, blocks: list[nn.Module], feature_width: int, num_classes: int, head_width: int
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.feature_width = feature_width
        self.num_classes = num_classes
        self.head_width = head_width
        self.blocks = nn.Sequential(*blocks)
        self.head = _head(feature_width, head_width, num_classes)
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1) * 255.0, persistent=False)
        self.register_buffer("scale", 1.0 / (torch.tensor(_STD).view(1, 3, 1, 1) * 255.0), persistent=False)
        self.to(memory_format=torch.channels_last)  # twice as fast on a core for these small nets

    def features(self, crops: Tensor) -> Tensor:
        """Pooled features, float32 (n, feature_width), of uint8 or float (0..255) crops (n, px, px, 3)."""
        # The permuted view is already channels-last, the layout the convolutions run in.
        x = (crops.permute(0, 3, 1, 2).float() - self.get_buffer("mean")) * self.get_buffer("scale")
        return self.blocks(x).mean(dim=(2, 3))  # type: ignore[no-any-return]

    def forward(self, crops: Tensor) -> Tensor:
        """Logits, float32 (n, num_classes)."""
        return self.head(self.features(crops))  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> Student:
        """Training mode, except for frozen blocks: their batch statistics stay as they are."""
        super().train(mode)
        if mode:
            for block in self.blocks:
                if not any(parameter.requires_grad for parameter in block.parameters()):
                    block.eval()
        return self


def named_spec(spec: StudentSpec, task: Task) -> StudentSpec:
    """``spec`` with its architecture named. Raises InputError for one that is unknown or does another task."""
    name = spec.architecture or _DEFAULTS[task]
    if name != "edge_cnn" and name not in _BACKBONES:
        known = ", ".join(["edge_cnn", *_BACKBONES])
        raise InputError(f"student.architecture: {name!r} is no student for {task}; known: {known}")
    return msgspec.structs.replace(spec, architecture=name)


def build_student(spec: StudentSpec, num_classes: int, head_width: int | None = None) -> Student:
    """A new student; ``head_width`` overrides the spec's. Weights are random, drawn from torch's generator.

    With ``spec.checkpoint`` (a .safetensors or .pth state dict; torchvision's own names for its
    architectures) the backbone starts from that file and the head is new. Raises InputError naming the
    file when it cannot be read or does not fit.
    """
    spec = named_spec(spec, "classification")
    width = spec.head_width if head_width is None else head_width
    if spec.architecture == "edge_cnn":
        student = Student("edge_cnn", _edge_blocks(), _EDGE_WIDTHS[-1], num_classes, width)
        if spec.checkpoint:
            state = read_state(spec.checkpoint, "student.checkpoint")
            backbone = {name[7:]: tensor for name, tensor in state.items() if name.startswith("blocks.")}
            fill(student.blocks, backbone, f"student.checkpoint {spec.checkpoint}", "edge_cnn")
        return student
    network: nn.Module = getattr(torchvision.models, spec.architecture)(weights=None)
    if spec.checkpoint:
        # The published classifier layer is left out: its classes are others.
        wanted = {name for name in network.state_dict() if not name.startswith(("fc.", "classifier."))}
        state = read_state(spec.checkpoint, "student.checkpoint")
        fill(network, state, f"student.checkpoint {spec.checkpoint}", spec.architecture, wanted)
    blocks, feature_width = _BACKBONES[spec.architecture](network)
    return Student(spec.architecture, blocks, feature_width, num_classes, width)


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
    if student.num_classes == num_classes and student.head_width == head_width:
        return False
    device = next(student.parameters()).device
    student.head = _head(student.feature_width, head_width, num_classes).to(device)
    student.num_classes, student.head_width = num_classes, head_width
    return True


def _head(feature_width: int, head_width: int, num_classes: int) -> nn.Module:
    if head_width == 0:
        return nn.Linear(feature_width, num_classes)
    return nn.Sequential(nn.Linear(feature_width, head_width), nn.ReLU(), nn.Linear(head_width, num_classes))


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


def _resnet_blocks(network: nn.Module) -> tuple[list[nn.Module], int]:
    part = network.get_submodule
    stem = nn.Sequential(part("conv1"), part("bn1"), part("relu"), part("maxpool"))
    stages = [block for stage in range(1, 5) for block in part(f"layer{stage}").children()]
    return [stem, *stages], 512


def _mobilenet_blocks(network: nn.Module) -> tuple[list[nn.Module], int]:
    return list(network.get_submodule("features").children()), 576


def _shufflenet_blocks(network: nn.Module) -> tuple[list[nn.Module], int]:
    part = network.get_submodule
    stem = nn.Sequential(part("conv1"), part("maxpool"))
    stages = [block for stage in range(2, 5) for block in part(f"stage{stage}").children()]
    return [stem, *stages, part("conv5")], 1024


_DEFAULTS: dict[Task, str] = {"classification": "edge_cnn", "detection": "edge_detector"}

_BACKBONES: dict[str, Callable[[nn.Module], tuple[list[nn.Module], int]]] = {
    "resnet18": _resnet_blocks,
    "mobilenet_v3_small": _mobilenet_blocks,
    "shufflenet_v2_x0_5": _shufflenet_blocks,
}
