"""How a live stream is judged, tried again and timed: pure functions of a clock that the test passes in."""

from __future__ import annotations

import random

import pytest

from executor.streams.health import FrameCounter, Health, HealthJudge, StampClock, Waiting, pause_s

SIZE = (320, 240)


def well(now: float = 0.0) -> HealthJudge:
    """A judge of a stream that is connected and shows pictures until ``now``."""
    judge = HealthJudge(2.0, now - 1.0)
    judge.connected(now - 1.0)
    for number in range(5):
        judge.picture(SIZE, now - 0.4 + number / 10)
    assert judge.at(now) == Health("ok")
    return judge


def test_a_stream_that_is_still_being_opened_is_not_complained_about() -> None:
    judge = HealthJudge(2.0, 0.0)
    assert judge.at(5.0).condition == "ok"
    judge.lost("refused")
    assert judge.at(5.0) == Health("lost", "refused")


def test_silence_is_a_stall_and_bad_data_is_garbage() -> None:
    judge = well()
    assert judge.at(1.9).condition == "ok"
    assert judge.at(2.0).condition == "stalled"
    judge = well()
    judge.bad_data()
    assert judge.at(1.0).condition == "ok", "the decoder gets over it"
    assert judge.at(2.0).condition == "garbage"


@pytest.mark.parametrize("trouble", ["lost", "stalled", "garbage"])
def test_a_degraded_stream_is_well_again_when_several_pictures_have_come(trouble: str) -> None:
    judge = well()
    if trouble == "lost":
        judge.lost("gone")
    if trouble == "garbage":
        judge.bad_data()
    assert judge.at(3.0).condition == trouble
    judge.connected(3.0)
    judge.picture(SIZE, 3.1)
    assert judge.at(3.1).condition == trouble
    judge.bad_data()
    judge.picture(SIZE, 3.2)
    judge.picture(SIZE, 3.3)
    assert judge.at(3.3).condition == trouble
    judge.picture(SIZE, 3.4)
    assert judge.at(3.4) == Health("ok")


def test_a_lost_stream_that_connects_and_shows_nothing_stays_lost_and_is_then_stalled_no_more() -> None:
    judge = well()
    judge.lost("gone")
    assert judge.at(0.1).condition == "lost"
    judge.connected(1.0)
    assert judge.at(1.5).condition == "lost"
    assert judge.at(9.0).condition == "lost", "it never came back"


def test_another_picture_size_is_told_once_and_is_over_with_the_next_pictures() -> None:
    judge = well()
    judge.picture((640, 480), 0.1)
    assert judge.at(0.1) == Health("changed", "pictures of 640x480 instead of 320x240")
    judge.picture((640, 480), 0.2)
    judge.picture((640, 480), 0.3)
    assert judge.at(0.3) == Health("ok")


def test_pauses_double_up_to_the_longest_and_differ_between_streams() -> None:
    assert [pause_s(n, 0.5, 15.0, 1.0) for n in range(7)] == [0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0]
    assert pause_s(10**6, 0.5, 15.0, 0.0) == 7.5
    assert {pause_s(2, 0.5, 15.0, draw / 10) for draw in range(11)} <= {1.0 + draw / 10 for draw in range(11)}


def test_time_stamps_lose_the_networks_jitter_and_keep_its_delays() -> None:
    draw = random.Random(7)
    clock = StampClock()
    late = []
    for number in range(600):
        jitter = draw.uniform(0.0, 0.08)
        delay = 0.6 if 300 <= number < 310 else 0.0
        now = 1000.0 + number / 10 + jitter + delay
        late.append(now - clock.local(number / 10, now))
    assert max(late[50:300] + late[310:]) <= 0.09
    assert min(late[300:310]) >= 0.5


def test_time_stamps_that_begin_anew_are_followed_at_once() -> None:
    clock = StampClock()
    for number in range(20):
        clock.local(500.0 + number / 10, number / 10)
    assert clock.local(0.0, 2.0) == pytest.approx(2.0)
    assert clock.local(0.1, 2.1) == pytest.approx(2.1)
    assert clock.local(9e5, 2.2) == pytest.approx(2.2), "a leap forward as well"
    assert clock.local(None, 2.3) == 2.3


def test_clocks_that_run_apart_are_followed() -> None:
    clock = StampClock()
    late = [0.05 * n * 1.0005 - clock.local(0.05 * n, 0.05 * n * 1.0005) for n in range(20_000)]
    assert max(late) < 0.001


@pytest.mark.parametrize("camera_fps", [10.0, 25.0, 29.97, 4.0])
def test_frames_are_numbered_at_the_streams_rate_each_number_once(camera_fps: float) -> None:
    draw = random.Random(3)
    counter = FrameCounter(10.0, 100.0)
    shift = draw.uniform(0.0, 0.1)
    numbers = [counter.number(103.0 + shift + n / camera_fps + draw.uniform(-0.02, 0.02)) for n in range(1000)]
    given = [number for number in numbers if number is not None]
    assert given == sorted(set(given))
    assert given[0] in (30, 31)
    seconds = 999 / camera_fps
    assert len(given) == pytest.approx(seconds * min(10.0, camera_fps), rel=0.01)
    assert given[-1] - given[0] == pytest.approx(seconds * 10.0, abs=2)


def test_a_recording_for_the_first_model_begins_where_it_is_to_begin() -> None:
    counter = FrameCounter(10.0, None, start_s=-20.0)
    assert [counter.number(5000.0 + n / 10) for n in range(3)] == [-200, -199, -198]


def test_who_falls_behind_gets_the_newest_picture_next_and_every_picture_is_taken_or_counted_once() -> None:
    waiting = Waiting[int](0.4)
    taken, lost = [], 0
    for step in range(200):  # a picture every 100 ms; nobody asks between 5 s and 8 s, then every 120 ms
        now = step / 10.0
        waiting.add(step, now, now)
        if not 5.0 < now < 8.0 and step % 6:
            item, given_up = waiting.take(now)
            lost += given_up
            if item is not None:
                taken.append((now, item))
    first = next(at for at in taken if at[0] >= 8.0)
    assert first[0] - first[1] / 10.0 <= 0.4
    lags = [now - item / 10.0 for now, item in taken]
    assert max(lags) <= 0.4 + 1e-9
    assert sum(lags) / len(lags) < 0.25, "and not as late as is allowed for ever"
    assert [item for _, item in taken] == sorted({item for _, item in taken})
    item, given_up = waiting.take(1e3)
    assert item is None
    assert len(taken) + lost + given_up == 200


def test_a_picture_that_is_late_already_when_it_comes_is_given_up() -> None:
    waiting = Waiting[str](0.4)
    waiting.add("late", 1.0, 2.0)
    assert waiting.take(2.0) == (None, 1)
    waiting.add("in time", 1.9, 2.0)
    assert waiting.take(2.2) == ("in time", 0)
