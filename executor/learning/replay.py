"""Exemplar memory against forgetting, for crops: what is carried over from one window's data set to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from executor.learning import memory
from executor.learning.datasets import CropSet
from executor.learning.memory import Features

_EMBEDDING_PX = 6
# What a crop takes besides its pixels: label, frame, stretch, two flags, box, weight.
_BYTES_BESIDE = 3 * 8 + 2 + 16 + 4


def resize(crops: NDArray[np.uint8], px: int) -> NDArray[np.uint8]:
    """Square crops (n, k, k, 3) at another edge: area mean downwards, bilinear upwards."""
    if len(crops) == 0 or crops.shape[1] == px:
        return crops if crops.shape[1] == px else np.zeros((0, px, px, 3), np.uint8)
    tensor = torch.from_numpy(crops).permute(0, 3, 1, 2).float()
    if px < crops.shape[1]:
        scaled = torch.nn.functional.adaptive_avg_pool2d(tensor, px)
    else:
        scaled = torch.nn.functional.interpolate(tensor, size=px, mode="bilinear", align_corners=False)
    resized: NDArray[np.uint8] = scaled.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return resized


def colour_layout(crops: NDArray[np.uint8]) -> Features:
    """A cheap embedding without a model: the crop at 6 x 6, float32 (n, 108)."""
    return resize(crops, _EMBEDDING_PX).reshape(len(crops), -1).astype(np.float32) / 255.0


def exemplars(
    previous: CropSet,
    max_bytes: int,
    crop_px: int,
    embed: Callable[[NDArray[np.uint8]], Features] = colour_layout,
) -> CropSet:
    """The memory to carry over from a window's data set: crops of ``crop_px`` that take at most ``max_bytes``.

    Chosen from everything the window knew (its own memory included) by executor.learning.memory. ``embed`` maps crops
    (n, px, px, 3) to features (n, d).
    """
    features = embed(previous.crops) if len(previous) else np.zeros((0, 1), np.float32)
    size = max_bytes // (3 * crop_px * crop_px + _BYTES_BESIDE)
    chosen = previous.take(memory.choose(previous.labels, previous.stretch, features, size))
    count = len(chosen)
    return replace(
        chosen,
        crops=resize(chosen.crops, crop_px),
        is_validation=np.zeros(count, np.bool_),
        is_exemplar=np.ones(count, np.bool_),
        boxes=np.zeros((0, 4), np.float32),
    )
