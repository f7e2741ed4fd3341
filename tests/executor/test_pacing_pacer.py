"""The pacer as pure logic, driven by clocks of the test's own."""

from __future__ import annotations

import random

import pytest

from executor.shares.pacing import Pacer


class Machine:
    """A device that is either working or resting; oversleeps a little, as real ones do."""

    def __init__(self, oversleep_s: float = 0.0) -> None:
        self.now = 100.0
        self.busy = 7.0
        self.oversleep_s = oversleep_s

    def work(self, seconds: float, contention: float = 1.0) -> None:
        self.busy += seconds
        self.now += seconds * contention

    def sleep(self, seconds: float) -> None:
        self.now += seconds + self.oversleep_s

    def pacer(self, share: float) -> Pacer:
        return Pacer(share, lambda: self.now, lambda: self.busy, self.sleep)


def run(machine: Machine, pacer: Pacer, until: float, step_s: tuple[float, float], seed: int = 1) -> None:
    draw = random.Random(seed)
    while machine.now < until:
        machine.work(draw.uniform(*step_s))
        pacer.pace()


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("step_s", [(0.0005, 0.002), (0.02, 0.06), (0.2, 0.4)])
def test_the_achieved_share_of_ten_seconds_is_the_granted_one(share: float, step_s: tuple[float, float]) -> None:
    machine = Machine(oversleep_s=0.002)
    pacer = machine.pacer(share)
    run(machine, pacer, 120.0, step_s)
    achieved = pacer.achieved(10.0)
    assert achieved is not None
    assert achieved == pytest.approx(share, rel=0.1 if step_s[1] < 0.1 else 0.3)


def test_a_new_share_holds_from_the_moment_it_is_granted() -> None:
    machine = Machine()
    pacer = machine.pacer(0.2)
    run(machine, pacer, 110.0, (0.01, 0.02))
    pacer.set_share(0.8)
    run(machine, pacer, 121.0, (0.01, 0.02))
    assert pacer.achieved(10.0) == pytest.approx(0.8, rel=0.05)
    assert pacer.achieved(20.0) == pytest.approx(0.5, abs=0.05)


def test_a_rest_that_a_command_cut_short_is_worked_out_anew() -> None:
    machine = Machine()
    pacer = machine.pacer(0.1)
    rests: list[float] = []

    def sleep(seconds: float) -> None:
        rests.append(seconds)
        if len(rests) == 1:  # the command comes after a tenth of a second
            machine.now += 0.1
            pacer.set_share(0.5)
        else:
            machine.now += seconds

    pacer = Pacer(0.1, lambda: machine.now, lambda: machine.busy, sleep)
    machine.work(1.0)
    pacer.pace()
    # 0.1 burst + 0.1 earned while working - 1.0 consumed: 0.8 owed, of which 0.01 is paid at the old share.
    assert rests == [pytest.approx(8.0), pytest.approx(0.79 / 0.5)]


def test_an_idle_worker_saves_up_no_more_than_the_burst() -> None:
    machine = Machine()
    pacer = machine.pacer(0.5)
    machine.now += 60.0
    assert pacer.owed_s() == 0.0
    machine.work(0.6)
    assert pacer.owed_s() == pytest.approx((0.6 - 0.1 - 0.3) / 0.5)


def test_share_one_never_rests_even_when_processor_time_runs_ahead_of_wall_time() -> None:
    machine = Machine()
    pacer = machine.pacer(1.0)
    machine.work(3.0, contention=0.5)
    assert pacer.owed_s() == 0.0
    pacer.set_share(0.5)
    assert pacer.owed_s() == 0.0


def test_excused_work_is_not_paid_for_but_shows_in_the_achieved_share() -> None:
    machine = Machine()
    pacer = machine.pacer(0.5)
    machine.work(1.0)
    assert pacer.owed_s() > 0.0
    pacer.excuse(1.0)
    assert pacer.owed_s() == 0.0
    assert pacer.achieved() == pytest.approx(1.0)


def test_what_was_achieved_at_an_earlier_share_is_not_counted() -> None:
    machine = Machine()
    pacer = machine.pacer(0.2)
    run(machine, pacer, 120.0, (0.005, 0.01))
    assert pacer.achieved() == pytest.approx(0.2, rel=0.1)
    pacer.set_share(0.8)
    assert pacer.achieved() is None
    run(machine, pacer, 123.0, (0.005, 0.01))
    assert pacer.achieved() == pytest.approx(0.8, rel=0.1)
    pacer.set_share(0.8)
    assert pacer.achieved() is not None, "nothing has changed"


def test_nothing_is_achieved_before_anything_was_measured() -> None:
    assert Machine().pacer(0.5).achieved() is None


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_a_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        Machine().pacer(share)
