"""What the profiler remembers and hands out. This file holds structs only."""

from __future__ import annotations

from typing import Literal

from protocol.plan import StreamProfile
from protocol.schema import (
    Fraction,
    InferenceConfig,
    Name,
    Record,
    RetrainConfig,
    RetrainResult,
    RetrainRun,
    Seconds,
    TrialResult,
)

EstimateSource = Literal["trial", "past_trial", "neighbour", "site", "assumed"]


class ConfigEstimate(Record, frozen=True, kw_only=True):
    """How the estimate of one retraining configuration came about.

    ``curve_accuracy`` and ``base_gpu_seconds`` are what trial and cost model say before anything learned from
    past errors is applied; the corrections of later windows are learned against these. ``source``: trial = own
    trial or one that is shared, past_trial = its shape in an earlier window, neighbour = another
    configuration's trial, site = other streams' retrainings alone, assumed = nothing is known.
    ``scale``: the estimator's own error; ``accuracy_error`` is it times what past errors teach, so that the interval
    accuracy_after +- 1.2816 * accuracy_error holds 80 % of the outcomes. ``held_out``, ``held_out_scale`` and
    ``held_out_error`` are the same of what it is measured with on the window's held-out split when it ends; None: not
    estimated. ``start_s`` as in `RetrainProfile`.
    """

    config: RetrainConfig
    source: EstimateSource
    curve_accuracy: Fraction
    curve_error: Seconds
    base_gpu_seconds: float
    accuracy_after: Fraction
    accuracy_error: Seconds
    gpu_seconds: float
    scale: float = 0.0
    start_s: float = 0.0
    held_out: Fraction | None = None
    held_out_scale: float = 0.0
    held_out_error: float = 0.0


class InferenceEstimate(Record, frozen=True, kw_only=True):
    """One inference configuration as it was last measured; ``num_frames`` 0 = assumed, never measured."""

    config: InferenceConfig
    busy_s_per_frame: Seconds
    relative_accuracy: Fraction
    num_frames: int


class Estimate(Record, frozen=True, kw_only=True):
    """A profile and how it came about. ``live_correction`` is contained in all accuracies of the profile."""

    profile: StreamProfile
    window: int
    accuracy_validated: Fraction  # serving model on the validation split, before the live correction
    live_correction: float
    retrain: tuple[ConfigEstimate, ...]
    inference: tuple[InferenceEstimate, ...]
    num_train: int = 0
    num_validation: int = 0


class Outcome(Record, frozen=True, kw_only=True):
    """A retraining that ended, beside what was predicted for it and what the gate made of it.

    ``run``: how it ran; None in rows of the first schema and where the optimizer did not see it whole.
    """

    result: RetrainResult
    accuracy_predicted: float | None
    seconds_predicted: float | None
    promoted: bool
    reason: str = ""
    run: RetrainRun | None = None


class GateRow(Record, frozen=True, kw_only=True):
    """One decision about a retrained model, as it was recorded. ``evidence``: the whole decision as JSON text."""

    stream_id: Name
    window: int
    stage: str
    decision: str
    retrain_id: str
    version: int
    confidence: float | None
    reason: str
    evidence: str


class LiveAccuracy(Record, frozen=True, kw_only=True):
    """What a model reached on the live frames of a window, as with the best inference configuration."""

    version: int
    accuracy: Fraction
    num_frames: int


class WindowHistory(Record, frozen=True, kw_only=True):
    """One past window of a stream. ``realised``/``predicted``: window-averaged live accuracy, None = not known."""

    window: int
    trial: TrialResult | None = None
    estimate: Estimate | None = None
    outcomes: tuple[Outcome, ...] = ()
    realised: float | None = None
    predicted: float | None = None
    live: tuple[LiveAccuracy, ...] = ()


class StreamHistory(Record, frozen=True, kw_only=True):
    """What is remembered of one stream, oldest window first. Empty for a new stream."""

    stream_id: Name
    windows: tuple[WindowHistory, ...] = ()


class TrialChoice(Record, frozen=True, kw_only=True):
    """Which configurations to try in this window and how (the fields of a trial job).

    ``gpu_seconds``: expected busy time of all trials, None = nothing known yet. ``pruned``: ids of
    configurations whose group is left out because history shows it far from the front; ``postponed``: those
    that the budget did not reach.
    """

    retrain: tuple[RetrainConfig, ...]
    inference: tuple[InferenceConfig, ...]
    data_share: Fraction
    num_epochs: int
    num_frames: int
    gpu_seconds: float | None = None
    pruned: tuple[str, ...] = ()
    postponed: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """True when there is nothing to try: no trial job is needed, estimates come from history."""
        return not self.retrain and not self.inference
