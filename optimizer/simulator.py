"""Virtual time: the real coordinator and real policies, executors that follow the execution model.

The coordinator cannot tell the difference: it gets the same inputs and gives the same outputs as in
production. Only what executors and streams do is simulated, by the rules of ``protocol.plan``; what
models are worth and cost comes from a `World`. Every number made here is a simulated one.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from optimizer.clouds import advance as transfer_for
from optimizer.clouds import arrived, first_arrival_s
from optimizer.coordinator import Coordinator
from optimizer.execution import share_efficiency
from optimizer.ports import (
    CloudDone,
    CloudQueue,
    ExecutorGone,
    ExecutorJoined,
    Finish,
    Input,
    Measured,
    Output,
    Publish,
    Received,
    Send,
    Solve,
    Solved,
    Tick,
)
from optimizer.state import Transfer
from protocol import messages as m
from protocol.errors import PlanError
from protocol.events import StreamAccuracy, TelemetryEvent
from protocol.plan import Plan, PlanVersion, Problem
from protocol.schema import (
    CanaryResult,
    CheckpointRef,
    GpuSpec,
    InferenceConfig,
    LabelResult,
    LinkSpec,
    PairedCounts,
    RetrainResult,
    TrialResult,
)

TICK_S = 0.5


_KINDS: dict[type, str] = {
    m.LabelJob: "label",
    m.TrialJob: "trial",
    m.RetrainJob: "retrain",
    m.CanaryJob: "canary",
}
_Work = m.LabelJob | m.TrialJob | m.RetrainJob | m.CanaryJob
_Outcome = LabelResult | TrialResult | RetrainResult | CanaryResult
_VOTES = 1000


def exact_votes(before: float, after: float) -> PairedCounts:
    """Votes that say just what two exactly known accuracies say."""
    gain = round((after - before) * _VOTES)
    return PairedCounts(num_objects=_VOTES, num_won=max(0, gain), num_lost=max(0, -gain))


class World(Protocol):
    """What is true in the simulation. Times in seconds of the site clock, costs in GPU-seconds at speed 1."""

    def label(self, job: m.LabelJob) -> tuple[float, LabelResult]:
        """GPU-seconds and result of a labelling job."""
        ...

    def trial(self, job: m.TrialJob) -> tuple[float, TrialResult]:
        """GPU-seconds and result of a profiling job."""
        ...

    def retrain(self, job: m.RetrainJob) -> tuple[float, RetrainResult]:
        """GPU-seconds and result of a retraining."""
        ...

    def canary(self, job: m.CanaryJob) -> tuple[float, CanaryResult]:
        """GPU-seconds and result of a comparison on live frames."""
        ...

    def accuracy(self, stream_id: str, window: int, checkpoint: CheckpointRef, config: InferenceConfig) -> float:
        """Instantaneous accuracy of a model under an inference configuration in a window."""
        ...


class _Running(msgspec.Struct):
    job: _Work
    left_s: float
    result: _Outcome


class SimulatedExecutor:
    """One GPU in virtual time: applies plans at once, works jobs off at the rate of the execution model.

    ``announces_ready``: says at once that new inference workers are ready, so that a stream's old place is given
    up in the same instant; otherwise it sends no heartbeats, as if its workers were still starting.
    ``can_resize_live``: what it says of its shares.
    """

    def __init__(
        self, gpu: GpuSpec, world: World, *, announces_ready: bool = False, can_resize_live: bool = False
    ) -> None:
        self.gpu = gpu
        self.executor_id = gpu.gpu_id
        self.incarnation = "1"
        self.held: PlanVersion | None = None
        self.serving: dict[str, m.InferenceJob] = {}
        self.running: dict[str, _Running] = {}
        self.finished: set[str] = set()
        self._announces_ready, self._can_resize_live = announces_ready, can_resize_live
        self._world = world
        self._event_ids = itertools.count(1)
        self._since_s = 0.0

    def hello(self, incarnation: str = "1") -> m.Hello:
        """What it says when it joins."""
        self.incarnation = incarnation
        return m.Hello(
            protocol_version=m.PROTOCOL_VERSION,
            executor_id=self.executor_id,
            incarnation=incarnation,
            device="simulated",
            share_backend="simulated",
            can_resize_live=self._can_resize_live,
            gpu=self.gpu,
            host="simulated",
            pid=1,
            held=self.held,
        )

    def granted(self) -> float:
        """Sum of all shares in use."""
        return sum(share for _, share in self.shares())

    def shares(self) -> list[tuple[str, float]]:
        """(kind of job, share) of every job."""
        return [("inference", job.share) for job in self.serving.values()] + [
            (_KINDS[type(running.job)], running.job.share) for running in self.running.values()
        ]

    def apply(self, plan: m.ApplyPlan, now: float) -> list[m.Up]:
        """Take a plan as an executor does: older than the held one is refused, a repeated one changes nothing."""
        if self.held is not None and plan.version < self.held:
            reason = "older than the held plan"
            return [m.PlanRefused(executor_id=self.executor_id, version=plan.version, held=self.held, reason=reason)]
        self.advance(now)
        self.held = plan.version
        before = set(self.serving)
        wanted = {job.job_id: job for job in plan.jobs}
        self.serving = {k: job for k, job in wanted.items() if isinstance(job, m.InferenceJob)}
        self.running = {k: r for k, r in self.running.items() if k in wanted}
        for job_id, job in wanted.items():
            if isinstance(job, m.InferenceJob) or job_id in self.finished:
                continue
            if job_id in self.running:
                self.running[job_id].job = job
            else:
                self.running[job_id] = self._start(job)
        applied = m.PlanApplied(executor_id=self.executor_id, version=plan.version)
        news = self._announces_ready and not set(self.serving) <= before
        return [applied, self._heartbeat()] if news else [applied]

    def _heartbeat(self) -> m.Heartbeat:
        workers = tuple(
            m.WorkerStatus(
                job_id=job_id,
                kind="inference",
                stream_id=job.stream.stream_id,
                pid=1,
                state="ready",
                share_granted=job.share,
                share_achieved=None,  # it does what the plan reckons with, and uses nobody knows how much of its share
                progress=0,
                model_version=job.checkpoint.version,
            )
            for job_id, job in self.serving.items()
        )
        return m.Heartbeat(
            executor_id=self.executor_id, incarnation=self.incarnation, loop_count=0, held=self.held, workers=workers
        )

    def advance(self, now: float) -> None:
        """Work on all running jobs until ``now``."""
        for running in self.running.values():
            running.left_s -= (now - self._since_s) * self._rate(running)
        self._since_s = now

    def next_end_s(self) -> float:
        """When the next job ends if nothing changes, inf without one."""
        return min(
            (self._since_s + max(0.0, r.left_s) / self._rate(r) for r in self.running.values()), default=float("inf")
        )

    def take_ended(self, now: float) -> list[m.Up]:
        """The results of the jobs that have ended by ``now``."""
        self.advance(now)
        ended = [job_id for job_id, r in self.running.items() if r.left_s <= 1e-9]
        return [self._report(job_id, self.running.pop(job_id).result) for job_id in ended]

    def _start(self, job: _Work) -> _Running:
        match job:
            case m.LabelJob():
                return _Running(job, *self._world.label(job))
            case m.TrialJob():
                return _Running(job, *self._world.trial(job))
            case m.RetrainJob():
                return _Running(job, *self._world.retrain(job))
            case m.CanaryJob():
                return _Running(job, *self._world.canary(job))

    def _report(self, job_id: str, result: _Outcome) -> m.Up:
        self.finished.add(job_id)
        event_id = next(self._event_ids)
        match result:
            case LabelResult():
                return m.LabelsDone(event_id=event_id, executor_id=self.executor_id, job_id=job_id, result=result)
            case TrialResult():
                return m.TrialsDone(event_id=event_id, executor_id=self.executor_id, job_id=job_id, result=result)
            case RetrainResult():
                return m.RetrainDone(event_id=event_id, executor_id=self.executor_id, job_id=job_id, result=result)
            case CanaryResult():
                return m.CanaryDone(event_id=event_id, executor_id=self.executor_id, job_id=job_id, result=result)

    def _rate(self, running: _Running) -> float:
        return self.gpu.speed * share_efficiency(self.gpu, running.job.share)


class SimulatedCloud:
    """Links and the cloud behind them in virtual time: transfers by rule 8 of the execution model."""

    def __init__(self, links: Sequence[LinkSpec], world: World) -> None:
        self.links = {link.link_id: link for link in links}
        self.queues: dict[str, list[Transfer]] = {link.link_id: [] for link in links}
        self._results: dict[str, RetrainResult] = {}
        self._world = world
        self._since_s = 0.0

    def apply(self, wanted: CloudQueue, now: float) -> None:
        """Take a link's whole queue: what is known goes on from where it is, the rest begins or is given up."""
        self.advance(now)
        known = {transfer.job.job_id: transfer for transfer in self.queues[wanted.link_id]}
        queue = []
        for turn, entry in enumerate(wanted.jobs):
            transfer = known.get(entry.job.job_id)
            if transfer is None:
                self._results[entry.job.job_id] = self._world.retrain(entry.job)[1]
                transfer = Transfer(
                    job=entry.job,
                    retrain_id=entry.job.config.config_id,
                    link_id=wanted.link_id,
                    turn=turn,
                    up_bytes=entry.up_bytes,
                    cloud_s=entry.cloud_s,
                    down_bytes=entry.down_bytes,
                    accuracy_predicted=0.0,
                )
            queue.append(transfer)
        self.queues[wanted.link_id] = queue

    def advance(self, now: float) -> None:
        """Transfer until ``now``."""
        for link_id, queue in self.queues.items():
            transfer_for(queue, self.links[link_id], now - self._since_s)
        self._since_s = now

    def next_end_s(self) -> float:
        """When the next model is there if nothing changes, inf without one."""
        ends = [self._since_s + first_arrival_s(queue, self.links[link]) for link, queue in self.queues.items()]
        return min(ends, default=math.inf)

    def take_ended(self, now: float) -> list[CloudDone]:
        """The models that have arrived by ``now``."""
        self.advance(now)
        ended = []
        for link_id, queue in self.queues.items():
            there = [transfer.job.job_id for transfer in arrived(queue)]
            self.queues[link_id] = queue[len(there) :]
            ended += [CloudDone(job_id=job_id, result=self._results.pop(job_id)) for job_id in there]
        return ended


Solver = Callable[[Problem, Plan | None], Plan]


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """One question to the planner and how long the answer took, seconds of wall time."""

    window: int
    phase: str
    seconds: float
    problem: Problem
    plan: Plan | None


class Measure(msgspec.Struct):
    """One stream in one window, exactly: integral of its accuracy, seconds, and its least accuracy in them."""

    accuracy_s: float = 0.0
    seconds: float = 0.0
    least: float = 1.0


class Simulation:
    """Runs a coordinator with simulated executors until it finishes or ``until_s``.

    Virtual time jumps from event to event; the coordinator besides gets a tick every ``tick_s`` seconds.
    ``decision_s`` maps wall seconds of a decision to the virtual seconds that it takes (default: none). Of
    several questions of one instant only the last is put to the solver, as a planner drops the older ones.

    ``measures`` by (stream, window); ``share_s`` by (kind of job, window): seconds times share, all GPUs.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        executors: list[SimulatedExecutor],
        world: World,
        solver: Solver,
        *,
        decision_s: Callable[[float], float] = lambda _: 0.0,
        tick_s: float = TICK_S,
        cloud: SimulatedCloud | None = None,
    ) -> None:
        self.coordinator = coordinator
        self.executors = {executor.executor_id: executor for executor in executors}
        self.now = 0.0
        self.events: list[TelemetryEvent] = []
        self.decisions: list[Decision] = []
        self.finish: Finish | None = None
        self.peak_share = 0.0
        self.measures: dict[tuple[str, int], Measure] = {}
        self.share_s: dict[tuple[str, int], float] = {}
        self._world = world
        self._cloud = cloud or SimulatedCloud((), world)
        self._solver = solver
        self._decision_s = decision_s
        self._tick_s = tick_s
        self._question: Solve | None = None
        self._due: list[tuple[float, int, Input]] = []
        self._order = itertools.count()
        self._measured_s = 0.0

    def join(self, executor: SimulatedExecutor, incarnation: str = "1") -> None:
        """An executor joins now."""
        self.executors[executor.executor_id] = executor
        executor.advance(self.now)
        self.give(ExecutorJoined(hello=executor.hello(incarnation)))

    def leave(self, executor_id: str, reason: str = "killed") -> None:
        """An executor is gone now, with all that it ran."""
        self._measure()
        self.executors.pop(executor_id)
        self.give(ExecutorGone(executor_id=executor_id, reason=reason))

    def run(self, until_s: float = float("inf")) -> None:
        """Advance virtual time."""
        while self.finish is None and self.now < until_s:
            self._answer()
            self.now = max(self.now, min(until_s, self._next_s()))
            self._measure()
            while self._due and self._due[0][0] <= self.now:
                self.give(heapq.heappop(self._due)[2])
            for executor in list(self.executors.values()):
                for message in executor.take_ended(self.now):
                    self.give(Received(executor_id=executor.executor_id, message=message))
            for done in self._cloud.take_ended(self.now):
                self.give(done)
            self.give(Tick())

    def _next_s(self) -> float:
        """When something happens next: an answer, the end of a job, a limit of the window, a tick."""
        state, site = self.coordinator.state, self.coordinator.site
        tick_s = TICK_S if state.phase == "finished" else self._tick_s
        coming = [(math.floor(self.now / tick_s + 1e-9) + 1) * tick_s]
        coming += [executor.next_end_s() for executor in self.executors.values()]
        coming += [due for due, _, _ in self._due[:1]]
        coming.append(self._cloud.next_end_s())
        limits = []
        if state.phase in ("profiling", "planning", "executing"):
            limits.append(self.coordinator.window_end_s())
        if state.phase == "profiling":
            # A little late: the coordinator cuts off once the limit has been passed.
            limits.append(state.window_opened_s + site.profiling.limit * site.window_s + 1e-6)
        return min(coming + [limit for limit in limits if limit > self.now])

    def give(self, item: Input) -> None:
        """Hand one input to the coordinator and carry out what it says."""
        if self.finish is None:
            self._carry_out(self.coordinator.handle(item, self.now))

    def _carry_out(self, outputs: list[Output]) -> None:
        for output in outputs:
            match output:
                case Send(executor_id=executor_id, message=m.ApplyPlan() as plan):
                    executor = self.executors.get(executor_id)
                    if executor is not None:
                        self._measure()
                        for answer in executor.apply(plan, self.now):
                            self._later(self.now, Received(executor_id=executor_id, message=answer))
                case Publish(event=event):
                    self._record(event)
                case Solve():
                    self._question = output
                case CloudQueue():
                    self._cloud.apply(output, self.now)
                case Finish():
                    self.finish = output
                case _:
                    pass

    def _record(self, event: TelemetryEvent) -> None:
        origin_s = self.coordinator.state.origin_s
        self.events.append(event if origin_s is None else msgspec.structs.replace(event, site_s=self.now - origin_s))

    def _answer(self) -> None:
        """Put the newest question to the solver."""
        question, self._question = self._question, None
        if question is None:
            return
        began = time.perf_counter()
        plan, reason = None, ""
        try:
            plan = self._solver(question.problem, self.coordinator.state.plan)
        except PlanError as error:
            reason = str(error)
        seconds = time.perf_counter() - began
        self.decisions.append(
            Decision(window=question.window, phase=question.phase, seconds=seconds, problem=question.problem, plan=plan)
        )
        answer = Solved(token=question.token, plan=plan, reason=reason)
        self._later(self.now + self._decision_s(seconds), answer)

    def _later(self, due_s: float, item: Input) -> None:
        heapq.heappush(self._due, (due_s, next(self._order), item))

    def _measure(self) -> None:
        """Account for the accuracy since the last change of anything."""
        span, begin = self.now - self._measured_s, self._measured_s
        self._measured_s = self.now
        state = self.coordinator.state
        if span <= 0.0 or state.origin_s is None or state.phase == "finished":
            return
        jobs = {job.stream.stream_id: job for e in self.executors.values() for job in e.serving.values()}
        window = state.window if begin >= state.window_opened_s - 1e-9 else state.window - 1
        for executor in self.executors.values():
            # What is handed over within one instant, between plans that travel separately, does not count.
            self.peak_share = max(self.peak_share, executor.granted())
            for kind, share in executor.shares():
                self.share_s[kind, window] = self.share_s.get((kind, window), 0.0) + share * span
        for stream_id in state.streams:
            job = jobs.get(stream_id)
            accuracy = self._world.accuracy(stream_id, window, job.checkpoint, job.config) if job else 0.0
            measure = self.measures.setdefault((stream_id, window), Measure())
            measure.accuracy_s += accuracy * span
            measure.seconds += span
            measure.least = min(measure.least, accuracy)
            weight = max(1, round(span * 1000))  # in milliseconds: tallies count whole frames
            event = StreamAccuracy(
                site_s=self.now - state.origin_s,
                stream_id=stream_id,
                window=window,
                accuracy=accuracy,
                accuracy_sum=accuracy * weight,
                num_scored=weight,
                num_frames=weight,
                num_analysed=weight if job else 0,
                num_dropped=0,
                num_objects=weight,
                fps=0.0,
                latency_ms_p50=0.0,
                model_version=job.checkpoint.version if job else 0,
                inference_id=job.config.config_id if job else "",
            )
            self.events.append(event)
            self.coordinator.handle(Measured(event=event), self.now)
