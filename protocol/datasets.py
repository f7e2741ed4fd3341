"""What is in a data set: made by the executor's readers, shown by ``ekya-optimizer ingest``. Structs only."""

from __future__ import annotations

import msgspec


class DataWindow(msgspec.Struct, frozen=True):
    """``num_windows`` equal stretches of the data set in order of time. ``classes``: boxes by name.

    ``drift``: how far its mix of classes is from that of the first window, 0 (same) to 1 (nothing in common), by total
    variation; None where one of them is empty. ``objects_per_frame``, ``box_edge``: means (edge: root of the area, px).
    """

    first_frame: int
    num_frames: int
    num_objects: int
    classes: dict[str, int]
    drift: float | None
    objects_per_frame: float
    box_edge: float


class DataSummary(msgspec.Struct, frozen=True):
    """The data set. ``ids``: category id of each class that occurs. ``sizes``: pictures by "WIDTHxHEIGHT".

    ``num_problems`` counts all, ``problems`` shows some.
    """

    path: str
    format: str
    num_frames: int
    num_empty: int
    num_objects: int
    classes: dict[str, int]
    ids: dict[str, int]
    sizes: dict[str, int]
    windows: tuple[DataWindow, ...]
    num_problems: int
    problems: tuple[str, ...]
