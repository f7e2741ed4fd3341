"""How plans that look ahead are carried out: starts wait for events, the rest of the window is planned anew when
something happened that a plan depends on, and nothing at all is done when nothing happened."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from optimizer.config import GateConfig
from optimizer.objective import judge, stamped
from optimizer.policies.registry import get_policy
from optimizer.ports import Measured, Output, Received, Send, Solve, Tick
from optimizer.simulator import SimulatedExecutor, Simulation
from optimizer.state import SiteState
from protocol import messages as m
from protocol.events import PlanSolved, RetrainFinished
from protocol.plan import Assignment, InferenceStep, Plan, Problem, RetrainStep, SolveReport
from protocol.schema import GpuSpec
from tests.optimizer.coordinator_world import COSTS, TestProfiler, TestWorld, simulation, site, thief

NO_CANARY = GateConfig(canary_s=0.0)


def queued(problem: Problem, last: Plan | None) -> Plan:
    """s0 is retrained first; when that has ended s1 is, and s0 gets the share that is free then."""
    steps = {
        "s0": (
            InferenceStep(inference_id="half", gpu_id="gpu0", share=0.2),
            InferenceStep(inference_id="full", gpu_id="gpu0", share=0.4, after=("s0",)),
        ),
        "s1": (InferenceStep(inference_id="half", gpu_id="gpu0", share=0.2),),
    }
    known = {s.stream_id: {p.retrain_id for p in s.retrain} for s in problem.streams}
    if any("cheap" not in names for names in known.values()):
        return thief(problem, last)  # profiling, or later in the window
    retrain = {
        "s0": RetrainStep(retrain_id="cheap", gpu_id="gpu0", share=0.5),
        "s1": RetrainStep(retrain_id="cheap", gpu_id="gpu0", share=0.4, after=("s0",)),
    }
    assignments = tuple(
        Assignment(stream_id=s.stream_id, inference=steps[s.stream_id], retrain=retrain[s.stream_id])
        for s in problem.streams
    )
    plan = Plan(
        window_s=problem.window_s, assignments=assignments, report=SolveReport(policy="hand", status="heuristic")
    )
    assert judge(problem, plan).only_floors_broken
    return stamped(problem, plan)


class SlowWorld(TestWorld):
    """Retrainings cost ``factor`` times what the planner was told."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def retrain(self, job: m.RetrainJob) -> tuple[float, object]:  # type: ignore[override]
        cost_s, result = super().retrain(job)
        return (cost_s if job.checkpoint is None else self.factor * cost_s), result


class Log:
    """What went into the coordinator of a simulation and what came out, by time."""

    def __init__(self, run: Simulation) -> None:
        self.asked: list[tuple[float, Solve]] = []
        self.sent: list[tuple[float, m.ApplyPlan]] = []
        carry_out: Callable[[list[Output]], None] = run._carry_out

        def logged(outputs: list[Output]) -> None:
            for output in outputs:
                if isinstance(output, Solve):
                    self.asked.append((run.now, output))
                if isinstance(output, Send) and isinstance(output.message, m.ApplyPlan):
                    self.sent.append((run.now, output.message))
            carry_out(outputs)

        run._carry_out = logged  # type: ignore[method-assign]


def start(
    world: TestWorld | None = None,
    *,
    num_streams: int = 2,
    num_gpus: int = 1,
    think_s: float = 0.0,
    solver: Callable[[Problem, Plan | None], Plan] | None = None,
    **changes: object,
) -> tuple[Simulation, Log, TestProfiler]:
    """A site that is carried on to the moment when the plan of window 0 is in force."""
    config = site(num_streams=num_streams, gate=NO_CANARY, **changes)
    run, _, profiler = simulation(config, num_gpus=num_gpus, num_windows=None, world=world, join=False)
    run._solver = solver or (queued if num_streams == 2 else thief)
    run._decision_s = lambda _: think_s
    for index in range(num_gpus):
        run.join(SimulatedExecutor(GpuSpec(gpu_id=f"gpu{index}"), run._world, announces_ready=True))
    log = Log(run)
    while run.coordinator.state.phase != "executing":
        run.run(until_s=run.now + 0.5)
    return run, log, profiler


def begun(run: Simulation, stream_id: str) -> bool:
    return any(f"retrain/{stream_id}/" in job_id for e in run.executors.values() for job_id in e.running)


def ends(run: Simulation) -> dict[str, float]:
    origin_s = run.coordinator.state.origin_s or 0.0
    return {e.stream_id: e.site_s + origin_s for e in run.events if isinstance(e, RetrainFinished)}


@pytest.mark.parametrize("factor", [0.4, 1.0, 2.5])
def test_what_waits_for_an_event_starts_at_the_event_and_not_at_its_predicted_time(factor: float) -> None:
    run, _, _ = start(SlowWorld(factor), think_s=1.0)
    opened_s = run.coordinator.state.plan_s
    predicted_s = COSTS["cheap"] / 0.5
    true_s = factor * predicted_s
    run.run(until_s=opened_s + true_s - 0.2)
    assert begun(run, "s0")
    assert not begun(run, "s1")
    assert run.executors["gpu0"].serving["serve/s0"].config.config_id == "half"
    run.run(until_s=opened_s + true_s + 0.2)
    # The new plan is a second away; what the old one promised for this event is done already.
    assert ends(run)["s0"] == pytest.approx(opened_s + true_s, abs=1e-6)
    assert begun(run, "s1")
    assert run.executors["gpu0"].serving["serve/s0"].config.config_id == "full"
    assert run.executors["gpu0"].serving["serve/s0"].share == 0.4
    assert run.peak_share <= 1.0 + 1e-9


def test_what_waits_for_a_retraining_that_fails_starts_too() -> None:
    run, _, _ = start()
    job = run.coordinator.state.streams["s0"].running
    assert job is not None
    failure = m.JobFailed(
        event_id=77, executor_id="gpu0", job_id=job.job.job_id, stream_id="s0", kind="retrain", reason="out of memory"
    )
    run.give(Received(executor_id="gpu0", message=failure))
    assert begun(run, "s1")
    assert not begun(run, "s0")


def test_a_retraining_that_ends_early_or_is_refused_has_the_rest_of_the_window_planned_anew() -> None:
    world = SlowWorld(0.5)
    world.worse = {"s0"}
    run, log, profiler = start(world)
    before = len(log.asked)
    run.run(until_s=run.coordinator.state.plan_s + 0.5 * COSTS["cheap"] / 0.5 + 0.5)
    assert ("s0", False) in profiler.outcomes
    (_, question), *_ = log.asked[before:]
    assert question.phase == "replan"
    s0 = next(s for s in question.problem.streams if s.stream_id == "s0")
    assert s0.retrain == ()  # one retraining a window
    reasons = [e.reason for e in run.events if isinstance(e, PlanSolved)]
    assert any("retraining of s0 ended" in reason for reason in reasons)


def test_a_retraining_that_is_late_has_the_rest_of_the_window_planned_anew_and_only_then() -> None:
    run, log, _ = start(SlowWorld(3.0))
    opened_s, before = run.coordinator.state.plan_s, len(log.asked)
    expected_s = COSTS["cheap"] / 0.5
    run.run(until_s=opened_s + expected_s * 1.15 + 1.5)
    assert len(log.asked) == before  # within what estimates are good for
    run.run(until_s=opened_s + 2.9 * expected_s)
    late = log.asked[before:]
    assert 1 <= len(late) <= 4
    s0 = next(s for s in late[0][1].problem.streams if s.stream_id == "s0")
    done_s = 0.5 * (late[0][0] - opened_s)
    assert [p.retrain_id for p in s0.retrain] == ["cheap"]
    assert s0.retrain[0].pinned_gpu == "gpu0"
    assert s0.retrain[0].gpu_seconds == pytest.approx(0.25 * done_s)
    assert all("s0 is late" in e.reason for e in run.events[-50:] if isinstance(e, PlanSolved) and e.phase == "replan")
    # It is the same retraining all the time, and what it really took is what is told.
    run.run(until_s=opened_s + 3.0 * expected_s + 0.5)
    finished = next(e for e in run.events if isinstance(e, RetrainFinished) and e.stream_id == "s0")
    assert finished.seconds_predicted == COSTS["cheap"]


def but_for_measurements(state: SiteState) -> bytes:
    """The state without what reports of serving have added to it."""
    copy = msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=SiteState)
    for stream in copy.streams.values():
        stream.demands, stream.demand_reports = {}, 0
    return msgspec.msgpack.encode(copy)


@pytest.mark.parametrize("policy", ["thief", "milp", "timeline"])
def test_nothing_at_all_is_done_while_nothing_happens(policy: str) -> None:
    run, log, _ = start(num_streams=3, num_gpus=2)
    run._solver = lambda problem, last: get_policy(policy)(problem, 2.0)
    run.run(until_s=run.coordinator.window_end_s() + 40.0)
    run.run(until_s=run.coordinator.window_end_s() - 55.0)
    while any(e.running for e in run.executors.values()):
        run.run(until_s=run.now + 1.0)
    assert run.coordinator.window_end_s() - run.now > 25.0
    run.run(until_s=run.now + 2.0)
    state = run.coordinator.state
    revision, asked, sent = state.revision, len(log.asked), len(log.sent)
    kept = but_for_measurements(state)
    for executor in run.executors.values():
        run.give(Received(executor_id=executor.executor_id, message=executor._heartbeat()))
        assert executor.held is not None
        again = m.PlanApplied(executor_id=executor.executor_id, version=executor.held)
        run.give(Received(executor_id=executor.executor_id, message=again))
    # Then the labels of the next window begin.
    run.run(until_s=run.coordinator.window_end_s() - 0.2 * run.coordinator.site.window_s - 0.6)
    assert (len(log.asked), len(log.sent), state.revision) == (asked, sent, revision)
    assert but_for_measurements(state) == kept


def test_a_plan_that_says_the_same_again_is_sent_to_nobody() -> None:
    run, log, _ = start()
    state = run.coordinator.state
    run.run(until_s=run.now + 1.0)
    plan = state.plan
    assert plan is not None
    revision, sent = state.revision, len(log.sent)
    running = {s.stream_id: s.running.job.job_id for s in state.streams.values() if s.running}
    run._solver = lambda problem, last: stamped(problem, msgspec.structs.replace(plan, window_s=problem.window_s))
    run.coordinator._asker.want("somebody asks for no reason")
    run.give(Tick())
    run.run(until_s=run.now + 2.0)
    assert state.plan is not plan
    assert (state.revision, len(log.sent)) == (revision, sent)
    assert {s.stream_id: s.running.job.job_id for s in state.streams.values() if s.running} == running


def test_measured_accuracy_alone_plans_nothing() -> None:
    # It is measured with the truth that only recordings and the city have, not with golden labels.
    run, log, _ = start()
    asked = len(log.asked)
    event = next(e for e in reversed(run.events) if type(e).__name__ == "StreamAccuracy")
    for _ in range(50):
        poor = msgspec.structs.replace(event, accuracy=0.0, accuracy_sum=0.0)
        run.give(Measured(event=poor))  # type: ignore[arg-type]
    run.run(until_s=run.now + 3.0)
    assert len(log.asked) == asked


def overtaken(problem: Problem, last: Plan | None) -> Plan:
    """s0 first, then s1; asked again when s0 has ended, s2 goes before s1, unless that has begun."""
    known = {s.stream_id: {p.retrain_id for p in s.retrain} for s in problem.streams}
    if "cheap" not in known["s1"]:
        return thief(problem, last)
    began = any(p.pinned_gpu for s in problem.streams if s.stream_id == "s1" for p in s.retrain)
    order = ("s1", "s2") if began else ("s2", "s1")
    chain = ("s0", "s1") if "cheap" in known["s0"] else tuple(s for s in order if "cheap" in known[s])
    assignments = []
    for stream in problem.streams:
        step = None
        if stream.stream_id in chain:
            after = chain[: chain.index(stream.stream_id)]
            step = RetrainStep(retrain_id="cheap", gpu_id="gpu0", share=0.4, after=after)
        serve = InferenceStep(inference_id="half", gpu_id="gpu0", share=0.2)
        assignments.append(Assignment(stream_id=stream.stream_id, inference=(serve,), retrain=step))
    report = SolveReport(policy="hand", status="heuristic")
    plan = Plan(window_s=problem.window_s, assignments=tuple(assignments), report=report)
    assert judge(problem, plan).only_floors_broken
    return stamped(problem, plan)


def test_what_begins_at_an_event_is_known_to_the_plan_that_the_event_asks_for() -> None:
    run, log, _ = start(num_streams=3, think_s=0.5, solver=overtaken)
    while not ends(run):
        run.run(until_s=run.now + 0.1)
    assert begun(run, "s1")  # by the old plan, while the new one is made
    running = run.coordinator.state.streams["s1"].running
    assert running is not None
    for reason in ("somebody asks", "and again"):
        run.coordinator._asker.want(reason)
        run.run(until_s=run.now + 1.0)
        assert run.coordinator.state.streams["s1"].running is not None
        assert run.coordinator.state.streams["s1"].running.job.job_id == running.job.job_id
    pinned = {s.stream_id: {p.pinned_gpu for p in s.retrain} for s in log.asked[-1][1].problem.streams}
    assert pinned["s1"] == {"gpu0"}
    assert not begun(run, "s2")
    assert all(sum(job.share for job in plan.jobs) <= 1.0 + 1e-9 for _, plan in log.sent)
    run.run(until_s=run.coordinator.window_end_s() - 1.0)
    assert {"s0", "s1"} <= set(ends(run))


def test_a_retraining_that_begins_while_a_plan_is_made_has_it_made_anew() -> None:
    """s1 waits for s0, which ends while the planner thinks about something else."""
    run, log, _ = start(num_streams=3, think_s=2.0, solver=overtaken)
    state = run.coordinator.state
    plan_s = state.plan_s
    while not ends(run) and state.streams["s0"].running is not None:
        if not run.coordinator._asker.waiting:
            run.coordinator._asker.want("somebody asks")
        run.run(until_s=run.now + 0.25)
    assert state.plan_s > plan_s
    assert begun(run, "s1")
    running = state.streams["s1"].running
    assert running is not None
    run.run(until_s=run.now + 5.0)
    now = state.streams["s1"].running
    assert now is None or now.job.job_id == running.job.job_id
    pinned = {p.pinned_gpu for s in log.asked[-1][1].problem.streams if s.stream_id == "s1" for p in s.retrain}
    assert pinned == {"gpu0"}


def test_an_answer_that_is_overtaken_at_a_windows_end_is_not_followed() -> None:
    run, _, _ = start(think_s=4.0)
    asker, state, site = run.coordinator._asker, run.coordinator.state, run.coordinator.site
    run.run(until_s=run.coordinator.window_end_s() - site.replan_s - 1.0)
    asker.want("somebody asks")
    run.give(Tick())
    plan = state.plan
    run.run(until_s=run.coordinator.window_end_s() - site.replan_s + 0.5)
    assert asker.waiting
    asker.want_after("what comes later")
    asker.overtaken("something began")
    run.run(until_s=run.coordinator.window_end_s() - 0.5)
    assert state.plan is plan
    assert not asker.waiting


def test_what_waits_for_a_retraining_that_is_given_up_before_its_turn_waits_for_the_one_before_it() -> None:
    def chain(problem: Problem, last: Plan | None) -> Plan:
        made = overtaken(problem, last)
        tail = RetrainStep(retrain_id="cheap", gpu_id="gpu0", share=0.4, after=("s1",))
        if len({a.stream_id for a in made.assignments if a.retrain}) == 2 and problem.streams[0].retrain:
            made = msgspec.structs.replace(
                made,
                assignments=tuple(
                    msgspec.structs.replace(a, retrain=tail) if a.stream_id == "s2" else a for a in made.assignments
                ),
            )
            assert judge(problem, made).only_floors_broken
        return made

    run, log, _ = start(num_streams=3, think_s=4.0, solver=chain)
    plan = run.coordinator.state.plan
    assert plan is not None
    assert {a.stream_id: a.retrain.after for a in plan.assignments if a.retrain} == {
        "s0": (),
        "s1": ("s0",),
        "s2": ("s1",),
    }
    assert begun(run, "s0")
    run.coordinator._settle(run.coordinator.state.streams["s1"])
    run.run(until_s=run.now + 1.0)
    assert begun(run, "s0")
    assert not begun(run, "s2")
    while "s0" not in ends(run):
        run.run(until_s=run.now + 0.1)
    run.run(until_s=run.now + 1.0)
    assert begun(run, "s2")
    assert all(sum(job.share for job in plan.jobs) <= 1.0 + 1e-9 for _, plan in log.sent)


def test_executors_that_join_or_leave_have_the_rest_of_the_window_planned_anew() -> None:
    run, log, _ = start(num_streams=3, num_gpus=2, think_s=0.5)
    run.run(until_s=run.now + 1.0)
    asked = len(log.asked)
    run.leave("gpu1")
    assert len(log.asked) == asked + 1
    assert [gpu.gpu_id for gpu in log.asked[-1][1].problem.gpus] == ["gpu0"]
    run.run(until_s=run.now + 2.0)
    assert {job.stream.stream_id for job in run.executors["gpu0"].serving.values()} == {"s0", "s1", "s2"}
    asked = len(log.asked)
    run.join(SimulatedExecutor(GpuSpec(gpu_id="gpu7"), run._world, announces_ready=True))
    assert len(log.asked) == asked + 1
    assert [gpu.gpu_id for gpu in log.asked[-1][1].problem.gpus] == ["gpu0", "gpu7"]
    assert 0.0 < log.asked[-1][1].problem.window_s < run.coordinator.site.window_s


def test_an_answer_to_an_older_question_is_not_carried_out() -> None:
    run, log, _ = start(num_streams=3, num_gpus=2, think_s=5.0)
    run.run(until_s=run.now + 1.0)
    run.leave("gpu1")
    old = log.asked[-1][1].token
    run.run(until_s=run.now + 1.0)
    run.join(SimulatedExecutor(GpuSpec(gpu_id="gpu2"), run._world, announces_ready=True))
    new = log.asked[-1][1].token
    assert new > old
    plans = len([e for e in run.events if isinstance(e, PlanSolved)])
    run.run(until_s=run.now + 4.5)  # the older answer has come by now
    assert len([e for e in run.events if isinstance(e, PlanSolved)]) == plans
    run.run(until_s=run.now + 1.0)
    assert len([e for e in run.events if isinstance(e, PlanSolved)]) == plans + 1


def test_a_camera_that_is_lost_and_comes_back_is_planned_for_both_times() -> None:
    run, log, _ = start(num_streams=3, num_gpus=2)
    home = run.coordinator.state.streams["s1"].serving_executor
    executor = run.executors[home]

    def report(condition: str) -> None:
        beat = executor._heartbeat()
        workers = tuple(
            msgspec.structs.replace(w, condition=condition) if w.stream_id == "s1" else w for w in beat.workers
        )
        run.give(Received(executor_id=home, message=msgspec.structs.replace(beat, workers=workers)))

    for condition, reason in (("lost", "stream s1 is lost"), ("ok", "stream s1 is back")):
        asked = len(log.asked)
        report(condition)
        assert len(log.asked) == asked  # it may be back in a moment
        run.run(until_s=run.now + 2.5)
        assert len(log.asked) == asked + 1
        assert any(reason in e.reason for e in run.events if isinstance(e, PlanSolved))
