"""Where things appear and how they are lit: camera geometry, light and weather of a scene state.

World axes: X metres to the right of the camera, Z metres away from it, heights in metres above the ground. A main
road runs away from the camera and a second road crosses it; pavements and house fronts line both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from executor.streams.drift import SceneState
from executor.streams.paints import Colour

CAMERA_HEIGHT = 5.0
ROAD_LEFT, ROAD_RIGHT = -9.0, 4.0
FRONT_LEFT, FRONT_RIGHT = -13.0, 8.0
CROSS_NEAR, CROSS_FAR = 22.0, 30.0


@dataclass(frozen=True)
class Camera:
    """A pinhole camera ``CAMERA_HEIGHT`` metres up, looking along +Z, for frames of width x height pixels."""

    width: int
    height: int

    @property
    def focal(self) -> float:
        return self.height * 1.66

    @property
    def centre(self) -> float:
        """Column of the vanishing point."""
        return self.width * 0.54

    @property
    def horizon(self) -> float:
        return self.height * 0.30

    def ground(self, x: float, z: float) -> tuple[float, float, float]:
        """Column, row and pixels per metre at a point of the ground."""
        ppm = self.focal / z
        return self.centre + x * ppm, self.horizon + CAMERA_HEIGHT * ppm, ppm

    @property
    def nearest(self) -> float:
        """Z at which the ground leaves the picture at the bottom."""
        return CAMERA_HEIGHT * self.focal / (self.height - self.horizon)

    def cross_road_window(self) -> tuple[float, float]:
        """Columns between the near houses, where the crossing road can be seen."""
        return (
            max(self.centre + FRONT_LEFT / CROSS_NEAR * self.focal, 0.0),
            min(self.centre + FRONT_RIGHT / CROSS_NEAR * self.focal, float(self.width)),
        )


class Light(NamedTuple):
    """How surfaces are lit: ``ambient`` RGB gain, ``lamps`` 0..1, ``shadow`` 0..1, ``fog`` per metre and its colour."""

    ambient: Colour
    lamps: float
    shadow: float
    fog: float
    fog_colour: Colour
    noise: float
    rain: float
    snow: float


_AMBIENT: dict[str, Colour] = {"day": (1.0, 1.0, 1.0), "dusk": (0.62, 0.47, 0.44), "night": (0.42, 0.42, 0.50)}
_LAMPS = {"day": 0.0, "dusk": 0.55, "night": 1.0}
_NOISE = {"day": 2.5, "dusk": 5.0, "night": 7.0}


@lru_cache(maxsize=64)
def light_of(state: SceneState) -> Light:
    """Light and weather of a state. Fog and snow take contrast, rain and cloud take the shadows."""

    def of(table: dict[str, float]) -> float:
        return sum(table[level] * state.light.of(level) for level in table)

    rain, fog, snow = (state.weather.of(name) for name in ("rain", "fog", "snow"))
    lamps = of(_LAMPS)
    cloud = min(rain + fog + snow, 1.0)
    dull = 1.0 - 0.22 * cloud
    red, green, blue = (
        dull * sum(_AMBIENT[level][channel] * state.light.of(level) for level in _AMBIENT) for channel in range(3)
    )
    grey = 0.74 * (1 - lamps) + 0.15 * lamps
    return Light(
        ambient=(red, green, blue),
        lamps=min(lamps + 0.35 * fog + 0.2 * rain, 1.0),
        shadow=0.5 * (1 - 0.75 * cloud) * (1 - 0.7 * lamps),
        fog=0.0095 * fog + 0.005 * snow + 0.006 * rain + 0.0012,
        fog_colour=(grey, grey * 1.01, grey * (1.03 + 0.1 * lamps)),
        noise=of(_NOISE) + 1.5 * cloud,
        rain=rain,
        snow=snow,
    )


def lamp_pool(x: float, z: float) -> float:
    """Light of the street lamps at a ground point, 0..about 1."""
    along = math.exp(-((((z - 4.0) % 14.0) - 7.0) ** 2) / 14.0)
    return along * (math.exp(-(((x + 10.0) / 5.0) ** 2)) + math.exp(-(((x - 5.0) / 4.0) ** 2)))
