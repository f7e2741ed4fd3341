"""The seam between a long piece of learning and whoever runs it: steps, busy time, stop.

Learning code calls :meth:`Stepper.step` between two steps of work (a training batch, a labelled frame). The
worker uses the call to rest (pacing), to answer commands and to report progress.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol


class Stepper(Protocol):
    """What learning code may ask of the worker that runs it."""

    def busy_s(self) -> float:
        """Busy seconds of the device consumed so far; differences are what work cost at share 1."""
        ...

    def step(self) -> bool:
        """Call between two steps. True: finish now with what there is (a stop was requested)."""
        ...


class FreeStepper:
    """No pacing and no commands: for benchmarks, tests and work inside one process."""

    def __init__(self, busy_clock: Callable[[], float] = time.process_time, stop_after: int | None = None) -> None:
        self._busy_clock, self._stop_after = busy_clock, stop_after
        self.num_steps = 0

    def busy_s(self) -> float:
        return self._busy_clock()

    def step(self) -> bool:
        self.num_steps += 1
        return self._stop_after is not None and self.num_steps >= self._stop_after
