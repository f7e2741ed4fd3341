"""Cars, vans and buses: prisms with windows, wheels and lamps."""

from __future__ import annotations

from collections.abc import Sequence

from executor.streams.canvas import Canvas, Sprite
from executor.streams.paints import (
    BODY,
    CHROME,
    DARK,
    GLASS,
    HEADLIGHT,
    PLATE,
    RED_LAMP,
    TAIL,
    TRIM,
    TYRE,
    WHITE_LAMP,
    Colour,
    Paint,
)

Profile = Sequence[tuple[float, float]]

_CABIN: Colour = (0.75, 0.72, 0.55)


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


def draw_vehicle(shape: str, heading: int) -> Sprite:
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
    if not bus:
        # Vans wear dark cladding; it tells them from cars and small buses where the build does not.
        _both_sides(canvas, _rect(-length, foot, sill, 0.62), width, DARK)
        for x in (-length - 0.005, length + 0.005):
            _panel(canvas, x, sill, 0.62, -width, width, DARK)
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
            canvas.lamp((length, y, z), HEADLIGHT, 0.55)
        else:
            canvas.lamp((-length, y, z), TAIL, 0.30, 0.8)
