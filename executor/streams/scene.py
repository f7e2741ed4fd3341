"""The empty street: a static background as albedo layers, graded by light and weather.

Axes and the lie of the roads are those of executor.streams.camera.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from executor.streams.camera import (
    CAMERA_HEIGHT,
    CROSS_FAR,
    CROSS_NEAR,
    FRONT_LEFT,
    FRONT_RIGHT,
    ROAD_LEFT,
    ROAD_RIGHT,
    Camera,
    Light,
    light_of,
)
from executor.streams.drift import SceneState
from executor.streams.hashing import mix
from executor.streams.paints import Colour

_ZEBRA = (17.3, 20.3)
_FAR = 130.0
Layer = NDArray[np.floating]


class Background:
    """The empty street: built once per (seed, size), graded per scene state."""

    def __init__(self, seed: int, camera: Camera) -> None:
        self._seed, self._camera = mix(seed, 0x5CE7E), camera
        self._rng = np.random.default_rng(self._seed)
        self._summer = self._build(winter=False)
        self._winter: dict[str, Layer] | None = None
        self._graded: dict[tuple[Light, float], NDArray[np.uint32]] = {}

    def graded(self, state: SceneState) -> NDArray[np.uint32]:
        """Packed RGBX of the whole frame, (height, width) uint32. The last few states are kept."""
        light, winter = light_of(state), state.appearance.of("winter")
        key = (light, winter)
        if key not in self._graded:
            if len(self._graded) >= 4:
                self._graded.pop(next(iter(self._graded)))
            layers = self._summer
            if winter > 0:
                if self._winter is None:
                    self._winter = self._build(winter=True)
                layers = {name: (1 - winter) * self._summer[name] + winter * self._winter[name] for name in layers}
            self._graded[key] = _grade(layers, light)
        return self._graded[key]

    def _build(self, *, winter: bool) -> dict[str, Layer]:
        camera, scale = self._camera, 2
        height, width = camera.height * scale, camera.width * scale
        across = ((np.arange(width, dtype=np.float32) + 0.5) / scale - camera.centre) / camera.focal
        down = ((np.arange(height, dtype=np.float32) + 0.5) / scale - camera.horizon) / camera.focal
        a, d = np.meshgrid(across, down)
        albedo = np.zeros((3, height, width), np.float32)
        depth = np.full((height, width), _FAR * 4, np.float32)
        glow = np.zeros((3, height, width), np.float32)
        wet = np.zeros((height, width), np.float32)
        sky = np.ones((height, width), np.float32)
        shade = np.ones((height, width), np.float32)
        self._skyline(a, d, albedo, depth, sky, glow)
        self._ground(a, d, albedo, depth, sky, wet, shade)
        self._fronts(a, d, albedo, depth, sky, glow, wet, shade)
        self._furniture(a, d, albedo, depth, sky, glow, wet, shade, winter=winter)
        layers = np.concatenate([albedo, glow, np.stack([1 / depth, wet, sky, shade, self._pool(a, d, depth, wet)])])
        small = (layers[:, ::2, ::2] + layers[:, ::2, 1::2] + layers[:, 1::2, ::2] + layers[:, 1::2, 1::2]) * 0.25
        return {
            "albedo": small[:3], "glow": small[3:6], "depth": 1 / small[6], "wet": small[7], "sky": small[8],
            "shade": small[9], "pool": small[10],
        }  # fmt: skip

    def _hash(self, cells: NDArray[np.int64], salt: int) -> Layer:
        """A float in [0, 1) per integer cell."""
        x = (cells.astype(np.uint64) + np.uint64(mix(self._seed, salt) >> 1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        return ((x ^ (x >> np.uint64(32))) >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)

    def _skyline(self, a: Layer, d: Layer, albedo: Layer, depth: Layer, sky: Layer, glow: Layer) -> None:
        cell = np.floor(a * _FAR / 9.0).astype(np.int64)
        top = 14 + 26 * self._hash(cell, 1)
        rise = CAMERA_HEIGHT - d * _FAR
        mask = (rise < top) & (d < 0.06)
        tone = 0.42 + 0.18 * self._hash(cell, 2)
        for channel, tint in enumerate((0.95, 1.0, 1.1)):
            albedo[channel][mask] = (tone * tint)[mask]
        window = (np.floor(rise / 1.1).astype(np.int64) * 7919) ^ np.floor(a * _FAR / 1.0).astype(np.int64)
        lit = mask & (self._hash(window, 3) > 0.80)
        glow[0][lit], glow[1][lit], glow[2][lit] = 0.30, 0.26, 0.16
        depth[mask], sky[mask] = _FAR, 0.0

    def _ground(self, a: Layer, d: Layer, albedo: Layer, depth: Layer, sky: Layer, wet: Layer, shade: Layer) -> None:
        z = CAMERA_HEIGHT / np.maximum(d, 1e-3)
        mask = z < _FAR
        x = a * z
        grain = self._rng.standard_normal(a.shape).astype(np.float32)
        coarse = self._hash(np.floor(x * 1.3).astype(np.int64) * 4099 + np.floor(z * 0.9).astype(np.int64), 4)
        cross = (z > CROSS_NEAR) & (z < CROSS_FAR)
        main = (x > ROAD_LEFT) & (x < ROAD_RIGHT)
        road = main | cross
        tone = np.where(road, 0.30 + 0.015 * coarse, 0.52 + 0.04 * coarse) + 0.012 * grain
        slab = (((x % 0.9) < 0.05) | ((z % 0.9) < 0.06)) & ~road
        tone = np.where(slab, tone - 0.06, tone)
        edge = np.minimum(np.abs(x - ROAD_LEFT), np.abs(x - ROAD_RIGHT)) < 0.14
        kerb = (edge & ~cross) | ((np.minimum(np.abs(z - CROSS_NEAR), np.abs(z - CROSS_FAR)) < 0.2) & ~main)
        tone = np.where(kerb, 0.66, tone)
        white = main & ~cross & (np.abs(x + 2.5) < 0.09) & ((z % 4.0) < 2.2)
        white |= main & ~cross & ((np.abs(x + 7.3) < 0.07) | (np.abs(x - 2.3) < 0.07))
        zebra = main & (z > _ZEBRA[0]) & (z < _ZEBRA[1])
        white = (white & ~zebra) | (zebra & ((x % 1.1) < 0.55))
        white |= cross & (np.abs(z - 26.0) < 0.10) & ((x % 3.0) < 1.7) & ~main
        white |= main & (np.abs(z - 16.4) < 0.2) & (x > -2.4)
        tone = np.where(white, 0.80 + 0.03 * grain, tone)
        lane = main & ~cross & ~white & ((x < -7.3) | (x > 2.3))
        tint = (np.where(lane, 1.25, 1.0), np.where(lane, 0.82, 1.0), np.where(lane, 0.78, 1.02))
        for channel in range(3):
            albedo[channel][mask] = (tone * tint[channel])[mask]
        depth[mask], sky[mask] = z[mask], 0.0
        wet[mask] = np.where(road, 1.0, 0.6)[mask]
        # The houses on the left throw the shadow; it ends in the road and is open at the crossing.
        cast = 1 / (1 + np.exp(np.clip((x + 6.5) * 3, -30, 30))) * (1 - cross * 0.9)
        shade[mask] = (1 - cast)[mask]

    def _fronts(
        self, a: Layer, d: Layer, albedo: Layer, depth: Layer, sky: Layer, glow: Layer, wet: Layer, shade: Layer
    ) -> None:
        for side, front in ((-1, FRONT_LEFT), (1, FRONT_RIGHT)):
            facing = a * side > 1e-4
            z = np.where(facing, front / np.where(facing, a, side), _FAR * 9).astype(np.float32)
            corner = (z > CROSS_NEAR - 2) & (z < CROSS_FAR + 2.5)
            # Between the near and the far houses the view is open up to the fronts along the crossing road.
            far_plane = np.float32(CROSS_FAR + 2.5)
            plane = np.where(corner, far_plane, z)
            along = np.where(corner, np.abs(a) * far_plane - abs(front) + 200 + 3, z)
            rise = CAMERA_HEIGHT - d * plane
            house = np.floor(along / 10.5).astype(np.int64) * 2 + (side > 0)
            top = 10.0 + 9.0 * self._hash(house, 5)
            mask = facing & (rise > 0) & (rise < top) & (plane < _FAR)
            self._paint_front(mask, along, rise, house, top, side, albedo, glow, corner)
            depth[mask], sky[mask], wet[mask] = plane[mask], 0.0, 0.0
            shade[mask] = np.where(corner, 0.9, 0.62 if side < 0 else 1.0)[mask]

    def _paint_front(
        self, mask: NDArray[np.bool_], along: Layer, rise: Layer, house: NDArray[np.int64], top: Layer, side: int,
        albedo: Layer, glow: Layer, corner: NDArray[np.bool_],
    ) -> None:  # fmt: skip
        hue, value = self._hash(house, 6), 0.45 + 0.35 * self._hash(house, 7)
        red = value * (1.0 + 0.22 * np.cos(6.28 * hue) * (hue > 0.3))
        blue = value * (0.80 - 0.16 * np.cos(6.28 * hue))
        colours = [red, value * 0.92, blue]
        storey, bay = np.floor(rise / 3.1), np.floor(along / 2.1)
        up, across = rise / 3.1 - storey, along / 2.1 - bay
        shop = rise < 3.1
        pane = ~shop & (up > 0.25) & (up < 0.80) & (across > 0.25) & (across < 0.75) & (rise < top - 0.9)
        frame = ~shop & (up > 0.20) & (up < 0.84) & (across > 0.20) & (across < 0.80) & ~pane & (rise < top - 0.9)
        show = shop & (up > 0.12) & (up < 0.72) & (across > 0.06) & (across < 0.94)
        sign = shop & (up > 0.76) & (up < 0.95)
        cornice = (rise > top - 0.35) | ((up < 0.05) & ~shop)
        cell = house * 65537 + storey.astype(np.int64) * 257 + bay.astype(np.int64)
        chance = self._hash(cell, 8)
        lit_pane = pane & (chance > 0.55)
        lit_show = show & (self._hash(house, 9) > 0.25)
        sign_hue = self._hash(house, 10)
        for channel in range(3):
            tone = colours[channel]
            tone = np.where(frame, 0.78, tone)
            tone = np.where(cornice, tone * 0.72, tone)
            tone = np.where(pane, 0.20 + 0.16 * chance + 0.03 * channel, tone)
            tone = np.where(show, 0.17 + 0.10 * self._hash(cell, 11) + 0.02 * channel, tone)
            tone = np.where(sign, 0.30 + 0.35 * (0.5 + 0.5 * np.cos(6.28 * (sign_hue + channel / 3))), tone)
            albedo[channel][mask] = tone[mask]
            warm = (0.85, 0.68, 0.40)[channel] * (0.6 + 0.4 * chance)
            glow[channel][mask] = (np.where(lit_pane, warm, 0) + np.where(lit_show, warm * 0.9, 0))[mask]

    def _furniture(
        self,
        a: Layer,
        d: Layer,
        albedo: Layer,
        depth: Layer,
        sky: Layer,
        glow: Layer,
        wet: Layer,
        shade: Layer,
        *,
        winter: bool,
    ) -> None:
        rng = np.random.default_rng(self._seed + 1)
        places: list[tuple[float, float, bool]] = []
        for k in range(9):
            places += [(12.0 + 14 * k - 1, side, True) for side in (FRONT_LEFT + 0.9, FRONT_RIGHT - 0.7)]
            places += [(18.0 + 14 * k, side, False) for side in (FRONT_LEFT + 1.2, FRONT_RIGHT - 0.9)]
        for z, x, is_lamp in sorted(places, reverse=True):
            if CROSS_NEAR - 1 < z < CROSS_FAR + 1:
                continue
            reach = 4.5 if is_lamp else 3.2
            left, right = np.searchsorted(a[0], ((x - reach) / z, (x + reach) / z))
            top, bottom = np.searchsorted(d[:, 0], ((CAMERA_HEIGHT - 10.0) / z, (CAMERA_HEIGHT + 0.1) / z))
            window = (slice(top, bottom), slice(left, right))
            if top >= bottom or left >= right:
                continue
            px, py = a[window] * z - x, CAMERA_HEIGHT - d[window] * z
            part = _Part(
                albedo[:, *window], glow[:, *window], depth[window], sky[window], wet[window], shade[window], z
            )  # fmt: skip
            if is_lamp:
                _draw_lamp(part, px, py, 1.6 if x < 0 else -1.6)
            else:
                _draw_tree(part, px, py, rng, winter=winter)

    def _pool(self, a: Layer, d: Layer, depth: Layer, wet: Layer) -> Layer:
        x, height = a * depth, np.clip(CAMERA_HEIGHT - d * depth, 0, None)
        along = np.exp(-((((depth - 4.0) % 14.0) - 7.0) ** 2) / 14.0)
        spread = np.exp(-(((x + 10.0) / 5.0) ** 2)) + np.exp(-(((x - 5.0) / 4.0) ** 2))
        return np.asarray(along * spread * np.exp(-height / 5.0), np.float32)


class _Part(NamedTuple):
    """Views into the layers of the background around one thing at distance ``z``."""

    albedo: Layer
    glow: Layer
    depth: Layer
    sky: Layer
    wet: Layer
    shade: Layer
    z: float

    def stamp(self, mask: NDArray[np.bool_], colour: Colour) -> None:
        for channel in range(3):
            self.albedo[channel][mask] = colour[channel]
            self.glow[channel][mask] = 0.0
        self.depth[mask], self.sky[mask], self.wet[mask], self.shade[mask] = self.z, 0.0, 0.0, 1.0


def _draw_lamp(part: _Part, px: Layer, py: Layer, reach: float) -> None:
    pole = (np.abs(px) < 0.09) & (py > 0) & (py < 7.2)
    arm = (np.abs(py - 7.2) < 0.08) & (px * reach > 0) & (np.abs(px) < abs(reach))
    part.stamp(pole | arm, (0.20, 0.22, 0.21))
    square = (px - reach) ** 2 + (py - 7.1) ** 2
    for channel, strength in enumerate((1.0, 0.86, 0.55)):
        part.glow[channel] += strength * (1.4 * np.exp(-square * 20) + 0.30 * np.exp(-square * 0.7))


def _draw_tree(part: _Part, px: Layer, py: Layer, rng: np.random.Generator, *, winter: bool) -> None:
    part.stamp((np.abs(px) < 0.14) & (py > 0) & (py < 2.6), (0.26, 0.19, 0.14))
    # The same numbers are drawn in both seasons, so that a tree keeps its place and build.
    for _ in range(60):
        cx, cy, r, tone = rng.normal(0, 0.8), 3.8 + rng.normal(0, 0.75), rng.uniform(0.25, 0.6), rng.uniform(0.75, 1.2)
        if winter:
            steep, length = math.atan2(cy - 2.2, cx), math.hypot(cx, cy - 2.2)
            along = px * math.cos(steep) + (py - 2.2) * math.sin(steep)
            line = np.abs(px * math.sin(steep) - (py - 2.2) * math.cos(steep))
            twig = (line < 0.05 * (1.2 - along / length)) & (along > 0) & (along < length)
            part.stamp(twig, (0.28, 0.22, 0.18))
        else:
            tone += 0.14 * (cy - 3.8) + 0.10 * cx
            part.stamp((px - cx) ** 2 + (py - cy) ** 2 < r * r, (0.20 * tone, 0.36 * tone, 0.14 * tone))


def _grade(layers: dict[str, Layer], light: Light) -> NDArray[np.uint32]:
    albedo, sky, wet = layers["albedo"], layers["sky"], layers["wet"]
    height = np.linspace(0, 1, albedo.shape[1], dtype=np.float32)[:, None]
    damp = 1 - 0.30 * wet * light.rain
    sun = 1 - 2.0 * light.shadow * 0.45 * (1 - layers["shade"]) * (wet + 0.6)
    veil = 1 - np.exp(-light.fog * layers["depth"])
    packed = np.empty((*albedo.shape[1:], 4), np.uint8)
    overcast = min(light.fog / 0.008, 1.0)
    zenith = ((0.36, 0.56, 0.86), (0.60, 0.64, 0.70))
    for channel in range(3):
        ambient = light.ambient[channel]
        tone = albedo[channel] * damp * sun
        tone = tone + (0.86 - tone) * 0.75 * light.snow * wet
        pool = (0.62, 0.52, 0.34)[channel] * light.lamps**2
        tone = tone * (ambient + pool * layers["pool"]) + light.lamps * layers["glow"][channel]
        blue = zenith[0][channel] * (1 - overcast) + zenith[1][channel] * overcast
        haze = (0.92, 0.86, 0.80)[channel] * (1 - 0.25 * overcast)
        dome = (blue + (haze - blue) * np.clip(height * 3.0, 0, 1)) * ambient
        dusk = 4 * light.lamps * (1 - light.lamps) * (1 - overcast)
        dome = dome + dusk * (0.34, 0.12, -0.02)[channel] * np.clip(height * 3.2, 0, 1)
        tone = tone * (1 - sky) + dome * sky
        fogged = veil * (1 - sky * (1 - min(light.fog / 0.03, 1.0)))
        tone = tone + (light.fog_colour[channel] - tone) * fogged
        packed[..., channel] = np.clip(tone * 255, 0, 255)
    packed[..., 3] = 255
    return packed.view(np.uint32)[..., 0]
