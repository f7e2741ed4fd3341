"""A worker whose live streams come with their truth: the films of tests/cameras/film.py say which frame they show."""

from __future__ import annotations

import re
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from executor import worker
from executor.streams.feed import Feed, Taken, open_feed
from executor.streams.frames import Frame, FrameSource
from executor.streams.health import Health
from executor.streams.resize import resize_picture
from protocol.messages import InferenceJob
from tests.cameras.film import SIZE, city, number_of


class TrueFrame:
    """A live frame with the boxes that its film was made with."""

    def __init__(self, frame: Frame, seed: int, fps: float) -> None:
        self.index, self.time_s, self.conditions = frame.index, frame.time_s, ""
        self._pixels = frame.image()
        truth = city(seed, (self._pixels.shape[1], self._pixels.shape[0]), fps).frame(number_of(self._pixels))
        self.boxes: NDArray[np.float32] = truth.boxes
        self.labels: NDArray[np.int64] = truth.labels

    def crops(self, px: int) -> NDArray[np.uint8]:
        crops = np.empty((len(self.boxes), px, px, 3), np.uint8)
        for number, (x0, y0, x1, y1) in enumerate(self.boxes.astype(int).tolist()):
            crops[number] = resize_picture(self._pixels[y0:y1, x0:x1], px)
        return crops

    def image(self) -> NDArray[np.uint8]:
        return self._pixels


class TrueFeed:
    """A feed whose frames know their truth. The stream's id ends with the seed of its film."""

    def __init__(self, feed: Feed, job: InferenceJob) -> None:
        self._feed, self._fps = feed, job.stream.fps
        digits = re.search(r"\d+$", job.stream.stream_id)
        self._seed = int(digits[0]) if digits else 0
        city(self._seed, SIZE, self._fps).frame(0)  # takes a second, once: not a frame's

    def take(self, now: float) -> Taken:
        taken = self._feed.take(now)
        return taken if taken.frame is None else replace(taken, frame=TrueFrame(taken.frame, self._seed, self._fps))

    def next_s(self, now: float) -> float:
        return self._feed.next_s(now)

    def arrival_s(self, frame: Frame) -> float:
        return self._feed.arrival_s(frame)

    def begin(self, at_s: float) -> None:
        self._feed.begin(at_s)

    def health(self, now: float) -> Health:
        return self._feed.health(now)

    def first(self) -> Frame | None:
        return self._feed.first()

    def close(self) -> None:
        self._feed.close()


def feed_with_truth(job: InferenceJob, source: FrameSource | None, store: Path, origin_s: float | None) -> Feed:
    return TrueFeed(open_feed(job, source, store, origin_s), job)


def main(connection: Connection) -> None:
    """The worker that an executor's settings name."""
    worker.main(connection, feed_with=feed_with_truth)
