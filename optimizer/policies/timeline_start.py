"""First layouts: inference packed onto GPUs, retrainings queued in the order of the priced schedules."""

from __future__ import annotations

import math
import time

import numpy as np

from optimizer.execution import capacity_quanta, needed_quanta, quanta_per_gpu, share_of
from optimizer.policies.timeline_bound import Dual
from optimizer.policies.timeline_layout import FOREVER, Layout, Queued, Tables
from protocol.plan import Assignment, InferenceStep, Plan, Problem

MOST_FAILURES = 12  # later moves that gain nothing, in a row, before a GPU is left alone


def pack_inference(tables: Tables) -> Layout | None:
    """Every stream served with its cheapest allowed option; None where first fit finds no room."""
    for order in _orders(tables):
        layout = _first_fit(tables, order)
        if layout is not None:
            return layout
    return None


def _smallest(tables: Tables, v: int, c: int) -> int:
    """Index of the allowed option of ``v`` on class ``c`` that takes least, -1 = none."""
    best, least = -1, (1 << 60, 0)
    for index, choice in enumerate(tables.choices[v][c]):
        size = (choice.quanta, choice.num_bytes)
        if choice.allowed and size < least:
            best, least = index, size
    return best


def _lightest(tables: Tables, v: int, c: int) -> int:
    """The same, but looking at memory first."""
    best, least = -1, (1 << 60, 0)
    for index, choice in enumerate(tables.choices[v][c]):
        size = (choice.num_bytes, choice.quanta)
        if choice.allowed and size < least:
            best, least = index, size
    return best


def _orders(tables: Tables) -> list[list[int]]:
    count = tables.num_streams
    sizes: list[tuple[int, int]] = []
    for v in range(count):
        fitting = [(_smallest(tables, v, c), c) for c in range(len(tables.rates))]
        found = [tables.choices[v][c][i] for i, c in fitting if i >= 0]
        sizes.append((min((f.quanta for f in found), default=0), min((f.num_bytes for f in found), default=0)))
    orders = [sorted(range(count), key=lambda v: (-sizes[v][0], -sizes[v][1], v))]
    if tables.with_memory:
        orders.append(sorted(range(count), key=lambda v: (-sizes[v][1], -sizes[v][0], v)))
    return orders


def _first_fit(tables: Tables, order: list[int]) -> Layout | None:
    layout = Layout(tables)
    free = list(tables.capacity)
    room = list(tables.memory)
    at_home = tables.with_changes
    for v in order:
        spots: list[tuple[bool, int, float, int, int]] = []
        fitting = [{_smallest(tables, v, c)} for c in range(len(tables.rates))]
        if tables.with_memory:
            for c, indices in enumerate(fitting):
                indices.add(_lightest(tables, v, c))
        for g in range(tables.num_gpus):
            c = tables.class_of[g]
            for index in fitting[c]:
                if index < 0:
                    continue
                choice = tables.choices[v][c][index]
                if choice.quanta <= free[g] and choice.num_bytes <= room[g]:
                    away = at_home and tables.serving[v] is not None and tables.serving[v] != g
                    left = room[g] - choice.num_bytes if tables.with_memory else 0.0
                    spots.append((away, free[g] - choice.quanta, left, g, index))
        if not spots:
            return None
        _, _, _, g, index = min(spots)
        choice = tables.choices[v][tables.class_of[g]][index]
        free[g] -= choice.quanta
        room[g] -= choice.num_bytes
        layout.host[v], layout.base[v] = g, index
        layout.residents[g].append(v)
    return layout if layout.settle(set(range(tables.num_gpus))) is not None else None


def layout_of(tables: Tables, plan: Plan) -> Layout | None:
    """The layout that serves as ``plan`` begins, without its retrainings; None where that is not possible."""
    problem = tables.model.problem
    position = {gpu.gpu_id: g for g, gpu in enumerate(problem.gpus)}
    layout = Layout(tables)
    for v, (stream, assignment) in enumerate(zip(problem.streams, plan.assignments, strict=True)):
        step = assignment.inference[0]
        g = position[step.gpu_id]
        profile = next(p for p in stream.inference if p.inference_id == step.inference_id)
        quanta = needed_quanta(profile, problem.gpus[g], problem.share_quantum)
        fitting = [
            index
            for index, choice in enumerate(tables.choices[v][tables.class_of[g]])
            if choice.allowed and choice.quanta <= quanta and choice.num_bytes <= profile.memory_bytes
        ]
        if not fitting:
            return None
        layout.host[v], layout.base[v] = g, fitting[-1]
        layout.residents[g].append(v)
    return layout if layout.settle(set(range(tables.num_gpus))) is not None else None


def spread_inference(tables: Tables, dual: Dual, dearer: float = 1.0, part: float = 1.0) -> Layout | None:
    """Every stream with the option that is best at the opening prices, on the GPU that is loaded least.

    GPUs then retrain beside their own streams, which suits many streams per GPU. ``part``: share of the GPUs of
    each class that serve; the others only retrain at first. None where it does not fit.
    """
    wanted = dual.pricer.opening_options(dual.prices * dearer)
    classes = range(len(tables.rates))
    small = [[_smallest(tables, v, c) for c in classes] for v in range(tables.num_streams)]
    layout = Layout(tables)
    hosts = {g for one in tables.model.classes for g in one.members[: math.ceil(part * len(one.members))]}
    # What is left for every stream after the smallest options of all is shared out by prices.
    free = list(tables.capacity)
    room = list(tables.memory)
    sizes = [
        max((tables.choices[v][c][small[v][c]].quanta for c in classes if small[v][c] >= 0), default=0)
        for v in range(tables.num_streams)
    ]
    for v in sorted(range(tables.num_streams), key=lambda v: (-sizes[v], v)):
        best: tuple[bool, float, int] | None = None
        for g in range(tables.num_gpus):
            index = small[v][tables.class_of[g]]
            if index < 0:
                continue
            choice = tables.choices[v][tables.class_of[g]][index]
            if g in hosts and choice.quanta <= free[g] and choice.num_bytes <= room[g]:
                away = tables.with_changes and tables.serving[v] is not None and tables.serving[v] != g
                spot = (away, -(free[g] - choice.quanta) * tables.rates[tables.class_of[g]][-1], g)
                best = spot if best is None else min(best, spot)
        if best is None:
            return None
        g = best[2]
        index = small[v][tables.class_of[g]]
        free[g] -= tables.choices[v][tables.class_of[g]][index].quanta
        room[g] -= tables.choices[v][tables.class_of[g]][index].num_bytes
        layout.host[v], layout.base[v] = g, index
        layout.residents[g].append(v)
    for v in range(tables.num_streams):
        g = layout.host[v]
        c = tables.class_of[g]
        index = int(wanted[v, c])
        if index < 0 or not tables.choices[v][c][index].allowed:
            continue
        old, new = tables.choices[v][c][layout.base[v]], tables.choices[v][c][index]
        more, more_bytes = new.quanta - old.quanta, new.num_bytes - old.num_bytes
        if 0 < more <= free[g] and more_bytes <= room[g]:
            free[g] -= more
            room[g] -= more_bytes
            layout.base[v] = index
    return layout if layout.settle(set(range(tables.num_gpus))) is not None else None


def overloaded(problem: Problem) -> tuple[Assignment, ...]:
    """Every stream served as cheaply as can be, for problems in which that does not fit: breaks what it must."""
    quantum = problem.share_quantum
    load = [0.0] * len(problem.gpus)
    assignments: list[Assignment] = []
    for stream in problem.streams:
        spots = []
        for g, gpu in enumerate(problem.gpus):
            capacity = capacity_quanta(gpu, quantum)
            for index, profile in enumerate(stream.inference):
                need = needed_quanta(profile, gpu, quantum)
                spots.append((need > capacity, load[g] + need / max(1, capacity), g, index, need))
        _, after, g, index, need = min(spots)
        load[g] = after
        share = share_of(min(need, quanta_per_gpu(quantum)), quantum)
        step = InferenceStep(
            inference_id=stream.inference[index].inference_id, gpu_id=problem.gpus[g].gpu_id, share=share
        )
        assignments.append(Assignment(stream_id=stream.stream_id, inference=(step,)))
    return tuple(assignments)


def queue_retrainings(layout: Layout, dual: Dual) -> None:
    """Queue the schedules that the dual favours, in order of their starts, where each would end first."""
    tables, model = layout.t, dual.pricer.model
    by_case = [{training.case: i for i, training in enumerate(per)} for per in tables.trainings]
    # Retrainings in the cloud all begin with the plan; their turns tell the order.
    turn_s = np.where(model.mode_turn >= 0, model.mode_seconds, 0.0)
    wanted = sorted(
        (float(dual.start_s[v] + turn_s[dual.mode[v]]), v) for v in range(tables.num_streams) if dual.mode[v] >= 0
    )
    ends = [0.0] * tables.num_gpus
    left = list(tables.capacity)
    for g in range(tables.num_gpus):
        for v in layout.residents[g]:
            left[g] -= tables.choices[v][tables.class_of[g]][layout.base[v]].quanta
    for _, v in wanted:
        index = by_case[v].get(int(model.mode_case[dual.mode[v]]), -1)
        if index < 0:
            continue
        training = tables.trainings[v][index]
        if training.link >= 0:
            _send(layout, v, index)
            continue
        spots = []
        for g in range(tables.num_gpus):
            if left[g] > 0 and training.pinned in (-1, g) and (training.pinned < 0 or ends[g] == 0.0):
                rate = tables.rates[tables.class_of[g]][left[g]]
                spots.append((ends[g] + training.gpu_seconds / rate, g))
        if not spots or min(spots)[0] >= tables.own_s[v]:
            continue
        end_s, g = min(spots)
        layout.queue[g].append(Queued(v, index, 0))
        layout.where[v], layout.training[v] = g, index
        gpus = {g, layout.host[v]} if tables.with_memory else {g}
        if layout.settle(gpus) is None:
            layout.queue[g].pop()
            layout.where[v], layout.training[v] = -1, -1
            if layout.settle(gpus) is None:
                raise RuntimeError("taking a retraining back left an infeasible layout")
        else:
            ends[g] = end_s


def _send(layout: Layout, v: int, index: int) -> None:
    """Put a retraining in the cloud behind the others of its link (in front if it runs), if it comes in time."""
    tables = layout.t
    training = tables.trainings[v][index]
    g = tables.queue_of(training)
    at = 0 if training.running else len(layout.queue[g])
    layout.queue[g].insert(at, Queued(v, index, 0))
    layout.where[v], layout.training[v] = g, index
    gpus = {g, layout.host[v]} if tables.with_memory else {g}
    if layout.settle(gpus) is None:
        layout.queue[g].pop(at)
        layout.where[v], layout.training[v] = -1, -1
        if layout.settle(gpus) is None:
            raise RuntimeError("taking a retraining back left an infeasible layout")


def pack_wanted(tables: Tables, dual: Dual, dearer: float = 1.0) -> Layout | None:
    """Every stream with the option that is best at the opening prices, on as few GPUs as first fit needs.

    The other GPUs are then free to retrain with all they have. ``dearer`` scales the prices. None where it does
    not fit.
    """
    wanted = dual.pricer.opening_options(dual.prices * dearer)
    classes = range(len(tables.rates))
    sizes = [
        max((tables.choices[v][c][int(wanted[v, c])].quanta for c in classes if wanted[v, c] >= 0), default=0)
        for v in range(tables.num_streams)
    ]
    layout = Layout(tables)
    free, room = list(tables.capacity), list(tables.memory)
    for v in sorted(range(tables.num_streams), key=lambda v: (-sizes[v], v)):
        spots: list[tuple[bool, int, int]] = []
        for g in range(tables.num_gpus):
            index = int(wanted[v, tables.class_of[g]])
            if index < 0:
                continue
            choice = tables.choices[v][tables.class_of[g]][index]
            if choice.allowed and choice.quanta <= free[g] and choice.num_bytes <= room[g]:
                away = tables.with_changes and tables.serving[v] is not None and tables.serving[v] != g
                spots.append((away, free[g] - choice.quanta, g))
        if not spots:
            return None
        g = min(spots)[2]
        index = int(wanted[v, tables.class_of[g]])
        free[g] -= tables.choices[v][tables.class_of[g]][index].quanta
        room[g] -= tables.choices[v][tables.class_of[g]][index].num_bytes
        layout.host[v], layout.base[v] = g, index
        layout.residents[g].append(v)
    return layout if layout.settle(set(range(tables.num_gpus))) is not None else None


def move_later(layout: Layout, deadline: float) -> None:
    """Let streams move into GPUs whose queue has ended, the first to end first, wherever that gains."""
    tables = layout.t
    closing = sorted(
        (max(run.end_s for run in runs), g) for g, runs in enumerate(layout.runs[: tables.num_gpus]) if runs
    )
    for _, g in closing:
        c = tables.class_of[g]
        spare = tables.capacity[g] - sum(tables.choices[v][c][layout.base[v]].quanta for v in layout.residents[g])
        here = [v for v in range(tables.num_streams) if layout.second[v] < 0 and layout.host[v] != g]
        lifts: list[tuple[float, int, int]] = []
        for v in here:
            old = tables.choices[v][tables.class_of[layout.host[v]]][layout.base[v]]
            for index, choice in enumerate(tables.choices[v][c]):
                if choice.allowed and choice.q > old.q and choice.quanta <= spare:
                    accuracy = max(layout.accuracy[v], tables.accuracy_now[v])
                    lifts.append((tables.weight[v] * accuracy * (choice.q - old.q) / choice.quanta, v, index))
        failed = 0
        for _, v, index in sorted(lifts, reverse=True):
            if time.monotonic() > deadline or spare <= 0 or failed >= MOST_FAILURES:
                break
            quanta = tables.choices[v][c][index].quanta
            if quanta > spare or layout.second[v] >= 0:
                continue
            layout.arrivals[g].append(v)
            layout.second[v], layout.second_base[v] = g, index
            undo = layout.settle({g, layout.host[v]})
            if undo is not None and undo.gain > 0.0:
                spare -= quanta
                failed = 0
                continue
            failed += 1
            if undo is not None:
                layout.restore(undo)
            layout.arrivals[g].remove(v)
            layout.second[v], layout.leave_s[v] = -1, FOREVER


def promising_trainings(layout: Layout, dual: Dual, slack: float) -> list[list[int]]:
    """Per stream the retrainings, best first, whose reduced cost is within ``slack`` of the stream's best schedule.

    What costs more than bound less incumbent cannot be part of any better plan (docs/timeline.md, section 4).
    """
    tables = layout.t
    reduced = dual.pricer.reduced_costs(dual.prices, dual.priced)
    found: list[list[int]] = []
    for v in range(tables.num_streams):
        ranked = sorted((float(reduced[training.case]), i) for i, training in enumerate(tables.trainings[v]))
        found.append([i for cost, i in ranked if cost <= slack])
    return found
