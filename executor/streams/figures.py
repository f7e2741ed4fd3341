"""The road users: what each class and each of its shapes looks like, in metres.

Shapes of a class differ in build; ``SHAPES`` says which belong to which look of the fleet and the season.
Sizes overlap between neighbours on purpose (minivan and estate car, minibus and van, scooter and bicycle):
a small model has to learn details that a change of fleet takes away again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from executor.streams.canvas import Canvas, Colour, Paint, Sprite

CLASSES = ("person", "cyclist", "car", "van", "bus", "motorcycle")

HEADING_STEP = {"person": 45, "cyclist": 30, "car": 15, "van": 15, "bus": 15, "motorcycle": 30}
"""Degrees between the views that are drawn of a class."""

NUM_PHASES = {"person": 4, "cyclist": 4, "car": 1, "van": 1, "bus": 1, "motorcycle": 1}
"""Steps of gait that are drawn of a class."""


SHAPES: dict[str, dict[str, tuple[str, ...]]] = {
    "person": {
        "summer": ("shirt", "dress", "shorts"),
        "winter": ("coat", "parka", "shirt"),
        "fleet": ("shirt", "trolley", "shorts"),
    },
    "cyclist": {
        "summer": ("city_bike", "race_bike", "helmet_bike"),
        "winter": ("coat_bike", "helmet_bike"),
        "fleet": ("cargo_bike", "helmet_bike"),
    },
    "car": {
        "summer": ("sedan", "hatch", "estate", "minivan"),
        "winter": ("sedan", "estate", "suv"),
        "fleet": ("suv", "minivan", "micro"),
    },
    "van": {
        "summer": ("panel", "panel", "glazed"),
        "winter": ("panel", "minibus"),
        "fleet": ("glazed", "minibus", "pickup_box"),
    },
    "bus": {
        "summer": ("city_bus", "midibus"),
        "winter": ("city_bus", "coach"),
        "fleet": ("midibus", "coach", "double"),
    },
    "motorcycle": {
        "summer": ("naked", "tourer", "scooter"),
        "winter": ("tourer", "scooter"),
        "fleet": ("scooter", "delivery"),
    },
}

GLASS, TYRE, DARK = Paint((0.16, 0.20, 0.25)), Paint((0.07, 0.07, 0.08)), Paint((0.12, 0.12, 0.13))
CHROME, PLATE, SKIN = Paint((0.55, 0.56, 0.58)), Paint((0.85, 0.84, 0.72)), Paint((0.78, 0.58, 0.46))
BODY, TRIM = Paint((1.0, 0, 0), 1), Paint((1.0, 0, 0), 2)
DIM_TRIM = Paint((0.7, 0, 0), 2)
WHITE_LAMP, RED_LAMP = Paint((0.92, 0.92, 0.85)), Paint((0.65, 0.08, 0.06))
_HEADLIGHT: Colour = (1.0, 0.95, 0.80)
_TAIL: Colour = (0.95, 0.10, 0.06)
_CABIN: Colour = (0.75, 0.72, 0.55)

Profile = Sequence[tuple[float, float]]


@lru_cache(maxsize=800)
def sprite(name: str, shape: str, heading: int, phase: int) -> Sprite:
    """The figure of a class in a heading (multiple of its HEADING_STEP, 0..180) and phase of its gait."""
    if name == "person":
        return _person(shape, heading, phase)
    if name in ("cyclist", "motorcycle"):
        return _two_wheeler(name, shape, heading, phase)
    return _vehicle(shape, heading)


# ---------------------------------------------------------------- vehicles with a body


def _prism(canvas: Canvas, profile: Profile, half_width: float, paints: Sequence[Paint], side: Paint) -> None:
    """A profile (x, y), counter-clockwise seen from the right, extruded across; ``paints`` per edge i -> i+1."""
    canvas.polygon([(x, y, -half_width) for x, y in profile], side)
    canvas.polygon([(x, y, half_width) for x, y in reversed(profile)], side)
    for (ax, ay), (bx, by), paint in zip(profile, [*profile[1:], profile[0]], paints, strict=True):
        canvas.polygon(
            [(ax, ay, -half_width), (ax, ay, half_width), (bx, by, half_width), (bx, by, -half_width)], paint
        )


def _both_sides(canvas: Canvas, profile: Profile, half_width: float, paint: Paint) -> None:
    canvas.polygon([(x, y, -half_width - 0.01) for x, y in profile], paint)
    canvas.polygon([(x, y, half_width + 0.01) for x, y in reversed(profile)], paint)


def _panel(canvas: Canvas, x: float, y0: float, y1: float, z0: float, z1: float, paint: Paint) -> bool:
    """A rectangle on the front (x > 0) or the rear (x < 0)."""
    order = (z0, z1) if x < 0 else (z1, z0)
    left, right = max(order) if x < 0 else min(order), min(order) if x < 0 else max(order)
    return canvas.polygon([(x, y0, left), (x, y0, right), (x, y1, right), (x, y1, left)], paint)


def _rect(x0: float, x1: float, y0: float, y1: float) -> Profile:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


# Shape: half length, half width, sill, waist height, roof height, cabin rear foot, rear top, front top, front foot.
_CARS: dict[str, tuple[float, ...]] = {
    "sedan": (2.25, 0.90, 0.30, 0.92, 1.44, -1.75, -1.05, 0.35, 1.15),
    "hatch": (1.95, 0.87, 0.30, 0.92, 1.48, -1.93, -1.65, 0.35, 1.15),
    "estate": (2.30, 0.90, 0.30, 0.94, 1.50, -2.25, -1.95, 0.35, 1.15),
    "suv": (2.30, 0.97, 0.42, 1.12, 1.80, -2.25, -1.95, 0.45, 1.20),
    "minivan": (2.30, 0.95, 0.32, 1.10, 1.86, -2.28, -2.05, 0.75, 1.70),
    "micro": (1.40, 0.80, 0.28, 0.92, 1.58, -1.38, -1.25, 0.45, 1.20),
}

# Shape: half length, half width, roof height, cab front top, cab front foot, glazed from, glazed to.
_BOXES: dict[str, tuple[float, ...]] = {
    "panel": (2.55, 1.00, 2.25, 1.05, 1.85, 0.55, 1.15),
    "glazed": (2.40, 0.96, 1.95, 1.05, 1.85, -2.1, 1.15),
    "minibus": (2.85, 1.02, 2.55, 1.45, 2.25, -2.5, 1.55),
    "pickup_box": (2.70, 1.02, 2.60, 0.75, 1.55, 0.45, 0.95),
    "city_bus": (5.40, 1.25, 3.05, 5.15, 5.38, -5.1, 5.0),
    "coach": (5.20, 1.25, 3.35, 4.80, 5.18, -5.0, 4.6),
    "midibus": (3.70, 1.15, 2.80, 3.40, 3.68, -3.4, 3.2),
    "double": (5.00, 1.25, 4.20, 4.80, 4.98, -4.7, 4.6),
}


def _vehicle(shape: str, heading: int) -> Sprite:
    if shape in _CARS:
        return _car(shape, heading)
    length, width, roof, top, foot, glass_from, glass_to = _BOXES[shape]
    bus = length > 3
    canvas = Canvas(heading, 26.0 if bus else 38.0, (length, width, roof))
    canvas.shadow(length, width, 0.4)
    waist = 1.15 if bus else 1.22
    sill = 0.30
    if bus:
        body: Profile = [(-length, sill), (length, sill), (foot, waist), (top, roof), (-length, roof)]
        paints = [DARK, BODY, GLASS, BODY, BODY]
    else:
        body = [(-length, sill), (foot, sill), (foot, waist), (top, roof), (-length, roof)]
        paints = [DARK, BODY, GLASS, BODY, BODY]
        hood: Profile = [(foot, sill), (length, sill), (length - 0.05, 0.85), (foot, waist)]
        hood_paints = [DARK, BODY, BODY, BODY]
        if not canvas.toward:
            _prism(canvas, hood, width, hood_paints, BODY)
    _prism(canvas, body, width, paints, BODY)
    if not bus and canvas.toward:
        _prism(canvas, hood, width, hood_paints, BODY)
    bands = [(1.25, roof - 0.45)] if shape != "double" else [(1.15, 1.95), (2.65, 3.45)]
    if not bus:
        bands = [(1.30, roof - 0.30 if roof < 2.3 else 2.0)]
    for low, high in bands:
        pane = 1.25 if bus else 0.95
        x = glass_to
        while x - 0.3 > glass_from:
            _both_sides(canvas, _rect(max(x - pane + 0.1, glass_from), x, low, high), width, GLASS)
            x -= pane
    if bus or shape in ("pickup_box", "minibus"):
        _both_sides(canvas, _rect(-length + 0.05, foot - 0.35, 0.55, 0.80), width, TRIM)
    if bus:
        for x in (length * 0.62, -length * 0.08):
            _both_sides(canvas, _rect(x, x + 1.0, 0.4, 2.35), width, DARK)
    if shape == "panel":
        _both_sides(canvas, _rect(-length + 0.4, 0.2, 1.2, 1.75), width, TRIM)
    _ends(canvas, length, width, roof, bus=bus, rear_glass=shape not in ("panel", "pickup_box"))
    axle = length * (0.58 if bus else 0.62)
    _wheels(canvas, (axle, -axle), width, 0.46 if bus else 0.36)
    _lamps(canvas, length, width, 0.75)
    if bus:
        for k in range(4):
            for z in (-width, width):
                if canvas.depth((0, 1.6, z)) < canvas.depth((0, 1.6, -z)) - 0.3:
                    canvas.lamp((length * (0.6 - 0.4 * k), 1.9, z), _CABIN, 0.6, 0.5)
    return canvas.finish()


def _car(shape: str, heading: int) -> Sprite:
    length, width, sill, waist, roof, rear_foot, rear_top, front_top, front_foot = _CARS[shape]
    canvas = Canvas(heading, 40.0, (length, width, roof))
    canvas.shadow(length, width, 0.3)
    nose = waist - 0.20
    lower: Profile = [
        (-length + 0.08, sill), (length - 0.05, sill), (length, nose - 0.12), (length - 0.12, nose),
        (front_foot, waist), (max(rear_foot, -length + 0.05), waist), (-length, waist - 0.12),
    ]  # fmt: skip
    _prism(canvas, lower, width, [DARK, BODY, BODY, BODY, BODY, BODY, BODY], BODY)
    cabin: Profile = [
        (rear_foot, waist), (front_foot, waist), (front_top, roof - 0.03), (rear_top, roof),
    ]  # fmt: skip
    inner = width - 0.10
    _prism(canvas, cabin, inner, [BODY, GLASS, BODY, GLASS], BODY)
    middle = 0.5 * (rear_top + front_top) - 0.05
    low, high = waist + 0.06, roof - 0.12
    _both_sides(
        canvas, [(middle + 0.05, low), (front_foot - 0.22, low), (front_top - 0.08, high), (middle + 0.05, high)],
        inner, GLASS,
    )  # fmt: skip
    _both_sides(
        canvas, [(rear_foot + 0.25, low), (middle - 0.05, low), (middle - 0.05, high), (rear_top + 0.12, high)],
        inner, GLASS,
    )  # fmt: skip
    _ends(canvas, length, width, waist, bus=False, rear_glass=False)
    _wheels(canvas, (length * 0.62, -length * 0.60), width, 0.36 if shape == "suv" else 0.32)
    _lamps(canvas, length, width, waist - 0.28)
    return canvas.finish()


def _ends(canvas: Canvas, length: float, width: float, height: float, *, bus: bool, rear_glass: bool) -> None:
    y = 0.72 if height > 1.3 else height - 0.34
    for z in (-1, 1):
        inner, outer = z * (width - 0.38), z * (width - 0.06)
        _panel(canvas, length + 0.01, y, y + 0.17, inner, outer, WHITE_LAMP)
        _panel(canvas, -length - 0.01, y, y + (0.35 if height > 1.3 else 0.20), z * (width - 0.25), outer, RED_LAMP)
    _panel(canvas, length + 0.01, 0.38, 0.52, -0.6 * width, 0.6 * width, DARK)
    _panel(canvas, -length - 0.01, 0.45, 0.57, -0.26, 0.26, PLATE)
    _panel(canvas, length + 0.02, 0.38, 0.48, -0.26, 0.26, PLATE)
    if rear_glass:
        _panel(canvas, -length - 0.01, 1.3, height - 0.35, -0.8 * width, 0.8 * width, GLASS)
    elif height > 1.6:
        _panel(canvas, -length - 0.01, 0.5, height - 0.15, -0.02, 0.02, DARK)
    if bus:
        _panel(canvas, length - 0.05, height - 0.38, height - 0.12, -0.7 * width, 0.7 * width, DARK)


def _wheels(canvas: Canvas, axles: Sequence[float], width: float, radius: float) -> None:
    near = -width if canvas.depth((0, 0, -width)) < canvas.depth((0, 0, width)) else width
    for x in axles:
        canvas.disc((x, radius, near * 1.005), radius, TYRE)
        canvas.disc((x, radius, near * 1.01), radius * 0.55, CHROME)


def _lamps(canvas: Canvas, length: float, width: float, y: float) -> None:
    front = canvas.toward
    for z in (-width + 0.2, width - 0.2):
        if front:
            canvas.lamp((length, y, z), _HEADLIGHT, 0.55)
        else:
            canvas.lamp((-length, y, z), _TAIL, 0.30, 0.8)


# ---------------------------------------------------------------- people and two-wheelers


def _person(shape: str, heading: int, phase: int) -> Sprite:
    canvas = Canvas(heading, 46.0, (0.45, 0.45, 1.80), margin=0.3, glow=False)
    canvas.shadow(0.25, 0.22, 0.35)
    swing = math.sin(2 * math.pi * (phase + 0.5) / NUM_PHASES["person"])
    leg = SKIN if shape in ("shorts", "dress") else TRIM
    for side in (1, -1):
        step = 0.30 * swing * side
        hip, knee, foot = (0.0, 0.88, 0.09 * side), (step * 0.55, 0.48, 0.09 * side), (step, 0.06, 0.09 * side)
        canvas.capsule(hip, knee, 0.085, TRIM)
        canvas.capsule(knee, foot, 0.065, leg)
        canvas.capsule(foot, (foot[0] + 0.12, 0.05, foot[2]), 0.055, DARK)
    thick, low = {"coat": (0.22, 0.55), "parka": (0.25, 0.80), "dress": (0.19, 0.62)}.get(shape, (0.17, 0.95))
    canvas.capsule((0, low, 0), (0, 1.38, 0), thick, BODY)
    if shape == "dress":
        canvas.capsule((0, 0.62, -0.08), (0, 0.62, 0.08), 0.22, BODY)
    for side in (1, -1):
        hand = (-0.25 * swing * side, 0.86, 0.27 * side)
        sleeve = SKIN if shape in ("shirt", "shorts", "dress") else BODY
        canvas.capsule((0, 1.38, 0.20 * side), (-0.1 * swing * side, 1.12, 0.25 * side), 0.065, BODY)
        canvas.capsule((-0.1 * swing * side, 1.12, 0.25 * side), hand, 0.055, sleeve)
    _head(canvas, (0.0, 1.62, 0.0), hood=shape in ("coat", "parka"))
    if shape == "trolley":
        canvas.capsule((-0.55, 0.25, 0.2), (-0.50, 0.65, 0.2), 0.16, DARK)
    return canvas.finish()


def _head(canvas: Canvas, at: tuple[float, float, float], *, hood: bool = False, helmet: Paint | None = None) -> None:
    x, y, z = at
    cover = helmet or (BODY if hood else Paint((0.22, 0.15, 0.10)))
    front, back = (x + 0.04, y - 0.02, z), (x - 0.03, y + 0.03, z)
    size = 0.155 if helmet else 0.125
    if canvas.toward:
        canvas.capsule(back, back, size, cover)
        canvas.capsule(front, front, 0.10, DARK if helmet and helmet.tint else SKIN)
    else:
        canvas.capsule(front, front, 0.11, SKIN)
        canvas.capsule(back, back, size, cover)


def _two_wheeler(name: str, shape: str, heading: int, phase: int) -> Sprite:
    canvas = Canvas(heading, 46.0, (1.15, 0.45, 1.85))
    motor = name == "motorcycle"
    canvas.shadow(0.9, 0.25, 0.3)
    if motor:
        _motorcycle(canvas, shape)
    else:
        _bicycle(canvas, shape)
    seat = (-0.25, 0.92, 0.0) if motor else (-0.20, 1.02, 0.0)
    lean = {"race_bike": 0.42, "naked": 0.28, "tourer": 0.18}.get(shape, 0.12)
    neck = (seat[0] + lean, seat[1] + 0.50, 0.0)
    turn = 0.0 if motor else 2 * math.pi * phase / NUM_PHASES["cyclist"]
    for side in (1, -1):
        pedal = (0.02 + 0.16 * math.cos(turn) * side, 0.30 + 0.15 * math.sin(turn) * side, 0.12 * side)
        if motor:
            pedal = (0.05, 0.36, 0.20 * side)
        knee = (0.5 * (seat[0] + pedal[0]) + 0.22, 0.5 * (seat[1] + pedal[1]) + 0.10, 0.14 * side)
        canvas.capsule((seat[0], seat[1], 0.09 * side), knee, 0.085, TRIM)
        canvas.capsule(knee, pedal, 0.065, SKIN if shape == "race_bike" else TRIM)
    thick = 0.21 if shape == "coat_bike" or motor else 0.16
    canvas.capsule(seat, neck, thick, BODY)
    grip_x = 0.42 if motor else 0.40
    for side in (1, -1):
        canvas.capsule((neck[0], neck[1] - 0.06, 0.18 * side), (grip_x, 1.02, 0.24 * side), 0.06, BODY)
    helmet: Paint | None = TRIM if motor else None
    if shape in ("helmet_bike", "race_bike"):
        helmet = Paint((0.85, 0.82, 0.25))
    _head(canvas, (neck[0] + 0.06, neck[1] + 0.24, 0.0), hood=shape == "coat_bike", helmet=helmet)
    if shape == "delivery":
        canvas.capsule((-0.62, 1.05, -0.12), (-0.62, 1.30, 0.12), 0.26, BODY)
    if canvas.toward:
        canvas.lamp((0.55, 0.85, 0), _HEADLIGHT, 0.45 if motor else 0.22, 1.0 if motor else 0.8)
    else:
        canvas.lamp((-0.75, 0.70, 0), _TAIL, 0.25 if motor else 0.15, 0.8)
    return canvas.finish()


def _bicycle(canvas: Canvas, shape: str) -> None:
    wheels = (-0.52, 0.72 if shape == "cargo_bike" else 0.54)
    for x in sorted(wheels, key=lambda x: -canvas.depth((x, 0.34, 0))):
        canvas.ring((x, 0.34, 0), 0.33, 0.03, TYRE)
    frame = [((-0.52, 0.34), (-0.18, 0.90)), ((-0.18, 0.90), (0.02, 0.30)), ((0.02, 0.30), (0.42, 0.85)),
             ((-0.18, 0.85), (0.42, 0.85)), ((wheels[1], 0.34), (0.40, 1.05))]  # fmt: skip
    for (ax, ay), (bx, by) in frame:
        canvas.capsule((ax, ay, 0), (bx, by, 0), 0.028, DIM_TRIM)
    if shape == "cargo_bike":
        canvas.capsule((0.55, 0.55, -0.12), (0.95, 0.55, 0.12), 0.24, BODY)


def _motorcycle(canvas: Canvas, shape: str) -> None:
    slim = shape in ("scooter", "delivery")
    for x in sorted((-0.62, 0.68), key=lambda x: -canvas.depth((x, 0.3, 0))):
        radius = 0.22 if slim else 0.29
        canvas.ring((x, radius + 0.02, 0), radius - 0.05, 0.075, TYRE)
    if slim:
        canvas.capsule((-0.55, 0.50, 0), (-0.15, 0.62, 0), 0.20, DIM_TRIM)
        canvas.capsule((-0.05, 0.30, 0), (0.30, 0.30, 0), 0.10, DIM_TRIM)
        canvas.capsule((0.42, 0.35, 0), (0.45, 0.95, 0), 0.13, DIM_TRIM)
        return
    canvas.capsule((-0.10, 0.42, 0), (0.18, 0.42, 0), 0.20, DARK)
    canvas.capsule((-0.75, 0.80, 0), (-0.15, 0.78, 0), 0.12, DARK)
    canvas.capsule((0.02, 0.80, 0), (0.25, 0.84, 0), 0.18, DIM_TRIM)
    canvas.capsule((0.68, 0.31, 0), (0.42, 0.95, 0), 0.05, CHROME)
    canvas.capsule((-0.70, 0.42, 0), (-0.10, 0.36, 0), 0.07, CHROME)
    if shape == "tourer":
        canvas.capsule((0.48, 0.72, 0), (0.45, 1.10, 0), 0.20, DIM_TRIM)
        canvas.capsule((-0.70, 0.62, -0.2), (-0.70, 0.62, 0.2), 0.16, DIM_TRIM)
