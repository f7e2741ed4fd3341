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
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from protocol.schema import (
    Bytes,
    Fraction,
    GpuSpec,
    InferenceConfig,
    Name,
    PositiveInt,
    PositiveSeconds,
    Record,
    RetrainConfig,
    Seconds,
    Share,
)


class InferenceProfile(Record, frozen=True, kw_only=True):
    """lambda: what an inference configuration costs and is worth on a GPU of speed 1."""

    inference_id: Name
    gpu_share_needed: Annotated[float, msgspec.Meta(gt=0.0)]  # d(v, lambda), may exceed 1 (then unusable at speed 1)
    relative_accuracy: Fraction  # q(v, lambda)
    memory_bytes: Bytes = 0
    config: InferenceConfig | None = None


class RetrainProfile(Record, frozen=True, kw_only=True):
    """gamma: what a retraining configuration costs and is expected to reach.

    ``pinned_gpu``: the retraining already runs there and may only be continued there (gpu_seconds is
    then what is left of it). ``accuracy_error``: standard error of accuracy_after, 0 = taken as exact.
    ``swap_bytes``: extra memory on the inference GPU from the plan's start until the swap.
    """

    retrain_id: Name
    accuracy_after: Fraction  # a(v, gamma)
    gpu_seconds: Annotated[float, msgspec.Meta(gt=0.0)]  # c(v, gamma)
    memory_bytes: Bytes = 0
    swap_bytes: Bytes = 0
    accuracy_error: Seconds = 0.0
    pinned_gpu: Name | None = None
    config: RetrainConfig | None = None


class StreamProfile(Record, frozen=True, kw_only=True):
    """One stream: its model now, its choices, and where it is served at the moment (None = nowhere)."""

    stream_id: Name
    accuracy_now: Fraction  # a(v, 0)
    inference: Annotated[tuple[InferenceProfile, ...], msgspec.Meta(min_length=1)]  # Lambda_v
    retrain: tuple[RetrainProfile, ...] = ()  # Gamma_v; "no retraining" is always a choice besides
    min_accuracy: Fraction = 0.0  # aMIN_v
    weight: Annotated[float, msgspec.Meta(gt=0.0)] = 1.0  # w_v
    serving_gpu: Name | None = None
    serving_inference: Name | None = None


class Problem(Record, frozen=True, kw_only=True):
    """What is to be planned: ``window_s`` is what is left of the retraining window (T)."""

    format: Literal["ekya-problem/1"] = "ekya-problem/1"
    window_s: PositiveSeconds
    gpus: Annotated[tuple[GpuSpec, ...], msgspec.Meta(min_length=1)]
    streams: Annotated[tuple[StreamProfile, ...], msgspec.Meta(min_length=1)]
    share_quantum: Share = 0.1  # delta
    num_slots: PositiveInt = 20  # K, for time-indexed policies
    config_change_s: Seconds = 0.0
    migration_s: Seconds = 0.0


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


class Assignment(Record, frozen=True, kw_only=True):
    """What one stream does in the window. The first inference step has an empty ``after``."""

    stream_id: Name
    inference: Annotated[tuple[InferenceStep, ...], msgspec.Meta(min_length=1)]
    retrain: RetrainStep | None = None


SolveStatus = Literal["optimal", "feasible", "heuristic", "fallback"]


class SolveReport(Record, frozen=True, kw_only=True):
    """How a plan was made. ``value`` and ``bound`` by the judge's measure (0..1).

    status: optimal = proven within the solver's tolerance; feasible = bound known, gap open;
    heuristic = no bound; fallback = a better method was tried and failed, ``detail`` says how.
    """

    policy: str
    status: SolveStatus
    value: float = 0.0
    bound: float | None = None
    gap: float | None = None  # (bound - value) / bound
    seconds: Seconds = 0.0
    detail: str = ""


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
