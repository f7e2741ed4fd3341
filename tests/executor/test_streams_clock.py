"""The frame clock: which frames have arrived, nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executor.streams.clock import FrameClock


def test_frames_arrive_at_their_times_from_the_start_position_on() -> None:
    clock = FrameClock(fps=10.0, start_position_s=2.0, now=100.0)
    assert clock.next_index == 20
    assert list(clock.arrived(99.9).frames) == []
    assert list(clock.arrived(100.0).frames) == [20]
    assert list(clock.arrived(100.05).frames) == []
    assert clock.next_due() == pytest.approx(100.1)
    assert list(clock.arrived(100.3).frames) == [21, 22, 23]
    assert clock.position_s(100.3) == pytest.approx(2.3)
    assert clock.lag_s(23, 100.35) == pytest.approx(0.05)


def test_a_late_worker_gets_the_newest_frames_and_the_count_of_the_skipped_ones() -> None:
    clock = FrameClock(fps=10.0, start_position_s=0.0, now=0.0, max_backlog=3)
    arrivals = clock.arrived(2.0)
    assert list(arrivals.frames) == [18, 19, 20]
    assert arrivals.num_skipped == clock.num_skipped == 18
    assert list(clock.arrived(2.1).frames) == [21]


def test_a_stream_may_begin_before_its_time_zero() -> None:
    clock = FrameClock(fps=4.0, start_position_s=-1.0, now=50.0)
    assert list(clock.arrived(51.0).frames) == [-4, -3, -2, -1, 0]


@given(
    fps=st.floats(0.5, 240),
    start=st.floats(-1e4, 1e5),
    steps=st.lists(st.floats(-1, 3), max_size=30),
    backlog=st.integers(1, 20),
)
def test_every_frame_is_handed_out_or_counted_exactly_once_and_in_order(
    fps: float, start: float, steps: list[float], backlog: int
) -> None:
    clock = FrameClock(fps, start, now=1000.0, max_backlog=backlog)
    expected, now = clock.next_index, 1000.0
    for step in steps:
        now += step
        arrivals = clock.arrived(now)
        assert len(arrivals.frames) <= backlog
        assert arrivals.frames.start == expected + arrivals.num_skipped
        expected = arrivals.frames.stop
        assert clock.next_due() > now - 1e-3 / fps or step < 0


@pytest.mark.parametrize(("fps", "backlog"), [(0.0, 1), (-1.0, 1), (float("nan"), 1), (float("inf"), 1), (10.0, 0)])
def test_senseless_settings_are_refused(fps: float, backlog: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        FrameClock(fps, 0.0, 0.0, backlog)
