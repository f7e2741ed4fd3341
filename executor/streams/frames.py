"""The frame interface that every source implements and every worker reads."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Frame(Protocol):
    """One frame. Boxes and labels are cheap; pixels are only made when asked for.

    ``index``: frame number of the stream, from 0 (negative = before the stream's clock started; allowed).
    ``boxes``: float32 (n, 4) x0, y0, x1, y1 in pixels of the frame. ``labels``: int64 (n,), the golden
    truth as indices into the stream's classes. ``conditions``: a few words for people ("night, rain").
    """

    index: int
    time_s: float
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    conditions: str

    def crops(self, px: int) -> NDArray[np.uint8]:
        """Square RGB crops of the objects, uint8 (n, px, px, 3), in the order of ``boxes``."""
        ...

    def image(self) -> NDArray[np.uint8]:
        """The whole frame, RGB uint8 (height, width, 3)."""
        ...


class FrameSource(Protocol):
    """Random access by frame index; sequential access is fast. Not shared between threads."""

    fps: float
    classes: tuple[str, ...]

    def frame(self, index: int) -> Frame:
        """The frame at ``index``. Endless: recorded sources loop."""
        ...

    def close(self) -> None:
        """Release files and decoders; safe to call twice."""
        ...
