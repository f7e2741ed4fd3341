"""What a run's report holds. This file holds structs only.

Times are seconds of site time (``site_s`` of the events), shares fractions of one GPU, accuracies fractions.
``None`` stands for "not known": a run that was cut short or lost events still has a report.
"""

from __future__ import annotations

from typing import Literal

from protocol.events import JobKind
from protocol.schema import Record


class StreamWindowRow(Record, frozen=True, kw_only=True):
    """One stream in one window: the plan's choices and what came of them."""

    stream_id: str
    realised: float | None
    predicted: float | None
    abs_error: float | None
    inference_id: str = ""
    inference_share: float = 0.0
    inference_gpu: str = ""
    retrain_id: str = ""
    retrain_share: float = 0.0
    retrain_gpu: str = ""
    retrain_start_s: float = 0.0
    retrain_end_s: float = 0.0
    inference_id_after: str = ""
    swapped: bool = False
    num_frames: int = 0
    num_analysed: int = 0
    num_dropped: int = 0
    num_objects: int = 0


class SolveRow(Record, frozen=True, kw_only=True):
    """One planning: what was asked for, by which method, how good and how long."""

    site_s: float
    window: int
    revision: int
    phase: str
    reason: str
    policy: str
    status: str
    predicted: float
    bound: float | None
    gap: float | None
    seconds: float
    detail: str


class WindowRow(Record, frozen=True, kw_only=True):
    """One retraining window. ``closes_s`` None = it never closed."""

    window: int
    opens_s: float
    closes_s: float | None
    realised: float | None
    predicted: float | None
    streams: tuple[StreamWindowRow, ...]
    num_solves: int


class RetrainRow(Record, frozen=True, kw_only=True):
    """One retraining and the gate's decision."""

    site_s: float
    stream_id: str
    window: int
    retrain_id: str
    accuracy_before: float
    accuracy_after: float
    accuracy_predicted: float | None
    seconds: float
    seconds_predicted: float | None
    promoted: bool
    reason: str
    map_before: float | None = None
    map_after: float | None = None
    elapsed_s: float | None = None
    elapsed_predicted_s: float | None = None
    elapsed_half_s: float | None = None
    whole: bool = True
    held_out_predicted: float | None = None
    held_out_error: float | None = None


class TrialsRow(Record, frozen=True, kw_only=True):
    """How one stream came to its window's retraining. ``*_at_s``: seconds after the window opened, negative before.

    ``looked_s``, ``tried_s``, ``measured_s``: what looking at the serving model, trials and measurements took.
    ``known_at_s``: when its retraining could be chosen; ``retrain_at_s``: when one was begun.
    """

    window: int
    stream_id: str
    labelled_at_s: float | None
    looked_s: float | None
    tried_s: float | None
    measured_s: float | None
    known_at_s: float | None
    retrain_at_s: float | None


class GateRow(Record, frozen=True, kw_only=True):
    """What became of a retrained model at one of its tests. Votes are one per road user; ``seconds``: of the stage."""

    site_s: float
    stream_id: str
    window: int
    stage: str
    decision: str
    retrain_id: str
    version: int
    previous_version: int
    accuracy_candidate: float | None
    accuracy_previous: float | None
    num_objects: int
    num_won: int
    num_lost: int
    confidence: float | None
    seconds: float
    reason: str


class LabelRow(Record, frozen=True, kw_only=True):
    """One labelling. ``drift`` and ``signal``: of the stream before it. ``accuracy``: of the model that served, on
    these labels, with its 95 % interval; None = not measured."""

    site_s: float
    stream_id: str
    window: int
    drift: float | None
    signal: str
    num_frames: int
    num_labels: int
    uniform_share: float
    golden_s: float
    accuracy: float | None
    accuracy_low: float | None
    accuracy_high: float | None


class LabelsRow(Record, frozen=True, kw_only=True):
    """Busy seconds of golden models in a window, by purpose. ``budget_gpu_s`` None = no limit."""

    window: int
    budget_gpu_s: float | None
    labels_s: float
    trials_s: float
    canary_s: float


class SwapRow(Record, frozen=True, kw_only=True):
    """A new model took over a stream. ``gap_ms``: longest time between two results around it."""

    site_s: float
    stream_id: str
    gap_ms: float | None


class ConditionRow(Record, frozen=True, kw_only=True):
    """The scene of a stream changed, as the stream itself tells."""

    site_s: float
    stream_id: str
    before: str
    after: str


class ShareRow(Record, frozen=True, kw_only=True):
    """Granted and achieved share of one kind of job on one GPU, means over its share reports.

    ``granted`` and ``achieved`` are over the reports that state an achieved share.
    """

    gpu_id: str
    kind: JobKind
    granted: float
    achieved: float
    num_reports: int


class ProfileRow(Record, frozen=True, kw_only=True):
    """How contended one stream was in one window, from its estimated profile."""

    window: int
    stream_id: str
    best_inference_id: str
    best_inference_share: float
    num_retrain: int
    cheapest_s: float | None
    dearest_s: float | None


class Contention(Record, frozen=True, kw_only=True):
    """Is there anything to decide? Figures are None without a single estimated profile.

    ``best_share_of_machine``: share of all GPUs that serving every stream at its most accurate inference
    configuration takes (mean over windows); ``cost_ratio``: dearest over cheapest retraining configuration
    (smallest over streams and windows). ``windows_with_different_plans``: windows in which the plan treats
    streams differently; ``streams_with_changing_plans``: streams whose plan changes from window to window.
    """

    num_gpus: int
    best_share_of_machine: float | None
    cost_ratio: float | None
    windows_with_different_plans: int
    streams_with_changing_plans: int
    num_distinct_plans: int
    profiles: tuple[ProfileRow, ...]


class Report(Record, frozen=True, kw_only=True):
    """A run, summed up. Means are over streams and windows that have both numbers."""

    format: Literal["ekya-report/1"] = "ekya-report/1"
    site: str
    policy: str
    started_s: float  # wall-clock time of the first event, Unix seconds
    duration_s: float
    window_s: float
    streams: tuple[str, ...]
    gpus: tuple[str, ...]
    mean_realised: float | None
    mean_predicted: float | None
    mean_abs_error: float | None
    windows: tuple[WindowRow, ...]
    solves: tuple[SolveRow, ...]
    retrainings: tuple[RetrainRow, ...]
    trials: tuple[TrialsRow, ...]
    gates: tuple[GateRow, ...]
    labels: tuple[LabelRow, ...] = ()
    label_budget: tuple[LabelsRow, ...] = ()
    swaps: tuple[SwapRow, ...]
    conditions: tuple[ConditionRow, ...]
    shares: tuple[ShareRow, ...]
    contention: Contention
    num_failed_workers: int
    num_lost_executors: int
    notices: tuple[str, ...]


class PolicyRow(Record, frozen=True, kw_only=True):
    """One policy of an experiment, over all of its runs. ``windows``: realised accuracy per window and run."""

    policy: str
    num_runs: int
    mean_realised: float | None
    mean_predicted: float | None
    mean_abs_error: float | None
    windows: tuple[float, ...]
    num_retrainings: int
    num_promoted: int
    median_solve_s: float | None


class Comparison(Record, frozen=True, kw_only=True):
    """The same streams under several policies, best first; those without a result come last."""

    format: Literal["ekya-comparison/1"] = "ekya-comparison/1"
    site: str
    policies: tuple[PolicyRow, ...]
