from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.liveness import Liveness


def test_a_peer_is_lost_after_silence_and_not_before() -> None:
    live = Liveness(5.0)
    live.saw("a", 10.0)
    live.saw("b", 12.0)
    assert live.silent(15.0) == []
    assert live.silent(15.1) == ["a"]
    assert live.silent(18.0) == ["a", "b"]
    live.saw("a", 18.0)
    assert live.silent(18.0) == ["b"]
    assert live.silence("b", 18.0) == 6.0


def test_a_peer_that_was_forgotten_is_not_reported() -> None:
    live = Liveness(5.0)
    live.saw("a", 0.0)
    live.forget("a")
    live.forget("never seen")
    assert live.silent(100.0) == []
    assert live.peers == []
    assert live.state("a", 0.0) == "lost"
    assert live.next_deadline() is None


def test_a_loop_that_stands_still_is_stuck_and_not_lost() -> None:
    live = Liveness(5.0)
    for now in range(10):
        live.saw("a", float(now), loop_count=min(now, 3))
    assert live.state("a", 9.0) == "stuck"
    assert live.stuck(9.0) == ["a"]
    assert live.silent(9.0) == []
    live.saw("a", 9.5, loop_count=4)
    assert live.state("a", 9.5) == "alive"
    assert live.state("a", 20.0) == "lost"
    assert live.stuck(20.0) == []


def test_a_count_that_falls_is_a_peer_that_started_anew() -> None:
    live = Liveness(5.0)
    live.saw("a", 0.0, loop_count=900)
    live.saw("a", 6.0, loop_count=1)
    assert live.state("a", 6.0) == "alive"


def test_a_clock_reading_from_before_does_not_age_a_peer() -> None:
    live = Liveness(5.0)
    live.saw("a", 10.0)
    live.saw("a", 3.0)
    assert live.silent(14.0) == []


@pytest.mark.parametrize("silence_s", [0.0, -1.0, float("nan")])
def test_a_silence_that_is_not_positive_is_refused(silence_s: float) -> None:
    with pytest.raises(ValueError, match="silence_s"):
        Liveness(silence_s)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.0, 3.0)), max_size=40), st.floats(0.0, 10.0))
@settings(deadline=None)
def test_a_peer_is_lost_exactly_when_its_last_message_is_too_old(
    messages: list[tuple[str, float]], later: float
) -> None:
    live, now, last = Liveness(4.0), 0.0, dict[str, float]()
    for peer, step in messages:
        now += step
        live.saw(peer, now)
        last[peer] = now
    now += later
    assert set(live.silent(now)) == {peer for peer, at in last.items() if now - at > 4.0}
    deadline = live.next_deadline()
    assert (deadline is None) == (not last)
    if deadline is not None and now < deadline:
        assert live.silent(now) == []
