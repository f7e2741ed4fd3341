"""The road users: what each class and each of its shapes looks like, in metres.

Shapes of a class differ in build; ``SHAPES`` says which belong to which look of the fleet and the season.
Sizes overlap between neighbours on purpose (minivan and estate car, minibus and van, scooter and bicycle):
a small model has to learn details that a change of fleet takes away again.
"""

from __future__ import annotations

from functools import lru_cache

from executor.streams.canvas import Sprite
from executor.streams.riders import NUM_PHASES as GAIT
from executor.streams.riders import draw_person, draw_two_wheeler
from executor.streams.vehicles import draw_vehicle

CLASSES = ("person", "cyclist", "car", "van", "bus", "motorcycle")

HEADING_STEP = {"person": 45, "cyclist": 30, "car": 15, "van": 15, "bus": 15, "motorcycle": 30}
"""Degrees between the views that are drawn of a class."""

NUM_PHASES = {"person": GAIT, "cyclist": GAIT, "car": 1, "van": 1, "bus": 1, "motorcycle": 1}
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
        "summer": ("sedan", "sedan", "hatch", "hatch", "estate", "minivan"),
        "winter": ("sedan", "estate", "suv"),
        "fleet": ("suv", "minivan", "micro"),
    },
    "van": {
        "summer": ("panel", "panel", "panel", "glazed"),
        "winter": ("panel", "panel", "minibus"),
        "fleet": ("glazed", "minibus", "pickup_box", "pickup_box"),
    },
    "bus": {
        "summer": ("city_bus", "city_bus", "midibus"),
        "winter": ("city_bus", "coach"),
        "fleet": ("midibus", "coach", "double"),
    },
    "motorcycle": {
        "summer": ("naked", "naked", "tourer", "tourer", "scooter"),
        "winter": ("tourer", "scooter"),
        "fleet": ("scooter", "delivery"),
    },
}


@lru_cache(maxsize=800)
def sprite(name: str, shape: str, heading: int, phase: int) -> Sprite:
    """The figure of a class in a heading (multiple of its HEADING_STEP, 0..180) and phase of its gait."""
    if name == "person":
        return draw_person(shape, heading, phase)
    if name in ("cyclist", "motorcycle"):
        return draw_two_wheeler(name, shape, heading, phase)
    return draw_vehicle(shape, heading)
