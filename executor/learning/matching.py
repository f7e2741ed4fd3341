"""What detections are worth: F1 at an overlap of 0.3, the measure of the paper (NSDI 2022, section 6.1).

A detection is right when it overlaps a true box of its class by at least that much; every true box is matched
once, surest detection first. F1 = 2 TP / (2 TP + FP + FN).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from executor.learning.inference import MIN_OVERLAP, Objects, overlaps


def matched(found: Objects, boxes: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of the true ``boxes`` (n, 4) with ``labels`` (n,) were found: bool (n,)."""
    hit = np.zeros(len(labels), np.bool_)
    if len(found.labels) == 0 or len(labels) == 0:
        return hit
    overlap = np.where(found.labels[:, None] == labels[None, :], overlaps(found.boxes, boxes), 0.0)
    order = np.arange(len(found.labels)) if found.scores is None else np.argsort(-found.scores, kind="stable")
    for number in order:
        best = int(np.where(hit, -1.0, overlap[number]).argmax())
        if not hit[best] and overlap[number, best] >= MIN_OVERLAP:
            hit[best] = True
    return hit


def frame_f1(found: Objects | None, boxes: NDArray[np.float32], labels: NDArray[np.int64]) -> float | None:
    """F1 of a frame; None for one without true objects, which is not scored; 0 where there is no result yet."""
    if len(labels) == 0:
        return None
    if found is None:
        return 0.0
    return 2.0 * float(matched(found, boxes, labels).sum()) / (len(found.labels) + len(labels))
