"""Arithmetic of the execution model (rules 1 and 2 of ``protocol.plan``) that judge and policies share.

Shares are handled as whole numbers of share quanta, so that sums of shares are exact. All functions
are pure; shares are fractions of one GPU, times are in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from protocol.plan import CloudProfile, InferenceProfile, Problem, RetrainProfile, StreamProfile
from protocol.schema import GpuSpec, LinkSpec

TOLERANCE = 1e-6  # of one quantum: forgives the rounding of a share that was written as a decimal
LABEL_TOLERANCE, LABEL_TOLERANCE_S = 1e-6, 1e-9  # of the label budget, and seconds


def quanta_per_gpu(quantum: float) -> int:
    """Whole quanta in one GPU (n = 1 / delta, rounded down when the quantum does not divide 1)."""
    return max(1, math.floor(1.0 / quantum + TOLERANCE))


def capacity_quanta(gpu: GpuSpec, quantum: float) -> int:
    """Quanta of ``gpu`` that may be handed out: what its reserved share leaves, rounded down."""
    return max(0, math.floor((1.0 - gpu.reserved_share) / quantum + TOLERANCE))


def share_of(quanta: int, quantum: float) -> float:
    """The share that ``quanta`` stand for, free of the dust of binary fractions."""
    return min(1.0, round(quanta * quantum, 9))


def quanta_of(share: float, quantum: float) -> int | None:
    """The number of quanta in ``share``, or None when it is not a whole number of them."""
    quanta = round(share / quantum)
    return quanta if abs(share / quantum - quanta) <= TOLERANCE else None


def needed_quanta(profile: InferenceProfile, gpu: GpuSpec, quantum: float) -> int:
    """Quanta that keep ``profile`` up with the live stream on ``gpu``: d(v, lambda, g), rounded up.

    May exceed the GPU's capacity; the configuration cannot be used there then.
    """
    return max(1, math.ceil(profile.gpu_share_needed / (gpu.speed * quantum) - TOLERANCE))


def share_efficiency(gpu: GpuSpec, share: float) -> float:
    """phi_g(share): training throughput at ``share`` over throughput at share 1.

    Linear between the measured points, and from (0, 0) and to (1, 1) where these do not reach.
    """
    left_share, left = 0.0, 0.0
    for point_share, point in gpu.share_efficiency:
        if share <= point_share:
            return left + (point - left) * (share - left_share) / (point_share - left_share)
        left_share, left = point_share, point
    if left_share >= 1.0:
        return left
    return left + (1.0 - left) * (share - left_share) / (1.0 - left_share)


def retrain_seconds(profile: RetrainProfile, gpu: GpuSpec, share: float) -> float:
    """Seconds from start to end of a retraining at ``share`` of ``gpu``: c / (s_g * phi_g(share))."""
    rate = gpu.speed * share_efficiency(gpu, share)
    return profile.gpu_seconds / rate if rate > 0.0 else math.inf


def fastest_retrain_seconds(profile: RetrainProfile, gpu: GpuSpec, quantum: float) -> float:
    """Seconds that a retraining takes on ``gpu`` at the share where it is fastest."""
    shares = (share_of(quanta, quantum) for quanta in range(1, capacity_quanta(gpu, quantum) + 1))
    return min((retrain_seconds(profile, gpu, share) for share in shares), default=math.inf)


def fits(profile: InferenceProfile, gpu: GpuSpec, quantum: float) -> bool:
    """Whether ``profile`` can be served on ``gpu`` when it has the GPU for itself."""
    if gpu.memory_bytes and profile.memory_bytes > gpu.memory_bytes:
        return False
    return needed_quanta(profile, gpu, quantum) <= capacity_quanta(gpu, quantum)


def own_window_s(stream: StreamProfile, window_s: float) -> float:
    """T_v: the time over which the stream's accuracy counts in a plan of ``window_s`` seconds (rule 7)."""
    return window_s if stream.window_s is None else min(stream.window_s, window_s)


def asked_latency_s(stream: StreamProfile, gpus: Iterable[GpuSpec], quantum: float) -> float:
    """The latency limit that can be asked of ``stream``, inf without one.

    Its own; where every configuration that fits on some GPU breaks it, the smallest latency of these.
    """
    if stream.max_latency_s is None:
        return math.inf
    places = tuple(gpus)
    usable = (p.latency_s for p in stream.inference if any(fits(p, gpu, quantum) for gpu in places))
    return max(stream.max_latency_s, min(usable, default=0.0))


def most_label_seconds(stream: StreamProfile) -> float:
    """The most golden-model seconds that one retraining of ``stream`` asks for."""
    on_gpu = max((p.label_seconds for p in stream.retrain), default=0.0)
    return max(on_gpu, max((p.label_seconds for p in stream.cloud), default=0.0))


def labels_are_short(problem: Problem) -> bool:
    """Whether the streams could want more labels than the budget has."""
    if problem.label_budget_s is None:
        return False
    return sum(most_label_seconds(stream) for stream in problem.streams) > problem.label_budget_s


def label_budget(problem: Problem) -> float:
    """Golden-model seconds that all retrainings of a plan may need, the tolerance included; inf = no budget."""
    budget_s = problem.label_budget_s
    return math.inf if budget_s is None else budget_s + max(LABEL_TOLERANCE_S, LABEL_TOLERANCE * budget_s)


def transfer_times(link: LinkSpec, queue: Sequence[CloudProfile]) -> list[tuple[float, float]]:
    """(start of the up-link transfer, arrival of the model) of retrainings in their order on ``link`` (rule 8).

    ``optimizer.clouds.advance`` is the same rule step by step, for what is under way.
    """
    times: list[tuple[float, float]] = []
    up_end_s = down_end_s = 0.0
    for profile in queue:
        start_s = up_end_s
        up_end_s += profile.up_bytes / link.up_bytes_per_s
        down_s = profile.down_bytes / link.down_bytes_per_s
        down_end_s = max(down_end_s, up_end_s + profile.cloud_seconds) + down_s
        times.append((start_s, down_end_s))
    return times


def gpu_classes(problem: Problem) -> tuple[tuple[GpuSpec, tuple[int, ...]], ...]:
    """Groups of interchangeable GPUs: (one of them, positions of all of them), in order of first appearance."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for position, gpu in enumerate(problem.gpus):
        key = (gpu.speed, gpu.memory_bytes, capacity_quanta(gpu, problem.share_quantum), gpu.share_efficiency)
        groups.setdefault(key, []).append(position)
    return tuple((problem.gpus[positions[0]], tuple(positions)) for positions in groups.values())
