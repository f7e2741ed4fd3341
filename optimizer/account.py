"""Realised accuracy per stream and window, added up from telemetry. Pure."""

from __future__ import annotations

import msgspec

from protocol.events import StreamAccuracy


class Tally(msgspec.Struct):
    """Sums of one stream in one window; frames without objects are not scored."""

    accuracy_sum: float = 0.0
    num_scored: int = 0
    num_frames: int = 0
    num_analysed: int = 0
    num_dropped: int = 0
    num_objects: int = 0

    @property
    def accuracy(self) -> float | None:
        """Mean accuracy of the scored frames, None when there were none."""
        return self.accuracy_sum / self.num_scored if self.num_scored else None


class Account:
    """Tallies by (stream, window); closed windows are forgotten."""

    def __init__(self) -> None:
        self._tallies: dict[tuple[str, int], Tally] = {}

    def add(self, event: StreamAccuracy) -> None:
        tally = self._tallies.setdefault((event.stream_id, event.window), Tally())
        tally.accuracy_sum += event.accuracy_sum
        tally.num_scored += event.num_scored
        tally.num_frames += event.num_frames
        tally.num_analysed += event.num_analysed
        tally.num_dropped += event.num_dropped
        tally.num_objects += event.num_objects

    def peek(self, stream_id: str, window: int) -> Tally:
        """What has come in so far of a window."""
        return self._tallies.get((stream_id, window), Tally())

    def close(self, stream_id: str, window: int) -> Tally:
        """The tally of a window; it and all older ones of the stream are forgotten."""
        tally = self._tallies.get((stream_id, window), Tally())
        self._tallies = {k: v for k, v in self._tallies.items() if k[0] != stream_id or k[1] > window}
        return tally
