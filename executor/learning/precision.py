"""Mean average precision of detections, as torchmetrics works it out; not known where that is not installed.

It is for people: plans and gates go by F1. The extra ``ekya[detection]`` brings torchmetrics and pycocotools.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

import torch

from executor.learning.inference import Objects

_log = logging.getLogger(__name__)


def available() -> bool:
    """Whether the libraries are there; nothing is imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("torchmetrics", "pycocotools"))


def mean_average_precision(found: Sequence[Objects], true: Sequence[Objects]) -> float | None:
    """COCO's figure, the mean over overlaps of 0.5 to 0.95; one entry per frame, of all classes that have objects.

    None where the libraries are missing or there is no true object.
    """
    if not any(len(each.labels) for each in true):
        return None
    if not available():
        _log.info("no mean average precision: install ekya[detection]")
        return None
    from torchmetrics.detection import MeanAveragePrecision

    metric: Any = MeanAveragePrecision(backend="pycocotools")
    metric.warn_on_many_detections = False
    metric.update([_as_prediction(each) for each in found], [_as_truth(each) for each in true])
    return min(1.0, max(0.0, float(metric.compute()["map"])))


def _as_truth(objects: Objects) -> dict[str, torch.Tensor]:
    return {"boxes": torch.from_numpy(objects.boxes.copy()), "labels": torch.from_numpy(objects.labels.copy())}


def _as_prediction(objects: Objects) -> dict[str, torch.Tensor]:
    scores = torch.ones(len(objects.labels)) if objects.scores is None else torch.from_numpy(objects.scores.copy())
    return _as_truth(objects) | {"scores": scores}
