"""Windows that are over: what was measured is set against what was predicted."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from optimizer.account import Account
from optimizer.emitter import Emitter
from optimizer.ports import ProfilerPort
from optimizer.state import SiteState, StreamState
from optimizer.summaries import stream_window
from protocol.events import StreamAccuracy, StreamWindow, WindowClosed
from protocol.schema import StreamSpec

# The last measurements of a window travel about this long after its end.
_CLOSING_S = 1.5


class _Closing(msgspec.Struct, frozen=True):
    """A window that is over; ``streams`` as they were at its end."""

    due_s: float
    window: int
    streams: tuple[StreamState, ...]


class Closer:
    """Holds measurements until their window is closed."""

    def __init__(self, specs: Mapping[str, StreamSpec], profiler: ProfilerPort, emit: Emitter) -> None:
        self._specs = specs
        self._profiler = profiler
        self._emit = emit
        self._account = Account()
        self._closings: list[_Closing] = []

    @property
    def waiting(self) -> bool:
        """Some window is still waiting for its last measurements."""
        return bool(self._closings)

    def measured(self, event: StreamAccuracy) -> None:
        """Accuracy measured while serving."""
        self._account.add(event)

    def shortfall(self, stream: StreamState, window: int) -> float:
        """How much worse than predicted a stream did in a window, as far as measurements have come in."""
        realised = self._account.peek(stream.stream_id, window).accuracy
        return 0.0 if realised is None or stream.predicted is None else stream.predicted - realised

    def window_over(self, state: SiteState, now: float) -> None:
        """The present window has ended; it is closed when its last measurements had time to arrive."""
        streams = tuple(msgspec.structs.replace(stream) for stream in state.streams.values())
        self._closings.append(_Closing(now + _CLOSING_S, state.window, streams))

    def close_due(self, now: float) -> None:
        """Close the windows whose time has come."""
        for closing in [c for c in self._closings if now >= c.due_s]:
            self._closings.remove(closing)
            streams = tuple(
                stream_window(stream, self._account.close(stream.stream_id, closing.window))
                for stream in closing.streams
            )
            for stream in streams:
                self._profiler.window_closed(stream.stream_id, closing.window, stream.predicted, stream.realised)
            self._emit.publish(
                WindowClosed(
                    window=closing.window,
                    streams=streams,
                    realised=self._mean(streams, lambda s: s.realised) or 0.0,
                    predicted=self._mean(streams, lambda s: s.predicted),
                )
            )

    def _mean(self, streams: tuple[StreamWindow, ...], value: Callable[[StreamWindow], float | None]) -> float | None:
        known = [(self._specs[s.stream_id].weight, v) for s in streams if (v := value(s)) is not None]
        total = sum(weight for weight, _ in known)
        return sum(weight * v for weight, v in known) / total if total else None
