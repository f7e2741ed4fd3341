"""How a live stream is, when it is tried again, and what its time stamps mean here. Pure: the clock is passed in."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

from protocol.schema import StreamCondition

T = TypeVar("T")

# So many usable pictures in a row, and a degraded stream counts as well again.
_GOOD_PICTURES = 3


@dataclass(frozen=True)
class Health:
    """A condition and, for people, its reason."""

    condition: StreamCondition
    reason: str = ""


class HealthJudge:
    """Judges a stream by what its reader tells, and by what it does not tell.

    ``stall_s``: seconds without a usable picture after which a stream that is connected is no longer well. Times are of
    one monotonic clock.
    """

    def __init__(self, stall_s: float, now: float) -> None:
        self._stall_s = stall_s
        self._connected: bool | None = None  # None: the first attempt goes on
        self._reason = ""
        self._picture_s = now
        self._num_bad = 0
        self._size: tuple[int, int] | None = None
        self._held = Health("ok")
        self._num_good = 0

    def connected(self, now: float) -> None:
        """The stream could be opened."""
        if not self._connected:
            self._picture_s = now
        self._connected, self._num_bad = True, 0

    def lost(self, reason: str) -> None:
        """It could not be opened, ended, or broke off."""
        self._connected, self._reason, self._num_good = False, reason, 0

    def bad_data(self) -> None:
        """Something came that gave no usable picture."""
        self._num_bad += 1
        self._num_good = 0

    def no_picture(self) -> None:
        """Something came that may yet become part of a picture."""
        self._num_bad += 1

    def picture(self, size: tuple[int, int], now: float) -> None:
        """A usable picture of ``size`` (width, height) came."""
        if self._size is not None and size != self._size:
            text = f"pictures of {size[0]}x{size[1]} instead of {self._size[0]}x{self._size[1]}"
            self._held, self._num_good = Health("changed", text), 0
        self._size, self._picture_s, self._num_bad = size, now, 0
        self._num_good += 1
        if self._num_good >= _GOOD_PICTURES:
            self._held = Health("ok")

    def at(self, now: float) -> Health:
        """The health at ``now``; one that was bad is only over when several pictures have come."""
        silent_s = now - self._picture_s
        if self._connected is None:
            return self._held
        if not self._connected:
            self._held = Health("lost", self._reason)
        elif silent_s >= self._stall_s:
            self._num_good = 0
            if self._num_bad:
                self._held = Health("garbage", f"{self._num_bad} pieces of data in a row give no picture")
            elif self._held.condition != "lost":
                self._held = Health("stalled", f"no picture for {self._stall_s:g} s")
        return self._held


class Waiting(Generic[T]):
    """What came and was not taken yet. Once the oldest has waited for longer than ``max_wait_s`` the newest alone is
    kept, and that only while it is younger.

    Dropped one at a time, whoever fell behind once would stay as late as is allowed until he is much faster.
    """

    def __init__(self, max_wait_s: float) -> None:
        self._max_wait_s = max_wait_s
        self._items: deque[tuple[float, T]] = deque()
        self._num_lost = 0

    def add(self, item: T, time_s: float, now: float) -> None:
        """``item``, of ``time_s``, came at ``now``."""
        self._items.append((time_s, item))
        self._give_up(now)

    def take(self, now: float) -> tuple[T | None, int]:
        """(the oldest that waits, or None; how many were given up since the last call)."""
        self._give_up(now)
        lost, self._num_lost = self._num_lost, 0
        return (self._items.popleft()[1] if self._items else None), lost

    def _give_up(self, now: float) -> None:
        if not self._items or now - self._items[0][0] <= self._max_wait_s:
            return
        newest = self._items[-1]
        kept = [newest] if now - newest[0] <= self._max_wait_s else []
        self._num_lost += len(self._items) - len(kept)
        self._items = deque(kept)


def pause_s(attempt: int, base_s: float, max_s: float, draw: float) -> float:
    """Pause before attempt number ``attempt`` (0 = the first after a failure) to open a stream again.

    Doubles up to ``max_s``; between half of it and all of it, by ``draw`` (0..1), so that many streams of one server
    that comes back do not arrive together.
    """
    longest = min(max_s, base_s * 2.0 ** min(attempt, 30))
    return longest * (0.5 + 0.5 * draw)


class StampClock:
    """Puts a stream's own time stamps on this machine's clock.

    The picture that came quickest says how the clocks differ; all others are late by what they came later. So what
    the network delays is seen, and its jitter is not in the times. Clocks may drift apart by 1 in 1000.
    """

    _SKEW = 1e-3
    _JUMP_S = 5.0

    def __init__(self) -> None:
        self._offset: float | None = None
        self._last_stamp = 0.0
        self._last_now = 0.0

    def local(self, stamp_s: float | None, now: float) -> float:
        """The time on the clock of ``now`` at which the picture stamped ``stamp_s`` was taken, at most ``now``."""
        if stamp_s is None:
            return now
        came = now - stamp_s
        step = stamp_s - self._last_stamp
        jumped = step < -0.5 or step > (now - self._last_now) + self._JUMP_S
        if self._offset is None or jumped:
            self._offset = came
        else:
            self._offset = min(came, self._offset + self._SKEW * (now - self._last_now))
        self._last_stamp, self._last_now = stamp_s, now
        return stamp_s + self._offset

    def late_s(self, stamp_s: float | None, now: float) -> float:
        """How late a picture stamped ``stamp_s`` would be; 0 while nothing is known."""
        return 0.0 if stamp_s is None or self._offset is None else now - stamp_s - self._offset


class FrameCounter:
    """Frame numbers of pictures that come at any rate, at most one picture per number.

    Frame ``i`` is at ``i / fps`` seconds of stream time. The phase of the first picture is kept, so that a camera with
    the stream's very rate fills every number.
    """

    def __init__(self, fps: float, origin_s: float | None, start_s: float = 0.0) -> None:
        """``origin_s``: where stream time 0 lies on the local clock; None: where it has to lie for the first picture to
        be at ``start_s`` of stream time."""
        self._fps, self._origin_s, self._start_s = fps, origin_s, start_s
        self._phase: float | None = None
        self._last: int | None = None

    def number(self, time_s: float) -> int | None:
        """The number of the picture taken at ``time_s`` of the local clock; None when its number is already given."""
        if self._origin_s is None:
            self._origin_s = time_s - self._start_s
        position = (time_s - self._origin_s) * self._fps
        if self._phase is None:
            self._phase = position - round(position)
        index = round(position - self._phase)
        if self._last is not None and index <= self._last:
            return None
        self._last = index
        return index
