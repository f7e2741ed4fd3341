"""Control messages between optimizer and executors. This file holds structs only; the union is written by hand.

Imperative down (``ApplyPlan``), past tense up (``RetrainDone``). Everything that must not be lost
going up carries an ``event_id`` and is sent again until an ``Ack`` names it. See docs/protocol.md.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from protocol.events import JobKind, TelemetryEvent
from protocol.plan import PlanVersion
from protocol.schema import (
    Bytes,
    CanaryResult,
    CheckpointRef,
    Count,
    DatasetRef,
    Fraction,
    GpuSpec,
    InferenceConfig,
    LabelResult,
    Name,
    Record,
    RetrainConfig,
    RetrainResult,
    Seconds,
    Share,
    StreamCondition,
    StreamSpec,
    TrialResult,
    ZooRef,
)

PROTOCOL_VERSION = 1

# ---------------------------------------------------------------- jobs: the desired state of an executor


class InferenceJob(Record, frozen=True, kw_only=True, tag="inference"):
    """Serve a stream. ``position_s``: the stream's time when the plan was sent (frame = position * fps).

    A worker that already serves the job keeps its own clock. A changed share, configuration or
    checkpoint is applied to the running worker without a gap.
    """

    job_id: str
    stream: StreamSpec
    share: Share
    config: InferenceConfig
    checkpoint: CheckpointRef
    position_s: float
    memory_bytes: Bytes = 0


class LabelJob(Record, frozen=True, kw_only=True, tag="label"):
    """Label frames of [from_s, to_s) of stream time at the stream's label rate and write the window's data set.

    ``exemplars`` is the stream's previous data set (None at first), whose memory is carried over. ``record``: of a live
    stream that nobody serves yet: the job first records as many seconds, from now on, and labels those.
    ``num_frames``: how many frames the budget has for it, 0 = as many as the label rate asks for. ``uniform_share``:
    part of them that is spread evenly; the others are drawn where ``checkpoint``, the serving model, is unsure and
    rare classes are. How far that model agrees with the labels is measured in any case; None = there is none yet.
    """

    job_id: str
    stream: StreamSpec
    share: Share
    window: int
    from_s: float
    to_s: float
    exemplars: DatasetRef | None = None
    memory_bytes: Bytes = 0
    record: bool = False
    checkpoint: CheckpointRef | None = None
    num_frames: Count = 0
    uniform_share: Share = 1.0


class TrialJob(Record, frozen=True, kw_only=True, tag="trial"):
    """Micro-profile: each retraining configuration on ``data_share`` of the training split for ``num_epochs``;
    each inference configuration on ``num_frames`` consecutive labelled frames ending at ``clip_end_s``.

    ``unseen``: the checkpoint was not trained on ``dataset``, so that all its new labels tell how good it is. ``zoo``:
    earlier models to be looked at on those, before anything else.
    """

    job_id: str
    stream: StreamSpec
    share: Share
    window: int
    dataset: DatasetRef
    checkpoint: CheckpointRef
    retrain: tuple[RetrainConfig, ...]
    inference: tuple[InferenceConfig, ...]
    data_share: Fraction
    num_epochs: int
    num_frames: int
    clip_end_s: float
    unseen: bool = False
    memory_bytes: Bytes = 0
    zoo: tuple[ZooRef, ...] = ()


class RetrainJob(Record, frozen=True, kw_only=True, tag="retrain"):
    """Retrain a student from ``checkpoint`` (None = from scratch) on ``dataset``; write version ``next_version``.

    ``start``: a model of the zoo to begin from instead; ``checkpoint`` is then only what it is compared with. With no
    epochs in ``config`` that model is taken as it is, and all new labels of ``dataset`` are held out.
    """

    job_id: str
    stream: StreamSpec
    share: Share
    window: int
    dataset: DatasetRef
    checkpoint: CheckpointRef | None
    config: RetrainConfig
    next_version: int
    seed: int = 0
    memory_bytes: Bytes = 0
    start: CheckpointRef | None = None


class CanaryJob(Record, frozen=True, kw_only=True, tag="canary"):
    """Label frames of [from_s, to_s) of stream time at ``label_fps`` and compare two models on them."""

    job_id: str
    stream: StreamSpec
    share: Share
    window: int
    from_s: float
    to_s: float
    label_fps: Annotated[float, msgspec.Meta(gt=0.0)]
    candidate: CheckpointRef
    previous: CheckpointRef
    memory_bytes: Bytes = 0


Job = InferenceJob | LabelJob | TrialJob | RetrainJob | CanaryJob

# ---------------------------------------------------------------- reports inside messages

WorkerState = Literal["starting", "ready", "stopping", "backoff", "failed"]


class WorkerStatus(Record, frozen=True, kw_only=True):
    """One worker of an executor as its supervisor sees it. ``share_achieved`` None = not measured yet.

    ``condition``: of the stream that it serves.
    """

    job_id: str
    kind: JobKind
    stream_id: Name
    pid: int
    state: WorkerState
    share_granted: float
    share_achieved: float | None
    progress: int
    restarts: int = 0
    model_version: int = 0
    condition: StreamCondition = "ok"


# ---------------------------------------------------------------- up: executor -> optimizer


class Hello(Record, frozen=True, kw_only=True, tag="hello"):
    """First message of an executor. ``incarnation`` is new for every start; ``held`` the plan it still runs.

    ``can_resize_live``: shares can be changed while a worker runs, so that free ones may be lent.
    """

    protocol_version: int
    executor_id: Name
    incarnation: str
    device: str
    share_backend: str
    gpu: GpuSpec
    host: str
    pid: int
    held: PlanVersion | None = None
    workers: tuple[WorkerStatus, ...] = ()
    can_resize_live: bool = False


class Heartbeat(Record, frozen=True, kw_only=True, tag="heartbeat"):
    """Sent by the executor's main loop; ``loop_count`` proves that the loop turns."""

    executor_id: Name
    incarnation: str
    loop_count: int
    held: PlanVersion | None
    workers: tuple[WorkerStatus, ...]


class PlanApplied(Record, frozen=True, kw_only=True, tag="plan_applied"):
    executor_id: Name
    version: PlanVersion


class PlanRefused(Record, frozen=True, kw_only=True, tag="plan_refused"):
    """The plan was not applied: it is older than ``held``, late, or not executable; ``reason`` says which."""

    executor_id: Name
    version: PlanVersion
    held: PlanVersion | None
    reason: str


class LabelsDone(Record, frozen=True, kw_only=True, tag="labels_done"):
    event_id: int
    executor_id: Name
    job_id: str
    result: LabelResult


class TrialsDone(Record, frozen=True, kw_only=True, tag="trials_done"):
    event_id: int
    executor_id: Name
    job_id: str
    result: TrialResult


class RetrainDone(Record, frozen=True, kw_only=True, tag="retrain_done"):
    event_id: int
    executor_id: Name
    job_id: str
    result: RetrainResult


class CanaryDone(Record, frozen=True, kw_only=True, tag="canary_done"):
    event_id: int
    executor_id: Name
    job_id: str
    result: CanaryResult


class JobFailed(Record, frozen=True, kw_only=True, tag="job_failed"):
    """A job will not end well by itself: crashed past its restart limit, refused, out of memory, hung."""

    event_id: int
    executor_id: Name
    job_id: str
    stream_id: Name
    kind: JobKind
    reason: str


class Goodbye(Record, frozen=True, kw_only=True, tag="goodbye"):
    """The executor leaves on purpose."""

    executor_id: Name
    reason: str


Up = (
    Hello
    | Heartbeat
    | PlanApplied
    | PlanRefused
    | LabelsDone
    | TrialsDone
    | RetrainDone
    | CanaryDone
    | JobFailed
    | Goodbye
)

# ---------------------------------------------------------------- down: optimizer -> executor


class Welcome(Record, frozen=True, kw_only=True, tag="welcome"):
    """Answer to Hello. ``store`` is the folder of data sets and checkpoints, shared by all processes of a site."""

    term: int
    site: str
    store: str
    telemetry_address: str
    heartbeat_s: Seconds
    silence_s: Seconds


class Rejected(Record, frozen=True, kw_only=True, tag="rejected"):
    """The executor may not join; it prints ``reason`` and exits with 2 unless ``retry`` is true."""

    reason: str
    retry: bool = False


class ApplyPlan(Record, frozen=True, kw_only=True, tag="apply_plan"):
    """The executor's complete desired state. Applying it twice is harmless.

    ``lifetime_s``: the plan is dropped when it reaches the reconcile step later than that after
    receipt (a duration judged by the receiver's monotonic clock).
    """

    version: PlanVersion
    lifetime_s: Seconds
    jobs: tuple[Job, ...]


class Ack(Record, frozen=True, kw_only=True, tag="ack"):
    event_id: int


class Leave(Record, frozen=True, kw_only=True, tag="leave"):
    """Stop all jobs and exit with 0."""

    reason: str


Down = Welcome | Rejected | ApplyPlan | Ack | Leave

# ---------------------------------------------------------------- clients


class SnapshotRequest(Record, frozen=True, kw_only=True, tag="snapshot_request"):
    """A telemetry client asks for the present state (it joined late or saw a gap)."""

    protocol_version: int = PROTOCOL_VERSION


class Snapshot(Record, frozen=True, kw_only=True, tag="snapshot"):
    """The newest event of every (kind, subject), and the hub's sequence number per publisher at that time.

    ``telemetry_address``: where clients subscribe; a wildcard host stands for the host that was asked.
    """

    protocol_version: int
    site: str
    term: int
    window: int
    sequence: dict[str, int]
    events: tuple[TelemetryEvent, ...]
    telemetry_address: str = ""


Client = SnapshotRequest

# ---------------------------------------------------------------- what each end of a control connection receives

ToServer = Up | Client
ToClient = Down | Snapshot
