"""What moves and hand-overs are measured to cost, and that plans are made with it."""

from __future__ import annotations

import pytest

from optimizer import moving
from optimizer.ports import HandedOver, Received
from optimizer.simulator import Simulation
from optimizer.state import SiteState
from protocol import messages as m
from protocol.events import PlanSolved, WorkerChanged
from tests.optimizer.coordinator_world import simulation, site

SITE = site(migration_s=1.5, config_change_s=0.05)


def test_without_measurements_prices_are_the_site_s() -> None:
    assert moving.prices(SiteState(site="test"), SITE) == (0.05, 1.5)


def test_a_price_nears_what_was_measured_and_never_falls_to_nothing() -> None:
    state = SiteState(site="test", move_costs_s=[9.0])
    assert moving.prices(state, SITE)[1] == pytest.approx((2 * 1.5 + 9.0) / 3)
    state.move_costs_s = [9.0] * 20
    assert moving.prices(state, SITE)[1] == pytest.approx(9.0, abs=0.7)
    state.move_costs_s = [0.0] * 20
    assert moving.prices(state, SITE)[1] == pytest.approx(0.75), "a plan that moves for nothing gains nothing"


def test_only_what_a_hand_over_adds_to_the_time_between_two_frames_is_a_cost() -> None:
    state = SiteState(site="test")
    spec = SITE.streams[0]
    for gap_ms in (1000.0 / spec.fps, 1000.0 / spec.fps + 80.0, None):
        event = WorkerChanged(
            job_id="serve/s0", stream_id="s0", gpu_id="gpu0", kind="inference", change="handed_over", reason="",
            gap_ms=gap_ms,
        )  # fmt: skip
        moving.note_hand_over(state, event, spec)
    assert state.change_costs_s == pytest.approx([0.0, 0.08])


def test_the_next_plan_is_made_with_the_price_that_telemetry_tells() -> None:
    run, _, _ = simulation(SITE, num_windows=2)
    run.run(until_s=60.0)
    for _ in range(6):
        event = WorkerChanged(
            job_id="serve/s0", stream_id="s0", gpu_id="gpu0", kind="inference", change="handed_over", reason="",
            gap_ms=1000.0,
        )  # fmt: skip
        run.give(HandedOver(event=event))
    run.run(until_s=1000.0)
    last = [e for e in run.events if isinstance(e, PlanSolved)][-1]
    assert last.config_change_s > 0.5
    assert run.decisions[-1].problem.config_change_s == last.config_change_s


# ---------------------------------------------------------------- moves


def ready(run: Simulation, executor_id: str) -> None:
    """The executor's worker of s0 says that it serves."""
    worker = m.WorkerStatus(
        job_id="serve/s0", kind="inference", stream_id="s0", pid=1, state="ready", share_granted=0.4,
        share_achieved=None, progress=1,
    )  # fmt: skip
    held = run.executors[executor_id].held
    beat = m.Heartbeat(executor_id=executor_id, incarnation="1", loop_count=1, held=held, workers=(worker,))
    run.give(Received(executor_id=executor_id, message=beat))


def moved(*, room: bool) -> tuple[Simulation, str]:
    """A stream that a plan moves now; without room its old place is given up at once."""
    run, _, _ = simulation(site(num_streams=1, retrain=()), num_gpus=2, num_windows=None)
    run.run(until_s=200.0)
    stream = run.coordinator.state.streams["s0"]
    new, old = stream.serving_executor, "gpu1" if stream.serving_executor == "gpu0" else "gpu0"
    stream.serving_executor = old
    stream.serving_share = stream.serving_share if room else 1.1  # more than there is beside the plan
    run.run(until_s=run.now + 0.5)  # the plan in force has it on the new one
    assert stream.serving_executor == new
    return run, new


def test_a_move_costs_nothing_while_the_old_place_serves() -> None:
    run, new = moved(room=True)
    run.run(until_s=run.now + 5.0)
    assert run.coordinator.state.streams["s0"].leaving is not None
    ready(run, new)
    assert run.coordinator.state.move_costs_s == [0.0]
    assert run.coordinator.state.streams["s0"].moving is None


def test_a_move_costs_the_time_in_which_nobody_serves() -> None:
    run, new = moved(room=False)
    assert run.coordinator.state.streams["s0"].leaving is None
    run.run(until_s=run.now + 6.0)
    ready(run, new)
    (cost_s,) = run.coordinator.state.move_costs_s
    assert cost_s == pytest.approx(6.0, abs=0.6)
    assert moving.prices(run.coordinator.state, SITE)[1] > 2.5
