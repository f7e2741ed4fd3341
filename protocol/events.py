"""Telemetry events. This file holds structs only. Lossy by contract: nothing needed for correctness travels here.

``time_s`` is wall-clock time (Unix seconds, for display only); ``site_s`` is seconds since the site's
stream clock started, the same for all processes of a site up to message latency.
"""

from __future__ import annotations

from typing import Literal

from protocol.schema import (
    Bytes,
    EpochResult,
    Fraction,
    InferenceConfig,
    Name,
    PairedCounts,
    Record,
    RetrainConfig,
    Seconds,
    StreamCondition,
    StreamSignals,
)

JobKind = Literal["inference", "label", "trial", "retrain", "canary"]


class Event(Record, frozen=True, kw_only=True):
    time_s: float = 0.0
    site_s: float = 0.0


class WindowOpened(Event, frozen=True, kw_only=True, tag="window_opened"):
    window: int
    term: int
    window_s: Seconds
    num_streams: int
    policy: str


class WindowClosed(Event, frozen=True, kw_only=True, tag="window_closed"):
    """Window-averaged accuracy per stream; ``predicted`` is None for streams without a plan."""

    window: int
    streams: tuple[StreamWindow, ...]
    realised: Fraction
    predicted: float | None


class StreamWindow(Record, frozen=True, kw_only=True):
    """One stream in one window. ``num_objects``: objects that ``realised`` was measured on."""

    stream_id: Name
    realised: float | None
    predicted: float | None
    num_frames: int
    num_analysed: int
    num_dropped: int
    num_objects: int
    retrain_id: str = ""
    swapped: bool = False


class PlanSolved(Event, frozen=True, kw_only=True, tag="plan_solved"):
    """A plan was chosen. ``phase``: profiling (before anything can be retrained), plan, replan. ``config_change_s`` and
    ``migration_s``: the prices that it was made with, from what changes and moves were measured to cost."""

    window: int
    revision: int
    phase: Literal["profiling", "plan", "replan"]
    reason: str
    policy: str
    status: str
    predicted: Fraction
    bound: float | None
    gap: float | None
    seconds: Seconds
    detail: str
    streams: tuple[PlannedStream, ...]
    config_change_s: Seconds = 0.0
    migration_s: Seconds = 0.0


class PlannedStream(Record, frozen=True, kw_only=True):
    """What a plan says for a stream: the inference configuration at once, the retraining, the one after it."""

    stream_id: Name
    predicted: float
    inference_id: str
    inference_share: float
    inference_gpu: str
    retrain_id: str = ""
    retrain_share: float = 0.0
    retrain_gpu: str = ""
    retrain_start_s: float = 0.0
    retrain_end_s: float = 0.0
    inference_id_after: str = ""


class StreamAccuracy(Event, frozen=True, kw_only=True, tag="stream_accuracy"):
    """Counts since the last such event of the stream (about one a second). Accuracy is num_correct / num_objects
    averaged over frames; None when no object was seen. ``memory_bytes``: most that the worker has held so far."""

    stream_id: Name
    window: int
    accuracy: float | None
    accuracy_sum: float
    num_scored: int
    num_frames: int
    num_analysed: int
    num_dropped: int
    num_objects: int
    fps: float
    latency_ms_p50: float
    model_version: int
    inference_id: str
    conditions: str = ""
    latency_ms_p99: float = 0.0
    memory_bytes: Bytes = 0
    signals: StreamSignals | None = None


class JobShare(Event, frozen=True, kw_only=True, tag="job_share"):
    """Granted and achieved share of a job over the last interval."""

    job_id: str
    kind: JobKind
    stream_id: Name
    gpu_id: Name
    share_granted: float
    share_achieved: float | None
    backend: str


class WorkerChanged(Event, frozen=True, kw_only=True, tag="worker_changed"):
    job_id: str
    stream_id: Name
    gpu_id: Name
    kind: JobKind
    change: Literal[
        "started", "ready", "resized", "reconfigured", "swapped", "handed_over", "finished", "failed", "stopped"
    ]
    reason: str
    pid: int = 0
    share: float = 0.0
    gap_ms: float | None = None


class RetrainProgress(Event, frozen=True, kw_only=True, tag="retrain_progress"):
    job_id: str
    stream_id: Name
    window: int
    config: RetrainConfig
    epoch: EpochResult


class RetrainFinished(Event, frozen=True, kw_only=True, tag="retrain_finished"):
    """A retraining ended and the gate decided whether the model goes live. ``map_before`` and ``map_after`` as in
    RetrainResult. ``elapsed_s``: from the command to the report; ``elapsed_predicted_s`` and ``elapsed_half_s``: what
    was expected of it at the start and after half of the epochs, at the shares that it had. ``whole``: not cut short.
    ``accuracy_before`` and ``accuracy_after`` are measured on the held-out split of the window's labels;
    ``held_out_predicted`` says what was expected of the second, ``held_out_error`` is its standard error (80 % of the
    outcomes lie within 1.28 of it). ``accuracy_predicted`` is about the frames that come then.
    """

    stream_id: Name
    window: int
    retrain_id: str
    accuracy_before: Fraction
    accuracy_after: Fraction
    accuracy_predicted: float | None
    seconds: Seconds
    seconds_predicted: float | None
    promoted: bool
    reason: str
    map_before: float | None = None
    map_after: float | None = None
    elapsed_s: Seconds | None = None
    elapsed_predicted_s: Seconds | None = None
    elapsed_half_s: Seconds | None = None
    whole: bool = True
    held_out_predicted: Fraction | None = None
    held_out_error: Seconds | None = None


class RetrainCorrected(Event, frozen=True, kw_only=True, tag="retrain_corrected"):
    """The epochs of a running retraining tell another story than its estimate. Seconds are GPU-seconds in all."""

    stream_id: Name
    window: int
    retrain_id: str
    action: Literal["told", "stopped"]
    epoch: int
    accuracy_after: Fraction
    accuracy_predicted: float
    gpu_seconds: Seconds
    gpu_seconds_predicted: Seconds
    reason: str


class GateDecided(Event, frozen=True, kw_only=True, tag="gate_decided"):
    """What became of a retrained model at one of its tests, with the evidence.

    ``stage``: gate = on the held-out labels of the retraining; shadow = on fresh labels while the old model serves;
    canary = on fresh labels after the swap. Accuracies and ``paired`` are of both models on the same labels.
    ``confidence``: that the new model is better, from ``paired``; None without a label. ``seconds``: since the
    stage began, for a canary how long the model was live.
    """

    stream_id: Name
    window: int
    stage: Literal["gate", "shadow", "canary"]
    decision: Literal["promoted", "on_trial", "refused", "kept", "rolled_back"]
    retrain_id: str
    version: int
    previous_version: int
    accuracy_candidate: float | None
    accuracy_previous: float | None
    paired: PairedCounts
    confidence: float | None
    seconds: Seconds
    reason: str


class ZooChanged(Event, frozen=True, kw_only=True, tag="zoo_changed"):
    """A model was kept for later, or one that is worth least was given up for room. ``number``: of the model in the
    zoo; ``stream_id`` and ``version``: whose it was; ``accuracy``: expected when it went live. ``num_models`` and
    ``num_bytes``: of the zoo afterwards."""

    stream_id: Name
    window: int
    change: Literal["kept", "given_up"]
    number: int
    version: int
    accuracy: float | None
    num_models: int
    num_bytes: Bytes


class DriftScored(Event, frozen=True, kw_only=True, tag="drift_scored"):
    """How far a stream is from what its model was made for; ``signal`` says so. ``alarm``: sudden, just noticed."""

    stream_id: Name
    window: int
    score: Fraction
    signal: str
    alarm: bool


class LabelsCollected(Event, frozen=True, kw_only=True, tag="labels_collected"):
    """A stream's window was labelled. ``golden_s``: busy seconds of its golden model; ``uniform_share``: part of the
    frames that was spread evenly. ``agreement`` and its 95 % interval: accuracy of the serving model on these labels,
    None where nothing was served."""

    stream_id: Name
    window: int
    num_frames: int
    num_train: int
    num_validation: int
    class_counts: tuple[int, ...]
    seconds: Seconds
    golden_s: Seconds = 0.0
    uniform_share: Fraction = 1.0
    agreement: Fraction | None = None
    agreement_low: Fraction = 0.0
    agreement_high: Fraction = 1.0
    num_exemplars: int = 0
    exemplar_bytes: Bytes = 0


class LabelsSpent(Event, frozen=True, kw_only=True, tag="labels_spent"):
    """Busy seconds of golden models in a window that has ended, by what they were spent on. ``budget_gpu_s``: what
    there was for all, what the window before overspent taken off; None = there is no limit."""

    window: int
    budget_gpu_s: Seconds | None
    labels_s: Seconds
    trials_s: Seconds
    canary_s: Seconds


class ProfileEstimated(Event, frozen=True, kw_only=True, tag="profile_estimated"):
    """The micro-profiler's estimate of one stream. Tuples run over configurations.

    ``stage``: after what it was made: check = a look at the serving model on new labels, trial = trials of retraining
    configurations (before a plan of inference configurations too), measure = inference configurations. ``seconds``:
    how long that took.
    """

    stream_id: Name
    window: int
    accuracy_now: Fraction
    inference: tuple[tuple[InferenceConfig, float, float], ...]  # (config, gpu_share_needed, relative_accuracy)
    retrain: tuple[tuple[RetrainConfig, float, float], ...]  # (config, gpu_seconds, accuracy_after)
    accuracy_low: Fraction = 0.0
    accuracy_high: Fraction = 1.0
    stage: Literal["check", "trial", "measure"] = "trial"
    seconds: Seconds = 0.0


class StreamDegraded(Event, frozen=True, kw_only=True, tag="stream_degraded"):
    """A live stream gives no usable pictures, or its picture size changed. Its worker goes on trying."""

    stream_id: Name
    gpu_id: Name
    condition: StreamCondition
    reason: str


class StreamRecovered(Event, frozen=True, kw_only=True, tag="stream_recovered"):
    """A degraded stream is analysed again. ``after_s``: how long it was degraded."""

    stream_id: Name
    gpu_id: Name
    condition: StreamCondition
    reason: str
    after_s: Seconds


class ExecutorChanged(Event, frozen=True, kw_only=True, tag="executor_changed"):
    executor_id: Name
    gpu_id: Name
    change: Literal["joined", "rejoined", "lost", "left", "refused"]
    reason: str


class Notice(Event, frozen=True, kw_only=True, tag="notice"):
    """Something a person should read."""

    level: Literal["info", "warning", "error"]
    text: str


TelemetryEvent = (
    WindowOpened
    | WindowClosed
    | PlanSolved
    | StreamAccuracy
    | JobShare
    | WorkerChanged
    | RetrainProgress
    | RetrainFinished
    | RetrainCorrected
    | GateDecided
    | ZooChanged
    | DriftScored
    | LabelsCollected
    | LabelsSpent
    | ProfileEstimated
    | StreamDegraded
    | StreamRecovered
    | ExecutorChanged
    | Notice
)
