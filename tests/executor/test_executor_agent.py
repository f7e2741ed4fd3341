"""The plan fence, the share ledger and reconcile, by cases and under a lossy link."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from executor.agent import (
    AgentCommand,
    Fence,
    Replace,
    Start,
    Stop,
    Tell,
    WorkerView,
    granted,
    reconcile,
)
from executor.limits import HandOvers, RestartPolicy
from executor.links import Command, JobDone, Progress, Ready, SetInference, SetShare, SwapModel
from executor.outbox import Outbox
from executor.roster import Roster
from executor.roster_entry import Effect, Halt, Launch
from protocol.messages import ApplyPlan, InferenceJob, Job, LabelJob, PlanApplied, PlanRefused, RetrainJob
from protocol.plan import PlanVersion
from protocol.schema import InferenceConfig
from tests.executor import optimizer_model as model
from tests.executor.problem_worker import result_of


def view(job: Job, state: str = "ready", held: float | None = None, **changes: float) -> WorkerView:
    return WorkerView(job=job, state=state, share_held=job.share if held is None else held, **changes)  # type: ignore[arg-type]


# ---------------------------------------------------------------- reconcile


def test_what_is_as_wanted_is_left_alone() -> None:
    jobs = (model.inference(), model.retraining())
    assert reconcile(jobs, tuple(view(job) for job in jobs), 0.0) == []


def test_missing_jobs_are_started_and_unwanted_ones_stopped() -> None:
    wanted, unwanted = model.inference("s1", 0.3), model.label("s2", 0.2)
    assert reconcile((wanted,), (view(unwanted),), 0.0) == [
        Stop(job_id="label/s2/0", reason="not_in_plan"),
        Start(job=wanted),
    ]


def test_a_start_waits_until_the_worker_in_its_place_has_left() -> None:
    new, old = model.retraining("s1", 0.7), model.retraining("s2", 0.6)
    assert reconcile((new,), (view(old),), 0.0) == [Stop(job_id=old.job_id, reason="not_in_plan")]
    assert reconcile((new,), (view(old, "stopping"),), 0.0) == []
    assert reconcile((new,), (), 0.0) == [Start(job=new)]


def test_a_growth_waits_until_the_shrink_has_settled() -> None:
    small, large = model.inference("s1", 0.7), model.inference("s2", 0.3)
    wanted = (model.inference("s1", 0.3), model.inference("s2", 0.7))
    shrink = Tell(job_id="inference/s1", command=SetShare(share=0.3))
    grow = Tell(job_id="inference/s2", command=SetShare(share=0.7))
    assert reconcile(wanted, (view(small), view(large)), 0.0) == [shrink]
    assert reconcile(wanted, (view(wanted[0], held=0.7), view(large)), 0.0) == []
    assert reconcile(wanted, (view(wanted[0]), view(large)), 0.0) == [grow]


def test_ten_tenths_fill_a_gpu_exactly() -> None:
    jobs = tuple(model.inference(f"s{i}", 0.1) for i in range(10))
    assert len(reconcile(jobs, (), 0.0)) == 10
    over = (*jobs, model.inference("s99", 0.001))
    assert [c.job.job_id for c in reconcile(over, (), 0.0) if isinstance(c, Start)].count("inference/s99") == 0


def test_changed_configuration_and_checkpoint_go_to_the_running_worker() -> None:
    config = InferenceConfig(config_id="half", frame_interval=2)
    wanted = model.inference(version=2, config=config)
    assert reconcile((wanted,), (view(model.inference()),), 0.0) == [
        Tell(job_id="inference/s1", command=SwapModel(checkpoint=wanted.checkpoint)),
        Tell(job_id="inference/s1", command=SetInference(config=config)),
    ]


def test_a_checkpoint_that_only_lies_elsewhere_is_no_swap() -> None:
    moved = model.inference(checkpoint=model.checkpoint("s1", 1, path="elsewhere"))
    assert reconcile((moved,), (view(model.inference()),), 0.0) == []


def test_a_starting_worker_is_changed_only_when_it_is_ready() -> None:
    assert reconcile((model.inference(version=2, share=0.5),), (view(model.inference(), "starting"),), 0.0) == []


def test_ended_jobs_are_not_begun_again() -> None:
    job = model.retraining()
    assert reconcile((job,), (), 0.0, settled={job.job_id}) == []


def test_a_worker_in_backoff_is_started_when_its_pause_is_over() -> None:
    job = model.inference()
    waiting = view(job, "backoff", held=0.0, resumes_s=10.0)
    assert reconcile((job,), (waiting,), 9.9) == []
    assert reconcile((job,), (waiting,), 10.0) == [Start(job=job)]


def test_alone_only_inference_is_begun() -> None:
    jobs = (model.inference(), model.label(), model.retraining())
    assert reconcile(jobs, (), 0.0, alone=True) == [Start(job=jobs[0])]


def test_beyond_its_cap_a_serving_worker_is_replaced_and_a_retraining_keeps_its_share() -> None:
    serving, training = model.inference("s1", 0.2), model.retraining("s1", 0.2)
    wanted = (model.inference("s1", 0.5), model.retraining("s1", 0.5))
    views = (view(serving, share_cap=0.2), view(training, share_cap=0.2))
    assert reconcile(wanted, views, 0.0) == [Replace(job=wanted[0])]
    # While it is being replaced there is nothing more to do, and afterwards it has what was wanted.
    handing_over = (view(serving, "replacing", share_cap=0.2), view(wanted[0], "starting", share_cap=0.5))
    assert reconcile(wanted[:1], handing_over, 0.0) == []
    assert reconcile(wanted[:1], (view(serving, "stopping"), view(wanted[0], share_cap=0.5)), 0.0) == []


def test_what_a_running_worker_can_have_it_gets_at_once_and_small_growths_are_not_worth_another() -> None:
    rules = HandOvers(min_growth=0.05, refit_below=0.5, refit_after_s=10.0)
    paced = view(model.inference("s1", 0.1), share_cap=0.3, cap_fixed=True)
    slightly, much = model.inference("s1", 0.33), model.inference("s1", 0.6)
    assert reconcile((slightly,), (paced,), 0.0, hand_overs=rules) == [
        Tell(job_id=slightly.job_id, command=SetShare(share=0.33))
    ]
    at_once = Tell(job_id=much.job_id, command=SetShare(share=0.3))
    assert reconcile((much,), (paced,), 0.0, hand_overs=rules) == [at_once, Replace(job=much)]
    pausing = msgspec.structs.replace(paced, resumes_s=5.0)
    assert reconcile((much,), (pausing,), 0.0, hand_overs=rules) == [at_once]


def test_a_worker_much_larger_than_its_share_is_replaced_when_things_have_been_quiet() -> None:
    rules = HandOvers(refit_below=0.5, refit_after_s=10.0)
    job, training = model.inference("s1", 0.2), model.retraining("s1", 0.2)
    large = view(job, share_cap=0.6, cap_fixed=True, since_s=100.0)
    assert reconcile((job,), (large,), 109.0, hand_overs=rules) == []
    assert reconcile((job,), (large,), 110.0, hand_overs=rules) == [Replace(job=job)]
    fitting = msgspec.structs.replace(large, share_cap=0.4)
    assert reconcile((job,), (fitting,), 200.0, hand_overs=rules) == []
    live = msgspec.structs.replace(large, share_cap=1.0, cap_fixed=False)
    assert reconcile((job,), (live,), 200.0, hand_overs=rules) == []
    assert reconcile((training,), (msgspec.structs.replace(large, job=training),), 200.0, hand_overs=rules) == []


def test_a_job_that_became_another_kind_is_stopped_before_it_is_started() -> None:
    old, new = model.label(job_id="job", share=0.2), model.retraining(job_id="job", share=0.2)
    assert reconcile((new,), (view(old),), 0.0) == [Stop(job_id="job", reason="became_another_kind")]


# ---------------------------------------------------------------- the fence


def test_the_fence_takes_newer_plans_repeats_equal_ones_and_refuses_older_ones() -> None:
    fence = Fence("e1")
    first, second = model.plan(model.inference(), window=1), model.plan(window=1, revision=1)
    assert isinstance(fence.judge(first, 0.0, 0.0), PlanApplied)
    assert isinstance(fence.judge(second, 0.0, 0.0), PlanApplied)
    assert fence.judge(second, 0.0, 1000.0) == PlanApplied(executor_id="e1", version=second.version)
    refused = fence.judge(first, 0.0, 0.0)
    assert isinstance(refused, PlanRefused)
    assert (refused.held, fence.desired) == (second.version, ())
    assert isinstance(fence.judge(model.plan(term=2, window=-1), 0.0, 0.0), PlanApplied)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (model.plan(model.inference(), lifetime_s=1.0), "late"),
        (model.plan(model.inference(share=0.6), model.retraining(share=0.6)), "sum to 1.2"),
        (model.plan(model.inference(), model.inference()), "occurs twice"),
    ],
)
def test_the_fence_refuses_late_and_impossible_plans(plan: ApplyPlan, words: str) -> None:
    fence = Fence("e1")
    refused = fence.judge(plan, 10.0, 11.5)
    assert isinstance(refused, PlanRefused)
    assert words in refused.reason
    assert fence.held is None


def test_shares_of_ended_jobs_do_not_count_in_a_plan() -> None:
    plan = model.plan(model.inference(share=0.9), model.retraining(share=0.4))
    assert isinstance(Fence("e1").judge(plan, 0.0, 0.0, {"retrain/s1/0"}), PlanApplied)


# ---------------------------------------------------------------- the whole core over a lossy link


@dataclass
class Process:
    """A worker process as it really is: it obeys in order and one step at a time."""

    worker_id: int
    job: Job
    share: float
    ready: bool = False
    stopping: bool = False
    orders: list[Command] = field(default_factory=list)
    ordered_s: float = 0.0


class LossyLink(RuleBasedStateMachine):
    """Plans are duplicated, reordered, delayed, lost and replayed; workers start, obey, end and crash at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.version = PlanVersion(term=1, window=0, revision=0)
        self.flying: list[tuple[ApplyPlan, float]] = []
        self.outbox = Outbox()
        self.fence = Fence("e1")
        self.roster = Roster("e1", "g1", self.outbox, RestartPolicy(limit=3))
        self.processes: dict[int, Process] = {}
        self.acknowledged: list[PlanVersion] = []
        self.taken_over: list[PlanVersion] = []
        self.ended: set[str] = set()
        self.served: set[str] = set()

    # The optimizer.

    @rule(data=st.data())
    def send_a_new_plan(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(["revision", "window", "term"]))
        v = self.version
        self.version = {
            "revision": PlanVersion(term=v.term, window=v.window, revision=v.revision + 1),
            "window": PlanVersion(term=v.term, window=v.window + 1, revision=0),
            "term": PlanVersion(term=v.term + 1, window=v.window, revision=0),
        }[step]
        rng = random.Random(data.draw(st.integers(0, 10_000)))
        jobs: list[Job] = []
        left = 10
        for stream in ("s1", "s2", "s3"):
            for kind in ("inference", "label", "retrain"):
                tenths = rng.randint(1, 5)
                if tenths > left or rng.random() < 0.3:
                    continue
                left -= tenths
                share, window = tenths / 10, rng.randint(0, 2)
                if kind == "inference":
                    jobs.append(model.inference(stream, share, version=rng.randint(1, 3)))
                elif kind == "label":
                    jobs.append(model.label(stream, share, window))
                else:
                    jobs.append(model.retraining(stream, share, window))
        wanted = ApplyPlan(version=self.version, lifetime_s=5.0, jobs=tuple(jobs))
        self.flying.append((wanted, self.now))

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), keep=st.booleans(), late_s=st.sampled_from([0.0, 0.1, 10.0]))
    def deliver(self, data: st.DataObject, keep: bool, late_s: float) -> None:
        i = data.draw(st.integers(0, len(self.flying) - 1))
        plan, _ = self.flying[i] if keep else self.flying.pop(i)
        before = self.fence.held
        answer = self.fence.judge(plan, self.now, self.now + late_s, self.roster.settled.keys())
        if isinstance(answer, PlanApplied):
            assert not self.acknowledged or plan.version >= max(self.acknowledged), "older than acknowledged"
            self.acknowledged.append(plan.version)
            if before != self.fence.held:
                assert late_s <= plan.lifetime_s
                self.taken_over.append(plan.version)
                assert self.fence.desired == plan.jobs
        else:
            assert self.fence.held == before
        self.reconcile()

    @precondition(lambda self: self.flying)
    @rule()
    def lose(self) -> None:
        self.flying.pop(0)

    # The workers.

    def pick(self, data: st.DataObject) -> Process | None:
        if not self.processes:
            return None
        return self.processes[data.draw(st.sampled_from(sorted(self.processes)))]

    @rule(data=st.data(), names_share=st.booleans())
    def a_worker_steps(self, data: st.DataObject, names_share: bool) -> None:
        process = self.pick(data)
        if process is None:
            return
        if not process.ready:
            process.ready = True
            self.effects(self.roster.reported(process.worker_id, Ready(pid=1, startup_s=0.1), self.now))
            if isinstance(process.job, InferenceJob):
                self.served.add(process.job.job_id)
            self.reconcile()
            return
        for order in process.orders:
            if isinstance(order, SetShare):
                process.share = order.share
        process.orders.clear()
        if process.stopping:
            self.exit(process, "exit code 0")
            return
        share = process.share if names_share else None
        self.roster.reported(process.worker_id, Progress(count=1, share_achieved=None, share=share), self.now)
        self.reconcile()

    @rule(data=st.data(), names_share=st.booleans())
    def a_report_from_before_the_order_arrives(self, data: st.DataObject, names_share: bool) -> None:
        process = self.pick(data)
        if process is None or not process.ready or (not names_share and self.now - process.ordered_s >= 0.25):
            return
        stale = Progress(count=1, share_achieved=None, share=process.share if names_share else None)
        self.roster.reported(process.worker_id, stale, self.now)
        self.reconcile()

    @rule(data=st.data())
    def a_worker_ends(self, data: st.DataObject) -> None:
        process = self.pick(data)
        if process is None or not process.ready or isinstance(process.job, InferenceJob):
            return
        if isinstance(process.job, LabelJob | RetrainJob):
            result = JobDone(result=result_of(process.job))
            self.roster.reported(process.worker_id, result, self.now)
            self.ended.add(process.job.job_id)
            process.stopping = True
            self.reconcile()

    @rule(data=st.data())
    def a_worker_crashes(self, data: st.DataObject) -> None:
        process = self.pick(data)
        if process is not None:
            if not isinstance(process.job, InferenceJob) and not process.stopping:
                self.ended.add(process.job.job_id)
            self.exit(process, "killed by SIGKILL")

    @rule(seconds=st.sampled_from([0.05, 0.3, 1.0, 40.0]))
    def time_passes(self, seconds: float) -> None:
        # A worker looks at its orders between steps, long before this: see Roster._settle.
        if seconds >= 0.25:
            for process in self.processes.values():
                for order in process.orders:
                    if isinstance(order, SetShare):
                        process.share = order.share
                process.orders.clear()
        self.now += seconds
        self.reconcile()

    # The glue that the service has.

    def exit(self, process: Process, reason: str) -> None:
        del self.processes[process.worker_id]
        self.roster.left(process.worker_id, reason, self.now)
        self.reconcile()

    def reconcile(self) -> None:
        commands = reconcile(self.fence.desired, self.roster.views(), self.now, settled=self.roster.settled.keys())
        for command in commands:
            self.check_in_view(command)
            self.effects(self.roster.carry_out(command, self.now))

    def check_in_view(self, command: AgentCommand) -> None:
        if isinstance(command, Start):
            assert command.job.job_id not in self.ended, "an ended job was begun again"
            assert command.job in self.fence.desired

    def effects(self, effects: list[Effect]) -> None:
        for effect in effects:
            worker = effect.worker
            if isinstance(effect, Launch):
                self.processes[worker.worker_id] = Process(worker.worker_id, worker.job, worker.job.share)
                self.roster.launched(worker.worker_id, 1)
            elif isinstance(effect, Halt):
                self.processes[worker.worker_id].stopping = True
            else:
                process = self.processes[worker.worker_id]
                process.orders.append(effect.command)
                process.ordered_s = self.now
                if isinstance(effect.command, SetShare) and effect.command.share > process.share:
                    process.share = effect.command.share  # the worst case: it grows at once

    # The oracles.

    @invariant()
    def shares_in_use_never_exceed_the_gpu(self) -> None:
        assert granted(process.share for process in self.processes.values()) <= 1.0 + 1e-6

    @invariant()
    def the_held_plan_is_the_newest_acknowledged_one(self) -> None:
        assert self.fence.held == (max(self.acknowledged) if self.acknowledged else None)

    @invariant()
    def each_plan_is_taken_over_at_most_once(self) -> None:
        assert len(set(self.taken_over)) == len(self.taken_over)

    @invariant()
    def one_process_per_job(self) -> None:
        job_ids = [process.job.job_id for process in self.processes.values()]
        assert len(set(job_ids)) == len(job_ids)

    @invariant()
    def wanted_streams_that_were_served_are_served_or_about_to_be(self) -> None:
        present = {worker.job.job_id for worker in self.roster}
        for job in self.fence.desired:
            if job.job_id in self.served and isinstance(job, InferenceJob):
                waiting = granted(w.share_held for w in self.roster) + job.share > 1.0
                assert job.job_id in present or waiting

    def teardown(self) -> None:
        """Once the link is quiet and workers obey, the executor runs exactly what it was told last."""
        for _ in range(20):
            self.now += 40.0
            self.reconcile()
            for process in tuple(self.processes.values()):
                for order in process.orders:
                    if isinstance(order, SetShare):
                        process.share = order.share
                process.orders.clear()
                if process.stopping:
                    self.exit(process, "exit code 0")
                elif process.ready:
                    report = Progress(count=1, share_achieved=None)
                    self.roster.reported(process.worker_id, report, self.now)
                else:
                    process.ready = True
                    self.roster.reported(process.worker_id, Ready(pid=1, startup_s=0.1), self.now)
        wanted = {job.job_id: job.share for job in self.fence.desired if job.job_id not in self.roster.settled}
        running = {process.job.job_id: process.share for process in self.processes.values()}
        assert running == pytest.approx(wanted)


TestLossyLink = LossyLink.TestCase
TestLossyLink.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
