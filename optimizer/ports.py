"""What goes into the coordinator, what comes out of it, and what it needs from the profiler.

Structs and protocols only.
"""

from __future__ import annotations

from typing import Protocol

from protocol.events import RetrainProgress, StreamAccuracy, TelemetryEvent, WorkerChanged
from protocol.messages import Down, Hello, RetrainJob, Up
from protocol.plan import Plan, Problem, StreamProfile
from protocol.schema import (
    DatasetRef,
    InferenceConfig,
    Record,
    RetrainConfig,
    RetrainResult,
    RetrainRun,
    StreamSpec,
    TrialResult,
)

# ---------------------------------------------------------------- in


class ExecutorJoined(Record, frozen=True, kw_only=True):
    hello: Hello


class ExecutorGone(Record, frozen=True, kw_only=True):
    executor_id: str
    reason: str
    on_purpose: bool = False


class Received(Record, frozen=True, kw_only=True):
    """A control message of a joined executor."""

    executor_id: str
    message: Up


class Solved(Record, frozen=True, kw_only=True):
    """The planner answered. ``plan`` None: no plan exists, ``reason`` says why."""

    token: int
    plan: Plan | None
    reason: str = ""


class Measured(Record, frozen=True, kw_only=True):
    """Realised accuracy arrived through telemetry."""

    event: StreamAccuracy


class Progressed(Record, frozen=True, kw_only=True):
    """An epoch of a retraining ended, as telemetry tells."""

    event: RetrainProgress


class HandedOver(Record, frozen=True, kw_only=True):
    """A stream was handed over from one worker to another, as telemetry tells."""

    event: WorkerChanged


class CloudDone(Record, frozen=True, kw_only=True):
    """The model of a retraining in the cloud is there."""

    job_id: str
    result: RetrainResult


class Tick(Record, frozen=True, kw_only=True):
    """Time has passed."""


Input = ExecutorJoined | ExecutorGone | Received | Solved | Measured | Progressed | HandedOver | CloudDone | Tick

# ---------------------------------------------------------------- out


class Send(Record, frozen=True, kw_only=True):
    executor_id: str
    message: Down


class Publish(Record, frozen=True, kw_only=True):
    event: TelemetryEvent


class Solve(Record, frozen=True, kw_only=True):
    """Ask the planner; a newer token replaces an older question."""

    token: int
    problem: Problem
    window: int
    phase: str


class CloudJob(Record, frozen=True, kw_only=True):
    """One retraining in the cloud and what is left of it: bytes to send, seconds to wait, bytes to fetch."""

    job: RetrainJob
    up_bytes: float
    cloud_s: float
    down_bytes: float


class CloudQueue(Record, frozen=True, kw_only=True):
    """All that a link should transfer, in order; what is not named any more is given up. Said by coordinators that
    were given links."""

    link_id: str
    jobs: tuple[CloudJob, ...]


class Save(Record, frozen=True, kw_only=True):
    """The state changed in a way that must survive a restart."""


class Tidy(Record, frozen=True, kw_only=True):
    """Only these models, by their paths below the store, are still of use: what was left out twice in a row can go."""

    in_use: frozenset[str]


class Finish(Record, frozen=True, kw_only=True):
    """The run is over."""

    exit_code: int
    reason: str


Output = Send | Publish | Solve | CloudQueue | Save | Tidy | Finish

# ---------------------------------------------------------------- profiler


class TrialWish(Protocol):
    """The trials worth their time in this window (see TrialJob for the fields)."""

    @property
    def retrain(self) -> tuple[RetrainConfig, ...]: ...
    @property
    def inference(self) -> tuple[InferenceConfig, ...]: ...
    @property
    def data_share(self) -> float: ...
    @property
    def num_epochs(self) -> int: ...
    @property
    def num_frames(self) -> int: ...


class GateEvidence(Protocol):
    """A decision about a retrained model (gate, shadow, canary, roll-back) and what it rests on."""

    @property
    def stream_id(self) -> str: ...
    @property
    def window(self) -> int: ...
    @property
    def stage(self) -> str: ...
    @property
    def decision(self) -> str: ...
    @property
    def retrain_id(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def confidence(self) -> float | None: ...
    @property
    def reason(self) -> str: ...


class ProfilerPort(Protocol):
    """The micro-profiler as the coordinator sees it. Calls return at once."""

    def choose(
        self,
        spec: StreamSpec,
        window: int,
        dataset: DatasetRef,
        *,
        drift: float | None = None,
        price: float | None = None,
        wait_share: float | None = None,
    ) -> TrialWish:
        """Which trials to run for a stream in this window.

        ``wait_share``: the share that they run at while the stream's retraining waits for them, beside a plan; None =
        nothing waits.
        ``drift``: how much the stream has changed since its last window, 0 (not) to 1, None = not known. ``price``:
        accuracy-seconds of the site that a GPU-second is worth elsewhere (dual of the last plan), None = not known.
        """
        ...

    def estimate(self, spec: StreamSpec, trial: TrialResult, dataset: DatasetRef) -> StreamProfile:
        """The stream's profile from its trials and its history."""
        ...

    def retrained(
        self,
        spec: StreamSpec,
        result: RetrainResult,
        predicted: float,
        predicted_s: float,
        promoted: bool,
        run: RetrainRun | None = None,
    ) -> None:
        """A retraining ended; remember predicted and realised. ``run`` None: only its busy time is known."""
        ...

    def record_gate(self, decision: GateEvidence) -> None:
        """Something was decided about a retrained model; remember it with its evidence (a frozen struct)."""
        ...

    def share_efficiency(self, device: str) -> tuple[tuple[float, float], ...]:
        """Points (share, throughput over that of share 1) of a kind of device; empty = linear, or not known."""
        ...

    def measured(self, event: StreamAccuracy) -> None:
        """Accuracy measured while serving."""
        ...

    def window_closed(self, stream_id: str, window: int, predicted: float | None, realised: float | None) -> None:
        """A window ended; remember predicted and realised window accuracy."""
        ...
