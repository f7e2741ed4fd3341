"""Who is on the street when: spawn processes per lane, hashed by (seed, lane, slot), with no state to carry.

A lane's time is cut into slots; each slot spawns one road user or none. Its shape, colours and speed come from the
slot's own generator and from the scene state at the moment of spawning: any frame can be made without those before.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from executor.streams.camera import Camera
from executor.streams.drift import LEVELS, DriftSchedule, SceneState
from executor.streams.figures import SHAPES
from executor.streams.hashing import generator
from executor.streams.paints import Colour

MIX: dict[str, dict[str, float]] = {
    "commute": {"person": 0.24, "cyclist": 0.16, "car": 0.26, "van": 0.13, "bus": 0.09, "motorcycle": 0.12},
    "freight": {"person": 0.12, "cyclist": 0.06, "car": 0.16, "van": 0.40, "bus": 0.16, "motorcycle": 0.10},
    "weekend": {"person": 0.30, "cyclist": 0.30, "car": 0.14, "van": 0.04, "bus": 0.04, "motorcycle": 0.18},
    "festival": {"person": 0.44, "cyclist": 0.10, "car": 0.06, "van": 0.10, "bus": 0.22, "motorcycle": 0.08},
}
"""Share of each class among the road users that are visible, by level of class_mix."""

CONVERTED = 0.75
"""The part of the road users that follows a change of appearance."""

_SPEED = {"person": 1.35, "cyclist": 4.2, "car": 7.5, "van": 7.0, "bus": 6.0, "motorcycle": 7.8}

_PAINTS: dict[str, tuple[Colour, ...]] = {
    "summer": ((0.78, 0.79, 0.80), (0.70, 0.10, 0.10), (0.14, 0.24, 0.52), (0.16, 0.17, 0.19), (0.48, 0.50, 0.53),
               (0.86, 0.86, 0.84)),
    "winter": ((0.56, 0.56, 0.56), (0.30, 0.31, 0.33), (0.20, 0.20, 0.24), (0.46, 0.42, 0.38)),
    "fleet": ((0.90, 0.74, 0.10), (0.10, 0.50, 0.36), (0.92, 0.92, 0.90), (0.90, 0.42, 0.08), (0.30, 0.62, 0.78)),
}  # fmt: skip
_CLOTHES: dict[str, tuple[Colour, ...]] = {
    "summer": ((0.85, 0.85, 0.82), (0.80, 0.25, 0.22), (0.25, 0.45, 0.75), (0.90, 0.78, 0.30), (0.40, 0.65, 0.40)),
    "winter": ((0.12, 0.12, 0.14), (0.20, 0.22, 0.30), (0.28, 0.22, 0.18), (0.32, 0.33, 0.34)),
    "fleet": ((0.90, 0.45, 0.10), (0.80, 0.88, 0.20), (0.15, 0.15, 0.18), (0.85, 0.30, 0.50)),
}
_TROUSERS: tuple[Colour, ...] = ((0.20, 0.24, 0.36), (0.14, 0.14, 0.15), (0.42, 0.38, 0.30), (0.35, 0.36, 0.38))


@dataclass(frozen=True)
class Lane:
    """A straight way through the scene. ``start`` to ``end`` along Z (or along X when ``across``), at ``offset``."""

    start: float
    end: float
    offset: float
    across: bool
    members: tuple[str, ...]
    share: float

    @property
    def heading(self) -> float:
        """Degrees on the ground: 0 = away from the camera, 90 = to the right."""
        if self.across:
            return 90.0 if self.end > self.start else 270.0
        return 0.0 if self.end > self.start else 180.0


@dataclass(frozen=True)
class Track:
    """One road user's passage; all of it follows from its slot."""

    name: str
    shape: str
    lane: Lane
    begin_s: float
    end_s: float
    speed: float
    side: float
    tints: tuple[Colour, Colour]
    rhythm: float

    def place(self, time_s: float) -> tuple[float, float]:
        """(X, Z) on the ground, metres."""
        way = (time_s - self.begin_s) * self.speed
        along = self.lane.start + math.copysign(way, self.lane.end - self.lane.start)
        across = self.lane.offset + self.side
        return (along, across) if self.lane.across else (across, along)


def lanes_of(camera: Camera) -> tuple[Lane, ...]:
    """The lanes of the scene; ``share`` is the part of a class's members that use the lane."""
    near, far = camera.nearest - 3.0, 48.0
    motors = ("car", "van", "bus", "motorcycle")
    left = (camera.cross_road_window()[0] - camera.centre) / camera.focal * 24 - 7
    right = (camera.cross_road_window()[1] - camera.centre) / camera.focal * 28 + 7
    return (
        Lane(near, far, -0.2, False, motors, 0.26),
        Lane(far, near, -4.9, False, motors, 0.26),
        Lane(left, right, 24.2, True, motors, 0.24),
        Lane(right, left, 27.8, True, motors, 0.24),
        Lane(near, far, 3.1, False, ("cyclist",), 0.35),
        Lane(far, near, -8.1, False, ("cyclist",), 0.35),
        Lane(left, right, 22.7, True, ("cyclist",), 0.30),
        Lane(near, far, 5.6, False, ("person",), 0.25),
        Lane(far, near, -10.6, False, ("person",), 0.25),
        Lane(-12.0, 7.0, 18.6, True, ("person",), 0.20),
        Lane(7.0, -12.0, 19.6, True, ("person",), 0.15),
        Lane(right, left, 31.2, True, ("person",), 0.15),
    )


class Traffic:
    """The tracks of one city.

    ``num_objects`` is the mean number of road users present; ``classes`` limits which classes appear.
    """

    def __init__(
        self, seed: int, camera: Camera, num_objects: float, classes: tuple[str, ...], schedule: DriftSchedule
    ) -> None:
        self._seed, self._schedule, self._classes = seed, schedule, classes
        self._cache: dict[tuple[int, int], Track | None] = {}
        self._processes: list[tuple[Lane, str, float, float]] = []
        for lane in lanes_of(camera):
            for name in lane.members:
                if name in classes:
                    transit = abs(lane.end - lane.start) / (_SPEED[name] * 0.85)
                    # At most this many are ever wanted at once, so a slot is filled with a probability below 1.
                    most = max(levels[name] for levels in MIX.values()) * lane.share * num_objects * 1.3
                    self._processes.append((lane, name, transit, transit / (most * 1.15)))

    def tracks(self, time_s: float) -> list[Track]:
        """The road users that exist at ``time_s``, in a fixed order."""
        found = []
        for number, (_, _, transit, slot_s) in enumerate(self._processes):
            last = math.floor(time_s / slot_s)
            first = math.floor((time_s - transit) / slot_s) - 1
            for slot in range(first, last + 1):
                key = (number, slot)
                if key in self._cache:
                    track = self._cache[key]
                else:
                    track = self._spawn(number, slot)
                    self._remember(key, track)
                if track is not None and track.begin_s <= time_s < track.end_s:
                    found.append(track)
        return found

    def _remember(self, key: tuple[int, int], track: Track | None) -> None:
        if len(self._cache) >= 4096:
            for old in list(self._cache)[:1024]:
                del self._cache[old]
        self._cache[key] = track

    def _spawn(self, number: int, slot: int) -> Track | None:
        lane, name, _, slot_s = self._processes[number]
        draw = generator(self._seed, 0x7AF1C, number, slot)
        begin_s = (slot + draw.random()) * slot_s
        state = self._schedule.state(begin_s)
        present = self._share(state, name) / max(levels[name] for levels in MIX.values())
        if draw.random() >= present / 1.15:
            return None
        look = _look(draw, state)
        shape = draw.choice(SHAPES[name][look])
        rider = name in ("person", "cyclist", "motorcycle")
        palette = (_CLOTHES if rider else _PAINTS)[look]
        body = _vary(draw, draw.choice(palette))
        trim = _vary(draw, draw.choice(_TROUSERS if rider else _PAINTS[look]))
        speed = _SPEED[name] * draw.uniform(0.85, 1.15)
        return Track(
            name, shape, lane, begin_s, begin_s + abs(lane.end - lane.start) / speed, speed,
            draw.uniform(-0.9, 0.9) if name == "person" else draw.uniform(-0.35, 0.35), (body, trim), draw.random(),
        )  # fmt: skip

    def _share(self, state: SceneState, name: str) -> float:
        blend = state.class_mix
        total = sum(self._mixed(blend.old, blend.new, blend.weight, other) for other in self._classes)
        return self._mixed(blend.old, blend.new, blend.weight, name) / total

    @staticmethod
    def _mixed(old: str, new: str, weight: float, name: str) -> float:
        return (1 - weight) * MIX[old][name] + weight * MIX[new][name]


def _look(draw: random.Random, state: SceneState) -> str:
    """Summer, winter or fleet. A blend is a mixed population, not mixed figures, and some never change."""
    blend = state.appearance
    look = blend.new if draw.random() < blend.weight else blend.old
    return look if draw.random() < CONVERTED else LEVELS["appearance"][0]


def _vary(draw: random.Random, colour: Colour) -> Colour:
    gain = draw.uniform(0.85, 1.12)
    red, green, blue = (min(max(value * gain + draw.uniform(-0.03, 0.03), 0.02), 1.0) for value in colour)
    return red, green, blue
