"""The drift schedule: given or derived, always mild before time 0."""

from __future__ import annotations

import pytest

from executor.streams.drift import BASE, LEVELS, DriftSchedule
from protocol.errors import InputError
from protocol.schema import CitySource, DriftEvent


def event(kind: str, at_s: float, to: str, over_s: float = 0.0) -> DriftEvent:
    return DriftEvent(kind=kind, at_s=at_s, to=to, over_s=over_s)  # type: ignore[arg-type]


def test_before_time_zero_the_scene_is_in_its_base_state_whatever_the_schedule() -> None:
    drift = (event("light", 0.0, "night"), event("weather", 0.0, "fog"))
    for source in (CitySource(seed=1, drift=drift), CitySource(seed=1, drift_period_s=2.0)):
        schedule = DriftSchedule(source)
        assert all(schedule.state(time_s) == BASE for time_s in (-1e6, -100.0, -0.01))
    assert BASE.words == "day, clear, commute, summer"


def test_an_event_takes_effect_gradually_and_then_lasts() -> None:
    schedule = DriftSchedule(CitySource(seed=1, drift=(event("light", 10.0, "night", 8.0),)))
    night = [schedule.state(time_s).light.of("night") for time_s in (9.9, 10.0, 12.0, 14.0, 18.0, 1e6)]
    assert night == [0.0, 0.0, 0.25, 0.5, 1.0, 1.0]
    assert schedule.state(14.0).light.of("day") == 0.5
    assert schedule.state(20.0).words == "night, clear, commute, summer"


def test_kinds_change_independently_and_given_events_need_no_order() -> None:
    drift = (event("weather", 20.0, "rain"), event("light", 10.0, "dusk"), event("weather", 30.0, "clear"))
    schedule = DriftSchedule(CitySource(seed=1, drift=drift))
    assert [schedule.state(time_s).words for time_s in (15.0, 25.0, 35.0)] == [
        "dusk, clear, commute, summer",
        "dusk, rain, commute, summer",
        "dusk, clear, commute, summer",
    ]
    assert [item.at_s for item in schedule.events_until(25.0)] == [10.0, 20.0]


def test_a_derived_schedule_is_the_same_in_any_order_of_asking_and_differs_by_seed() -> None:
    times = [float(time_s) for time_s in range(0, 3000, 7)]
    one, other = (DriftSchedule(CitySource(seed=5, drift_period_s=30.0)) for _ in range(2))
    forward = [one.state(time_s) for time_s in times]
    backward = [other.state(time_s) for time_s in reversed(times)]
    assert forward == backward[::-1]
    assert forward != [DriftSchedule(CitySource(seed=6, drift_period_s=30.0)).state(time_s) for time_s in times]


def test_a_derived_schedule_changes_something_about_once_a_period_and_uses_every_kind() -> None:
    events = DriftSchedule(CitySource(seed=9, drift_period_s=30.0)).events_until(3000.0)
    assert 98 <= len(events) <= 101
    assert {item.kind for item in events} == set(LEVELS)
    now = {kind: levels[0] for kind, levels in LEVELS.items()}
    for item in events:
        assert item.to != now[item.kind], "every event has to change something"
        now[item.kind] = item.to


def test_a_period_of_zero_turns_drift_off() -> None:
    assert DriftSchedule(CitySource(seed=9, drift_period_s=0.0)).state(1e7) == BASE


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (event("light", 1.0, "noon"), r"drift\[1\]\.to: 'noon' is no level of light; allowed: day, dusk, night"),
        (event("weather", 1.0, "night"), "is no level of weather"),
        (event("light", -1.0, "night"), r"drift\[1\]\.at_s: -1.0"),
        (event("light", float("nan"), "night"), r"drift\[1\]\.at_s: nan"),
        (event("light", float("inf"), "night"), r"drift\[1\]\.at_s: inf"),
    ],
)
def test_a_bad_event_is_refused_with_its_place_and_what_is_allowed(bad: DriftEvent, words: str) -> None:
    with pytest.raises(InputError, match=words):
        DriftSchedule(CitySource(seed=1, drift=(event("light", 0.0, "dusk"), bad)))
