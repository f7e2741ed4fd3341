"""Serving: what a frame is worth, and what skipping one costs."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from executor.learning.inference import (
    InferenceEngine,
    Objects,
    carry_over,
    frame_accuracy,
    overlaps,
)
from executor.streams.feed import ClockedFeed
from executor.streams.frames import Frame
from protocol.schema import InferenceConfig
from tests.executor.tiny_source import SIZE, TinyFrame, TinySource, spec


def boxes(*rows: tuple[float, float, float, float]) -> NDArray[np.float32]:
    return np.array(rows, np.float32).reshape(-1, 4)


class KnowingAnalyser:
    """Sees the truth; counts what it was asked."""

    def __init__(self, version: int = 1, shift: int = 0) -> None:
        self.version, self.shift = version, shift
        self.asked: list[tuple[int, int]] = []

    def analyse(self, frame: Frame, resolution_px: int) -> Objects:
        self.asked.append((frame.index, resolution_px))
        return Objects(frame.boxes, (frame.labels + self.shift) % 3)

    def warm_up(self, resolution_px: int) -> None:
        del resolution_px


def engine(interval: int, analyser: KnowingAnalyser | None = None) -> InferenceEngine:
    config = InferenceConfig(config_id="x", frame_interval=interval, resolution_px=16)
    return InferenceEngine(analyser or KnowingAnalyser(), config)


def test_overlap_is_intersection_over_union() -> None:
    a = boxes((0, 0, 10, 10), (20, 20, 30, 30), (5, 5, 5, 5))
    b = boxes((0, 0, 10, 10), (5, 0, 15, 10))
    expected = [[1.0, 50 / 150], [0.0, 0.0], [0.0, 0.0]]
    assert np.allclose(overlaps(a, b), expected)


def test_a_result_is_carried_to_the_box_that_overlaps_most_and_used_once() -> None:
    last = Objects(boxes((0, 0, 10, 10), (100, 0, 110, 10)), np.array([4, 5]))
    here = boxes((3, 0, 13, 10), (1, 0, 11, 10), (108, 0, 118, 10))
    assert carry_over(last, here).tolist() == [-1, 4, -1]
    assert carry_over(None, here).tolist() == [-1, -1, -1]
    assert carry_over(last, boxes()).tolist() == []


def test_frames_without_objects_are_not_scored() -> None:
    assert frame_accuracy(np.array([1, -1]), np.array([1, 1])) == 0.5
    assert frame_accuracy(np.zeros(0, np.int64), np.zeros(0, np.int64)) is None
    assert engine(1).process(TinyFrame(9)).accuracy is None


def test_a_frame_is_analysed_when_the_configuration_asks_for_it() -> None:
    analyser = KnowingAnalyser()
    served = engine(3, analyser)
    outcomes = [served.process(TinyFrame(index)) for index in range(7)]
    assert [outcome.analysed for outcome in outcomes] == [True, False, False, True, False, False, True]
    assert analyser.asked == [(0, 16), (3, 16), (6, 16)]


@pytest.mark.parametrize(("interval", "right_until"), [(30, 10), (8, 8)])
def test_a_skipped_frame_is_right_as_long_as_its_objects_overlap_the_last_result(
    interval: int, right_until: int
) -> None:
    served = engine(interval)
    # Objects of 40 px move by 2 px a frame: the overlap of (40 - 2k) / (40 + 2k) falls below 0.3 at k = 11.
    assert (SIZE - 2 * 10) / (SIZE + 2 * 10) > 0.3 > (SIZE - 2 * 11) / (SIZE + 2 * 11)
    accuracies = [served.process(TinyFrame(index)).accuracy for index in range(0, 30) if index % 10 != 9]
    if interval == 30:
        indices = [index for index in range(30) if index % 10 != 9]
        assert accuracies == [1.0 if index <= right_until else 0.0 for index in indices]
    else:
        assert accuracies == [1.0] * len(accuracies)


def test_a_dropped_frame_is_not_analysed_but_judged() -> None:
    served = engine(1)
    assert served.process(TinyFrame(0), dropped=True).accuracy == 0.0  # nothing known yet
    served.process(TinyFrame(1))
    outcome = served.process(TinyFrame(2), dropped=True)
    assert (outcome.analysed, outcome.accuracy) == (False, 1.0)


def test_a_model_taken_over_between_two_frames_serves_the_next_one() -> None:
    served = engine(1, KnowingAnalyser(version=1, shift=1))
    assert served.process(TinyFrame(0)).accuracy == 0.0
    served.analyser = KnowingAnalyser(version=2)
    assert served.process(TinyFrame(1)).accuracy == 1.0


def test_every_frame_is_either_taken_or_dropped_exactly_once_however_late_the_worker_is() -> None:
    draw = np.random.default_rng(5)
    feed = ClockedFeed(TinySource(spec(fps=10.0)), 10.0, 3.0, 50.0)
    now, seen = 50.0, list[int]()
    num_dropped = 0
    for _ in range(400):
        now += float(draw.choice([0.0, 0.05, 0.1, 0.9], p=[0.3, 0.4, 0.2, 0.1]))
        taken = feed.take(now)
        num_dropped += len(taken.dropped)
        seen += [frame.index for frame in taken.dropped]
        if taken.frame is not None:
            seen.append(taken.frame.index)
    assert seen == list(range(30, 30 + len(seen)))
    assert num_dropped > 0
    assert len(seen) >= (now - 50.0) * 10.0 - 11


def test_the_frame_after_a_lost_one_is_analysed_in_its_place() -> None:
    serving = engine(4)
    analysed = [index for index in (0, 1, 3, 5, 6, 7, 8, 15, 17, 19, 20) if serving.process(TinyFrame(index)).analysed]
    assert analysed == [0, 5, 8, 15, 17, 20]
