"""The planning problem and its answer. This file holds structs only.

Symbols of docs/formulation.md stand beside the fields. Execution model (planner, judge, simulator and
executors all follow it):

1. An inference step is granted d(v, lambda, g) = gpu_share_needed / speed of g, rounded up to the
   share quantum. It keeps up by construction.
2. A retraining at share r on g takes gpu_seconds / (speed of g * phi_g(r)) seconds from its start.
3. Instantaneous accuracy is a * q: a = accuracy_now until the retrained model is swapped in (the
   instant its retraining ends), accuracy_after from then on.
4. A step starts on *events*: when every retraining that its ``after`` names (by stream id) has ended,
   and not before the step in front of it. ``planned_*_s`` only order and explain things.
5. A retraining that has not ended by the end of the window changes nothing.
6. A change of inference configuration costs ``config_change_s`` seconds of that stream's accuracy, a
   change of its GPU ``migration_s`` (instead, not in addition).
7. A stream's own window (its ``window_s``, at most the problem's) may end before the plan's: its value is
   the average over its own window, and a retraining that ends after it changes nothing. Serving, shares
   and floors go on to the end of the plan.
8. A retraining in the cloud takes no GPU share: its data go up, the cloud works for ``cloud_seconds``, the
   model comes down; it ends when the model is there. Each direction of a link carries one transfer at a
   time at full bandwidth, in the order of the steps' ``turn`` (then of the plan's streams), the same order
   in both directions; those that already run come first. All of them begin with the plan.
9. The golden model works for at most ``label_budget_s`` seconds: the sum of ``label_seconds`` over the
   retrainings of the plan, on GPUs and in the cloud.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from protocol.schema import (
    Bytes,
    Fraction,
    GpuSpec,
    InferenceConfig,
    LinkSpec,
    Name,
    PositiveInt,
    PositiveSeconds,
    Record,
    RetrainConfig,
    Seconds,
    Share,
)


class InferenceProfile(Record, frozen=True, kw_only=True):
    """lambda: what an inference configuration costs and is worth on a GPU of speed 1.

    ``latency_s``: measured time from a frame's arrival to its result at the granted share, 0 = not measured.
    """

    inference_id: Name
    gpu_share_needed: Annotated[float, msgspec.Meta(gt=0.0)]  # d(v, lambda), may exceed 1 (then unusable at speed 1)
    relative_accuracy: Fraction  # q(v, lambda)
    memory_bytes: Bytes = 0
    latency_s: Seconds = 0.0
    config: InferenceConfig | None = None


# Throughput that a retraining is likely to be granted, as its cost is estimated before it has a share.
START_RATE = 0.5


class RetrainProfile(Record, frozen=True, kw_only=True):
    """gamma: what a retraining configuration costs and is expected to reach.

    ``pinned_gpu``: the retraining already runs there and may only be continued there (gpu_seconds is
    then what is left of it). ``accuracy_error``: standard error of accuracy_after, 0 = taken as exact;
    ``gain_error``: that of accuracy_after - accuracy_now where it is known to differ (both are measured on
    the same labels). ``swap_bytes``: extra memory on the inference GPU from the plan's start until the swap.
    ``label_seconds``: golden-model seconds that labelling its data still costs. ``start_s``: seconds by the clock to
    command, start and report it, which no share shortens; ``gpu_seconds`` has them at a throughput of `START_RATE`.
    ``held_out``, ``held_out_error``: accuracy that it will measure on its window's held-out split when it ends, and the
    standard error of that; None: not estimated. ``accuracy_after`` is about the frames that come then.
    """

    retrain_id: Name
    accuracy_after: Fraction  # a(v, gamma)
    gpu_seconds: Annotated[float, msgspec.Meta(gt=0.0)]  # c(v, gamma)
    memory_bytes: Bytes = 0
    swap_bytes: Bytes = 0
    accuracy_error: Seconds = 0.0
    gain_error: Seconds | None = None
    label_seconds: Seconds = 0.0
    pinned_gpu: Name | None = None
    config: RetrainConfig | None = None
    start_s: Seconds = 0.0
    held_out: Fraction | None = None
    held_out_error: Seconds = 0.0


class CloudProfile(Record, frozen=True, kw_only=True):
    """gamma in the cloud: data up over a link, a wait, the model down; no GPU share of the site (rule 8).

    ``running``: it was begun before; the numbers are what is left of it, and it keeps its turn in front.
    The other fields are those of `RetrainProfile`.
    """

    retrain_id: Name
    link_id: Name
    accuracy_after: Fraction
    up_bytes: Bytes
    cloud_seconds: Seconds
    down_bytes: Bytes
    swap_bytes: Bytes = 0
    accuracy_error: Seconds = 0.0
    gain_error: Seconds | None = None
    label_seconds: Seconds = 0.0
    running: bool = False
    config: RetrainConfig | None = None


class StreamProfile(Record, frozen=True, kw_only=True):
    """One stream: its model now, its choices, and where it is served at the moment (None = nowhere).

    ``max_latency_s``: inference configurations with a larger latency_s are out; if none is left, the
    smallest latency that can be had is asked for. ``window_s``: what is left of the stream's own retraining
    window, None = the problem's (rule 7).
    """

    stream_id: Name
    accuracy_now: Fraction  # a(v, 0)
    inference: Annotated[tuple[InferenceProfile, ...], msgspec.Meta(min_length=1)]  # Lambda_v
    retrain: tuple[RetrainProfile, ...] = ()  # Gamma_v; "no retraining" is always a choice besides
    cloud: tuple[CloudProfile, ...] = ()  # retraining in the cloud, instead of one of ``retrain``
    min_accuracy: Fraction = 0.0  # aMIN_v
    max_latency_s: PositiveSeconds | None = None
    window_s: PositiveSeconds | None = None  # T_v
    weight: Annotated[float, msgspec.Meta(gt=0.0)] = 1.0  # w_v
    serving_gpu: Name | None = None
    serving_inference: Name | None = None


class Problem(Record, frozen=True, kw_only=True):
    """What is to be planned: ``window_s`` is what is left of the retraining window (T).

    ``planning_quantile``: policies plan on this quantile of every uncertain gain (0.5 = what is expected);
    plans are judged on what is expected. ``label_budget_s`` None = unlimited.
    """

    format: Literal["ekya-problem/1"] = "ekya-problem/1"
    window_s: PositiveSeconds
    gpus: Annotated[tuple[GpuSpec, ...], msgspec.Meta(min_length=1)]
    streams: Annotated[tuple[StreamProfile, ...], msgspec.Meta(min_length=1)]
    share_quantum: Share = 0.1  # delta
    num_slots: PositiveInt = 20  # K, for time-indexed policies
    config_change_s: Seconds = 0.0
    migration_s: Seconds = 0.0
    links: tuple[LinkSpec, ...] = ()
    label_budget_s: Seconds | None = None
    planning_quantile: Annotated[float, msgspec.Meta(gt=0.0, le=0.5)] = 0.5


class InferenceStep(Record, frozen=True, kw_only=True):
    """Serve with ``inference_id`` on ``gpu_id`` once the retrainings of the streams in ``after`` have ended."""

    inference_id: Name
    gpu_id: Name
    share: Share
    after: tuple[Name, ...] = ()
    planned_start_s: Seconds = 0.0


class RetrainStep(Record, frozen=True, kw_only=True):
    """Retrain with ``retrain_id`` on ``gpu_id`` at ``share`` once the retrainings in ``after`` have ended."""

    retrain_id: Name
    gpu_id: Name
    share: Share
    after: tuple[Name, ...] = ()
    planned_start_s: Seconds = 0.0
    planned_end_s: Seconds = 0.0


class CloudStep(Record, frozen=True, kw_only=True):
    """Retrain with ``retrain_id`` of the stream's ``cloud``, in this turn on its link (0 = first)."""

    retrain_id: Name
    turn: Annotated[int, msgspec.Meta(ge=0)] = 0
    planned_start_s: Seconds = 0.0
    planned_end_s: Seconds = 0.0


class Assignment(Record, frozen=True, kw_only=True):
    """What one stream does in the window. The first inference step has an empty ``after``.

    At most one of ``retrain`` and ``cloud``; others wait for the end of either by the stream's id.
    """

    stream_id: Name
    inference: Annotated[tuple[InferenceStep, ...], msgspec.Meta(min_length=1)]
    retrain: RetrainStep | None = None
    cloud: CloudStep | None = None


SolveStatus = Literal["optimal", "feasible", "heuristic", "fallback"]


class SolveReport(Record, frozen=True, kw_only=True):
    """How a plan was made. ``value`` and ``bound`` by the judge's measure (0..1), on what is expected.

    status: optimal = proven within the solver's tolerance; feasible = bound known, gap open;
    heuristic = no bound; fallback = a better method was tried and failed, ``detail`` says how.
    ``planning_quantile``: the quantile of the gains that it was planned on.
    """

    policy: str
    status: SolveStatus
    value: float = 0.0
    bound: float | None = None
    gap: float | None = None  # (bound - value) / bound
    seconds: Seconds = 0.0
    detail: str = ""
    planning_quantile: Annotated[float, msgspec.Meta(gt=0.0, le=0.5)] = 0.5


class Plan(Record, frozen=True, kw_only=True):
    """One assignment per stream of the problem, in the problem's order."""

    format: Literal["ekya-plan/1"] = "ekya-plan/1"
    window_s: PositiveSeconds
    assignments: tuple[Assignment, ...]
    report: SolveReport


class PlanVersion(Record, frozen=True, kw_only=True, order=True):
    """Fencing token of plans; compares lexicographically. ``term`` rises when an optimizer (re)starts."""

    term: Annotated[int, msgspec.Meta(ge=0)]
    window: Annotated[int, msgspec.Meta(ge=-1)]
    revision: Annotated[int, msgspec.Meta(ge=0)]
