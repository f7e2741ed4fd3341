"""The time-indexed planning problem as arrays: rows, inference options, retraining modes (docs/timeline.md, section 2).

Letters: v stream, c GPU class, l inference option (lambda on a class), j case (stream, gamma or none),
m mode (case, class, share in quanta), k slot. Rows are the resources that all GPUs of a class offer
together: share quanta (row c), and, where memory may run short, GPU memories (a row of its own). Behind them
stand rows of what is spent once in a plan, whenever that is: the label budget where it is short, and every
turn of every link. A retraining in the cloud is a case like any other; its modes are its turns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from optimizer.execution import (
    capacity_quanta,
    gpu_classes,
    label_budget,
    labels_are_short,
    needed_quanta,
    own_window_s,
    share_efficiency,
    share_of,
)
from optimizer.objective import ACCURACY_TOLERANCE, attainable_floor
from optimizer.policies.cloud import turns
from protocol.plan import CloudProfile, Problem, RetrainProfile, StreamProfile
from protocol.schema import GpuSpec

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class GpuClass:
    """GPUs that nothing tells apart. ``memory_row`` is -1 where memory cannot run short."""

    gpu: GpuSpec
    members: tuple[int, ...]
    capacity: int  # quanta of one GPU
    memory_row: int
    first_item: int  # item of size 0; a job of d quanta on this class is item first_item + d
    rates: Floats  # training throughput at 1, 2, ... quanta, relative to a whole GPU of speed 1


@dataclass(frozen=True, slots=True)
class Model:
    """Arrays over streams (V), options (V x L, padded), cases (J) and modes (M).

    ``option_class`` is -1 where padded. ``serves`` says which options keep the stream's floor before a
    swap. ``start_cost_s`` is what beginning the window with an option costs (rule 6 of the execution model).
    Cases are ordered by stream; the first case of each stream is "no retraining".
    """

    problem: Problem
    classes: tuple[GpuClass, ...]
    capacities: Floats  # per row, in GPUs (memory rows: in bytes), of all GPUs of the class together; of once rows: 1
    item_use: Floats  # rows x items: what a job of one size takes of each row, in GPUs; 0 in memory and once rows
    first_once: int  # rows from here on are spent once: labels (if ``case_labels`` is not all 0), then turns
    weight: Floats  # V, sums to 1
    own_s: Floats  # V, the stream's own window
    accuracy_now: Floats  # V
    floor: Floats  # V, what is asked for at every instant
    option_class: Ints
    option_lambda: Ints
    option_quanta: Ints
    option_bytes: Floats
    option_q: Floats
    serves: Bools
    start_cost_s: Floats
    case_stream: Ints
    case_gamma: Ints  # index into the stream's retrain tuple, and from its end on into the cloud tuple; -1 = none
    case_labels: Floats  # part of the label budget, 0 where that is not short
    case_accuracy: Floats
    case_bytes: Floats
    case_swap_bytes: Floats
    mode_case: Ints
    mode_class: Ints
    mode_quanta: Ints
    mode_seconds: Floats
    mode_pinned: Ints  # position of the GPU that it is bound to, -1 = any of its class; 0 for the cloud: begins at 0
    mode_turn: Ints  # which once row it takes one of, -1 = none (on a GPU)

    @property
    def num_streams(self) -> int:
        return len(self.weight)

    @property
    def num_rows(self) -> int:
        return len(self.capacities)

    @property
    def own_windows(self) -> bool:
        """Whether some stream's own window ends before the plan's."""
        return bool((self.own_s < self.problem.window_s).any())

    @property
    def change_s(self) -> float:
        """What any change of an inference step costs at least, seconds."""
        return min(self.problem.config_change_s, self.problem.migration_s)


def build_model(
    problem: Problem,
    *,
    no_floor: frozenset[int] = frozenset(),
    cuts: tuple[int, ...] = (),
    every_retraining: bool = False,
) -> Model:
    """Arrays of ``problem``, without the options and modes that another one replaces everywhere.

    ``every_retraining`` keeps those that another one replaces, too (an exhaustive search wants them).
    ``cuts``: parameters k of the dual feasible functions that tighten the pooled share rows.
    ``no_floor``: streams whose accuracy floor is given up (for problems in which not all can be kept).
    """
    memory_matters = _memory_matters(problem)
    classes, capacities, item_use = _rows(problem, memory_matters, cuts)
    builder = _Builder(problem, classes, memory_matters, no_floor)
    builder.every_retraining = every_retraining
    for stream in problem.streams:
        builder.add(stream)
    first_once = len(capacities)
    once = np.array(builder.once)
    return builder.finish(*_with_once(capacities, item_use, once), first_once)


def _with_once(capacities: Floats, item_use: Floats, once: Floats) -> tuple[Floats, Floats]:
    """Rows of time, and behind them those of what is spent once."""
    return np.concatenate((capacities, once)), np.concatenate((item_use, np.zeros((len(once), item_use.shape[1]))))


def _rows(problem: Problem, memory_matters: bool, cuts: tuple[int, ...]) -> tuple[tuple[GpuClass, ...], Floats, Floats]:
    """GPU classes, capacity of every row, and what every item takes of every row."""
    classes: list[GpuClass] = []
    capacities: list[float] = []
    uses: list[tuple[int, Floats]] = []
    num_items = 0
    quantum = problem.share_quantum
    for gpu, members in gpu_classes(problem):
        capacity = capacity_quanta(gpu, quantum)
        rates = np.array([gpu.speed * share_efficiency(gpu, share_of(r, quantum)) for r in range(1, capacity + 1)])
        for use in size_functions(capacity, cuts):
            uses.append((num_items, use))
            capacities.append(float(len(members)))
        memory_row = -1
        if memory_matters and gpu.memory_bytes:
            memory_row = len(capacities)
            uses.append((num_items, np.zeros(capacity + 1)))
            capacities.append(float(gpu.memory_bytes) * len(members))
        classes.append(GpuClass(gpu, members, capacity, memory_row, num_items, rates))
        num_items += capacity + 1
    item_use = np.zeros((len(uses), num_items))
    for row, (first, use) in enumerate(uses):
        item_use[row, first : first + len(use)] = use
    return tuple(classes), np.array(capacities), item_use


def with_cuts(model: Model, cuts: tuple[int, ...]) -> Model:
    """``model`` with share rows for the size functions ``cuts`` besides the plain ones."""
    with_memory = any(one.memory_row >= 0 for one in model.classes)
    classes, capacities, item_use = _rows(model.problem, with_memory, cuts)
    first_once = len(capacities)
    capacities, item_use = _with_once(capacities, item_use, model.capacities[model.first_once :])
    return replace(model, classes=classes, capacities=capacities, item_use=item_use, first_once=first_once)


def with_modes(model: Model, keep: Ints) -> Model:
    """``model`` with the modes at positions ``keep`` only (ascending)."""
    return replace(
        model,
        mode_case=model.mode_case[keep],
        mode_class=model.mode_class[keep],
        mode_quanta=model.mode_quanta[keep],
        mode_seconds=model.mode_seconds[keep],
        mode_pinned=model.mode_pinned[keep],
        mode_turn=model.mode_turn[keep],
    )


def part_of(model: Model, streams: Ints) -> Model:
    """A sample of the streams with its part of every capacity, for finding prices; ``problem`` stays the whole one.

    Where the sample is like the whole, its best prices are those of the whole: weights are kept as they are.
    """
    chosen = np.zeros(model.num_streams, dtype=bool)
    chosen[streams] = True
    cases = np.flatnonzero(chosen[model.case_stream])
    new_stream = np.cumsum(chosen) - 1
    new_case = np.full(len(model.case_stream), -1, dtype=np.int64)
    new_case[cases] = np.arange(len(cases))
    small = with_modes(model, np.flatnonzero(new_case[model.mode_case] >= 0))
    return replace(
        small,
        capacities=model.capacities * (len(streams) / model.num_streams),
        weight=model.weight[streams],
        own_s=model.own_s[streams],
        accuracy_now=model.accuracy_now[streams],
        floor=model.floor[streams],
        option_class=model.option_class[streams],
        option_lambda=model.option_lambda[streams],
        option_quanta=model.option_quanta[streams],
        option_bytes=model.option_bytes[streams],
        option_q=model.option_q[streams],
        serves=model.serves[streams],
        start_cost_s=model.start_cost_s[streams],
        case_stream=new_stream[model.case_stream[cases]],
        case_gamma=model.case_gamma[cases],
        case_labels=model.case_labels[cases],
        case_accuracy=model.case_accuracy[cases],
        case_bytes=model.case_bytes[cases],
        case_swap_bytes=model.case_swap_bytes[cases],
        mode_case=new_case[small.mode_case],
    )


def size_functions(capacity: int, cuts: tuple[int, ...]) -> list[Floats]:
    """Tables over sizes 0..capacity, each of which sums to at most 1 over jobs that share one GPU.

    The first is the share itself. The others are the dual feasible functions of Fekete and Schepers
    (Math. Program. 91, 2001): x where (k + 1) x is whole, floor((k + 1) x) / k elsewhere. They know that
    four jobs of size 0.3 do not fit on one GPU although two thirds of a fifth would be free on each.
    """
    sizes = np.arange(capacity + 1)
    share = sizes / max(1, capacity)
    tables = [share]
    for k in cuts:
        whole = (k + 1) * sizes % max(1, capacity) == 0
        table = np.where(whole, share, ((k + 1) * sizes // max(1, capacity)) / k)
        if not np.array_equal(table, share):
            tables.append(table)
    return tables


def _memory_matters(problem: Problem) -> bool:
    most = 0
    for stream in problem.streams:
        most += max(p.memory_bytes for p in stream.inference)
        on_gpu = max((p.memory_bytes + p.swap_bytes for p in stream.retrain), default=0)
        most += max(on_gpu, max((p.swap_bytes for p in stream.cloud), default=0))
    return any(0 < gpu.memory_bytes < most for gpu in problem.gpus)


class _Builder:
    def __init__(
        self, problem: Problem, classes: tuple[GpuClass, ...], memory_matters: bool, no_floor: frozenset[int]
    ) -> None:
        self.problem, self.classes, self.memory_matters, self.no_floor = problem, classes, memory_matters, no_floor
        self.every_retraining = False
        self.floor: list[float] = []
        self.position = {gpu.gpu_id: index for index, gpu in enumerate(problem.gpus)}
        self.class_of = {g: c for c, one in enumerate(classes) for g in one.members}
        self.options: list[list[tuple[int, int, int, int, float, bool, float]]] = []
        self.cases: list[tuple[int, int, float, int, int, float]] = []
        self.modes: list[tuple[Ints, Ints, Ints, Floats, Ints, Ints]] = []
        self.budget_s = label_budget(problem) if labels_are_short(problem) else None
        self.once: list[float] = [] if self.budget_s is None else [1.0]
        self.turns = turns(problem) if problem.links else {}
        self.turn_row: dict[tuple[str, int], int] = {}

    def add(self, stream: StreamProfile) -> None:
        v = len(self.options)
        best = attainable_floor(stream, (one.gpu for one in self.classes), self.problem.share_quantum)
        floor = 0.0 if v in self.no_floor else min(stream.min_accuracy, best)
        self.floor.append(floor)
        self.options.append(self._options(stream, floor))
        own_s = self.problem.window_s if self.every_retraining else own_window_s(stream, self.problem.window_s)
        self.cases.append((v, -1, stream.accuracy_now, 0, 0, 0.0))
        for gamma in self._useful(stream):
            profile = stream.retrain[gamma]
            pinned = -1 if profile.pinned_gpu is None else self.position[profile.pinned_gpu]
            case, before = len(self.cases), len(self.modes)
            for c, one in enumerate(self.classes):
                if pinned >= 0 and self.class_of[pinned] != c:
                    continue
                if one.gpu.memory_bytes and profile.memory_bytes > one.gpu.memory_bytes:
                    continue
                seconds = profile.gpu_seconds / one.rates
                # A share that trains no faster than a smaller one is never wanted.
                faster = np.concatenate(([True], seconds[1:] < np.minimum.accumulate(seconds)[:-1]))
                r = np.flatnonzero((faster | self.every_retraining) & (seconds < own_s))
                if len(r):
                    full, none = np.full(len(r), case), np.full(len(r), -1)
                    where = np.full(len(r), pinned)
                    self.modes.append((full, np.full(len(r), c), r + 1, seconds[r], where, none))
            if len(self.modes) > before:
                labels = self._labels(profile)
                self.cases.append((v, gamma, profile.accuracy_after, profile.memory_bytes, profile.swap_bytes, labels))
        for c, sent in enumerate(stream.cloud):
            self._add_cloud(v, stream, c, sent)

    def _labels(self, profile: RetrainProfile | CloudProfile) -> float:
        """Part of the label budget; more than 1 where it can never be had."""
        return 0.0 if self.budget_s is None else profile.label_seconds / self.budget_s

    def _add_cloud(self, v: int, stream: StreamProfile, c: int, profile: CloudProfile) -> None:
        """The case of a retraining in the cloud, with a mode per turn of its link: it ends at the earliest arrival."""
        labels = self._labels(profile)
        useful = self.every_retraining or profile.accuracy_after > stream.accuracy_now
        found = self.turns.get((v, c), [])
        if not useful or labels > 1.0 or not found:
            return
        rows = []
        for turn in found:
            name = (turn.link_id, turn.index)
            if name not in self.turn_row:
                self.turn_row[name] = len(self.once)
                self.once.append(float(turn.most))
            rows.append(self.turn_row[name])
        count, zero = len(found), np.zeros(len(found), dtype=np.int64)
        arrival_s = np.array([turn.earliest_s for turn in found])
        self.modes.append((np.full(count, len(self.cases)), zero, zero, arrival_s, zero, np.array(rows)))
        gamma = len(stream.retrain) + c
        self.cases.append((v, gamma, profile.accuracy_after, 0, profile.swap_bytes, labels))

    def _options(self, stream: StreamProfile, floor: float) -> list[tuple[int, int, int, int, float, bool, float]]:
        """(class, lambda, quanta, bytes, q, keeps the floor before a swap, start cost) of the options worth having."""
        found: list[tuple[int, int, int, int, float, bool, float]] = []
        problem = self.problem
        home = self.position.get(stream.serving_gpu) if stream.serving_gpu is not None else None
        for c, one in enumerate(self.classes):
            rows = []
            for index, profile in enumerate(stream.inference):
                quanta = needed_quanta(profile, one.gpu, problem.share_quantum)
                fits_memory = not one.gpu.memory_bytes or profile.memory_bytes <= one.gpu.memory_bytes
                if quanta <= one.capacity and fits_memory:
                    rows.append((quanta, -profile.relative_accuracy, profile.memory_bytes, index))
            kept: list[tuple[int, float, int, int]] = []
            for quanta, minus_q, num_bytes, index in sorted(rows):
                serving = stream.inference[index].inference_id == stream.serving_inference
                replaced = any(o[1] <= minus_q and (o[2] <= num_bytes or not self.memory_matters) for o in kept)
                if not replaced or (serving and problem.config_change_s > 0.0):
                    kept.append((quanta, minus_q, num_bytes, index))
            for quanta, minus_q, num_bytes, index in kept:
                if stream.serving_gpu is None:
                    cost_s = 0.0
                elif home is None or home not in one.members:
                    cost_s = problem.migration_s
                elif stream.serving_inference in (None, stream.inference[index].inference_id):
                    cost_s = 0.0
                else:
                    cost_s = min(problem.config_change_s, problem.migration_s)
                keeps = stream.accuracy_now * -minus_q >= floor - ACCURACY_TOLERANCE
                found.append((c, index, quanta, num_bytes, -minus_q, keeps, cost_s))
        return found

    def _useful(self, stream: StreamProfile) -> list[int]:
        """Retrainings that raise the accuracy and that no other one replaces at every share."""
        affordable = [g for g, p in enumerate(stream.retrain) if self._labels(p) <= 1.0]
        if self.every_retraining:
            return affordable
        after = [p.accuracy_after for p in stream.retrain]
        order = sorted(affordable, key=lambda g: (stream.retrain[g].gpu_seconds, -after[g]))
        kept: list[int] = []
        for g in order:
            one = stream.retrain[g]
            if after[g] <= stream.accuracy_now:
                continue
            if not any(self._replaces(stream.retrain[o], one) and after[o] >= after[g] for o in kept):
                kept.append(g)
        return sorted(kept)

    def _replaces(self, other: RetrainProfile, one: RetrainProfile) -> bool:
        if other.pinned_gpu is not None and other.pinned_gpu != one.pinned_gpu:
            return False
        if self.budget_s is not None and other.label_seconds > one.label_seconds:
            return False
        less = other.memory_bytes <= one.memory_bytes and other.swap_bytes <= one.swap_bytes
        return less or not self.memory_matters

    def finish(self, capacities: Floats, item_use: Floats, first_once: int) -> Model:
        problem, count = self.problem, len(self.options)
        width = max(1, *(len(rows) for rows in self.options))
        table = np.zeros((7, count, width))
        table[0] = -1.0
        for v, rows in enumerate(self.options):
            if rows:
                table[:, v, : len(rows)] = np.array(rows, dtype=np.float64).T
        cases = np.array(self.cases, dtype=np.float64)
        weight = np.array([stream.weight for stream in problem.streams])
        joined = [np.concatenate(parts) for parts in zip(*self.modes, strict=True)] if self.modes else [np.zeros(0)] * 6
        return Model(
            problem=problem,
            classes=self.classes,
            capacities=capacities,
            item_use=item_use,
            first_once=first_once,
            weight=weight / weight.sum(),
            own_s=np.array([own_window_s(stream, problem.window_s) for stream in problem.streams]),
            accuracy_now=np.array([stream.accuracy_now for stream in problem.streams]),
            floor=np.array(self.floor),
            option_class=table[0].astype(np.int64),
            option_lambda=table[1].astype(np.int64),
            option_quanta=table[2].astype(np.int64),
            option_bytes=table[3],
            option_q=table[4],
            serves=(table[5] > 0.5) & (table[0] >= 0.0),
            start_cost_s=table[6],
            case_stream=cases[:, 0].astype(np.int64),
            case_gamma=cases[:, 1].astype(np.int64),
            case_accuracy=cases[:, 2],
            case_bytes=cases[:, 3],
            case_swap_bytes=cases[:, 4],
            case_labels=cases[:, 5],
            mode_case=joined[0].astype(np.int64),
            mode_class=joined[1].astype(np.int64),
            mode_quanta=joined[2].astype(np.int64),
            mode_seconds=joined[3].astype(np.float64),
            mode_pinned=joined[4].astype(np.int64),
            mode_turn=joined[5].astype(np.int64),
        )
