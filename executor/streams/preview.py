"""A sheet of frames for people: ``python -m executor.streams.preview --help``."""

from __future__ import annotations

import argparse
import math
import struct
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from executor.streams.drift import LEVELS
from executor.streams.figures import CLASSES
from executor.streams.frames import FrameSource
from executor.streams.open import open_source
from protocol.errors import EkyaError, InputError
from protocol.schema import CitySource, DriftEvent, StreamSpec

_COLOURS = ((230, 60, 50), (60, 160, 240), (250, 200, 40), (90, 200, 90), (200, 90, 220), (250, 130, 30))


def write_png(picture: NDArray[np.uint8], path: Path) -> None:
    """Write RGB uint8 (height, width, 3) as PNG. Raises InputError when the file cannot be written."""
    height, width = picture.shape[:2]
    # Filter 2 ("up"): each row less the one above it, which packs drawn pictures well.
    rows = picture.reshape(height, width * 3)
    above = np.vstack([np.zeros((1, width * 3), np.uint8), rows[:-1]])
    raw = np.hstack([np.full((height, 1), 2, np.uint8), rows - above]).tobytes()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")
    try:
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error


def contact_sheet(
    source: FrameSource, indices: Sequence[int], path: Path, *, num_columns: int = 3, boxes: bool = True
) -> None:
    """Write the frames ``indices`` of a source as one PNG, with the boxes drawn in a colour per class."""
    write_png(sheet([framed(source, index, boxes=boxes) for index in indices], num_columns), path)


def framed(source: FrameSource, index: int, *, boxes: bool = True) -> NDArray[np.uint8]:
    """A frame's pixels with its boxes."""
    frame = source.frame(index)
    picture = frame.image().copy()
    if boxes:
        corners = np.concatenate([np.floor(frame.boxes[:, :2]), np.ceil(frame.boxes[:, 2:])], 1).astype(int)
        for (x0, y0, x1, y1), label in zip(corners.tolist(), frame.labels.tolist(), strict=True):
            colour = _COLOURS[label % len(_COLOURS)]
            picture[y0:y1, [x0, x1 - 1]] = colour
            picture[[y0, y1 - 1], x0:x1] = colour
    return picture


def sheet(pictures: Sequence[NDArray[np.uint8]], num_columns: int) -> NDArray[np.uint8]:
    """Pictures in rows on a dark ground; smaller ones leave a margin."""
    if not pictures:
        raise InputError("a sheet needs at least one frame")
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    num_rows = math.ceil(len(pictures) / num_columns)
    ground = np.full((num_rows * (height + 4), num_columns * (width + 4), 3), 24, np.uint8)
    for number, picture in enumerate(pictures):
        top, left = number // num_columns * (height + 4), number % num_columns * (width + 4)
        ground[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return ground


def conditions_sheet(seed: int, conditions: Sequence[str], at_s: float = 30.0) -> list[NDArray[np.uint8]]:
    """One city frame per entry, each a list of levels such as "night,rain"; "" is the base state."""
    kinds = {level: kind for kind, levels in LEVELS.items() for level in levels}
    pictures = []
    for entry in conditions:
        levels = [level.strip() for level in entry.split(",") if level.strip()]
        unknown = [level for level in levels if level not in kinds]
        if unknown:
            raise InputError(f"{', '.join(unknown)}: no such condition; allowed: {', '.join(kinds)}")
        drift = tuple(DriftEvent(kind=kinds[level], at_s=0.0, to=level, over_s=0.0) for level in levels)
        city = CitySource(seed=seed, num_objects=12.0, drift=drift, drift_period_s=0.0)
        source = open_source(StreamSpec(stream_id="preview", source=city, classes=CLASSES))
        pictures.append(framed(source, round(at_s * source.fps), boxes=False))
        source.close()
    return pictures


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a sheet of one city under several conditions. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Write a picture of one city under several conditions.")
    parser.add_argument("conditions", nargs="*", help='levels joined by commas, for example "night,rain"')
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--at", type=float, default=30.0, metavar="SECONDS", help="stream time of the frames")
    parser.add_argument("--columns", type=int, default=3)
    parser.add_argument("--halve", action="store_true", help="half the width and height")
    parser.add_argument("--output", type=Path, default=Path("city.png"))
    options = parser.parse_args(arguments)
    try:
        pictures = conditions_sheet(options.seed, options.conditions or [""], options.at)
        if options.halve:
            pictures = [_halved(picture) for picture in pictures]
        write_png(sheet(pictures, max(options.columns, 1)), options.output)
    except EkyaError as error:
        print(f"preview: {error}", file=sys.stderr)
        return 2
    return 0


def _halved(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = picture.shape[0] // 2 * 2, picture.shape[1] // 2 * 2
    quads = picture[:height, :width].reshape(height // 2, 2, width // 2, 2, 3).astype(np.uint16)
    return np.asarray(quads.mean((1, 3)) + 0.5, np.uint8)


if __name__ == "__main__":
    sys.exit(main())
