"""What an executor and its workers say to one another over a pipe, as MessagePack. Structs only.

One worker runs one job. Parent to worker is imperative, worker to parent past tense.
"""

from __future__ import annotations

from typing import Literal

from protocol.messages import Job
from protocol.schema import (
    Bytes,
    CanaryResult,
    CheckpointRef,
    EpochResult,
    InferenceConfig,
    LabelResult,
    Record,
    RetrainResult,
    Seconds,
    Share,
    StreamCondition,
    StreamSignals,
    TrialResult,
)

# ---------------------------------------------------------------- parent -> worker


class StartJob(Record, frozen=True, kw_only=True, tag="start"):
    """First message. ``device``: "cpu:K" (pin to core K) or "cuda:K"; ``pace``: hold the share by duty cycle.

    ``origin_s``: this machine's monotonic time at which the stream was at position 0, so that all workers of a
    stream count its frames alike; None: the job's position is that of the worker's start. ``standby``: get ready, then
    serve nothing until ``TakeOver``. ``cap``: the part of the device that this worker can use at most (an MPS
    percentage), so that a busy second of it costs ``cap`` GPU-seconds.
    """

    job: Job
    store: str
    device: str
    pace: bool
    origin_s: float | None = None
    standby: bool = False
    cap: Share = 1.0
    stats_interval_s: Seconds = 1.0


class SetShare(Record, frozen=True, kw_only=True, tag="set_share"):
    share: Share


class SetInference(Record, frozen=True, kw_only=True, tag="set_inference"):
    config: InferenceConfig


class SwapModel(Record, frozen=True, kw_only=True, tag="swap_model"):
    """Load beside the serving model, verify, take over between two frames."""

    checkpoint: CheckpointRef


class StopJob(Record, frozen=True, kw_only=True, tag="stop"):
    """Finish the step in hand and leave."""

    reason: str


class TakeOver(Record, frozen=True, kw_only=True, tag="take_over"):
    """To a worker on standby: serve the frames that arrive at ``at_s`` (monotonic) or later."""

    at_s: float


class HandOver(Record, frozen=True, kw_only=True, tag="hand_over"):
    """To the worker before it: finish the frames that arrived before ``at_s`` and leave."""

    at_s: float


Command = StartJob | SetShare | SetInference | SwapModel | StopJob | TakeOver | HandOver

# ---------------------------------------------------------------- worker -> parent


class Ready(Record, frozen=True, kw_only=True, tag="ready"):
    """The model is loaded and warm; ``num_units``: multiprocessors visible (0 on CPU devices)."""

    pid: int
    startup_s: Seconds
    num_units: int = 0


class Progress(Record, frozen=True, kw_only=True, tag="progress"):
    """Sent at least every stats interval while the worker gets on; ``count`` never falls.

    ``share``: the share that the worker keeps to at this moment (None = it does not say). Sent at once after a
    SetShare, it lets the executor give a freed share to others without waiting.
    """

    count: int
    share_achieved: float | None
    share: Share | None = None


class StreamStats(Record, frozen=True, kw_only=True, tag="stream_stats"):
    """Counts of an inference worker since its last such message."""

    interval_s: Seconds
    num_frames: int
    num_analysed: int
    num_dropped: int
    num_objects: int
    accuracy_sum: float
    num_scored: int
    latency_ms_p50: float
    model_version: int
    inference_id: str
    conditions: str = ""
    latency_ms_p99: float = 0.0
    memory_bytes: Bytes = 0
    signals: StreamSignals | None = None


class StreamChanged(Record, frozen=True, kw_only=True, tag="stream_changed"):
    """The stream that the worker serves is another way than before; ``condition`` "ok": it is analysed again."""

    condition: StreamCondition
    reason: str = ""


class Swapped(Record, frozen=True, kw_only=True, tag="swapped"):
    """The new model serves. ``gap_ms``: longest time between two results around the swap."""

    version: int
    gap_ms: float


class SwapRefused(Record, frozen=True, kw_only=True, tag="swap_refused"):
    """The checkpoint was not usable; the old model goes on serving."""

    version: int
    reason: str


class TookOver(Record, frozen=True, kw_only=True, tag="took_over"):
    """The first result of a worker that was on standby. ``at_s``: monotonic time of it."""

    at_s: float


class HandedOver(Record, frozen=True, kw_only=True, tag="handed_over"):
    """The stream is the successor's. ``at_s``: monotonic time of the last result."""

    at_s: float


class EpochDone(Record, frozen=True, kw_only=True, tag="epoch_done"):
    epoch: EpochResult


class JobDone(Record, frozen=True, kw_only=True, tag="job_done"):
    """The job's result; the worker leaves by itself afterwards."""

    result: LabelResult | TrialResult | RetrainResult | CanaryResult


class JobBroken(Record, frozen=True, kw_only=True, tag="job_broken"):
    """The job cannot go on. ``kind``: input = the user's data, memory, diverged (NaN), device, internal.

    ``fault``: the GPU has reported a fatal error, after which no call of this process succeeds any more.
    """

    kind: Literal["input", "memory", "diverged", "device", "checkpoint", "internal"]
    reason: str
    fault: bool = False


Report = (
    Ready
    | Progress
    | StreamStats
    | StreamChanged
    | Swapped
    | SwapRefused
    | TookOver
    | HandedOver
    | EpochDone
    | JobDone
    | JobBroken
)
