"""Signals of drift that serving yields for nothing, added up over an interval."""

from __future__ import annotations

import numpy as np

from executor.learning.inference import Objects
from protocol.schema import StreamSignals


class SignalSums:
    """Sums over the frames that were looked at."""

    def __init__(self) -> None:
        self._num = 0
        self._confidence = 0.0
        self._classes = np.zeros(0, np.int64)
        self._look = np.zeros(0)

    def add(self, found: Objects) -> None:
        """A frame was looked at."""
        count = len(found.labels)
        if count == 0 or found.scores is None:
            return
        self._num += count
        self._confidence += float(found.scores.sum())
        size = max(len(self._classes), int(found.labels.max()) + 1)
        classes = np.bincount(found.labels, minlength=size)
        classes[: len(self._classes)] += self._classes
        self._classes = classes
        if found.look is not None:
            look = count * found.look.astype(np.float64)
            self._look = look if len(self._look) == 0 else self._look + look

    def means(self) -> StreamSignals | None:
        """Of all objects so far; None when there was none."""
        if self._num == 0:
            return None
        return StreamSignals(
            num_objects=self._num,
            confidence=min(1.0, max(0.0, self._confidence / self._num)),
            class_counts=tuple(int(n) for n in self._classes),
            look=tuple(round(float(x) / self._num, 4) for x in self._look),
        )
