"""What the coordinator remembers. Structs only; all of it survives a restart of the optimizer.

These structs are mutable on purpose: only the coordinator holds them, and only ``handle`` changes them.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from protocol.messages import CanaryJob, LabelJob, RetrainJob, TrialJob, WorkerStatus
from protocol.plan import Plan, PlanVersion, RetrainProfile, StreamProfile
from protocol.schema import (
    CheckpointRef,
    Conditions,
    DatasetRef,
    EpochResult,
    GpuSpec,
    InferenceConfig,
    PairedCounts,
    RetrainConfig,
    Task,
    TrialResult,
)

Phase = Literal["gathering", "bootstrap", "starting", "profiling", "planning", "executing", "finished"]
Stage = Literal["label", "train", "check", "trial", "measure", "done"]
PipelineJob = LabelJob | TrialJob | RetrainJob


class ExecutorState(msgspec.Struct, kw_only=True):
    """One joined executor. ``device``, ``can_resize_live``: as the executor says. ``sent`` is the newest plan sent to
    it, ``applied`` the newest it acknowledged, ``refused_s`` when it last refused one."""

    executor_id: str
    incarnation: str
    gpu: GpuSpec
    backend: str
    can_resize_live: bool = False
    device: str = ""
    sent: PlanVersion | None = None
    sent_s: float = 0.0
    applied: PlanVersion | None = None
    refused_s: float | None = None
    workers: tuple[WorkerStatus, ...] = ()


class RunningRetrain(msgspec.Struct, kw_only=True):
    """A retraining that was started. ``work_s``: GPU-seconds expected when it started; ``done_s`` of them
    were done by ``since_s`` (site clock), from when on it runs at ``share``; ``started_s``: when it was commanded.
    ``late_work_s``: what is expected in all since it turned out to take longer or less, 0 until then. ``epochs``:
    those that were heard of, ``heard_work_s``: GPU-seconds behind it each time. ``half_work_s``: what was expected in
    all when half of its epochs were done, 0 until then. ``stopped_s``: when it was told to hand in what it has."""

    job: RetrainJob
    executor_id: str
    retrain_id: str
    work_s: float
    done_s: float
    since_s: float
    share: float
    accuracy_predicted: float
    held_out_predicted: float | None = None
    held_out_error: float = 0.0
    started_s: float | None = None
    late_work_s: float = 0.0
    epochs: tuple[EpochResult, ...] = ()
    heard_work_s: tuple[float, ...] = ()
    half_work_s: float = 0.0
    stopped_s: float | None = None


class Canary(msgspec.Struct, kw_only=True):
    """A retrained model that is compared with the one before it on fresh labels.

    ``stage``: shadow = it does not serve yet, canary = it does; ``proven``: it went live with the gate's confidence.
    ``since_s``: when the stage began (for a canary, when the worker was seen to serve it: ``swapped``). Frames are
    labelled up to ``watched_s``. ``right_*``: crops right so far. ``job`` runs on ``executor_id``.
    ``accuracy_expected``: of the candidate when live.
    """

    candidate: CheckpointRef
    previous: CheckpointRef
    stage: Literal["shadow", "canary"]
    retrain_id: str
    window: int
    since_s: float
    watched_s: float
    held_out: PairedCounts
    accuracy_expected: float
    proven: bool = False
    swapped: bool = False
    fresh: PairedCounts = PairedCounts()
    num_crops: int = 0
    right_candidate: float = 0.0
    right_previous: float = 0.0
    num_looks: int = 0
    num_failures: int = 0
    num_jobs: int = 0
    job: CanaryJob | None = None
    executor_id: str = ""


class Transfer(msgspec.Struct, kw_only=True):
    """A retraining in the cloud: what is left to send up, to wait, and to fetch. ``begun``: its turn has come."""

    job: RetrainJob
    retrain_id: str
    link_id: str
    turn: int
    up_bytes: float
    cloud_s: float
    down_bytes: float
    accuracy_predicted: float
    begun: bool = False

    @property
    def is_there(self) -> bool:
        """Everything has been sent, waited for and fetched."""
        return self.up_bytes <= 0.0 and self.cloud_s <= 0.0 and self.down_bytes <= 0.0


class DriftAlarm(msgspec.Struct, frozen=True, kw_only=True):
    """A sudden drift within a window: its frames are waited for, then they are labelled and tried on."""

    since_s: float
    stage: Literal["waiting", "profiling"] = "waiting"


class Trials(msgspec.Struct, frozen=True, kw_only=True):
    """Trials that were found worth their time beside a plan (see TrialJob for the fields)."""

    retrain: tuple[RetrainConfig, ...]
    inference: tuple[InferenceConfig, ...]
    data_share: float
    num_epochs: int
    num_frames: int


class Leaving(msgspec.Struct, frozen=True, kw_only=True):
    """Where a stream was served before it moved; it is served there until the new place is ready."""

    executor_id: str
    config: InferenceConfig
    share: float
    since_s: float


class Moving(msgspec.Struct, frozen=True, kw_only=True):
    """A move to another GPU whose new place is not ready yet. ``let_go_s``: when the old one was given up already."""

    since_s: float
    let_go_s: float | None = None


class LabelSpend(msgspec.Struct, kw_only=True):
    """Busy seconds of golden models in a window, -1 before the first. ``budget_s``: what there is, None = no limit."""

    window: int = -1
    budget_s: float | None = None
    labels_s: float = 0.0
    trials_s: float = 0.0
    canary_s: float = 0.0

    @property
    def spent_s(self) -> float:
        """For everything."""
        return self.labels_s + self.trials_s + self.canary_s


class ZooModel(msgspec.Struct, kw_only=True):
    """An earlier model, made for ``stream_id``; what it was worth, and where, is in the situations.

    ``window``: in which it began to serve, ``last_used``: in which it last did; ``dataset_window``: of the labels that
    it was trained on; ``accuracy``: what was then expected of it. ``confidence``: its belief in its own answers when
    it last looked at labels.
    """

    number: int
    stream_id: str
    checkpoint: CheckpointRef
    task: Task
    classes: tuple[str, ...]
    architecture: str
    picture_px: int
    window: int
    dataset_window: int
    accuracy: float | None = None
    confidence: float | None = None
    last_used: int = 0


class Situation(msgspec.Struct, kw_only=True):
    """A labelled stretch of a stream; ``accuracies`` of models there, by their numbers in the zoo."""

    stream_id: str
    window: int
    conditions: Conditions
    accuracies: dict[int, float]


class ZooState(msgspec.Struct, kw_only=True):
    """Earlier models of all streams, and where they were measured."""

    models: list[ZooModel] = []
    situations: list[Situation] = []
    last_number: int = 0


class StreamState(msgspec.Struct, kw_only=True):
    """One stream. ``stage``: how far its profiling is. ``profile``: this window's estimates.

    ``tried``: what this window's profiling has measured so far; ``trials``: what is still to be tried, beside the plan.
    ``ahead``: the window that its labels were begun for before it opened; ``first_s``: GPU-seconds that labels and a
    look at the model took last time, 0 = not known. ``unplanned``: its estimates are newer than the plan that its
    window's accuracy was predicted from.
    ``predicted``: accuracy promised for the window, ``earned_s``: accuracy-seconds of it until the plan in force.
    ``shortfall``: how much the last window fell behind what was predicted; such streams are profiled first.
    ``degraded``: it is live and gives no pictures; ``turned_s``: since when its executor says otherwise than this.
    ``sent``: its retraining in the cloud, instead of ``running``. ``settled``: its retraining of this window ended,
    was refused or failed; no other is started.
    ``canary``: a new model on its way; ``judged_version``: the newest that the gate has seen. ``penalties``: the last
    window in which a retraining configuration is not to be tried.
    ``drift``: how far it is from what its model was made for, 0..1, None = not known; ``doubt``: 1 less its student's
    mean confidence, None = not known; ``alarm``: a sudden drift of this window that is acted upon.
    ``label_frames``: frames that are set aside for its next labels, None = as many as its label rate asks for;
    ``golden_frame_s``: busy seconds that its golden model took for a frame when it labelled last, 0 = not measured.
    ``latencies``: the last ones measured per
    inference configuration, seconds; ``late``: it was told in this window that the one in use is too slow.
    ``demands``: (share needed, part of the frames dropped) of the last reports per inference
    configuration (``demands.py``); ``demand_planned``: what the plan in force reckons with; ``demand_reports`` have
    come since the stream is served with configuration ``demand_of``.
    ``conditions``: of its newest data sets, by their window; ``kept_sha256``: the model that the zoo last took note of.
    """

    stream_id: str
    checkpoint: CheckpointRef | None = None
    next_version: int = 1
    dataset: DatasetRef | None = None
    stage: Stage = "label"
    profile: StreamProfile | None = None
    tried: TrialResult | None = None
    trials: Trials | None = None
    unplanned: bool = False
    ahead: int = -1
    first_s: float = 0.0
    running: RunningRetrain | None = None
    sent: Transfer | None = None
    settled: bool = False
    swapped: bool = False
    retrain_id: str = ""
    serving_executor: str = ""
    serving_config: InferenceConfig | None = None
    serving_share: float = 0.0
    leaving: Leaving | None = None
    moving: Moving | None = None
    predicted: float | None = None
    earned_s: float = 0.0
    shortfall: float = 0.0
    canary: Canary | None = None
    judged_version: int = 0
    penalties: dict[str, int] = {}
    drift: float | None = None
    doubt: float | None = None
    label_frames: int | None = None
    golden_frame_s: float = 0.0
    alarm: DriftAlarm | None = None
    degraded: bool = False
    turned_s: float | None = None
    latencies: dict[str, list[float]] = {}
    late: bool = False
    demands: dict[str, list[tuple[float, float]]] = {}
    demand_planned: dict[str, float] = {}
    demand_of: str = ""
    demand_reports: int = 0
    conditions: dict[int, Conditions] = {}
    kept_sha256: str = ""

    @property
    def awaits_trial(self) -> bool:
        """Its retraining is not chosen yet: labels are missing, or a trial that may change the choice."""
        return self.stage in ("label", "train", "check", "trial")


class SiteState(msgspec.Struct, kw_only=True):
    """The whole. Times are seconds of the site clock; ``origin_s`` is when the streams' clocks started.

    ``ended``: streams whose retraining ended since ``plan`` started at ``plan_s``.
    ``pipeline``: the labelling, trial or bootstrap job that each executor runs now, since ``pipeline_since``.
    ``room_made``: the inference jobs have been planned so that profiling has its share, ``profiling_share``;
    ``beside_share``: its share beside a plan; ``trial_room``: what the plan in force keeps free for it per executor.
    ``watch_share`` is kept free where new models are compared. ``shed``: streams that are not served because there is
    no room for them. ``links_s``: until when transfers to and from the cloud are accounted for. ``move_costs_s``,
    ``change_costs_s``: what the last moves to another GPU and hand-overs on one cost, seconds.
    ``label_spend``: of the window whose labels were begun last.
    """

    site: str
    term: int = 1
    window: int = -1
    revision: int = 0
    phase: Phase = "gathering"
    origin_s: float | None = None
    window_opened_s: float = 0.0
    streams: dict[str, StreamState] = {}
    plan: Plan | None = None
    plan_s: float = 0.0
    ended: list[str] = []
    pipeline: dict[str, PipelineJob] = {}
    pipeline_since: dict[str, float] = {}
    room_made: bool = False
    profiling_share: float = 0.0
    beside_share: float = 0.0
    trial_room: dict[str, float] = {}
    watch_share: float = 0.0
    links_s: float = 0.0
    move_costs_s: list[float] = []
    change_costs_s: list[float] = []
    label_spend: LabelSpend = msgspec.field(default_factory=LabelSpend)
    shed: list[str] = []
    zoo: ZooState = msgspec.field(default_factory=ZooState)
    clock_s: float = 0.0
    clock_wall_s: float = 0.0


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan in force says about one stream at this moment; ids resolved to configurations."""

    executor_id: str
    config: InferenceConfig
    share: float


class Retraining(msgspec.Struct, frozen=True, kw_only=True):
    """A retraining that the plan in force wants to run at this moment; ``profile``: what is expected of it."""

    executor_id: str
    config: RetrainConfig
    share: float
    profile: RetrainProfile
