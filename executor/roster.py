"""The life of every job of an executor: started, ready, changed, restarted, ended. No input or output.

The supervisor says what processes do, the agent what is wanted; the roster is the memory between them. A
stream that once had a serving model always gets one again: an inference worker that dies is started again
with growing pauses, after ``limit`` quick deaths in slow rhythm for ever. Jobs of other kinds are not
repeated: their failure is an event, and what comes next is the optimizer's decision.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from executor.agent import SHARE_TOLERANCE, AgentCommand, Replace, Start, Stop, Tell, WorkerView
from executor.limits import RestartPolicy
from executor.links import (
    EpochDone,
    HandedOver,
    HandOver,
    JobDone,
    Progress,
    Ready,
    Report,
    SetInference,
    SetShare,
    StreamChanged,
    StreamStats,
    Swapped,
    SwapRefused,
    TakeOver,
    TookOver,
)
from executor.outbox import LastingEvent, Outbox
from executor.roster_entry import Effect, Halt, Launch, Order, Worker
from protocol.events import Notice, RetrainProgress, StreamDegraded, StreamRecovered, TelemetryEvent, WorkerChanged
from protocol.messages import (
    CanaryDone,
    InferenceJob,
    Job,
    JobFailed,
    LabelsDone,
    RetrainDone,
    TrialsDone,
    WorkerState,
    WorkerStatus,
)
from protocol.schema import CanaryResult, CheckpointRef, LabelResult, TrialResult

HAND_OVER_LEAD_S = 0.05
"""How long before its time a hand-over is announced to both workers: more than an order takes to be read."""

REMEMBERED = 1000
"""Ended jobs and refused checkpoints remembered, so that memory stays bounded in a long run."""


class Roster:
    """All workers of one executor. Methods take the monotonic time; results wait in ``outbox`` and ``events``."""

    def __init__(
        self,
        executor_id: str,
        gpu_id: str,
        outbox: Outbox,
        policy: RestartPolicy | None = None,
        settle_s: float = 0.25,
        pause_s: float = 0.0,
        shrinks_at_once: bool = False,
    ) -> None:
        """``settle_s``: after an order, when a report of a worker that does not name its share follows it.
        ``pause_s``: between two hand-overs of a stream. ``shrinks_at_once``: a ready worker has no more than a smaller
        share from the order on; at a tenth of a core it may be seconds before it says so."""
        self.settled: dict[str, None] = {}
        self.events: list[TelemetryEvent] = []
        self._executor_id = executor_id
        self._gpu_id = gpu_id
        self._outbox = outbox
        self._policy = policy or RestartPolicy()
        self._settle_s = settle_s
        self._pause_s = pause_s
        self._shrinks_at_once = shrinks_at_once
        self._workers: dict[int, Worker] = {}
        self._good: dict[str, CheckpointRef] = {}
        self._refused: dict[str, None] = {}
        self._faults: dict[str, int] = {}
        self._next_id = 1

    # ------------------------------------------------------------ views

    def __iter__(self) -> Iterator[Worker]:
        return iter(tuple(self._workers.values()))

    def __len__(self) -> int:
        return len(self._workers)

    def get(self, worker_id: int) -> Worker | None:
        return self._workers.get(worker_id)

    def of_job(self, job_id: str) -> list[Worker]:
        """The job's workers: one as a rule, two during a hand-over."""
        return [worker for worker in self if worker.job.job_id == job_id]

    def views(self) -> tuple[WorkerView, ...]:
        """The ledger's view."""
        replaced = {worker.successor_of for worker in self if worker.state == "starting"}
        return tuple(
            WorkerView(
                job=worker.job,
                state="replacing" if worker.worker_id in replaced and worker.state == "ready" else worker.state,  # type: ignore[arg-type]
                share_held=worker.share_held,
                share_cap=worker.share_cap,
                resumes_s=worker.resumes_s,
                cap_fixed=worker.cap_fixed,
                since_s=worker.since_s,
            )
            # A job's live worker last: the agent goes by the last one of a job.
            for worker in sorted(self, key=lambda w: (w.state != "stopping", w.state != "starting"))
        )

    def statuses(self) -> tuple[WorkerStatus, ...]:
        return tuple(
            WorkerStatus(
                job_id=worker.job.job_id,
                kind=worker.kind,
                stream_id=worker.job.stream.stream_id,
                pid=worker.pid,
                state=self._shown_state(worker),
                share_granted=worker.job.share,
                share_achieved=worker.share_achieved,
                progress=worker.progress,
                restarts=worker.restarts,
                model_version=worker.model_version,
                condition=worker.condition,
            )
            for worker in self
        )

    def _shown_state(self, worker: Worker) -> WorkerState:
        if worker.state == "backoff" and worker.deaths >= self._policy.limit:
            return "failed"
        state: WorkerState = worker.state  # type: ignore[assignment]
        return state

    def next_due_s(self) -> float:
        """When a pause ends next; infinity when no worker waits."""
        return min((worker.resumes_s for worker in self if worker.state == "backoff"), default=float("inf"))

    # ------------------------------------------------------------ what we do to workers

    def carry_out(self, command: AgentCommand, now: float, live: bool = True) -> list[Effect]:
        """Enter a command of the agent; returns what is to be done to processes.

        ``live``: workers can be given any share while they run; otherwise at most the one they start with.
        """
        if isinstance(command, Start | Replace):
            worker = self._begin(command, 1.0 if live else command.job.share)
            worker.cap_fixed, worker.since_s = not live, now
            return [Launch(worker)]
        if isinstance(command, Stop):
            return [effect for w in self.of_job(command.job_id) for effect in self.halt(w.worker_id, command.reason)]
        return self._tell(command, now)

    def halt(self, worker_id: int, reason: str) -> list[Effect]:
        """Stop a worker; one that waits for its restart is forgotten at once."""
        worker = self._workers[worker_id]
        if worker.state == "backoff":
            del self._workers[worker_id]
            self._change(worker, "stopped", reason)
            return []
        if worker.state != "stopping":
            worker.state, worker.stop_reason = "stopping", reason
        return [Halt(worker, reason)]

    def launched(self, worker_id: int, pid: int) -> None:
        worker = self._workers[worker_id]
        worker.pid = pid
        why = "hand_over" if worker.successor_of is not None else "restart" if worker.restarts else "plan"
        self._change(worker, "started", why)

    def interrupt(self, worker_id: int, reason: str, culprit: bool = False) -> None:
        """The device has failed under the worker, which is being stopped: a death that does not count against it.

        A stream goes on as soon as workers can be started again. ``culprit``: the first to meet a fault, so probably
        the one that made it, waits ``slow_s`` in quarantine, longer every time.
        """
        worker = self._workers[worker_id]
        if worker.state in ("stopping", "backoff"):
            return
        worker.interrupted = reason
        if culprit:
            faults = self._faults[worker.job.job_id] = self._faults.get(worker.job.job_id, 0) + 1
            worker.quarantine_s = faults * self._policy.slow_s
            while len(self._faults) > REMEMBERED:
                del self._faults[next(iter(self._faults))]

    def retry_now(self, job_id: str) -> None:
        """The job has changed: what made it fail may be gone, so its pause is over."""
        for worker in self.of_job(job_id):
            worker.resumes_s = 0.0

    def forget_all(self) -> None:
        """Another site: nothing of what was remembered of jobs and checkpoints applies there."""
        self.settled.clear()
        self._good.clear()
        self._refused.clear()

    def _begin(self, command: Start | Replace, share_cap: float) -> Worker:
        """A new worker for the command's job, with a checkpoint that is not known to be bad."""
        job = self._with_usable_checkpoint(command.job)
        worker = Worker(worker_id=self._next_id, job=job, share_held=job.share, share_cap=share_cap)
        self._next_id += 1
        if isinstance(command, Replace):
            old = next(w for w in self.of_job(job.job_id) if w.state == "ready")
            worker.successor_of, worker.standby, worker.origin_s = old.worker_id, True, old.origin_s
        else:
            for old in self.of_job(job.job_id):
                worker.deaths, worker.restarts, worker.reported = old.deaths, old.restarts + 1, old.reported
                del self._workers[old.worker_id]
        self._workers[worker.worker_id] = worker
        return worker

    def _tell(self, command: Tell, now: float) -> list[Effect]:
        """A growth counts in the ledger at once, a shrink when it has settled."""
        order, effects = command.command, list[Effect]()
        for worker in self.of_job(command.job_id):
            if worker.state != "ready":
                continue
            if isinstance(order, SetShare):
                worker.since_s = now
                worker.shrink_sent_s = now if order.share < worker.share_held else None
                worker.share_held = max(worker.share_held, order.share)
                if self._shrinks_at_once:
                    worker.share_held, worker.shrink_sent_s = order.share, None
                worker.job = _replaced(worker.job, share=order.share)
                self._change(worker, "resized", "plan")
            elif isinstance(order, SetInference):
                worker.job = _replaced(worker.job, config=order.config)
                self._change(worker, "reconfigured", order.config.config_id)
            else:
                worker.job = _replaced(worker.job, checkpoint=order.checkpoint)
            effects.append(Order(worker, order))
        return effects

    # ------------------------------------------------------------ what workers do

    def reported(self, worker_id: int, report: Report, now: float) -> list[Effect]:
        """Take a report in; a successor that has become ready relieves the worker before it."""
        worker = self._workers.get(worker_id)
        if worker is None:
            return []
        self._settle(worker, report, now)
        if isinstance(report, Ready):
            return self._ready(worker, report, now)
        if isinstance(report, Progress):
            worker.progress, worker.share_achieved = max(worker.progress, report.count), report.share_achieved
        elif isinstance(report, StreamStats):
            worker.model_version = report.model_version
        elif isinstance(report, Swapped):
            worker.model_version = report.version
            self._remember_good(worker)
            self._change(worker, "swapped", f"model_version={report.version}", gap_ms=report.gap_ms)
        elif isinstance(report, SwapRefused):
            self._refuse_checkpoint(worker, report.reason)
        elif isinstance(report, TookOver):
            worker.took_over_s = report.at_s
            self._handed_over(worker)
        elif isinstance(report, HandedOver):
            for successor in self.of_job(worker.job.job_id):
                if successor is not worker:
                    successor.handed_over_s = report.at_s
                    self._handed_over(successor)
        elif isinstance(report, EpochDone):
            self._epoch(worker, report)
        elif isinstance(report, JobDone):
            self._done(worker, report)
        elif isinstance(report, StreamChanged):
            self._stream_changed(worker, report, now)
        else:
            worker.broken = report
        return []

    def left(self, worker_id: int, reason: str, now: float) -> None:
        """The worker's process has ended, whatever the cause."""
        worker = self._workers.pop(worker_id, None)
        if worker is None:
            return
        if worker.state == "stopping" or worker.job.job_id in self.settled:
            done = worker.job.job_id in self.settled
            self._change(worker, "finished" if done else "stopped", worker.stop_reason or reason)
            return
        if worker.broken is not None:
            reason = f"{worker.broken.kind}: {worker.broken.reason}"
        if worker.interrupted and not worker.quarantine_s:
            reason = f"interrupted: {worker.interrupted}"
        self._change(worker, "failed", reason)
        if not isinstance(worker.job, InferenceJob):
            self._settle_job(worker.job.job_id)
            self._report_failure(worker, reason)
        elif any(other.state != "stopping" for other in self.of_job(worker.job.job_id)):
            self._hand_over_broken(worker, now)
        elif worker.interrupted:
            if worker.quarantine_s:
                reason = f"{reason}; the first to meet a GPU fault, in quarantine for {worker.quarantine_s:g} s"
                self._report_failure(worker, reason)
            self._rest(worker, now + worker.quarantine_s)
        else:
            self._pause(worker, reason, now)

    # ------------------------------------------------------------ inside

    def _ready(self, worker: Worker, report: Ready, now: float) -> list[Effect]:
        relieved = worker.successor_of if worker.successor_of is not None else -1
        worker.pid, worker.ready_s, worker.successor_of = report.pid, now, None
        if worker.state == "starting":
            worker.state = "ready"
        if isinstance(worker.job, InferenceJob):
            worker.model_version = worker.job.checkpoint.version
            self._remember_good(worker)
        self._change(worker, "ready", f"startup_s={report.startup_s:.2f}")
        if not worker.standby:
            return []
        worker.standby, worker.resumes_s = False, now + self._pause_s
        if relieved not in self._workers:
            return [Order(worker, TakeOver(at_s=now))]  # the one before it has died meanwhile
        # A little ahead, so that both know before the frame comes that the one leaves and the other takes.
        turn_s = now + HAND_OVER_LEAD_S
        old = self._workers[relieved]
        effects: list[Effect] = [Order(worker, TakeOver(at_s=turn_s))]
        for effect in self.halt(relieved, "handed_over"):
            farewell = HandOver(at_s=turn_s) if isinstance(effect, Halt) else None
            effects.append(Halt(old, "handed_over", farewell))
        return effects

    def _handed_over(self, worker: Worker) -> None:
        """Both sides of a hand-over have told the time of their result next to it."""
        before, after = worker.handed_over_s, worker.took_over_s
        if before is not None and after is not None:
            worker.handed_over_s = worker.took_over_s = None
            gap_ms = max(0.0, after - before) * 1e3
            self._change(worker, "handed_over", f"share={worker.job.share:g}", gap_ms=gap_ms)

    def _settle(self, worker: Worker, report: Report, now: float) -> None:
        """A shrink is over when the worker names the share it holds, or reports a while after the order.

        Workers read orders between two steps, so that a report sent ``settle_s`` after an order follows it.
        """
        if worker.shrink_sent_s is None or not isinstance(report, Progress | StreamStats):
            return
        named = report.share if isinstance(report, Progress) else None
        if named is None and now - worker.shrink_sent_s < self._settle_s:
            return
        if named is None or named <= worker.job.share + SHARE_TOLERANCE:
            worker.share_held, worker.shrink_sent_s = worker.job.share, None

    def _stream_changed(self, worker: Worker, report: StreamChanged, now: float) -> None:
        stream_id, before = worker.job.stream.stream_id, worker.condition
        worker.condition = report.condition
        if report.condition == "ok":
            if before != "ok":
                self.events.append(
                    StreamRecovered(
                        stream_id=stream_id,
                        gpu_id=self._gpu_id,
                        condition=before,
                        reason="pictures come again",
                        after_s=max(0.0, now - worker.degraded_s),
                    )
                )
            return
        if before == "ok":
            worker.degraded_s = now
        self.events.append(
            StreamDegraded(stream_id=stream_id, gpu_id=self._gpu_id, condition=report.condition, reason=report.reason)
        )

    def _epoch(self, worker: Worker, report: EpochDone) -> None:
        job = worker.job
        if not isinstance(job, InferenceJob) and hasattr(job, "config"):
            self.events.append(
                RetrainProgress(
                    job_id=job.job_id,
                    stream_id=job.stream.stream_id,
                    window=job.window,
                    config=job.config,
                    epoch=report.epoch,
                )
            )

    def _done(self, worker: Worker, report: JobDone) -> None:
        job_id = worker.job.job_id
        if job_id in self.settled:
            return
        event_id, result = self._outbox.next_id(), report.result
        event: LastingEvent
        if isinstance(result, LabelResult):
            event = LabelsDone(event_id=event_id, executor_id=self._executor_id, job_id=job_id, result=result)
        elif isinstance(result, TrialResult):
            event = TrialsDone(event_id=event_id, executor_id=self._executor_id, job_id=job_id, result=result)
        elif isinstance(result, CanaryResult):
            event = CanaryDone(event_id=event_id, executor_id=self._executor_id, job_id=job_id, result=result)
        else:
            event = RetrainDone(event_id=event_id, executor_id=self._executor_id, job_id=job_id, result=result)
        self._outbox.add(event)
        self._settle_job(job_id)
        worker.state, worker.stop_reason = "stopping", "done"

    def _hand_over_broken(self, worker: Worker, now: float) -> None:
        """One of two has died: the other goes on alone, and the next attempt waits."""
        for other in self.of_job(worker.job.job_id):
            other.successor_of = None
            other.deaths += 1
            other.resumes_s = now + self._backoff_s(other.deaths)

    def _backoff_s(self, deaths: int) -> float:
        return min(self._policy.backoff_max_s, self._policy.backoff_s * 2.0 ** min(30, deaths - 1))

    def _pause(self, worker: Worker, reason: str, now: float) -> None:
        """Put a dead inference worker on hold until its next start; say so once when it dies too often."""
        policy = self._policy
        if worker.ready_s is not None and now - worker.ready_s >= policy.stable_s:
            worker.deaths, worker.reported = 0, False
        worker.deaths += 1
        if worker.broken is not None:
            if worker.broken.kind == "checkpoint":
                self._refuse_checkpoint(worker, worker.broken.reason)
            if worker.broken.kind == "input":
                worker.deaths = max(worker.deaths, policy.limit)  # the same data will not do any better at once
        if worker.deaths >= policy.limit:
            pause = policy.slow_s
            if not worker.reported:
                worker.reported = True
                self._report_failure(worker, f"{reason}; tried again every {policy.slow_s:g} s")
        else:
            pause = self._backoff_s(worker.deaths)
        self._rest(worker, now + pause)

    def _rest(self, worker: Worker, resumes_s: float) -> None:
        """An inference worker without a process, until it is started again."""
        worker.state, worker.resumes_s, worker.share_held, worker.pid = "backoff", resumes_s, 0.0, 0
        worker.interrupted, worker.quarantine_s, worker.standby = "", 0.0, False
        worker.ready_s, worker.broken, worker.shrink_sent_s, worker.successor_of = None, None, None, None
        self._workers[worker.worker_id] = worker

    def _report_failure(self, worker: Worker, reason: str) -> None:
        self._outbox.add(
            JobFailed(
                event_id=self._outbox.next_id(),
                executor_id=self._executor_id,
                job_id=worker.job.job_id,
                stream_id=worker.job.stream.stream_id,
                kind=worker.kind,
                reason=reason,
            )
        )

    def _settle_job(self, job_id: str) -> None:
        self.settled[job_id] = None
        while len(self.settled) > REMEMBERED:
            del self.settled[next(iter(self.settled))]

    def _with_usable_checkpoint(self, job: Job) -> Job:
        if isinstance(job, InferenceJob) and job.checkpoint.sha256 in self._refused:
            good = self._good.get(job.stream.stream_id)
            if good is not None:
                return _replaced(job, checkpoint=good)
        return job

    def _remember_good(self, worker: Worker) -> None:
        if isinstance(worker.job, InferenceJob):
            self._good[worker.job.stream.stream_id] = worker.job.checkpoint

    def _refuse_checkpoint(self, worker: Worker, reason: str) -> None:
        if not isinstance(worker.job, InferenceJob):
            return
        checkpoint = worker.job.checkpoint
        self._refused[checkpoint.sha256] = None
        while len(self._refused) > REMEMBERED:
            del self._refused[next(iter(self._refused))]
        text = f"checkpoint version {checkpoint.version} of {checkpoint.stream_id} refused: {reason}"
        self.events.append(Notice(level="error", text=text))

    def _change(self, worker: Worker, change: str, reason: str, gap_ms: float | None = None) -> None:
        self.events.append(
            WorkerChanged(
                job_id=worker.job.job_id,
                stream_id=worker.job.stream.stream_id,
                gpu_id=self._gpu_id,
                kind=worker.kind,
                change=change,  # type: ignore[arg-type]
                reason=reason,
                pid=worker.pid,
                share=worker.job.share,
                gap_ms=gap_ms,
            )
        )


def _replaced(job: Job, **changes: object) -> Job:
    changed: Job = msgspec.structs.replace(job, **changes)
    return changed
