"""What the roster remembers of one worker, and what it asks the supervisor to do."""

from __future__ import annotations

from dataclasses import dataclass

from executor.agent import Kind, kind_of
from executor.links import Command, HandOver, JobBroken
from protocol.messages import Job
from protocol.schema import StreamCondition


@dataclass(slots=True, kw_only=True)
class Worker:
    """One worker: its job as last told, and what is known of its process."""

    worker_id: int
    job: Job
    state: str = "starting"
    share_held: float = 0.0
    share_cap: float = 1.0
    shrink_sent_s: float | None = None
    ready_s: float | None = None
    resumes_s: float = 0.0
    deaths: int = 0
    restarts: int = 0
    reported: bool = False
    pid: int = 0
    progress: int = 0
    share_achieved: float | None = None
    model_version: int = 0
    condition: StreamCondition = "ok"
    degraded_s: float = 0.0
    broken: JobBroken | None = None
    stop_reason: str = ""
    interrupted: str = ""
    quarantine_s: float = 0.0
    successor_of: int | None = None
    standby: bool = False
    cap_fixed: bool = False
    since_s: float = 0.0
    origin_s: float | None = None
    handed_over_s: float | None = None
    took_over_s: float | None = None

    @property
    def kind(self) -> Kind:
        return kind_of(self.job)


@dataclass(frozen=True, slots=True)
class Launch:
    """Start a process for the worker."""

    worker: Worker


@dataclass(frozen=True, slots=True)
class Order:
    """Send a command to the worker's process."""

    worker: Worker
    command: Command


@dataclass(frozen=True, slots=True)
class Halt:
    """Stop the worker's process by the stop ladder. ``farewell``: what it is told, StopJob when None."""

    worker: Worker
    reason: str
    farewell: HandOver | None = None


Effect = Launch | Order | Halt
