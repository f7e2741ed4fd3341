"""Trials beside the plan in virtual time: when they run, at what share, what waits for them, and what may go wrong."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from optimizer.config import ProfilingConfig
from optimizer.objective import judge
from optimizer.ports import Received
from optimizer.simulator import SimulatedExecutor, Simulation
from protocol import messages as m
from protocol.events import Notice, PlanSolved, ProfileEstimated, RetrainFinished, WindowClosed, WindowOpened
from protocol.plan import Plan
from protocol.schema import GpuSpec
from tests.optimizer.coordinator_world import RETRAIN, TestProfiler, TestWorld, Wish, simulation, site

BESIDE = ProfilingConfig(share=0.3)
NOTHING = Wish(retrain=(), inference=())


def run_site(
    profiling: ProfilingConfig, wish: Wish, *, num_streams: int = 2, num_gpus: int = 1, windows: int = 3
) -> tuple[Simulation, TestWorld, TestProfiler]:
    run, world, profiler = simulation(
        site(num_streams=num_streams, profiling=profiling), num_gpus=num_gpus, num_windows=windows
    )
    profiler.wish = wish
    run.run(until_s=1000.0)
    assert run.finish is not None
    return run, world, profiler


def realised(run: Simulation) -> list[float]:
    return [e.realised for e in run.events if isinstance(e, WindowClosed)]


def opened_s(run: Simulation, window: int) -> float:
    return next(e.site_s for e in run.events if isinstance(e, WindowOpened) and e.window == window)


@pytest.mark.parametrize("num_streams", [1, 2, 4])
@pytest.mark.parametrize("num_gpus", [1, 2])
def test_trials_beside_the_plan_cost_less_accuracy_than_a_pause_before_it(num_streams: int, num_gpus: int) -> None:
    before, _, _ = run_site(
        ProfilingConfig(share=0.3, when="before"), Wish(), num_streams=num_streams, num_gpus=num_gpus
    )
    beside, _, _ = run_site(BESIDE, Wish(), num_streams=num_streams, num_gpus=num_gpus)
    # The first window is the same; in the others retrainings begin earlier, or streams are served better meanwhile.
    assert sum(realised(beside)) > sum(realised(before))
    assert beside.peak_share <= 1.0 + 1e-9


def test_a_window_whose_labels_are_there_is_planned_the_moment_it_opens() -> None:
    run, world, _ = run_site(msgspec.structs.replace(BESIDE, ahead=0.3), NOTHING)
    for window in (1, 2):
        plans = [e for e in run.events if isinstance(e, PlanSolved) and e.window == window]
        assert plans[0].phase == "plan"
        assert plans[0].site_s == pytest.approx(opened_s(run, window), abs=1e-6)
        assert any(stream.retrain_id for stream in plans[0].streams)
        labelled = [j for j in world.started if j.endswith(f"/w{window}") and j.startswith(("label/", "check/"))]
        assert len(labelled) == 4
    assert not [job for job in world.started if job.startswith(("trial/", "measure/")) and "/w" in job]


def test_a_stream_is_retrained_while_others_are_still_labelled() -> None:
    run, world, _ = run_site(msgspec.structs.replace(BESIDE, ahead=0.0, head_start=0.05), NOTHING, num_streams=4)
    order = [job for job in world.started if job.endswith("/w1") or (job.startswith("retrain/") and "/w1/" in job)]
    first = next(index for index, job in enumerate(order) if job.startswith("retrain/"))
    assert any(job.startswith("label/") for job in order[first:])
    assert run.peak_share <= 1.0 + 1e-9


def test_every_plan_beside_trials_keeps_their_share_free_and_passes_the_judge() -> None:
    run, _, _ = run_site(msgspec.structs.replace(BESIDE, ahead=0.0), Wish(), num_streams=3, num_gpus=2)
    kept = 0
    for decision in run.decisions:
        assert decision.plan is not None
        verdict = judge(decision.problem, decision.plan)
        assert verdict.feasible, verdict.violations
        if decision.phase != "profiling":
            kept += any(gpu.reserved_share > 0.15 for gpu in decision.problem.gpus)
    assert kept, "some plan was made beside trials"
    assert run.share_s["trial", 1] > 0.0


def test_a_retraining_waits_for_a_trial_that_may_change_it_and_for_no_measurement() -> None:
    for wish, waits in ((Wish(inference=()), True), (Wish(retrain=()), False)):
        _, world, _ = run_site(BESIDE, wish, num_streams=1)
        order = [job.split("/")[0] for job in world.started if "/s0/w1" in job]
        assert order.index("check") < order.index("retrain")
        if waits:
            assert order.index("trial") < order.index("retrain")
        else:
            assert "trial" not in order
            assert "measure" in order


def test_the_profiler_is_told_at_what_share_trials_are_waited_for() -> None:
    _, _, beside = run_site(msgspec.structs.replace(BESIDE, beside_share=0.2), Wish(), num_streams=1)
    assert beside.waits[0] is None, "the bootstrap's trials hold nothing up"
    assert set(beside.waits[1:]) == {0.2}
    _, _, before = run_site(ProfilingConfig(share=0.3, when="before"), Wish(), num_streams=1)
    assert set(before.waits) == {None}


def test_the_paper_s_method_pauses_before_the_plan_whatever_the_site_says() -> None:
    run, world, _ = run_site(ProfilingConfig(share=0.3, method="paper", when="beside"), Wish())
    assert not [job for job in world.started if job.startswith(("check/", "measure/"))]
    for window in (1, 2):
        profiled = [e.site_s for e in run.events if isinstance(e, ProfileEstimated) and e.window == window]
        (planned,) = [
            e.site_s for e in run.events if isinstance(e, PlanSolved) and e.window == window and e.phase == "plan"
        ]
        assert planned >= max(profiled)
        assert min(profiled) > opened_s(run, window)


# ---------------------------------------------------------------- faults


def begun(kind: str, **changes: object) -> tuple[Simulation, TestWorld, str, str]:
    """A run in its second window with a job of ``kind`` under way: (run, world, executor, job id)."""
    profiling = msgspec.structs.replace(BESIDE, ahead=0.0, **changes)
    run, world, _ = simulation(site(num_streams=2, profiling=profiling), num_gpus=2, num_windows=None)
    while True:
        run.run(until_s=run.now + 0.5)
        for executor_id, job in run.coordinator.state.pipeline.items():
            if job.job_id.startswith(f"{kind}/") and job.window == 1:
                return run, world, executor_id, job.job_id


@pytest.mark.parametrize("kind", ["label", "check", "trial"])
def test_a_trial_whose_executor_dies_is_made_on_another_one(kind: str) -> None:
    run, world, executor_id, job_id = begun(kind)
    run.leave(executor_id)
    run.run(until_s=run.now + 60.0)
    assert world.started.count(job_id) == 2
    stream_id = job_id.split("/")[1]
    assert [e for e in run.events if isinstance(e, ProfileEstimated) and e.window == 1 and e.stream_id == stream_id]
    assert run.peak_share <= 1.0 + 1e-9


@pytest.mark.parametrize("kind", ["label", "check", "trial"])
def test_a_trial_that_hangs_is_cut_off_and_its_stream_goes_on_with_what_is_known(kind: str) -> None:
    run, _, executor_id, job_id = begun(kind, limit=0.15)
    stream_id = job_id.split("/")[1]
    run.executors[executor_id].running[job_id].left_s = 1e9
    run.run(until_s=run.coordinator.window_end_s() - 1.0)
    told = [e.text for e in run.events if isinstance(e, Notice) and "cut off" in e.text]
    assert len(told) == 1
    assert stream_id in told[0]
    if kind == "trial":  # its labels are there: it is retrained by what history says
        done = [e for e in run.events if isinstance(e, RetrainFinished) and e.window == 1]
        assert stream_id in {e.stream_id for e in done}
    assert not run.coordinator.state.pipeline or job_id not in {
        j.job_id for j in run.coordinator.state.pipeline.values()
    }


def test_a_trial_that_fails_holds_its_stream_up_no_longer() -> None:
    run, _, executor_id, job_id = begun("trial")
    stream_id = job_id.split("/")[1]
    reason = "every configuration diverged (NaN)"
    failure = m.JobFailed(
        event_id=901, executor_id=executor_id, job_id=job_id, stream_id=stream_id, kind="trial", reason=reason
    )
    run.give(Received(executor_id=executor_id, message=failure))
    run.run(until_s=run.now + 1.0)
    reasons = [e.reason for e in run.events if isinstance(e, PlanSolved)]
    assert any("goes without its trial job" in reason for reason in reasons)
    run.run(until_s=run.coordinator.window_end_s() - 1.0)
    done = [e for e in run.events if isinstance(e, RetrainFinished) and e.window == 1]
    assert stream_id in {e.stream_id for e in done}


def test_trials_do_with_less_and_then_without_where_serving_needs_the_room() -> None:
    profiling = ProfilingConfig(share=0.5, beside_share=0.5, ahead=0.0, head_start=0.01)
    run, world, _ = simulation(site(num_streams=2, share_quantum=0.25, profiling=profiling), num_gpus=2, num_windows=3)
    run.run(until_s=150.0)
    run.leave("gpu1")
    run.run(until_s=1000.0)
    assert run.finish is not None
    assert run.peak_share <= 1.0 + 1e-9
    assert [job for job in world.started if job.startswith("label/") and job.endswith("/w2")]


def test_an_executor_that_joins_beside_trials_gets_work() -> None:
    run, world, _, _ = begun("trial")
    run.join(SimulatedExecutor(GpuSpec(gpu_id="gpu9"), world))
    run.run(until_s=run.now + 30.0)
    assert run.peak_share <= 1.0 + 1e-9
    assert run.executors["gpu9"].serving or run.executors["gpu9"].running


def test_labels_made_ahead_survive_the_end_of_their_window_and_are_not_made_again() -> None:
    run, world, _ = run_site(msgspec.structs.replace(BESIDE, ahead=0.05), NOTHING, num_streams=3)
    made = [job for job in world.started if job.startswith("label/") and "/w" in job]
    assert len(made) == len(set(made))
    assert not [job for job in made if job.endswith("/w3")], "nothing is labelled for a window that never comes"
    assert {c.config_id for c in RETRAIN} >= {
        e.retrain_id for e in run.events if isinstance(e, RetrainFinished) and e.window
    }


def test_a_job_that_began_with_little_grows_when_there_is_room() -> None:
    run, _, executor_id, job_id = begun("label")
    state = run.coordinator.state
    granted = state.pipeline[executor_id].share
    state.pipeline[executor_id] = msgspec.structs.replace(state.pipeline[executor_id], share=0.05)
    run.run(until_s=run.now + 0.5)
    assert state.pipeline[executor_id].job_id == job_id
    assert state.pipeline[executor_id].share == pytest.approx(granted)
    assert run.executors[executor_id].running[job_id].job.share == pytest.approx(granted)


def test_streams_that_are_profiled_one_after_another_do_not_keep_a_plan_from_being_made() -> None:
    profiling = msgspec.structs.replace(BESIDE, ahead=0.0, head_start=0.05)
    run, _, profiler = simulation(site(num_streams=6, profiling=profiling), num_gpus=6, num_windows=2)
    profiler.wish = NOTHING
    run._decision_s = lambda _: 3.0  # a plan takes longer than the time between two results
    run.run(until_s=1000.0)
    assert run.finish is not None
    plans = [e for e in run.events if isinstance(e, PlanSolved) and e.window == 1 and e.phase == "plan"]
    assert plans
    assert plans[0].site_s - opened_s(run, 1) < 20.0
    known = {e.stream_id for e in run.events if isinstance(e, RetrainFinished) and e.window == 1}
    assert known, "what was profiled meanwhile is planned with after it"


@pytest.mark.parametrize("decision_s", [0.0, 0.9, 3.0])
def test_every_plan_was_made_knowing_the_retrainings_that_run_when_it_starts(
    decision_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    profiling = msgspec.structs.replace(BESIDE, ahead=0.0, head_start=0.05)
    run, _, _ = simulation(site(num_streams=6, profiling=profiling), num_gpus=3, num_windows=3)
    run._decision_s = lambda _: decision_s
    asker, state = run.coordinator._asker, run.coordinator.state
    start_plan = asker._start_plan
    known: list[str] = []

    def checked(question: Any, plan: Plan, now: float) -> None:
        pinned = {s.stream_id for s in question.problem.streams if any(p.pinned_gpu for p in s.retrain)}
        running = {s.stream_id for s in state.streams.values() if s.running is not None and not s.settled}
        assert running <= pinned, f"{now:.1f} s, {question.reason}: begun meanwhile: {running - pinned}"
        known.extend(running)
        start_plan(question, plan, now)

    monkeypatch.setattr(asker, "_start_plan", checked)
    run.run(until_s=1000.0)
    assert run.finish is not None
    assert known, "no plan was made beside a retraining: nothing was shown"
