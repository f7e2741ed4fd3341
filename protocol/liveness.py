"""Who is there? A failure detector over messages of a peer's main loop.

A peer is *lost* when nothing came from it for ``silence_s``. It is *stuck* when messages do come but the
``loop_count`` in its heartbeats stands still for as long: something answers for it, its main loop does
not turn. Time is passed in, in seconds of one monotonic clock.
"""

from __future__ import annotations

from typing import Literal

import msgspec

PeerState = Literal["alive", "stuck", "lost"]


class _Seen(msgspec.Struct):
    heard_s: float
    turned_s: float
    loop_count: int


class Liveness:
    """Failure detector for any number of named peers; unknown peers count as lost."""

    def __init__(self, silence_s: float) -> None:
        """``silence_s``: silence after which a peer counts as lost; several heartbeat intervals, > 0."""
        if not silence_s > 0.0:
            raise ValueError(f"silence_s must be positive, got {silence_s}")
        self.silence_s = silence_s
        self._seen: dict[str, _Seen] = {}

    @property
    def peers(self) -> list[str]:
        return list(self._seen)

    def saw(self, peer: str, now: float, loop_count: int | None = None) -> None:
        """A message came from ``peer``. A heartbeat brings its ``loop_count``; other messages prove a turn too.

        A count that falls is a peer that started anew, and counts as a turn.
        """
        seen = self._seen.get(peer)
        if seen is None:
            self._seen[peer] = _Seen(now, now, -1 if loop_count is None else loop_count)
            return
        seen.heard_s = max(seen.heard_s, now)
        if loop_count is None or loop_count != seen.loop_count:
            seen.turned_s = max(seen.turned_s, now)
        if loop_count is not None:
            seen.loop_count = loop_count

    def state(self, peer: str, now: float) -> PeerState:
        seen = self._seen.get(peer)
        if seen is None or now - seen.heard_s > self.silence_s:
            return "lost"
        return "stuck" if now - seen.turned_s > self.silence_s else "alive"

    def silent(self, now: float) -> list[str]:
        """Peers that are lost, in the order in which they were first seen."""
        return [peer for peer in self._seen if self.state(peer, now) == "lost"]

    def stuck(self, now: float) -> list[str]:
        """Peers that are heard of and whose loop stands still."""
        return [peer for peer in self._seen if self.state(peer, now) == "stuck"]

    def silence(self, peer: str, now: float) -> float:
        """Seconds since the last message of ``peer``; infinite when it is unknown."""
        seen = self._seen.get(peer)
        return float("inf") if seen is None else max(0.0, now - seen.heard_s)

    def next_deadline(self) -> float | None:
        """When the next peer may become lost or stuck, for the time-out of a poll; None without peers."""
        times = [min(seen.heard_s, seen.turned_s) for seen in self._seen.values()]
        return min(times) + self.silence_s if times else None

    def forget(self, peer: str) -> None:
        self._seen.pop(peer, None)
