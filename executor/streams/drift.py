"""When and how a city changes: a schedule of drift events and the state of the scene at a time.

Before time 0 the scene is always in its base state (commute, day, clear, summer), so that a first
model can be trained on mild conditions whatever the schedule says.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

from executor.streams.hashing import generator
from protocol.errors import InputError
from protocol.schema import CitySource, DriftEvent, DriftKind

LEVELS: dict[DriftKind, tuple[str, ...]] = {
    "class_mix": ("commute", "freight", "weekend", "festival"),
    "light": ("day", "dusk", "night"),
    "weather": ("clear", "rain", "fog", "snow"),
    "appearance": ("summer", "winter", "fleet"),
}
"""Levels of each kind; the first one is the base."""

_KINDS: tuple[DriftKind, ...] = ("class_mix", "light", "weather", "appearance")

# Transitions are drawn in this many steps, so that a handful of graded backgrounds serves a whole transition.
_STEPS = 8


@dataclass(frozen=True)
class Blend:
    """One kind of drift at a time: ``weight`` of the way from level ``old`` to level ``new``."""

    old: str
    new: str
    weight: float

    def of(self, level: str) -> float:
        """How much of ``level`` is present, 0..1."""
        return (self.new == level) * self.weight + (self.old == level) * (1.0 - self.weight)

    @property
    def words(self) -> str:
        """The level that prevails."""
        return self.new if self.weight >= 0.5 else self.old


@dataclass(frozen=True)
class SceneState:
    """All four kinds at a time. Hashable: it is the key of graded backgrounds."""

    class_mix: Blend
    light: Blend
    weather: Blend
    appearance: Blend

    @property
    def words(self) -> str:
        """For people: "night, rain, freight, winter"."""
        return ", ".join((self.light.words, self.weather.words, self.class_mix.words, self.appearance.words))


BASE = SceneState(**{kind: Blend(LEVELS[kind][0], LEVELS[kind][0], 1.0) for kind in _KINDS})


class DriftSchedule:
    """The events of one city, given or derived from its seed, and the state they lead to.

    Raises InputError for an event with an unknown level, a negative or non-finite time.
    """

    def __init__(self, source: CitySource) -> None:
        self._seed = source.seed
        self._period_s = 0.0 if source.drift else source.drift_period_s
        for number, event in enumerate(source.drift):
            _check(event, number)
        self._events: list[DriftEvent] = []
        self._times: list[float] = []
        self._after: list[dict[DriftKind, tuple[str, DriftEvent]]] = []
        self._latest: dict[DriftKind, str] = {kind: LEVELS[kind][0] for kind in _KINDS}
        for event in sorted(source.drift, key=lambda item: item.at_s):
            self._append(event)

    def events_until(self, time_s: float) -> tuple[DriftEvent, ...]:
        """All events that begin at or before ``time_s``, in order."""
        self._extend(time_s)
        return tuple(self._events[: bisect.bisect_right(self._times, time_s)])

    def state(self, time_s: float) -> SceneState:
        """The state of the scene at ``time_s`` seconds of stream time."""
        if time_s < 0:
            return BASE
        self._extend(time_s)
        position = bisect.bisect_right(self._times, time_s)
        if position == 0:
            return BASE
        latest = self._after[position - 1]
        blends = {}
        for kind in _KINDS:
            if kind not in latest:
                blends[kind] = getattr(BASE, kind)
                continue
            old, event = latest[kind]
            progress = 1.0 if event.over_s == 0 else min((time_s - event.at_s) / event.over_s, 1.0)
            blends[kind] = Blend(old, event.to, math.floor(progress * _STEPS) / _STEPS)
        return SceneState(**blends)

    def _append(self, event: DriftEvent) -> None:
        latest = dict(self._after[-1]) if self._after else {}
        latest[event.kind] = (self._latest[event.kind], event)
        self._latest[event.kind] = event.to
        self._events.append(event)
        self._times.append(event.at_s)
        self._after.append(latest)

    def _extend(self, time_s: float) -> None:
        while self._period_s > 0 and (not self._times or self._times[-1] <= time_s):
            number = len(self._events) + 1
            draw = generator(self._seed, 0xD81F7, number)
            last = self._events[-1].kind if self._events else None
            kind = draw.choice([name for name in _KINDS if name != last])
            level = draw.choice([name for name in LEVELS[kind] if name != self._latest[kind]])
            at_s = self._period_s * (number + draw.uniform(-0.25, 0.25))
            self._append(DriftEvent(kind=kind, at_s=at_s, to=level, over_s=min(5.0, self._period_s / 4)))


def _check(event: DriftEvent, number: int) -> None:
    where = f"source.drift[{number}]"
    if event.to not in LEVELS[event.kind]:
        allowed = ", ".join(LEVELS[event.kind])
        raise InputError(f"{where}.to: {event.to!r} is no level of {event.kind}; allowed: {allowed}")
    if not math.isfinite(event.at_s) or event.at_s < 0:
        raise InputError(
            f"{where}.at_s: {event.at_s} must be a finite time from 0 on (before 0 the scene is in its base state)"
        )
