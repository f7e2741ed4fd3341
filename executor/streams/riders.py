"""People on foot, on bicycles and on motorcycles: rods and balls on a skeleton with a gait."""

from __future__ import annotations

import math

from executor.streams.canvas import Canvas, Sprite
from executor.streams.paints import BODY, CHROME, DARK, DIM_TRIM, HEADLIGHT, SKIN, TAIL, TRIM, TYRE, Paint

NUM_PHASES = 4
"""Steps of a gait that are drawn."""


def draw_person(shape: str, heading: int, phase: int) -> Sprite:
    canvas = Canvas(heading, 46.0, (0.45, 0.45, 1.80), margin=0.3, glow=False)
    canvas.shadow(0.25, 0.22, 0.35)
    swing = math.sin(2 * math.pi * (phase + 0.5) / NUM_PHASES)
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


def draw_two_wheeler(name: str, shape: str, heading: int, phase: int) -> Sprite:
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
    turn = 0.0 if motor else 2 * math.pi * phase / NUM_PHASES
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
        canvas.lamp((0.55, 0.85, 0), HEADLIGHT, 0.45 if motor else 0.22, 1.0 if motor else 0.8)
    else:
        canvas.lamp((-0.75, 0.70, 0), TAIL, 0.25 if motor else 0.15, 0.8)
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
