"""Exemplar memory against forgetting: a fixed number of crops per class, chosen by herding.

iCaRL (Rebuffi et al., CVPR 2017, algorithm 4): take, one after the other, the crop that brings the mean of the
chosen features nearest to the mean of the whole class, so that every prefix is the best memory of its size.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from executor.learning.datasets import CropSet

Features = NDArray[np.float32]

_EMBEDDING_PX = 6


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


def herd(features: Features, size: int) -> NDArray[np.int64]:
    """Indices of ``size`` rows (or all, if fewer) in herding order. ``features``: float32 (n, d)."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / np.maximum(norms, 1e-12)
    mean = unit.mean(axis=0)
    chosen: list[int] = []
    total = np.zeros_like(mean)
    free = np.ones(len(unit), np.bool_)
    for position in range(min(size, len(unit))):
        distance = np.linalg.norm(mean - (total + unit) / (position + 1), axis=1)
        best = int(np.argmin(np.where(free, distance, np.inf)))
        chosen.append(best)
        free[best] = False
        total += unit[best]
    return np.array(chosen, np.int64)


def exemplars(
    previous: CropSet,
    per_class: int,
    crop_px: int,
    embed: Callable[[NDArray[np.uint8]], Features] = colour_layout,
) -> CropSet:
    """The memory to carry over from a window's data set: at most ``per_class`` crops of each class.

    Chosen from everything the window knew (its own memory included), so its size stays fixed while its
    content follows the stream. ``embed`` maps crops (n, px, px, 3) to features (n, d).
    """
    features = embed(previous.crops) if len(previous) else np.zeros((0, 1), np.float32)
    picked = [
        members[herd(features[members], per_class)]
        for label in np.unique(previous.labels)
        for members in [np.flatnonzero(previous.labels == label)]
    ]
    chosen = previous.take(np.concatenate(picked) if picked else np.zeros(0, np.int64))
    count = len(chosen)
    return CropSet(
        resize(chosen.crops, crop_px),
        chosen.labels,
        chosen.frame_index,
        np.zeros(count, np.bool_),
        np.ones(count, np.bool_),
    )
