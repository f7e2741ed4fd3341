"""Sprites: small solids drawn by projection onto layered canvases, scaled to levels, tinted and lit.

A sprite is drawn once per (figure, view) in metres, then kept as float layers: fixed colour, two tint
layers (body paint or clothes), coverage, ground shadow and glow. Tint, light and scale come last, so that one
drawing serves every colour and every time of day.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from executor.streams.paints import Colour, Paint
from executor.streams.resize import halved, sampled_planes

Vec = tuple[float, float, float]

PITCH = math.radians(13.0)
"""The camera looks down; one angle for all sprites."""

NUM_LEVELS = 16
LEVEL_RATIO = 2.0**-0.25
_NUM_HALVINGS = (NUM_LEVELS - 1) // 4

# Layers of a sprite: fixed red, green, blue; tint 1; tint 2; coverage; shadow; glow red, green, blue.
_TINT, _COVER, _SHADOW, _GLOW, _NUM_LAYERS = 3, 5, 6, 7, 10

_SUN = np.array([0.45, 0.80, -0.40])
_SUN /= np.linalg.norm(_SUN)


class Sprite(NamedTuple):
    """``mips``: uint8 (10, h, w) layers, see ``to_bytes``, as drawn then halved again and again.

    ``origin``: pixel (column, row) of the ground below the centre.

    ``body``: x0, y0, x1, y1 of the covered part in pixels, shadow and glow excluded. ``ppm``: pixels per metre.
    """

    mips: tuple[NDArray[np.uint8], ...]
    origin: tuple[float, float]
    body: tuple[float, float, float, float]
    ppm: float

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels as drawn."""
        height, width = self.mips[0].shape[1:]
        return height, width


class Canvas:
    """Draws solids given in object metres: x forward, y up, z to the left of the heading.

    ``heading``: degrees in the image plane's ground, 0 = away from the camera, 90 = to the right.
    """

    def __init__(
        self, heading: float, ppm: float, size: tuple[float, float, float], margin: float = 0.35, glow: bool = True
    ) -> None:
        """``size``: half length, half width and height of what is to be drawn, metres; ``glow``: lamps will shine."""
        angle = math.radians(heading)
        self._sin, self._cos = math.sin(angle), math.cos(angle)
        self._ppm = ppm
        length, width, height = size
        across = abs(self._sin) * length + abs(self._cos) * width + margin
        deep = (abs(self._cos) * length + abs(self._sin) * width) * math.sin(PITCH) + margin * (1 if glow else 0.4)
        self._origin = (across * ppm, (height * math.cos(PITCH) + deep) * ppm)
        whole = 2**_NUM_HALVINGS
        rows, columns = self._origin[1] + deep * ppm, 2 * self._origin[0]
        shape = (math.ceil(rows / whole) * whole, math.ceil(columns / whole) * whole)
        self._layers = np.zeros((_NUM_LAYERS, *shape), np.float32)
        self._rows = np.arange(shape[0], dtype=np.float32)[:, None] + 0.5
        self._columns = np.arange(shape[1], dtype=np.float32)[None, :] + 0.5

    def depth(self, point: Vec) -> float:
        """Distance from the camera relative to the object's origin; larger is farther."""
        x, y, z = point
        return (x * self._cos + z * self._sin) * math.cos(PITCH) - y * math.sin(PITCH)

    @property
    def toward(self) -> bool:
        """Whether the front faces the camera."""
        return self._cos < 0

    def polygon(self, points: Sequence[Vec], paint: Paint, *, cull: bool = True, shade: float | None = None) -> bool:
        """A convex polygon, counter-clockwise seen from outside. Returns False when it faces away."""
        flat = [self._project(point) for point in points]
        area = sum(
            (bx - ax) * (cy - ay) - (cx - ax) * (by - ay)
            for (ax, ay), (bx, by), (cx, cy) in zip(flat[:1] * (len(flat) - 2), flat[1:-1], flat[2:], strict=True)
        )
        if abs(area) < 0.5 or (cull and area > 0):
            return False
        if area > 0:
            flat.reverse()
        self._blend(flat, paint, self._shade(points) if shade is None else shade)
        return True

    def capsule(self, start: Vec, end: Vec, radius: float, paint: Paint) -> None:
        """A rod with round ends; a ball when start and end agree."""
        (ax, ay), (bx, by) = self._project(start), self._project(end)
        r = max(radius * self._ppm, 0.6)
        window = self._window(min(ax, bx) - r, min(ay, by) - r, max(ax, bx) + r, max(ay, by) + r)
        if window is None:
            return
        rows, columns = self._rows[window[0]], self._columns[:, window[1]]
        dx, dy = bx - ax, by - ay
        length = dx * dx + dy * dy
        along = np.clip(((columns - ax) * dx + (rows - ay) * dy) / length, 0, 1) if length > 1e-6 else np.float32(0)
        offset_x, offset_y = columns - ax - along * dx, rows - ay - along * dy
        distance = np.sqrt(offset_x**2 + offset_y**2)
        cover = np.clip(r - distance + 0.5, 0, 1)
        shade = 0.82 + 0.18 * np.clip((offset_x - offset_y) / (1.4 * r), -1, 1)
        self._put(window, cover, paint, shade)

    def ring(self, centre: Vec, radius: float, thickness: float, paint: Paint) -> None:
        """A wheel rim in the plane of the heading."""
        x, y, z = centre
        turns = [2 * math.pi * k / 12 for k in range(13)]
        rim = [(x + radius * math.cos(t), y + radius * math.sin(t), z) for t in turns]
        for start, end in itertools.pairwise(rim):
            self.capsule(start, end, thickness, paint)

    def disc(self, centre: Vec, radius: float, paint: Paint) -> None:
        """A wheel: a filled circle in the plane of the heading."""
        x, y, z = centre
        turns = [2 * math.pi * k / 12 for k in range(12)]
        self.polygon(
            [(x + radius * math.cos(t), y + radius * math.sin(t), z) for t in turns], paint, cull=False, shade=1.0
        )

    def shadow(self, half_length: float, half_width: float, shift: float) -> None:
        """A soft patch on the ground, ``shift`` metres to the left of the picture (the sun stands right)."""
        centre_x, centre_y = self._origin[0] - shift * self._ppm, self._origin[1]
        across = math.hypot(half_length * self._sin, half_width * self._cos) + 0.5 * shift
        deep = math.hypot(half_length * self._cos, half_width * self._sin)
        rx, ry = across * self._ppm * 1.15, max((deep * math.sin(PITCH) + 0.12) * self._ppm * 1.2, 1.5)
        distance = ((self._columns - centre_x) / rx) ** 2 + ((self._rows - centre_y) / ry) ** 2
        self._layers[_SHADOW] = np.maximum(self._layers[_SHADOW], np.clip(1.6 - 1.6 * distance, 0, 1))

    def lamp(self, point: Vec, colour: Colour, radius: float, strength: float = 1.0) -> None:
        """Light that shows at night: a bright core and a halo of about ``radius`` metres."""
        x, y = self._project(point)
        r = radius * self._ppm
        window = self._window(x - 2.2 * r, y - 2.2 * r, x + 2.2 * r, y + 2.2 * r)
        if window is None:
            return
        square = ((self._columns[:, window[1]] - x) ** 2 + (self._rows[window[0]] - y) ** 2) / (r * r)
        glow = strength * (1.2 * np.exp(-14 * square) + 0.28 * np.exp(-2 * square))
        for channel in range(3):
            self._layers[_GLOW + channel][window] += glow * colour[channel]

    def finish(self) -> Sprite:
        """The finished sprite, rounded to bytes to keep many."""
        solid = np.argwhere(self._layers[_COVER] > 0.4)
        (top, left), (bottom, right) = solid.min(0), solid.max(0)
        body = (float(left), float(top), float(right + 1), float(bottom + 1))
        mips = [to_bytes(self._layers)]
        while len(mips) <= _NUM_HALVINGS:
            mips.append(halved(mips[-1]))
        return Sprite(tuple(mips), self._origin, body, self._ppm)

    def _project(self, point: Vec) -> tuple[float, float]:
        x, y, z = point
        across = x * self._sin - z * self._cos
        up = y * math.cos(PITCH) + (x * self._cos + z * self._sin) * math.sin(PITCH)
        return self._origin[0] + across * self._ppm, self._origin[1] - up * self._ppm

    def _shade(self, points: Sequence[Vec]) -> float:
        a, b, c = (np.array(point) for point in points[:3])
        # The object's axes are left-handed (z points left), which turns the cross product round.
        normal = np.cross(c - a, b - a)
        norm = float(np.linalg.norm(normal))
        if norm < 1e-9:
            return 1.0
        x, y, z = normal / norm
        view = np.array([x * self._sin - z * self._cos, y, x * self._cos + z * self._sin])
        return float(0.58 + 0.42 * max(float(view @ _SUN), 0.0) + 0.10 * y)

    def _window(self, x0: float, y0: float, x1: float, y1: float) -> tuple[slice, slice] | None:
        height, width = self._layers.shape[1:]
        left, right = max(int(x0) - 1, 0), min(int(x1) + 2, width)
        top, bottom = max(int(y0) - 1, 0), min(int(y1) + 2, height)
        return (slice(top, bottom), slice(left, right)) if left < right and top < bottom else None

    def _blend(self, flat: Sequence[tuple[float, float]], paint: Paint, shade: float) -> None:
        xs, ys = [x for x, _ in flat], [y for _, y in flat]
        window = self._window(min(xs), min(ys), max(xs), max(ys))
        if window is None:
            return
        rows, columns = self._rows[window[0]], self._columns[:, window[1]]
        inside: NDArray[np.floating] | None = None
        for (ax, ay), (bx, by) in zip(flat, [*flat[1:], flat[0]], strict=True):
            length = math.hypot(bx - ax, by - ay)
            if length < 1e-6:
                continue
            distance = (rows - ay) * ((ax - bx) / length) + (columns - ax) * ((by - ay) / length)
            inside = distance if inside is None else np.asarray(np.minimum(inside, distance))
        if inside is not None:
            self._put(window, np.clip(inside + 0.5, 0, 1), paint, shade)

    def _put(
        self,
        window: tuple[slice, slice],
        cover: NDArray[np.floating],
        paint: Paint,
        shade: float | NDArray[np.floating],
    ) -> None:
        layers = self._layers[:_SHADOW, window[0], window[1]]
        layers *= 1 - cover
        layers[_COVER] += cover
        lit = cover * shade
        if paint.tint:
            layers[_TINT + paint.tint - 1] += lit * paint.colour[0]
        else:
            for channel in range(3):
                layers[channel] += lit * paint.colour[channel]


def to_bytes(layers: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Layers with values 0..1 (glow: 0..2) as bytes, 128 for 1."""
    return np.asarray(np.clip(layers * 128 + 0.5, 0, 255), np.uint8)


def level_size(sprite: Sprite, level: int) -> tuple[int, int]:
    """(height, width) of the sprite at a level; level 0 is as drawn, each further one smaller by 2 ** -0.25."""
    ratio = LEVEL_RATIO**level
    height, width = sprite.size
    return max(round(height * ratio), 3), max(round(width * ratio), 3)


def level_of(sprite: Sprite, level: int) -> NDArray[np.uint8]:
    """The sprite's layers scaled to a level, uint8 (10, h, w)."""
    mip = sprite.mips[level // 4]
    size = level_size(sprite, level)
    if mip.shape[1:] == size:
        return mip
    return sampled_planes(mip, *size)


def tinted(
    level: NDArray[np.uint8], tints: tuple[Colour, Colour], light: Colour, shadow: float, glow: float
) -> NDArray[np.uint32]:
    """Colour and light a level: packed RGBA, premultiplied, so that glow may add light where nothing covers."""
    layers = level.astype(np.float32)
    layers *= 1 / 128
    cover = layers[_COVER]
    packed = np.empty((*cover.shape, 4), np.uint8)
    for channel in range(3):
        colour = layers[channel] + layers[_TINT] * tints[0][channel] + layers[_TINT + 1] * tints[1][channel]
        colour *= light[channel] * 255
        if glow > 0:
            colour += layers[_GLOW + channel] * (glow * 255)
        packed[..., channel] = np.minimum(colour, 255.0)
    packed[..., 3] = np.minimum((cover + (1 - cover) * layers[_SHADOW] * shadow) * 255.0, 255.0)
    return packed.view(np.uint32)[..., 0]
