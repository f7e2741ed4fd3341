"""Sample lists: the golden model's boxes of a recorded video, as comma-separated text.

One row per box: ``idx,frame id,class,x0,y0,x1,y1`` and optionally ``score``; the first line may be a header.
``idx`` is a whole number and only for people. ``frame id`` is the 0-based decoded frame, ``class`` a COCO category id,
the box is in pixels of the frame with its origin at the top left.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protocol.errors import InputError

COLUMNS = ("idx", "frame id", "class", "x0", "y0", "x1", "y1", "score")


@dataclass(frozen=True)
class FrameSamples:
    """Boxes float32 (n, 4) and labels int64 (n,) of one frame."""

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]


NO_SAMPLES = FrameSamples(np.zeros((0, 4), np.float32), np.zeros(0, np.int64))


def label_table(classes: tuple[str, ...], class_map: dict[str, str]) -> dict[int, int | None]:
    """COCO id -> index into ``classes``, or None for a dropped id. Raises InputError naming the field."""
    table: dict[int, int | None] = {}
    for key, name in class_map.items():
        if not key.isascii() or not key.isdigit():
            raise InputError(f"source.class_map: key {key!r} is no COCO id; write whole numbers as strings")
        if name and name not in classes:
            raise InputError(f"source.class_map[{key!r}]: {name!r} is not among the classes {', '.join(classes)}")
        table[int(key)] = classes.index(name) if name else None
    if all(label is None for label in table.values()):
        raise InputError('source.class_map: maps no id to a class; at least one is needed (map an id to "" to drop it)')
    return table


def read_samples(
    path: Path, *, size: tuple[int, int], num_frames: int, table: dict[int, int | None], min_score: float
) -> dict[int, FrameSamples]:
    """Samples by frame id. ``size``: width and height of the video, ``num_frames``: its length.

    Rows whose class is mapped to nothing or whose score is below ``min_score`` are dropped, after they were checked.
    Raises InputError naming file, line and what is allowed.
    """
    rows: dict[int, tuple[list[tuple[float, ...]], list[int]]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            for fields in reader:
                if not fields or (reader.line_num == 1 and _is_header(fields)):
                    continue
                try:
                    row = _parse(fields, size, num_frames, table, min_score)
                except InputError as error:
                    raise InputError(f"{path}, line {reader.line_num}: {error}") from error
                if row is not None:
                    frame, label, box = row
                    boxes, labels = rows.setdefault(frame, ([], []))
                    boxes.append(box)
                    labels.append(label)
    except OSError as error:
        raise InputError(f"{path}: sample list cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a comma-separated text file: {error}") from error
    return {
        frame: FrameSamples(np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64))
        for frame, (boxes, labels) in rows.items()
    }


def _is_header(fields: list[str]) -> bool:
    return fields[0].strip().lower() == COLUMNS[0]


def _parse(
    fields: list[str], size: tuple[int, int], num_frames: int, table: dict[int, int | None], min_score: float
) -> tuple[int, int, tuple[float, ...]] | None:
    if len(fields) not in (7, 8):
        raise InputError(f"{len(fields)} columns; allowed: 7 or 8 ({', '.join(COLUMNS[:7])}[, score])")
    _whole(fields, 0)
    frame, coco = _whole(fields, 1), _whole(fields, 2)
    if not 0 <= frame < num_frames:
        raise InputError(f"frame id {frame} is not in the video; allowed: 0 to {num_frames - 1}")
    if coco not in table:
        known = ", ".join(map(str, sorted(table)))
        raise InputError(f'class {coco} is not in class_map (it has {known}); add it, or map it to "" to drop it')
    x0, y0, x1, y1 = box = tuple(_number(fields, column) for column in range(3, 7))
    width, height = size
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise InputError(
            f"box {','.join(fields[3:7])} is empty or leaves the frame; allowed: 0 <= x0 < x1 <= {width}, "
            f"0 <= y0 < y1 <= {height}"
        )
    score = 1.0
    if len(fields) == 8:
        score = _number(fields, 7)
        if not 0 <= score <= 1:
            raise InputError(f"score {fields[7]} is outside 0 to 1")
    label = table[coco]
    return None if label is None or score < min_score else (frame, label, box)


def _whole(fields: list[str], column: int) -> int:
    try:
        return int(fields[column])
    except ValueError:
        raise InputError(f"{COLUMNS[column]}: {fields[column]!r} is not a whole number") from None


def _number(fields: list[str], column: int) -> float:
    try:
        value = float(fields[column])
    except ValueError:
        raise InputError(f"{COLUMNS[column]}: {fields[column]!r} is not a number") from None
    if not math.isfinite(value):
        raise InputError(f"{COLUMNS[column]}: {fields[column]!r} is not finite")
    return value
