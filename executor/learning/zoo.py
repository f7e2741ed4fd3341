"""torchvision's classification families as students: by name, taken apart into a chain of blocks.

A block is what a retraining configuration freezes or trains as one: a residual block, an inverted bottleneck, a dense
block, or a convolution with what follows it. The published classifier is dropped, whatever it is: a student brings a
head of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torchvision
from torch import nn

from protocol.errors import InputError

# Edges that crops may have: what a family needs is found by trying.
_EDGES = (8, 12, 16, 24, 32, 48, 64)
_FIXED_SIZE = ("vit_", "maxvit_")
_TOO_LARGE = ("inception_v3",)
_CLASSIFIERS = ("fc", "classifier", "head", "heads", "avgpool", "flatten", "dropout", "aux1", "aux2")
# Containers whose children are blocks in their own right.
_STAGES = (nn.Sequential,)
# What belongs to the convolution before it.
_FOLLOWERS = (nn.BatchNorm2d, nn.LayerNorm, nn.ReLU, nn.Dropout)


@dataclass(frozen=True)
class Form:
    """``feature_width``: channels that leave the last block; ``min_px``: smallest edge of crops that gets through."""

    feature_width: int
    min_px: int
    num_blocks: int


def check_name(name: str) -> None:
    """Raises InputError unless ``name`` is a torchvision classification model that can be a student."""
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise InputError(
            f"student.architecture: {name!r} is neither edge_cnn nor a classification model of torchvision "
            f"{torchvision.__version__}; it has {', '.join(known)}"
        )
    if name.startswith(_FIXED_SIZE):
        raise InputError(
            f"student.architecture: {name} takes pictures of one size only, and students are served at many; "
            "take a convolutional family or swin"
        )
    if name in _TOO_LARGE:
        raise InputError(f"student.architecture: {name} needs pictures of 75 px and more at every scale; take another")


def new_network(name: str) -> nn.Module:
    """The family's network with random weights from torch's generator. ``name`` is checked."""
    options: dict[str, Any] = {"init_weights": True, "aux_logits": False} if name == "googlenet" else {}
    network: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    return network


def backbone_names(network: nn.Module) -> set[str]:
    """Names in the state dict that belong to the backbone, not to the published classifier."""
    return {name for name in network.state_dict() if name.partition(".")[0] not in _CLASSIFIERS}


def take_apart(network: nn.Module) -> list[nn.Module]:
    """The blocks of a network, input first: float (n, 3, px, px) in, float (n, channels, h, w) out."""
    parts = [part for name, part in network.named_children() if name not in _CLASSIFIERS]
    flat = list(_flattened(parts))
    if type(network).__name__ == "DenseNet":
        flat.append(nn.ReLU(inplace=True))  # which its forward applies between features and classifier
    if type(network).__name__ == "ConvNeXt":
        flat.append(network.get_submodule("classifier.0"))  # its last norm stands behind the pooling
    return _blocks(flat)


@lru_cache(maxsize=64)
def form_of(name: str) -> Form:
    """What a family's crops have to be and its features are, found by trying; torch's generator is left alone.

    Raises InputError when no edge that crops can have gets through.
    """
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        blocks = take_apart(new_network(name))
        chain = nn.Sequential(*blocks).eval()
        for px in _EDGES:
            try:
                out = chain(torch.zeros(1, 3, px, px))
            except RuntimeError:
                continue
            if out.dim() == 4 and out.shape[2] > 0 and out.shape[3] > 0:
                return Form(int(out.shape[1]), px, len(blocks))
    raise InputError(f"student.architecture: {name} gives no features of crops of up to {_EDGES[-1]} px; take another")


def _flattened(parts: Iterable[nn.Module]) -> Iterable[nn.Module]:
    for part in parts:
        # Sequential itself and the stages made of it; a convolution with its norm is a Sequential too, but one block.
        if type(part) in _STAGES or type(part).__name__ == "AnyStage":
            yield from _flattened(part.children())
        else:
            yield part


def _blocks(flat: Iterable[nn.Module]) -> list[nn.Module]:
    """Modules joined so that every block begins with something that learns."""
    groups: list[list[nn.Module]] = []
    for module in flat:
        learns = any(True for _ in module.parameters()) and not isinstance(module, _FOLLOWERS)
        if learns or not groups:
            groups.append([module])
        else:
            groups[-1].append(module)
    return [group[0] if len(group) == 1 else nn.Sequential(*group) for group in groups]
