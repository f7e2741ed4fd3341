"""What is in a data set, and what is wrong with it: ``python -m executor.streams.ingest PATH``.

Prints one JSON object. ``ekya-optimizer ingest`` runs it in a process of its own, since the readers and decoders of
pictures belong to the executor, and shows the result. Exit code 2 with one line on standard error when the data set
cannot be read at all.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec

from executor.streams.annotations import Annotated, AnnotatedSet, read_dataset
from executor.streams.dataset import check_pictures
from protocol.datasets import DataSummary, DataWindow
from protocol.errors import EkyaError, InputError

_SHOWN_PROBLEMS = 200


def summarise(found: AnnotatedSet, num_windows: int) -> DataSummary:
    """Read all there is to know. Opens every picture for its size."""
    sizes = check_pictures(found)
    count: Counter[str] = Counter()
    ids: dict[str, int] = {}
    for frame in found.frames:
        count.update(_name(found, box.category) for box in frame.boxes)
        ids |= {_name(found, box.category): box.category for box in frame.boxes}
    return DataSummary(
        path=str(found.path),
        format=found.format,
        num_frames=len(found.frames),
        num_empty=sum(not frame.boxes for frame in found.frames),
        num_objects=sum(count.values()),
        classes=dict(count.most_common()),
        ids=dict(sorted(ids.items(), key=lambda item: item[1])),
        sizes=sizes,
        windows=windows_of(found, num_windows),
        num_problems=len(found.problems),
        problems=tuple(map(str, found.problems[:_SHOWN_PROBLEMS])),
    )


def windows_of(found: AnnotatedSet, num_windows: int) -> tuple[DataWindow, ...]:
    """The data set in ``num_windows`` stretches, fewer when it has fewer frames."""
    total = len(found.frames)
    num_windows = min(num_windows, total)
    windows: list[DataWindow] = []
    for number in range(num_windows):
        first, end = number * total // num_windows, (number + 1) * total // num_windows
        part = found.frames[first:end]
        classes = Counter(_name(found, box.category) for frame in part for box in frame.boxes)
        windows.append(
            DataWindow(
                first_frame=first,
                num_frames=end - first,
                num_objects=sum(classes.values()),
                classes=dict(classes.most_common()),
                drift=mix_distance(windows[0].classes if windows else classes, classes),
                objects_per_frame=sum(classes.values()) / (end - first),
                box_edge=_mean_edge(part),
            )
        )
    return tuple(windows)


def mix_distance(a: dict[str, int] | Counter[str], b: dict[str, int] | Counter[str]) -> float | None:
    """Total variation distance of two mixes of classes, 0..1; None when one of them has no object."""
    sum_a, sum_b = sum(a.values()), sum(b.values())
    if not sum_a or not sum_b:
        return None
    return 0.5 * sum(abs(a.get(name, 0) / sum_a - b.get(name, 0) / sum_b) for name in {*a, *b})


def _mean_edge(frames: Sequence[Annotated]) -> float:
    edges = [math.sqrt((b.x1 - b.x0) * (b.y1 - b.y0)) for frame in frames for b in frame.boxes]
    return sum(edges) / len(edges) if edges else 0.0


def _name(found: AnnotatedSet, category: int) -> str:
    return found.names.get(category, str(category))


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description="Print what is in a data set as JSON.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--images", default="")
    parser.add_argument("--format", default="auto")
    parser.add_argument("--split", default="")
    parser.add_argument("--windows", type=int, default=8)
    options = parser.parse_args(arguments)
    try:
        found = read_dataset(options.path, images=options.images, form=options.format, split=options.split)
        if not found.frames and not found.problems:
            raise InputError(f"{options.path}: holds no frames")
        summary = summarise(found, max(1, options.windows))
    except EkyaError as error:
        print(error, file=sys.stderr)
        return 2
    sys.stdout.buffer.write(msgspec.json.encode(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
