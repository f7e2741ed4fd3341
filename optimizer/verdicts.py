"""What the judge says of a plan. This file holds structs only."""

from __future__ import annotations

from typing import Literal

from protocol.schema import Record

ViolationKind = Literal[
    "window",
    "order",
    "missing_stream",
    "duplicate_stream",
    "unknown_stream",
    "unknown_gpu",
    "unknown_inference",
    "unknown_retrain",
    "never_starts",
    "share_quantum",
    "share_too_small",
    "share_too_large",
    "pinned_gpu",
    "capacity",
    "memory",
    "two_retrainings",
    "link_order",
    "labels",
    "floor",
    "latency",
]


class Violation(Record, frozen=True, kw_only=True):
    """One broken rule. ``subject`` is the id of the stream or GPU concerned; ``text`` is for people."""

    kind: ViolationKind
    subject: str
    text: str


class StreamVerdict(Record, frozen=True, kw_only=True):
    """One stream under the plan. ``value``: its window average; ``min_accuracy``: its least a * q.

    ``step_starts_s``: when each inference step starts (inf = never). ``retrain_end_s`` may lie beyond the window.
    ``max_latency_s``: the largest latency that it is served with.
    """

    stream_id: str
    value: float
    min_accuracy: float
    retrain_start_s: float | None = None
    retrain_end_s: float | None = None
    step_starts_s: tuple[float, ...] = ()
    max_latency_s: float = 0.0


class GpuVerdict(Record, frozen=True, kw_only=True):
    """One GPU under the plan: the most that is granted and resident at any instant of the window."""

    gpu_id: str
    peak_share: float
    peak_memory_bytes: int


class Verdict(Record, frozen=True, kw_only=True):
    """The judgement. ``value`` is 0..1 and counts what is served even where rules are broken."""

    feasible: bool
    violations: tuple[Violation, ...]
    value: float
    streams: tuple[StreamVerdict, ...]
    gpus: tuple[GpuVerdict, ...]

    @property
    def only_floors_broken(self) -> bool:
        """True when the plan can be executed and merely serves some stream below its floor or above its latency."""
        return all(violation.kind in ("floor", "latency") for violation in self.violations)

    @property
    def rank(self) -> tuple[int, int, float]:
        """Sort key, larger is better: executable before not, fewer floors broken before more, then value."""
        return (int(self.only_floors_broken), -len(self.violations), self.value)
