"""Resizing of pixel planes, one axis at a time: area mean where it shrinks, bilinear where it grows.

Free of matrix products on purpose: a BLAS starts threads of its own for the larger ones, and a worker
that holds a share of one core must not.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def resize_planes(planes: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """(n, h, w) -> (n, height, width)."""
    # The axis that shrinks most goes first: the second one then has less to do.
    if planes.shape[1] * width >= planes.shape[2] * height:
        return _resize_columns(_resize_rows(planes, height), width)
    return _resize_rows(_resize_columns(planes, width), height)


def resize_picture(picture: NDArray[np.uint8], px: int) -> NDArray[np.uint8]:
    """(h, w, 3) -> (px, px, 3)."""
    planes = resize_planes(picture.transpose(2, 0, 1).astype(np.float32, order="C"), px, px)
    return np.ascontiguousarray((planes + 0.5).clip(0, 255).transpose(1, 2, 0).astype(np.uint8))


def cut_out(picture: NDArray[np.uint8], boxes: NDArray[np.float32], px: int) -> NDArray[np.uint8]:
    """Square crops (n, px, px, 3) of the boxes (n, 4) of a picture (h, w, 3); fractional boxes grow to whole pixels."""
    crops = np.empty((len(boxes), px, px, 3), np.uint8)
    low = np.floor(boxes[:, :2]).astype(np.intp)
    high = np.ceil(boxes[:, 2:]).astype(np.intp)
    for number, ((x0, y0), (x1, y1)) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        crops[number] = resize_picture(picture[y0:y1, x0:x1], px)
    return crops


def halved(planes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Mean of 2 x 2 pixels, (n, h, w) -> (n, h / 2, w / 2); h and w are even."""
    total = planes[:, ::2, ::2].astype(np.uint16)
    for part in (planes[:, ::2, 1::2], planes[:, 1::2, ::2], planes[:, 1::2, 1::2]):
        total += part
    return np.asarray((total + 2) >> 2, np.uint8)


def sampled_planes(planes: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """(n, h, w) -> (n, height, width), bilinear throughout: good for ratios near 1."""
    return np.asarray(_lerp_columns(_lerp_rows(planes.astype(np.float32), height), width) + 0.5, np.uint8)


def _resize_rows(planes: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    have = planes.shape[1]
    if have <= size:
        return planes if have == size else _lerp_rows(planes, size)
    if have == 2 * size:
        return (planes[:, ::2] + planes[:, 1::2]) * np.float32(0.5)
    low, weight = _edges(have, size)
    total = np.zeros((planes.shape[0], have + 1, planes.shape[2]), np.float32)
    np.cumsum(planes, axis=1, out=total[:, 1:])
    at = total.take(low, 1)
    at += (total.take(low + 1, 1) - at) * weight[:, None]
    return np.asarray(np.diff(at, axis=1) * np.float32(size / have), np.float32)


def _resize_columns(planes: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    have = planes.shape[2]
    if have <= size:
        return planes if have == size else _lerp_columns(planes, size)
    if have == 2 * size:
        return (planes[:, :, ::2] + planes[:, :, 1::2]) * np.float32(0.5)
    low, weight = _edges(have, size)
    total = np.zeros((planes.shape[0], planes.shape[1], have + 1), np.float32)
    np.cumsum(planes, axis=2, out=total[:, :, 1:])
    at = total.take(low, 2)
    at += (total.take(low + 1, 2) - at) * weight
    return np.asarray(np.diff(at, axis=2) * np.float32(size / have), np.float32)


def _lerp_rows(planes: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    low, high, weight = _centres(planes.shape[1], size)
    below = planes.take(low, 1)
    above = planes.take(high, 1)
    above -= below
    above *= weight[:, None]
    above += below
    return above


def _lerp_columns(planes: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    low, high, weight = _centres(planes.shape[2], size)
    below = planes.take(low, 2)
    above = planes.take(high, 2)
    above -= below
    above *= weight
    above += below
    return above


@lru_cache(maxsize=4096)
def _edges(have: int, size: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Where the edges of the target pixels fall between the running sums."""
    position = np.arange(size + 1) * (have / size)
    low = np.minimum(np.floor(position + 1e-9).astype(np.intp), have - 1)
    return low, (position - low).astype(np.float32)


@lru_cache(maxsize=4096)
def _centres(have: int, size: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """The lower and upper neighbour of each target centre and the weight of the upper one."""
    position = np.clip((np.arange(size) + 0.5) * (have / size) - 0.5, 0, have - 1)
    low = position.astype(np.intp)
    return low, np.minimum(low + 1, have - 1), (position - low).astype(np.float32)
