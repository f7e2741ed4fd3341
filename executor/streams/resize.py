"""Resizing of pixel planes along one axis at a time, as matrix products."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@lru_cache(maxsize=8192)
def weights(size_in: int, size_out: int) -> NDArray[np.float32]:
    """Row weights (size_out, size_in), rows adding up to 1: area mean where it shrinks, bilinear where it grows."""
    table = np.zeros((size_out, size_in), np.float32)
    if size_in >= size_out:
        edges = np.linspace(0, size_in, size_out + 1)
        low, high = edges[:-1, None], edges[1:, None]
        cell = np.arange(size_in)[None, :]
        table[:] = np.clip(np.minimum(high, cell + 1) - np.maximum(low, cell), 0, None)
        table /= table.sum(1, keepdims=True)
        return table
    position = np.clip((np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5, 0, size_in - 1)
    below = np.minimum(position.astype(np.intp), max(size_in - 2, 0))
    table[np.arange(size_out), below] = 1 - (position - below)
    if size_in > 1:
        table[np.arange(size_out), below + 1] += (position - below).astype(np.float32)
    return table


def resize_planes(planes: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """(n, h, w) -> (n, height, width)."""
    if planes.shape[1] != height:
        planes = np.matmul(weights(planes.shape[1], height), planes)
    if planes.shape[2] != width:
        planes = np.matmul(planes, weights(planes.shape[2], width).T)
    return planes


def resize_picture(picture: NDArray[np.uint8], px: int) -> NDArray[np.uint8]:
    """(h, w, 3) -> (px, px, 3)."""
    planes = resize_planes(picture.transpose(2, 0, 1).astype(np.float32), px, px)
    return np.ascontiguousarray((planes + 0.5).clip(0, 255).transpose(1, 2, 0).astype(np.uint8))
