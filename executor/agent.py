"""Desired state against running workers: the plan fence, the share ledger and ``reconcile``. No input or output.

Rules, in the order in which they bind:

1. Fence. A plan is applied when its version (term, window, revision) is above the held one, acknowledged
   without a change when it is equal, refused otherwise; refused too when it is past its life time.
2. Ledger. The shares that workers of this GPU may be using never sum to more than 1. Stops and shrinks are
   ordered at once; growths and starts wait until a worker has really left or really shrunk. Because the
   desired shares sum to at most 1, every growth and start fits in the end: nobody starves.
3. A job with the same id is changed in place (share, inference configuration, checkpoint), never restarted.
4. Alone. Without an optimizer nothing new is begun except inference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Set
from typing import Literal

from executor.limits import HandOvers
from executor.links import SetInference, SetShare, SwapModel
from protocol.events import JobKind
from protocol.messages import ApplyPlan, InferenceJob, Job, PlanApplied, PlanRefused
from protocol.plan import PlanVersion
from protocol.schema import Record

SHARE_TOLERANCE = 1e-6
_DEFAULT = HandOvers()

Kind = JobKind


class WorkerView(Record, frozen=True, kw_only=True):
    """One worker as the ledger sees it.

    ``job``: as last told to the worker, commands on their way included. ``share_held``: the most that
    it may still be using; 0 while it has no process (``backoff``). ``share_cap``: the largest share that
    it can be given while it runs. ``resumes_s``: when a worker in ``backoff`` may be
    started again, or one that is ready be replaced. ``cap_fixed``: a larger share takes another worker.
    ``since_s``: when its share was last changed.
    ``replacing``: it serves until its successor, a worker of the same job in ``starting``, is ready.
    """

    job: Job
    state: Literal["starting", "ready", "replacing", "stopping", "backoff"]
    share_held: float
    share_cap: float = 1.0
    resumes_s: float = 0.0
    cap_fixed: bool = False
    since_s: float = 0.0


class Start(Record, frozen=True, kw_only=True):
    """Start a worker for the job (anew, when it is in ``backoff``)."""

    job: Job


class Stop(Record, frozen=True, kw_only=True):
    """Stop the job's worker by the stop ladder."""

    job_id: str
    reason: str


class Tell(Record, frozen=True, kw_only=True):
    """Send a command to the job's worker."""

    job_id: str
    command: SetShare | SetInference | SwapModel


class Replace(Record, frozen=True, kw_only=True):
    """Hand the job over: start a second worker with ``job``, and stop the first when the second is ready.

    The one declared exception to rule 2: both hold their share for the time of the hand-over.
    """

    job: Job


AgentCommand = Start | Stop | Tell | Replace


def kind_of(job: Job) -> Kind:
    """The job's kind as it is called in messages: its tag."""
    kind: Kind = job.__struct_config__.tag  # type: ignore[assignment]
    return kind


def granted(shares: Iterable[float]) -> float:
    """Exact sum of shares, so that ten times 0.1 is not more than 1."""
    return math.fsum(shares)


def reconcile(
    desired: tuple[Job, ...],
    workers: tuple[WorkerView, ...],
    now: float,
    *,
    settled: Set[str] = frozenset(),
    alone: bool = False,
    hand_overs: HandOvers = _DEFAULT,
) -> list[AgentCommand]:
    """The commands that bring ``workers`` nearer to ``desired``; an empty list when nothing can be done now.

    To be called again whenever a worker has started, become ready, shrunk or left, and when a
    ``backoff`` ends. ``settled``: ids of jobs that have ended, well or badly, and are not begun again.
    A growth beyond a worker's cap needs a replacement; only inference is worth one, other kinds keep
    their share until they end. Up to its cap a worker grows at once, and a small growth beyond it is not worth a
    replacement (``hand_overs``); a worker much larger than its share is replaced when things have been quiet.
    """
    wanted = {job.job_id: job for job in desired}
    present = {worker.job.job_id: worker for worker in workers}
    stops: list[AgentCommand] = []
    changes: list[AgentCommand] = []
    growths: list[tuple[WorkerView, Job]] = []
    refits: list[AgentCommand] = []

    for worker in workers:
        if worker.state == "stopping":
            continue
        job = wanted.get(worker.job.job_id)
        if job is None:
            stops.append(Stop(job_id=worker.job.job_id, reason="not_in_plan"))
        elif type(job) is not type(worker.job):
            stops.append(Stop(job_id=worker.job.job_id, reason="became_another_kind"))
        elif worker.state == "ready":
            changes.extend(changes_of(worker.job, job))
            if job.share < worker.job.share - SHARE_TOLERANCE:
                stops.append(Tell(job_id=job.job_id, command=SetShare(share=job.share)))
            elif job.share > worker.job.share + SHARE_TOLERANCE:
                growths.append((worker, job))
            elif _is_oversized(worker, job, now, hand_overs):
                refits.append(Replace(job=job))

    free = 1.0 - granted(worker.share_held for worker in workers) + SHARE_TOLERANCE
    risings: list[AgentCommand] = []
    for worker, job in sorted(growths, key=lambda pair: _rank(pair[1])):
        extra = max(0.0, job.share - worker.share_held)
        if extra > free:
            continue
        excess = job.share - worker.share_cap
        if excess <= SHARE_TOLERANCE or (isinstance(job, InferenceJob) and excess < hand_overs.min_growth):
            risings.append(Tell(job_id=job.job_id, command=SetShare(share=job.share)))
        elif isinstance(job, InferenceJob):
            if worker.job.share < worker.share_cap - SHARE_TOLERANCE:
                risings.append(Tell(job_id=job.job_id, command=SetShare(share=worker.share_cap)))
            if now >= worker.resumes_s:
                risings.append(Replace(job=job))
        else:
            continue
        free -= extra
    for job in sorted(desired, key=_rank):
        known = present.get(job.job_id)
        if known is not None and (known.state != "backoff" or now < known.resumes_s):
            continue
        if job.job_id in settled or job.share > free:
            continue
        if alone and not isinstance(job, InferenceJob):
            continue
        risings.append(Start(job=job))
        free -= job.share
    return [*stops, *changes, *risings, *(refits if not risings else ())]


def _is_oversized(worker: WorkerView, job: Job, now: float, hand_overs: HandOvers) -> bool:
    return (
        worker.cap_fixed
        and isinstance(job, InferenceJob)
        and job.share < hand_overs.refit_below * worker.share_cap
        and now >= worker.resumes_s
        and now - worker.since_s >= hand_overs.refit_after_s
    )


def _rank(job: Job) -> tuple[int, str]:
    """Inference first: a stream without a serving model loses accuracy every second."""
    return (0 if isinstance(job, InferenceJob) else 1, job.job_id)


def changes_of(old: Job, new: Job) -> list[Tell]:
    """Changes of a serving worker besides its share. Paths may differ; the content of a checkpoint counts."""
    if not (isinstance(old, InferenceJob) and isinstance(new, InferenceJob)):
        return []
    tells = []
    if old.checkpoint.sha256 != new.checkpoint.sha256:
        tells.append(Tell(job_id=new.job_id, command=SwapModel(checkpoint=new.checkpoint)))
    if old.config != new.config:
        tells.append(Tell(job_id=new.job_id, command=SetInference(config=new.config)))
    return tells


class Fence:
    """The plan that this executor holds, and the judgement of the next one."""

    def __init__(self, executor_id: str) -> None:
        self.executor_id = executor_id
        self.held: PlanVersion | None = None
        self.desired: tuple[Job, ...] = ()
        self.taken_s = 0.0

    def judge(
        self, plan: ApplyPlan, received_s: float, now: float, settled: Set[str] = frozenset()
    ) -> PlanApplied | PlanRefused:
        """Take the plan over, or say why not.

        ``received_s`` and ``now`` are this machine's monotonic clock, at the earliest time of receipt and at
        this step; they differ when the loop was late. ``taken_s`` keeps the latter. Shares of ``settled``
        jobs do not count: nothing runs for them.
        """
        if self.held is not None and plan.version == self.held:
            return PlanApplied(executor_id=self.executor_id, version=plan.version)
        reason = self._objection(plan, received_s, now, settled)
        if reason:
            return PlanRefused(executor_id=self.executor_id, version=plan.version, held=self.held, reason=reason)
        self.held, self.desired, self.taken_s = plan.version, plan.jobs, now
        return PlanApplied(executor_id=self.executor_id, version=plan.version)

    def _objection(self, plan: ApplyPlan, received_s: float, now: float, settled: Set[str]) -> str:
        if self.held is not None and plan.version < self.held:
            return "older than the plan held"
        if now - received_s > plan.lifetime_s:
            return f"late: {now - received_s:.3f} s old, its life time is {plan.lifetime_s:g} s"
        job_ids = [job.job_id for job in plan.jobs]
        if len(set(job_ids)) < len(job_ids):
            return f"not executable: job id {next(i for i in job_ids if job_ids.count(i) > 1)!r} occurs twice"
        total = granted(job.share for job in plan.jobs if job.job_id not in settled)
        if total > 1.0 + SHARE_TOLERANCE:
            return f"not executable: its shares sum to {total:.4f}, more than one GPU"
        return ""
