"""A procedural street camera: endless, deterministic in (seed, frame index), with known truth.

Positions are cheap and pixels are made only when asked for, crops without the frame around them.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from executor.streams import figures
from executor.streams.camera import Camera, lamp_pool, light_of
from executor.streams.drift import DriftSchedule, SceneState
from executor.streams.render import Item, Renderer
from executor.streams.traffic import Track, Traffic
from protocol.errors import InputError
from protocol.schema import CitySource

# A box that is smaller, or that nearer road users hide by more than this part, is not labelled.
MIN_BOX_WIDTH, MIN_BOX_HEIGHT = 8, 16
MAX_HIDDEN = 0.5


class CityFrame:
    """One frame of a city (see executor.streams.frames.Frame)."""

    def __init__(self, city: City, index: int, state: SceneState, items: list[Item]) -> None:
        self.index = index
        self.time_s = index / city.fps
        self.conditions = state.words
        self._city, self._state, self._items = city, state, items
        self.boxes, self.labels = city.truth(items)

    def crops(self, px: int) -> NDArray[np.uint8]:
        """Square RGB crops of the objects, uint8 (n, px, px, 3), in the order of ``boxes``."""
        crops = np.empty((len(self.boxes), px, px, 3), np.uint8)
        reaches = self._city.reaches(self._items)
        for number, box in enumerate(self.boxes.astype(np.intp).tolist()):
            near = [item for item, (x0, y0, x1, y1) in zip(self._items, reaches, strict=True)
                    if x0 < box[2] and x1 > box[0] and y0 < box[3] and y1 > box[1]]  # fmt: skip
            crops[number] = self._city.renderer.compose(near, self._state, self.index, tuple(box), px)
        return crops

    def image(self) -> NDArray[np.uint8]:
        """The whole frame, RGB uint8 (height, width, 3)."""
        camera = self._city.camera
        return self._city.renderer.compose(
            self._items, self._state, self.index, (0, 0, camera.width, camera.height), None
        )


class City:
    """A city as a FrameSource. Raises InputError for classes that a city does not have and for a bad drift schedule."""

    def __init__(self, source: CitySource, classes: tuple[str, ...], fps: float) -> None:
        unknown = [name for name in classes if name not in figures.CLASSES]
        if unknown:
            raise InputError(
                f"classes: a city has no {', '.join(map(repr, unknown))}; allowed: {', '.join(figures.CLASSES)}"
            )
        self.fps, self.classes = fps, classes
        self.camera = Camera(source.width, source.height)
        self.schedule = DriftSchedule(source)
        self._traffic = Traffic(source.seed, self.camera, source.num_objects, classes, self.schedule)
        self._seed = source.seed
        self._renderer: Renderer | None = None
        self._ids = {name: number for number, name in enumerate(classes)}

    @property
    def renderer(self) -> Renderer:
        """Made on first use: a reader of boxes alone never pays for the background."""
        if self._renderer is None:
            self._renderer = Renderer(self._seed, self.camera)
        return self._renderer

    def frame(self, index: int) -> CityFrame:
        """The frame at ``index``, of any sign."""
        time_s = index / self.fps
        state = self.schedule.state(time_s)
        fog, lamps = light_of(state).fog, light_of(state).lamps
        ambient = light_of(state).ambient[1]
        placed = sorted(((track.place(time_s), track) for track in self._traffic.tracks(time_s)),
                        key=lambda pair: -pair[0][1])  # fmt: skip
        items = [self._item(track, place, time_s, fog, lamps, ambient) for place, track in placed if place[1] > 2]
        return CityFrame(self, index, state, items)

    def tracks_at(self, time_s: float) -> list[Track]:
        """The road users on their way at a stream time, in view or not."""
        return self._traffic.tracks(time_s)

    def close(self) -> None:
        """Drop the caches."""
        self._renderer = None

    def truth(self, items: list[Item]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Boxes (whole pixels, inside the frame), and labels of those that can be seen, nearest first."""
        width, height = self.camera.width, self.camera.height
        boxes: list[tuple[int, int, int, int]] = []
        labels: list[int] = []
        nearer: list[tuple[int, int, int, int]] = []
        for item in reversed(items):
            x0, y0, x1, y1 = item.box()
            box = (
                max(math.floor(x0), math.ceil(item.clip[0]), 0), max(math.floor(y0), 0),
                min(math.ceil(x1), math.floor(item.clip[1]), width), min(math.ceil(y1), height),
            )  # fmt: skip
            wide, high = box[2] - box[0], box[3] - box[1]
            if wide <= 0 or high <= 0:
                continue
            whole = (x1 - x0) * (y1 - y0)
            big = wide >= MIN_BOX_WIDTH and high >= MIN_BOX_HEIGHT and wide * high > 0.3 * whole
            if big and _hidden(box, nearer) <= MAX_HIDDEN:
                boxes.append(box)
                labels.append(self._ids[item.name])
            nearer.append(box)
        return np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64)

    @staticmethod
    def reaches(items: list[Item]) -> list[tuple[float, float, float, float]]:
        """The area of the picture that each item can touch, shadow and glow included."""
        found = []
        for item in items:
            sprite = item.sprite
            scale = item.ppm / sprite.ppm
            half = max(sprite.origin[0], sprite.size[1] - sprite.origin[0]) * scale
            top = item.row - sprite.origin[1] * scale
            found.append((item.column - half, top, item.column + half, top + sprite.size[0] * scale))
        return found

    def _item(
        self, track: Track, place: tuple[float, float], time_s: float, fog: float, lamps: float, ambient: float
    ) -> Item:
        x, z = place
        column, row, ppm = self.camera.ground(x, z)
        # What is seen of a road user depends on the line of sight, not only on where it heads.
        seen = (track.lane.heading - math.degrees(math.atan2(x, z))) % 360
        flip = seen > 180
        step = figures.HEADING_STEP[track.name]
        heading = round((360 - seen if flip else seen) / step) * step
        gait = (time_s * 1.7 + track.rhythm) % 1.0
        gain = 1.0
        if lamps > 0:
            gain += lamps * lamps * 0.5 * lamp_pool(x, z) / ambient
        sunlit = 1.0 if track.lane.across or x > -6 else 1 - 0.35 * (1 - lamps)
        return Item(
            track.name, track.shape, heading, int(gait * figures.NUM_PHASES[track.name]), flip, column, row, ppm,
            track.tints,
            gain * sunlit, 1 - math.exp(-fog * z),
            self.camera.cross_road_window() if track.lane.across else (0.0, float(self.camera.width)),
        )  # fmt: skip


def _hidden(box: tuple[int, int, int, int], nearer: list[tuple[int, int, int, int]]) -> float:
    """The largest part of ``box`` that one nearer box covers."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    worst = 0.0
    for other in nearer:
        wide = min(box[2], other[2]) - max(box[0], other[0])
        high = min(box[3], other[3]) - max(box[1], other[1])
        if wide > 0 and high > 0:
            worst = max(worst, wide * high / area)
    return worst
