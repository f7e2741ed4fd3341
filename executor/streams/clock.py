"""Which frames of a live stream have arrived: pure arithmetic on a clock that is passed in."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Arrivals:
    """``frames``: indices to be handled now, oldest first. ``num_skipped``: frames given up since the last call."""

    frames: range
    num_skipped: int


class FrameClock:
    """A camera's clock. Frame i arrives i / fps seconds of stream time after the stream began.

    ``start_position_s``: stream time at the moment ``now`` (a monotonic time in seconds); the first frame to come is
    the first one at or after it. ``max_backlog``: frames kept for a late worker; older ones are skipped and counted,
    as a camera does not wait.
    """

    def __init__(self, fps: float, start_position_s: float, now: float, max_backlog: int = 8) -> None:
        if not (fps > 0 and math.isfinite(fps)):
            raise ValueError(f"fps must be positive and finite, not {fps}")
        if max_backlog < 1:
            raise ValueError(f"max_backlog must be at least 1, not {max_backlog}")
        self._fps, self._max_backlog = fps, max_backlog
        self._origin = now - start_position_s
        self._next = math.ceil(start_position_s * fps - 1e-6)
        self.num_skipped = 0

    @property
    def next_index(self) -> int:
        """The first frame that was not handed out or skipped yet."""
        return self._next

    def position_s(self, now: float) -> float:
        """Stream time at ``now``."""
        return now - self._origin

    def arrived(self, now: float) -> Arrivals:
        """Hand out the frames that arrived since the last call; a clock that stands still or steps back yields none."""
        end = math.floor((now - self._origin) * self._fps + 1e-6) + 1
        if end <= self._next:
            return Arrivals(range(self._next, self._next), 0)
        first = max(self._next, end - self._max_backlog)
        skipped = first - self._next
        self._next = end
        self.num_skipped += skipped
        return Arrivals(range(first, end), skipped)

    def next_due(self) -> float:
        """The time, on the clock of ``now``, at which the next frame arrives."""
        return self._origin + self._next / self._fps

    def arrival_s(self, index: int) -> float:
        """The time, on the clock of ``now``, at which frame ``index`` arrives."""
        return self._origin + index / self._fps

    def lag_s(self, index: int, now: float) -> float:
        """How long ago frame ``index`` arrived."""
        return self.position_s(now) - index / self._fps
