"""Events that must not be lost: kept and sent again until the optimizer acknowledges them. No input or output."""

from __future__ import annotations

from protocol.messages import CanaryDone, JobFailed, LabelsDone, RetrainDone, TrialsDone

LastingEvent = LabelsDone | TrialsDone | RetrainDone | CanaryDone | JobFailed


class Outbox:
    """Unacknowledged events in order. Ids count from 1 within one incarnation of the executor."""

    def __init__(self, resend_s: float = 1.0) -> None:
        self._resend_s = resend_s
        self._waiting: dict[int, LastingEvent] = {}
        self._sent_s: dict[int, float] = {}
        self._next_id = 1

    def __len__(self) -> int:
        return len(self._waiting)

    def next_id(self) -> int:
        """A fresh event id."""
        event_id, self._next_id = self._next_id, self._next_id + 1
        return event_id

    def add(self, event: LastingEvent) -> None:
        self._waiting[event.event_id] = event

    def acknowledge(self, event_id: int) -> None:
        """Forget the event; unknown ids (acknowledged twice) are harmless."""
        self._waiting.pop(event_id, None)
        self._sent_s.pop(event_id, None)

    def due(self, now: float) -> list[LastingEvent]:
        """Events to be sent at ``now``: new ones at once, others ``resend_s`` after their last sending."""
        return [e for i, e in self._waiting.items() if now - self._sent_s.get(i, -float("inf")) >= self._resend_s]

    def sent(self, event_id: int, now: float) -> None:
        """The event has left; an event that could not be sent stays due."""
        if event_id in self._waiting:
            self._sent_s[event_id] = now

    def hold_again(self) -> None:
        """Make everything due: the peer is a new one (reconnected or restarted)."""
        self._sent_s.clear()

    def clear(self) -> None:
        """Forget everything: nobody is left who could use it."""
        self._waiting.clear()
        self._sent_s.clear()

    def next_due_s(self) -> float:
        """When the next event is due; infinity when none waits."""
        if not self._waiting:
            return float("inf")
        return min(self._sent_s.get(i, -float("inf")) + self._resend_s for i in self._waiting)
