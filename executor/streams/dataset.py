"""A labelled data set of pictures as a stream: played in time order and looped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from executor.streams.annotations import Annotated, AnnotatedSet, read_dataset
from executor.streams.pictures import picture_size, read_picture
from executor.streams.resize import resize_picture
from executor.streams.video import SourceError, Video
from protocol.errors import InputError
from protocol.schema import DatasetSource


@dataclass(frozen=True)
class _Truth:
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]


class DatasetFrame:
    """One frame of a data set (see executor.streams.frames.Frame). The picture is read when it is asked for."""

    def __init__(self, source: Dataset, index: int, number: int) -> None:
        self.index, self.time_s = index, index / source.fps
        self.conditions = source.name
        self._source, self._number = source, number
        truth = source.truth_of(number)
        self.boxes, self.labels = truth.boxes, truth.labels

    def crops(self, px: int) -> NDArray[np.uint8]:
        """Square RGB crops of the objects, uint8 (n, px, px, 3). Raises SourceError when the picture is damaged."""
        crops = np.empty((len(self.boxes), px, px, 3), np.uint8)
        if len(self.boxes) == 0:
            return crops
        picture = self.image()
        low = np.floor(self.boxes[:, :2]).astype(int).tolist()
        high = np.ceil(self.boxes[:, 2:]).astype(int).tolist()
        for number, ((x0, y0), (x1, y1)) in enumerate(zip(low, high, strict=True)):
            crops[number] = resize_picture(picture[y0:y1, x0:x1], px)
        return crops

    def image(self) -> NDArray[np.uint8]:
        """The whole picture, RGB uint8 (height, width, 3). Raises SourceError when it is damaged."""
        return self._source.picture(self._number)


class Dataset:
    """The data set of ``source`` as a FrameSource.

    Raises InputError, naming file and line, when something is wrong with it, as ``ekya-optimizer ingest`` lists it all.
    """

    def __init__(self, source: DatasetSource, classes: tuple[str, ...], fps: float) -> None:
        self.fps, self.classes = fps, classes
        found = read_dataset(Path(source.path), images=source.images, form=source.format, split=source.split)
        self._video = open_video(found)
        if found.problems:
            self.close()
            more = f" (and {len(found.problems) - 1} more: ekya-optimizer ingest lists them)"
            raise InputError(f"{found.problems[0]}{more if len(found.problems) > 1 else ''}")
        self.name = found.path.stem or found.path.name
        table = category_table(source.class_map, found.names, classes)
        self._frames = found.frames
        if not self._frames:
            raise InputError(f"{found.path}: holds no frames")
        self._truth = [self._sort(frame, table) for frame in self._frames]
        self._latest: tuple[int, NDArray[np.uint8]] | None = None
        if not any(len(truth.labels) for truth in self._truth):
            self.close()
            raise InputError(f"{found.path}: no box is left of the classes {', '.join(classes)}; see class_map")

    @property
    def num_frames(self) -> int:
        """Frames until the stream repeats."""
        return len(self._frames)

    def frame(self, index: int) -> DatasetFrame:
        """The frame at ``index``, of any sign."""
        return DatasetFrame(self, index, index % len(self._frames))

    def truth_of(self, number: int) -> _Truth:
        return self._truth[number]

    def picture(self, number: int) -> NDArray[np.uint8]:
        """The pixels of a frame; the latest one is kept. Raises SourceError."""
        if self._latest is None or self._latest[0] != number:
            frame = self._frames[number]
            try:
                if self._video is not None and frame.number is not None:
                    pixels = self._video.pixels(frame.number)
                else:
                    pixels = read_picture(frame.picture)
            except InputError as error:
                raise SourceError(str(error)) from error
            self._latest = number, pixels
        return self._latest[1]

    def close(self) -> None:
        """Release the video; safe to call twice."""
        if self._video is not None:
            self._video.close()

    def _sort(self, frame: Annotated, table: dict[int, int | None]) -> _Truth:
        """A frame's boxes of the stream's classes, cut at the edges of the picture."""
        kept = [(box, label) for box in frame.boxes if (label := table.get(box.category)) is not None]
        if not kept:
            return _Truth(np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
        if self._video is not None:
            width, height = self._video.width, self._video.height
        else:
            width, height = picture_size(frame.picture)
        boxes = np.array([(b.x0, b.y0, b.x1, b.y1) for b, _ in kept], np.float32)
        labels = np.array([label for _, label in kept], np.int64)
        boxes = np.clip(boxes, 0.0, np.array([width, height, width, height], np.float32))
        inside = (boxes[:, 2] - boxes[:, 0] >= 1.0) & (boxes[:, 3] - boxes[:, 1] >= 1.0)
        return _Truth(boxes[inside], labels[inside])


def category_table(class_map: dict[str, str], names: dict[int, str], classes: tuple[str, ...]) -> dict[int, int | None]:
    """Category id -> index into ``classes``, None for a dropped one. Raises InputError naming the key."""
    by_name = {name: number for number, name in names.items()}
    table: dict[int, int | None] = {
        number: classes.index(name) if name in classes else None for number, name in names.items()
    }
    if class_map:
        table = dict.fromkeys(names)
    for key, name in class_map.items():
        number = int(key) if key.isdigit() else by_name.get(key)
        if number is None or number not in names:
            known = ", ".join(f"{n} ({i})" for i, n in sorted(names.items()))
            raise InputError(f"source.class_map: the data set has no category {key!r}; it has {known}")
        if name and name not in classes:
            raise InputError(f"source.class_map[{key!r}]: {name!r} is not among the classes {', '.join(classes)}")
        table[number] = classes.index(name) if name else None
    if all(label is None for label in table.values()):
        have = ", ".join(names.values())
        raise InputError(
            f"source.class_map: none of the data set's categories ({have}) is a class of the stream; map them"
        )
    return table


def open_video(found: AnnotatedSet) -> Video | None:
    """The video that the frames of a sample list are in, None for pictures. Frames without rows are added, and rows
    beyond its end become problems. Raises InputError when the video cannot be read."""
    if found.video is None:
        return None
    video = Video(found.video)
    for frame in found.frames:
        if frame.number is not None and frame.number >= video.num_frames:
            text = f"frame id {frame.number} is not in the video; allowed: 0 to {video.num_frames - 1}"
            found.problem(found.path, 0, text)
    boxes = {frame.number: frame.boxes for frame in found.frames}
    found.frames = [
        Annotated(found.video, number, boxes.get(number, ()), (number,)) for number in range(video.num_frames)
    ]
    return video


def check_pictures(found: AnnotatedSet) -> dict[str, int]:
    """Pictures by "WIDTHxHEIGHT"; those that are none, and boxes that leave them, become problems of ``found``."""
    sizes: dict[str, int] = {}
    video = open_video(found)
    if video is not None:
        video.close()
    for frame in found.frames:
        try:
            width, height = (video.width, video.height) if video is not None else picture_size(frame.picture)
        except InputError as error:
            found.problem(frame.picture, 0, str(error).removeprefix(f"{frame.picture}: "))
            continue
        sizes[f"{width}x{height}"] = sizes.get(f"{width}x{height}", 0) + 1
        for box in frame.boxes:
            if box.x0 < -1.0 or box.y0 < -1.0 or box.x1 > width + 1.0 or box.y1 > height + 1.0:
                where = f"frame {frame.number}" if frame.number is not None else str(frame.picture)
                corners = f"{box.x0:g},{box.y0:g},{box.x1:g},{box.y1:g}"
                found.problem(found.path, 0, f"{where}: box {corners} leaves the {width}x{height} picture")
    return sizes
