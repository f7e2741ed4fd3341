"""Hold a share of a device by duty cycle: work, then rest until the consumed time is paid for.

Token bucket on *consumed* time. The bucket fills at ``share`` tokens per second of wall time up to
``burst_s`` and every busy second takes one token out. A step is never cut short: it may leave a debt,
and the worker rests until the debt is paid. Oversleeping is not lost, since the bucket goes on filling.

What counts as consumed is the caller's ``busy_clock``: processor time on CPU devices, wall time between
rests (after a synchronise) on CUDA devices. Pure logic: both clocks and the sleep are passed in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

_SAMPLE_S = 0.1
_SHORTEST_REST_S = 1e-6  # below this a rest may be lost in the rounding of the clock
_HISTORY_S = 60.0
_WINDOW_S = 10.0
_LEAST_S = 0.5  # the burst is a larger part of less


class Pacer:
    """Share holder of one worker; not thread-safe, the worker's main thread owns it.

    ``share``: fraction of the device in (0, 1]; at 1 it never rests. ``clock``: monotonic seconds.
    ``busy_clock``: busy seconds consumed so far, never falling. ``sleep``: rests for some seconds and may
    return early (a command came in); :meth:`pace` then looks again.
    """

    def __init__(
        self,
        share: float,
        clock: Callable[[], float],
        busy_clock: Callable[[], float],
        sleep: Callable[[float], object],
        burst_s: float = 0.1,
    ) -> None:
        self._clock, self._busy_clock, self._sleep = clock, busy_clock, sleep
        self._burst_s = burst_s
        self._share = _checked(share)
        self._now, self._busy = clock(), busy_clock()
        self._tokens = burst_s
        self._samples: deque[tuple[float, float]] = deque([(self._now, self._busy)])
        self._granted_s = self._now

    @property
    def share(self) -> float:
        """The granted share."""
        return self._share

    def set_share(self, share: float) -> None:
        """Grant another share from now on; time before now is settled at the old one."""
        self._settle()
        if share != self._share:
            self._share = _checked(share)
            self._samples.append((self._now, self._busy))
            self._granted_s = self._now

    def busy_s(self) -> float:
        """Busy seconds consumed so far, by the busy clock."""
        return self._busy_clock()

    def excuse(self, seconds: float) -> None:
        """Take ``seconds`` of consumption off the debt, not off :meth:`achieved`.

        For work beside the job (loading the model of a hot swap), which must not stall the job itself.
        """
        self._tokens = min(self._burst_s, self._tokens + seconds)

    def owed_s(self) -> float:
        """Wall seconds to rest before the next step, 0 when it may start now.

        Ask after waiting for other reasons too (no frame to analyse): the bucket is only capped when asked.
        """
        self._settle()
        owed = -self._tokens / self._share
        return 0.0 if self._share >= 1.0 or owed < _SHORTEST_REST_S else owed

    def pace(self) -> float:
        """Rest until the consumption is paid for; returns the seconds rested. Call it between two steps."""
        start = self._clock()
        while (owed := self.owed_s()) > 0.0:
            self._sleep(owed)
        return self._clock() - start

    def achieved(self, window_s: float | None = None) -> float | None:
        """Busy share of about the last ``window_s`` seconds; None before anything was measured.

        Without a window: of the last ten seconds, and nothing from before the present share was granted.
        """
        self._settle()
        since = self._now - window_s if window_s is not None else max(self._now - _WINDOW_S, self._granted_s)
        start = self._samples[0]
        for sample in reversed(self._samples):
            start = sample
            if sample[0] <= since:
                break
        elapsed = self._now - start[0]
        return (
            None if elapsed < (_SAMPLE_S if window_s is not None else _LEAST_S) else (self._busy - start[1]) / elapsed
        )

    def _settle(self) -> None:
        now, busy = self._clock(), self._busy_clock()
        # At share 1 there is no debt: processor time of helper threads may run ahead of wall time.
        floor = 0.0 if self._share >= 1.0 else float("-inf")
        tokens = self._tokens + self._share * (now - self._now) - (busy - self._busy)
        self._tokens = max(floor, min(self._burst_s, tokens))
        self._now, self._busy = now, busy
        if now - self._samples[-1][0] >= _SAMPLE_S:
            self._samples.append((now, busy))
            while self._samples[0][0] < now - _HISTORY_S:
                self._samples.popleft()


def _checked(share: float) -> float:
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must be in (0, 1], got {share}")
    return share
