"""Pixels: road users composed onto the graded background, for a whole frame or for boxes only.

Both go through ``Renderer.compose``; a box drawn at native size is the same pixels as that part of the whole frame.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from executor.streams import canvas, figures
from executor.streams.camera import Camera, Light, light_of
from executor.streams.canvas import Sprite
from executor.streams.drift import SceneState
from executor.streams.hashing import mix
from executor.streams.paints import Colour
from executor.streams.resize import resize_planes
from executor.streams.scene import Background

_TILE_SLACK = 192
_OVERSAMPLED_PX = 40
_CACHE_BYTES = 24_000_000


class Item(NamedTuple):
    """A figure at its place in the picture, nearest last.

    ``column``, ``row``: ground point in pixels; ``ppm``: pixels per metre there; ``gain``: local light;
    ``veil``: part taken by fog; ``clip``: columns outside which houses hide it.
    """

    name: str
    shape: str
    heading: int
    phase: int
    flip: bool
    column: float
    row: float
    ppm: float
    tints: tuple[Colour, Colour]
    gain: float
    veil: float
    clip: tuple[float, float]

    @property
    def sprite(self) -> Sprite:
        return figures.sprite(self.name, self.shape, self.heading, self.phase)

    def box(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 of the covered part in frame pixels, before clipping."""
        sprite = self.sprite
        scale = self.ppm / sprite.ppm
        x0, y0, x1, y1 = sprite.body
        left, right = (x0 - sprite.origin[0]) * scale, (x1 - sprite.origin[0]) * scale
        if self.flip:
            left, right = -right, -left
        top, bottom = (y0 - sprite.origin[1]) * scale, (y1 - sprite.origin[1]) * scale
        return self.column + left, self.row + top, self.column + right, self.row + bottom


@lru_cache(maxsize=600)
def _level(name: str, shape: str, heading: int, phase: int, level: int) -> NDArray[np.uint8]:
    return canvas.level_of(figures.sprite(name, shape, heading, phase), level)


class Renderer:
    """Draws the frames of one city. ``seed`` names its noise; ``background`` is shared by all its frames."""

    def __init__(self, seed: int, camera: Camera) -> None:
        self._seed, self._camera = seed, camera
        self.background = Background(seed, camera)
        shape = (camera.height + _TILE_SLACK, camera.width + _TILE_SLACK)
        rng = np.random.default_rng(mix(seed, 0x9015E))
        self._noise = np.clip(rng.standard_normal((3, *shape), dtype=np.float32) * 32, -127, 127).astype(np.int8)
        self._rain = _streaks(rng, shape)
        self._snow = _flakes(rng, shape)
        self._tinted: OrderedDict[tuple[object, ...], NDArray[np.uint32]] = OrderedDict()
        self._tinted_bytes = 0

    def compose(
        self, items: list[Item], state: SceneState, index: int, region: tuple[int, int, int, int], px: int | None
    ) -> NDArray[np.uint8]:
        """The pixels of ``region`` (x0, y0, x1, y1 inside the frame) with ``items`` far to near.

        ``px`` None: native size, (y1 - y0, x1 - x0, 3). Otherwise (px, px, 3): larger regions are drawn near the
        target size, smaller ones at native size and then enlarged, as a crop of a camera's frame would be.
        """
        x0, y0, x1, y1 = region
        # Small crops are drawn twice as large and averaged: drawn directly they would alias.
        most = max(x1 - x0, y1 - y0) if px is None else (2 * px if px <= _OVERSAMPLED_PX else px)
        width, height = min(most, x1 - x0), min(most, y1 - y0)
        columns = x0 + (np.arange(width) + 0.5) * ((x1 - x0) / width)
        rows = y0 + (np.arange(height) + 0.5) * ((y1 - y0) / height)
        light = light_of(state)
        picture = self._ground(state, rows, columns, region)
        for item in items:
            self._paste(picture, item, light, rows, columns)
        self._sensor(picture, light, index, rows, columns, (x1 - x0) / width, (y1 - y0) / height)
        np.clip(picture, 0, 255, out=picture)
        if px is not None:
            picture = resize_planes(picture, px, px)
        return np.ascontiguousarray(picture.transpose(1, 2, 0).astype(np.uint8))

    def _ground(
        self,
        state: SceneState,
        rows: NDArray[np.floating],
        columns: NDArray[np.floating],
        region: tuple[int, int, int, int],
    ) -> NDArray[np.float32]:
        packed = self.background.graded(state)
        x0, y0, x1, y1 = region
        if len(rows) == y1 - y0 and len(columns) == x1 - x0:
            part = packed[y0:y1, x0:x1]
        else:
            part = packed.take(rows.astype(np.intp), 0).take(columns.astype(np.intp), 1)
        part = np.ascontiguousarray(part)
        return part.view(np.uint8).reshape(*part.shape, 4)[..., :3].transpose(2, 0, 1).astype(np.float32, order="C")

    def _paste(
        self,
        picture: NDArray[np.float32],
        item: Item,
        light: Light,
        rows: NDArray[np.floating],
        columns: NDArray[np.floating],
    ) -> None:
        sprite = item.sprite
        scale = item.ppm / sprite.ppm
        sprite_height, sprite_width = sprite.size[0] * scale, sprite.size[1] * scale
        anchor = sprite.size[1] - sprite.origin[0] if item.flip else sprite.origin[0]
        left, top = item.column - anchor * scale, item.row - sprite.origin[1] * scale
        j0, j1 = columns.searchsorted((max(left, item.clip[0]), min(left + sprite_width, item.clip[1])))
        i0, i1 = rows.searchsorted((top, top + sprite_height))
        if j0 >= j1 or i0 >= i1:
            return
        step = min(rows[1] - rows[0], columns[1] - columns[0]) if min(len(rows), len(columns)) > 1 else 1.0
        wanted = math.log(scale / step) / math.log(canvas.LEVEL_RATIO)
        packed = self._coloured(item, light, min(max(math.floor(wanted + 0.5), 0), canvas.NUM_LEVELS - 1))
        high, wide = packed.shape
        across = ((columns[j0:j1] - left) * (wide / sprite_width)).astype(np.intp)
        if item.flip:
            across = wide - 1 - across
        down = ((rows[i0:i1] - top) * (high / sprite_height)).astype(np.intp)
        part = packed.take(down, 0, mode="clip").take(across, 1, mode="clip")
        planes = part.view(np.uint8).reshape(*part.shape, 4).transpose(2, 0, 1).astype(np.float32, order="C")
        target = picture[:, i0:i1, j0:j1]
        cover = planes[3] * np.float32(1 / 255)
        colour = planes[:3]
        gain = item.gain * (1 - item.veil)
        if abs(gain - 1) > 0.01:
            colour *= np.float32(gain)
        if item.veil > 0.02:
            for channel in range(3):
                colour[channel] += cover * np.float32(item.veil * light.fog_colour[channel] * 255)
        target *= 1 - cover
        target += colour

    def _coloured(self, item: Item, light: Light, level: int) -> NDArray[np.uint32]:
        key = (item.name, item.shape, item.heading, item.phase, level, item.tints, light)
        packed = self._tinted.get(key)
        if packed is None:
            layers = _level(item.name, item.shape, item.heading, item.phase, level)
            packed = canvas.tinted(layers, item.tints, light.ambient, light.shadow, light.lamps)
            self._tinted[key] = packed
            self._tinted_bytes += packed.nbytes
            while self._tinted_bytes > _CACHE_BYTES:
                self._tinted_bytes -= self._tinted.popitem(last=False)[1].nbytes
        else:
            self._tinted.move_to_end(key)
        return packed

    def _sensor(
        self,
        picture: NDArray[np.float32],
        light: Light,
        index: int,
        rows: NDArray[np.floating],
        columns: NDArray[np.floating],
        step_x: float,
        step_y: float,
    ) -> None:
        hashed = mix(self._seed, 0xF4A3E, index)
        dy, dx = hashed % _TILE_SLACK, (hashed >> 20) % _TILE_SLACK
        down, across = rows.astype(np.intp) + dy, columns.astype(np.intp) + dx
        native = step_x == 1.0 and step_y == 1.0

        def part(tile: NDArray[np.int8]) -> NDArray[np.int8]:
            if native:
                return tile[..., down[0] : down[-1] + 1, across[0] : across[-1] + 1]
            return tile.take(down, -2).take(across, -1)

        # Averaging n sensor pixels into one divides the noise by sqrt(n).
        picture += part(self._noise) * np.float32(light.noise / 32 / math.sqrt(step_x * step_y))
        if light.rain > 0.02:
            picture += part(self._rain) * np.float32(0.55 * light.rain)
        if light.snow > 0.02:
            picture += part(self._snow) * np.float32(1.1 * light.snow)


def _streaks(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.int8]:
    tile = np.zeros(shape, np.float32)
    for _ in range(shape[0] * shape[1] // 500):
        length, x, y = int(rng.integers(8, 22)), int(rng.integers(0, shape[1])), int(rng.integers(0, shape[0]))
        rows = np.arange(y, min(y + length, shape[0]))
        columns = np.clip(x - (rows - y) // 4, 0, shape[1] - 1)
        tile[rows, columns] += float(rng.uniform(30, 100))
    return np.clip(tile, 0, 127).astype(np.int8)


def _flakes(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.int8]:
    tile = np.zeros(shape, np.float32)
    for _ in range(shape[0] * shape[1] // 330):
        x, y, size = int(rng.integers(0, shape[1])), int(rng.integers(0, shape[0])), int(rng.integers(1, 4))
        tile[y : y + size, x : x + size] += float(rng.uniform(50, 120))
    return np.clip(tile, 0, 127).astype(np.int8)
