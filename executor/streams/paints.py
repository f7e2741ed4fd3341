"""Materials of the figures."""

from __future__ import annotations

from typing import NamedTuple

Colour = tuple[float, float, float]


class Paint(NamedTuple):
    """A material: ``tint`` 0 = fixed ``colour``; 1 or 2 = the track's colour, darkened by ``colour[0]``."""

    colour: Colour
    tint: int = 0


GLASS, TYRE, DARK = Paint((0.16, 0.20, 0.25)), Paint((0.07, 0.07, 0.08)), Paint((0.12, 0.12, 0.13))
CHROME, PLATE, SKIN = Paint((0.55, 0.56, 0.58)), Paint((0.85, 0.84, 0.72)), Paint((0.78, 0.58, 0.46))
BODY, TRIM = Paint((1.0, 0, 0), 1), Paint((1.0, 0, 0), 2)
DIM_TRIM = Paint((0.7, 0, 0), 2)
WHITE_LAMP, RED_LAMP = Paint((0.92, 0.92, 0.85)), Paint((0.65, 0.08, 0.06))
HEADLIGHT: Colour = (1.0, 0.95, 0.80)
TAIL: Colour = (0.95, 0.10, 0.06)
