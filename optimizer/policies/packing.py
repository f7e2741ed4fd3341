"""From choices to plans: writing assignments down, and packing wished-for jobs onto GPUs.

``pack`` is the placement step of the heuristic policies (paper, section 5): shares that were chosen
for the site as a whole are put onto GPUs, largest first, each where it leaves the least room. What
does not fit is shrunk: first retrainings, then inference configurations. Its plans are executable
whenever the cheapest configurations of all streams can be packed at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from optimizer.execution import (
    asked_latency_s,
    capacity_quanta,
    fits,
    needed_quanta,
    own_window_s,
    retrain_seconds,
    share_of,
)
from optimizer.objective import ACCURACY_TOLERANCE, SECONDS_TOLERANCE, attainable_floor
from protocol.errors import PlanError
from protocol.plan import (
    Assignment,
    CloudStep,
    InferenceStep,
    Plan,
    Problem,
    RetrainStep,
    SolveReport,
    StreamProfile,
)


@dataclass(frozen=True, slots=True)
class Placed:
    """What one stream does and where: indices into its profiles and into the problem's GPUs.

    ``gamma`` -1 = no retraining on a GPU, ``cloud`` -1 = none in the cloud; where both are, ``lam_after``
    and ``gpu_after`` mean nothing. ``turn``: the retraining's turn on its link.
    """

    lam: int
    gpu: int
    gamma: int = -1
    r: int = 0
    retrain_gpu: int = -1
    lam_after: int = -1
    gpu_after: int = -1
    cloud: int = -1
    turn: int = 0


@dataclass(frozen=True, slots=True)
class Wish:
    """What a policy wants for one stream before GPUs are looked at. ``lam`` is the inference configuration
    (the best one that ``lam_quanta`` sustain where None), ``gamma`` -1 = no retraining, ``r`` its quanta.
    ``gpu`` and ``retrain_gpu`` are preferred places, -1 = where the stream is served, and none."""

    lam_quanta: int
    lam: int | None = None
    gamma: int = -1
    r: int = 0
    gpu: int = -1
    retrain_gpu: int = -1


def write_plan(problem: Problem, placed: Sequence[Placed], report: SolveReport) -> Plan:
    """The plan that says what ``placed`` means, one entry per stream in the problem's order."""
    assignments = tuple(
        _assignment(problem, stream, choice) for stream, choice in zip(problem.streams, placed, strict=True)
    )
    return Plan(window_s=problem.window_s, assignments=assignments, report=report)


def _assignment(problem: Problem, stream: StreamProfile, choice: Placed) -> Assignment:
    quantum = problem.share_quantum

    def step(lam: int, gpu_index: int, after: tuple[str, ...], start_s: float) -> InferenceStep:
        gpu, profile = problem.gpus[gpu_index], stream.inference[lam]
        share = share_of(needed_quanta(profile, gpu, quantum), quantum)
        return InferenceStep(
            inference_id=profile.inference_id, gpu_id=gpu.gpu_id, share=share, after=after, planned_start_s=start_s
        )

    first = step(choice.lam, choice.gpu, (), 0.0)
    if choice.cloud >= 0:
        sent = CloudStep(retrain_id=stream.cloud[choice.cloud].retrain_id, turn=choice.turn)
        steps: tuple[InferenceStep, ...] = (first,)
        if (choice.lam_after, choice.gpu_after) != (choice.lam, choice.gpu):
            steps += (step(choice.lam_after, choice.gpu_after, (stream.stream_id,), 0.0),)
        return Assignment(stream_id=stream.stream_id, inference=steps, cloud=sent)
    if choice.gamma < 0:
        return Assignment(stream_id=stream.stream_id, inference=(first,))
    gpu, profile = problem.gpus[choice.retrain_gpu], stream.retrain[choice.gamma]
    share = share_of(choice.r, quantum)
    end_s = retrain_seconds(profile, gpu, share)
    retrain = RetrainStep(retrain_id=profile.retrain_id, gpu_id=gpu.gpu_id, share=share, planned_end_s=end_s)
    steps = (first,)
    if (choice.lam_after, choice.gpu_after) != (choice.lam, choice.gpu):
        steps += (step(choice.lam_after, choice.gpu_after, (stream.stream_id,), end_s),)
    return Assignment(stream_id=stream.stream_id, inference=steps, retrain=retrain)


class _Room:
    """Free quanta and bytes per GPU while jobs are put in. ``num_bytes`` None = unlimited."""

    def __init__(self, problem: Problem) -> None:
        self.quanta = [capacity_quanta(gpu, problem.share_quantum) for gpu in problem.gpus]
        self.num_bytes: list[int | None] = [gpu.memory_bytes or None for gpu in problem.gpus]

    def fits(self, gpu: int, quanta: int, num_bytes: int) -> bool:
        free = self.num_bytes[gpu]
        return quanta <= self.quanta[gpu] and (free is None or num_bytes <= free)

    def take(self, gpu: int, quanta: int, num_bytes: int) -> None:
        self.quanta[gpu] -= quanta
        free = self.num_bytes[gpu]
        if free is not None:
            self.num_bytes[gpu] = free - num_bytes


class _Packing:
    """One packing in progress; ``needs[v][lam][g]`` are the quanta of an inference configuration."""

    def __init__(self, problem: Problem, wishes: Sequence[Wish]) -> None:
        self.problem, self.wishes = problem, wishes
        self.room = _Room(problem)
        self.distinct = sorted({gpu.speed for gpu in problem.gpus})
        self.speed_index = [self.distinct.index(gpu.speed) for gpu in problem.gpus]
        representative = [next(gpu for gpu in problem.gpus if gpu.speed == speed) for speed in self.distinct]
        self.needs = [
            [[needed_quanta(p, gpu, problem.share_quantum) for gpu in representative] for p in stream.inference]
            for stream in problem.streams
        ]
        self.position = {gpu.gpu_id: index for index, gpu in enumerate(problem.gpus)}
        self.lam: list[int] = [-1] * len(wishes)
        self.gpu: list[int] = [-1] * len(wishes)

    def need(self, v: int, lam: int, gpu: int) -> int:
        return self.needs[v][lam][self.speed_index[gpu]]

    def floor(self, v: int) -> float:
        stream = self.problem.streams[v]
        if stream.min_accuracy <= 0.0:
            return 0.0
        attainable = attainable_floor(stream, self.problem.gpus, self.problem.share_quantum)
        return min(stream.min_accuracy, attainable) - ACCURACY_TOLERANCE

    def latency_s(self, v: int) -> float:
        """What is asked of the latency of stream v, inf = nothing."""
        stream = self.problem.streams[v]
        if stream.max_latency_s is None:
            return math.inf
        return asked_latency_s(stream, self.problem.gpus, self.problem.share_quantum) + SECONDS_TOLERANCE

    def least_quanta(self, v: int) -> int:
        """The fewest quanta with which stream v keeps its floor and its latency limit; 0 where nothing is asked."""
        stream = self.problem.streams[v]
        if stream.min_accuracy <= 0.0 and stream.max_latency_s is None:
            return 0
        floor, latency_s = self.floor(v), self.latency_s(v)
        keeping = (
            min(self.needs[v][lam])
            for lam, profile in enumerate(stream.inference)
            if stream.accuracy_now * profile.relative_accuracy >= floor and profile.latency_s <= latency_s
        )
        return min(keeping, default=0)

    def ladder(self, v: int) -> list[int]:
        """Configurations of stream v from the wished one down, first those that keep floor and latency limit."""
        stream, wish = self.problem.streams[v], self.wishes[v]
        least = [min(row) for row in self.needs[v]]
        limit = wish.lam_quanta if wish.lam is None else least[wish.lam]
        ceiling = 1.0 if wish.lam is None else stream.inference[wish.lam].relative_accuracy
        floor, latency_s = self.floor(v), self.latency_s(v)

        def key(lam: int) -> tuple[int, bool, float, int]:
            profile = stream.inference[lam]
            within = least[lam] <= limit and profile.relative_accuracy <= ceiling
            broken = (stream.accuracy_now * profile.relative_accuracy < floor) + (profile.latency_s > latency_s)
            return (broken, not within, -profile.relative_accuracy if within else float(least[lam]), least[lam])

        order = sorted(range(len(stream.inference)), key=key)
        if wish.lam is not None and stream.inference[wish.lam].latency_s <= latency_s:
            order.remove(wish.lam)
            order.insert(0, wish.lam)
        return order

    def place_inference(self, v: int, candidates: Sequence[int]) -> bool:
        """Put the first of ``candidates`` that fits: where the stream is served now, else where least room is left."""
        stream = self.problem.streams[v]
        home = self.wishes[v].gpu if self.wishes[v].gpu >= 0 else self.position.get(stream.serving_gpu or "", -1)
        for lam in candidates:
            num_bytes = stream.inference[lam].memory_bytes
            best, best_left = -1, 0
            for gpu in range(len(self.problem.gpus)):
                quanta = self.need(v, lam, gpu)
                if self.room.fits(gpu, quanta, num_bytes):
                    left = -1 if gpu == home else self.room.quanta[gpu] - quanta
                    if best < 0 or left < best_left:
                        best, best_left = gpu, left
            if best >= 0:
                self.room.take(best, self.need(v, lam, best), num_bytes)
                self.lam[v], self.gpu[v] = lam, best
                return True
        return False

    def place_retraining(self, v: int, r: int, gamma: int) -> tuple[int, int] | None:
        """(GPU, quanta) for the retraining: at the inference job if it fits there whole, else best fit, else shrunk."""
        profile = self.problem.streams[v].retrain[gamma]
        extra = profile.swap_bytes
        if not self.room.fits(self.gpu[v], 0, extra):
            return None
        places: Sequence[int] = range(len(self.problem.gpus))
        if profile.pinned_gpu is not None:
            places = [self.position[profile.pinned_gpu]] if profile.pinned_gpu in self.position else []
        best: tuple[tuple[float, int, int], int, int] | None = None
        for gpu in places:
            bytes_here = profile.memory_bytes + (extra if gpu == self.gpu[v] else 0)
            if not self.room.fits(gpu, 1, bytes_here):
                continue
            quanta = min(r, self.room.quanta[gpu])
            seconds = retrain_seconds(profile, self.problem.gpus[gpu], share_of(quanta, self.problem.share_quantum))
            if seconds >= own_window_s(self.problem.streams[v], self.problem.window_s):
                continue
            preference = 0 if gpu == self.wishes[v].retrain_gpu else 1 if gpu == self.gpu[v] else 2
            key = (seconds if quanta < r else 0.0, preference, self.room.quanta[gpu] - quanta)
            if best is None or key < best[0]:
                best = (key, gpu, quanta)
        if best is None:
            return None
        _, gpu, quanta = best
        self.room.take(gpu, quanta, profile.memory_bytes)
        self.room.take(self.gpu[v], 0, extra)
        return gpu, quanta

    def best_after(self, v: int, gamma: int, retrain_gpu: int, r: int) -> int:
        """The most accurate configuration that the stream's own share sustains after the swap, without moving."""
        stream, gpu, lam = self.problem.streams[v], self.gpu[v], self.lam[v]
        room = self.need(v, lam, gpu) + (r if retrain_gpu == gpu else 0)
        held_bytes = stream.inference[lam].memory_bytes
        if retrain_gpu == gpu:
            held_bytes += stream.retrain[gamma].memory_bytes + stream.retrain[gamma].swap_bytes
        best = lam
        latency_s = max(self.latency_s(v), stream.inference[lam].latency_s)
        for other, profile in enumerate(stream.inference):
            if profile.latency_s > latency_s:
                continue
            better = profile.relative_accuracy > stream.inference[best].relative_accuracy
            fits_bytes = self.room.num_bytes[gpu] is None or profile.memory_bytes <= held_bytes
            if better and fits_bytes and self.need(v, other, gpu) <= room:
                best = other
        return best


def pack(problem: Problem, wishes: Sequence[Wish]) -> list[Placed]:
    """Put ``wishes`` (one per stream) onto the GPUs. PlanError when not even the cheapest configurations fit."""
    packing = _Packing(problem, wishes)
    # A floor or a latency limit may need more than what is wished: such streams come before those that can give way.
    order = sorted(range(len(wishes)), key=lambda v: -max(wishes[v].lam_quanta, packing.least_quanta(v)))
    ladders = {v: packing.ladder(v) for v in order}
    if not all(packing.place_inference(v, ladders[v]) for v in order):
        packing = _cheapest_first(problem, wishes, ladders)
    placed: list[Placed] = [Placed(lam, gpu) for lam, gpu in zip(packing.lam, packing.gpu, strict=True)]
    labels_left_s = math.inf if problem.label_budget_s is None else problem.label_budget_s + SECONDS_TOLERANCE
    for v in sorted(order, key=lambda v: _retrain_order(problem, v, wishes[v])):
        wish = wishes[v]
        if wish.gamma < 0 or wish.r < 1:
            continue
        stream = problem.streams[v]
        gamma = wish.gamma
        if stream.retrain[gamma].label_seconds > labels_left_s:
            gamma = _within_labels(problem, v, wish, labels_left_s)
        spot = packing.place_retraining(v, wish.r, gamma) if gamma >= 0 else None
        if spot is not None:
            gpu, quanta = spot
            after = packing.best_after(v, gamma, gpu, quanta)
            keeps_floor = stream.retrain[gamma].accuracy_after * stream.inference[after].relative_accuracy
            if keeps_floor < packing.floor(v):
                continue
            placed[v] = Placed(packing.lam[v], packing.gpu[v], gamma, quanta, gpu, after, packing.gpu[v])
            labels_left_s -= stream.retrain[gamma].label_seconds
    return placed


def _retrain_order(problem: Problem, v: int, wish: Wish) -> tuple[bool, float]:
    """Retrainings that already run keep their place before new ones, then the largest first.

    Where labels are short, those that gain most per second of labelling.
    """
    if wish.gamma < 0:
        return (True, 0.0)
    stream = problem.streams[v]
    profile = stream.retrain[wish.gamma]
    if problem.label_budget_s is None:
        return (profile.pinned_gpu is None, -wish.r)
    gain = stream.weight * (profile.accuracy_after - stream.accuracy_now)
    return (profile.pinned_gpu is None, -gain / max(profile.label_seconds, 1e-9))


def _within_labels(problem: Problem, v: int, wish: Wish, labels_left_s: float) -> int:
    """The retraining of stream v that is worth most with the wished share among those whose labels can be had."""
    stream, best, most = problem.streams[v], -1, 0.0
    own_s = own_window_s(stream, problem.window_s)
    share = share_of(wish.r, problem.share_quantum)
    for gamma, profile in enumerate(stream.retrain):
        if profile.label_seconds <= labels_left_s and profile.pinned_gpu is None:
            seconds = min(retrain_seconds(profile, gpu, share) for gpu in problem.gpus)
            worth = (profile.accuracy_after - stream.accuracy_now) * max(0.0, own_s - seconds)
            if worth > most:
                best, most = gamma, worth
    return best


def _cheapest_first(problem: Problem, wishes: Sequence[Wish], ladders: dict[int, list[int]]) -> _Packing:
    """Pack the cheapest configuration of every stream, then raise them one after the other as room allows."""
    packing = _Packing(problem, wishes)

    def usable(v: int) -> list[int]:
        profiles = problem.streams[v].inference
        return [
            lam for lam in ladders[v] if any(fits(profiles[lam], gpu, problem.share_quantum) for gpu in problem.gpus)
        ]

    def cost(v: int, lam: int) -> tuple[int, int]:
        return (min(packing.needs[v][lam]), problem.streams[v].inference[lam].memory_bytes)

    for v in sorted(range(len(wishes)), key=lambda v: -min((cost(v, lam) for lam in usable(v)), default=(0, 0))[0]):
        cheapest = sorted(usable(v), key=lambda lam: cost(v, lam))
        if not packing.place_inference(v, cheapest):
            total = sum(packing.room.quanta)
            raise PlanError(
                f"stream {problem.streams[v].stream_id!r} cannot be served: its cheapest inference configuration "
                f"fits on no GPU beside the other streams ({total} free quanta in all)"
            )
    for v, ladder in ladders.items():
        lam, gpu = packing.lam[v], packing.gpu[v]
        profiles = problem.streams[v].inference
        packing.room.take(gpu, -packing.need(v, lam, gpu), -profiles[lam].memory_bytes)
        better = ladder[: ladder.index(lam) + 1]
        packing.place_inference(v, [*better, lam])
    return packing
