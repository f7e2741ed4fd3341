"""Exhaustive search for few streams: branch over retrainings and their order, pruned by the Lagrangian bound.

Every start is at 0 or at the end of another retraining, and inference changes at ends only; so the
choice of (retraining, GPU, share, predecessor) per stream, and the order of transfers on every link, fixes all times,
and between two ends the best inference is a small independent choice, in which a stream counts with the part of the
time that lies in its own window (whose end is no event, so that nothing can change at it). Not used where changes have
a price (intervals depend on one another then).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, permutations, product

from optimizer.policies.timeline_bound import Dual
from optimizer.policies.timeline_layout import Placed, Run, Stay, Tables, counted

Moment = tuple[float, tuple[tuple[int, int], ...]]  # rate, (GPU, choice) of every stream


@dataclass(frozen=True, slots=True)
class Exhausted:
    """Outcome. ``complete``: nothing better than ``value`` exists; else time was up."""

    value: float
    placed: Placed | None
    complete: bool


class _Exhaustive:
    def __init__(self, tables: Tables, dual: Dual, incumbent: float, deadline: float) -> None:
        self.t, self.dual, self.deadline = tables, dual, deadline
        self.best = incumbent
        self.found: Placed | None = None
        self.moments: dict[tuple[object, ...], Moment | None] = {}
        self.leaves = 0
        self.out_of_time = False
        model = dual.pricer.model
        case_index = {tr.case: (v, i) for v, per in enumerate(tables.trainings) for i, tr in enumerate(per)}
        losses = dual.pricer.mode_losses(dual.prices, dual.priced)
        # (loss against the stream's best schedule, training, GPU, quanta, seconds); training -1 = none
        self.candidates: list[list[tuple[float, int, int, int, float]]] = [
            [(float(loss), -1, -1, 0, 0.0)] for loss in losses[0]
        ]
        # A retraining in the cloud has one candidate, with the least loss of its turns. As it could end too late to be
        # worth anything and yet be what others wait for, it loses no more than no retraining either.
        for v, per in enumerate(tables.trainings):
            for index, training in enumerate(per):
                if training.link >= 0:
                    turns = losses[1][model.mode_case == training.case]
                    least = min(float(turns.min(initial=1e9)), float(losses[0][v]))
                    self.candidates[v].append((least, index, tables.queue_of(training), 0, 0.0))
        for m, loss in enumerate(losses[1].tolist()):
            if model.mode_turn[m] >= 0:
                continue
            v, index = case_index[int(model.mode_case[m])]
            pinned = int(model.mode_pinned[m])
            for g in model.classes[int(model.mode_class[m])].members if pinned < 0 else (pinned,):
                seconds = float(model.mode_seconds[m])
                self.candidates[v].append((loss, index, g, int(model.mode_quanta[m]), seconds))
        for found in self.candidates:
            found.sort()

    def run(self) -> Exhausted:
        self._branch(0, 0.0, [])
        return Exhausted(self.best, self.found, not self.out_of_time)

    def _branch(self, v: int, lost: float, chosen: list[tuple[float, int, int, int, float]]) -> None:
        """Choose for stream ``v``; what all choices lose together must leave the bound above the incumbent."""
        if v == self.t.num_streams:
            self._orders(chosen)
            return
        for candidate in self.candidates[v]:
            if self.dual.bound - lost - candidate[0] <= self.best + 1e-12:
                return  # the rest loses more
            if self.out_of_time:
                return
            chosen.append(candidate)
            self._branch(v + 1, lost + candidate[0], chosen)
            chosen.pop()

    def _orders(self, chosen: list[tuple[float, int, int, int, float]]) -> None:
        self.leaves += 1
        if not self.leaves % 16 and time.monotonic() > self.deadline:
            self.out_of_time = True
            return
        if not self._labels_fit(chosen):
            return
        retrained = [v for v, candidate in enumerate(chosen) if candidate[1] >= 0]
        fixed = [self._pinned(v, chosen[v][1]) for v in retrained]
        for transfers in self._transfers(chosen):
            for before in _forests(retrained, fixed):
                times = dict(transfers)
                for v in retrained:
                    self._time(v, before, chosen, times)
                if all(end_s < self.t.window_s for _, end_s in times.values()):
                    self._evaluate(chosen, times)

    def _labels_fit(self, chosen: list[tuple[float, int, int, int, float]]) -> bool:
        if not self.t.with_labels:
            return True
        used_s = sum(
            self.t.trainings[v][candidate[1]].labels_s for v, candidate in enumerate(chosen) if candidate[1] >= 0
        )
        return used_s <= self.t.label_budget_s

    def _transfers(self, chosen: list[tuple[float, int, int, int, float]]) -> Iterator[dict[int, tuple[float, float]]]:
        """Times of the retrainings in the cloud for every order on every link, those that run in front."""
        t = self.t
        queues: list[list[list[int]]] = []
        for x in range(t.num_gpus, t.num_gpus + t.num_links):
            users = [v for v, candidate in enumerate(chosen) if candidate[1] >= 0 and candidate[2] == x]
            running = [v for v in users if t.trainings[v][chosen[v][1]].running]
            others = [v for v in users if v not in running]
            queues.append([[*a, *b] for a, b in product(permutations(running), permutations(others))])
        for orders in product(*queues):
            times: dict[int, tuple[float, float]] = {}
            for order in orders:
                up_end_s = down_end_s = 0.0
                for v in order:
                    up_s, wait_s, down_s = t.trainings[v][chosen[v][1]].transfer_s
                    start_s, up_end_s = up_end_s, up_end_s + up_s
                    down_end_s = max(down_end_s, up_end_s + wait_s) + down_s
                    times[v] = (start_s, down_end_s)
            yield times

    def _pinned(self, v: int, training: int) -> bool:
        """Whether a retraining begins with the plan: it runs, or goes to the cloud."""
        one = self.t.trainings[v][training]
        return one.pinned >= 0 or one.link >= 0

    def _time(
        self,
        v: int,
        before: dict[int, int],
        chosen: list[tuple[float, int, int, int, float]],
        times: dict[int, tuple[float, float]],
    ) -> float:
        if v not in times:
            start_s = 0.0 if before[v] < 0 else self._time(before[v], before, chosen, times)
            times[v] = (start_s, start_s + chosen[v][4])
        return times[v][1]

    def _evaluate(
        self, chosen: list[tuple[float, int, int, int, float]], times: dict[int, tuple[float, float]]
    ) -> None:
        t = self.t
        ends = (end_s for _, end_s in times.values())
        marks = sorted({0.0, t.window_s, *ends})
        total = 0.0
        path: list[tuple[float, float, Moment]] = []
        for a, b in pairwise(marks):
            free, room = list(t.capacity), list(t.memory)
            state: list[tuple[int, bool, float]] = []
            for v, (_, training, g, quanta, _) in enumerate(chosen):
                # (training whose swap room or model matters, swapped, part of the time that counts)
                late = training >= 0 and times[v][1] >= t.own_s[v]
                swapped = training >= 0 and times[v][1] <= a
                if g < t.num_gpus and training >= 0 and times[v][0] <= a < times[v][1]:
                    free[g] -= quanta
                    if t.with_memory:
                        room[g] -= t.trainings[v][training].num_bytes
                state.append((-1 if late and swapped else training, swapped and not late, counted(t.own_s[v], a, b)))
            if min(free) < 0 or min(room) < 0:
                return
            key = (tuple(free), tuple(room) if t.with_memory else (), tuple(state))
            if key not in self.moments:
                self.moments[key] = self._moment(free, room, state)
            moment = self.moments[key]
            if moment is None:
                return
            total += moment[0] * (b - a)
            path.append((a, b, moment))
        if total > self.best + 1e-12:
            self.best = total
            self.found = self._placed(chosen, times, path)

    def _moment(self, free: list[int], room: list[float], state: list[tuple[int, bool, float]]) -> Moment | None:
        """The best inference of all streams at once, with what is free; None where not all can be served."""
        t = self.t
        spots: list[list[tuple[float, int, int, int, int]]] = []
        for v, (index_of, swapped, part) in enumerate(state):
            training = None if index_of < 0 else t.trainings[v][index_of]
            accuracy = training.accuracy if training is not None and swapped else t.accuracy_now[v]
            swap = training.swap_bytes if training is not None and not swapped else 0
            floor = float(t.model.floor[v])
            here = []
            for g in range(t.num_gpus):
                for index, choice in enumerate(t.choices[v][t.class_of[g]]):
                    if accuracy * choice.q >= floor - 1e-9:
                        rate = part * t.weight[v] * accuracy * choice.q
                        here.append((rate, g, index, choice.quanta, choice.num_bytes + swap))
            here.sort(reverse=True)
            spots.append(here)
        most = [max((spot[0] for spot in here), default=0.0) for here in spots]
        rest = [sum(most[v:]) for v in range(len(spots) + 1)]
        best: Moment | None = None

        def place(v: int, rate: float, taken: tuple[tuple[int, int], ...]) -> None:
            nonlocal best
            if v == len(spots):
                if best is None or rate > best[0]:
                    best = (rate, taken)
                return
            for more, g, index, quanta, num_bytes in spots[v]:
                if best is not None and rate + more + rest[v + 1] <= best[0]:
                    return
                if quanta <= free[g] and (not t.with_memory or num_bytes <= room[g]):
                    free[g] -= quanta
                    room[g] -= num_bytes
                    place(v + 1, rate + more, (*taken, (g, index)))
                    free[g] += quanta
                    room[g] += num_bytes

        place(0, 0.0, ())
        return best

    def _placed(
        self,
        chosen: list[tuple[float, int, int, int, float]],
        times: dict[int, tuple[float, float]],
        path: list[tuple[float, float, Moment]],
    ) -> Placed:
        t = self.t
        runs: list[list[Run]] = [[] for _ in range(t.num_gpus + t.num_links)]
        for v, (start_s, end_s) in times.items():
            _, training, g, quanta, _ = chosen[v]
            runs[g].append(Run(v, training, quanta, start_s, end_s))
        stays: list[list[Stay]] = [[] for _ in range(t.num_gpus)]
        for v in range(t.num_streams):
            current: Stay | None = None
            where = -1
            for a, b, (_, taken) in path:
                g, index = taken[v]
                if current is None or g != where:
                    current, where = Stay(v, a, b), g
                    stays[g].append(current)
                current.end_s = b
                if not current.steps or current.steps[-1][1] != index:
                    current.steps.append((a, index))
        return Placed(t, runs, stays)


def _forests(streams: list[int], first: list[bool]) -> Iterator[dict[int, int]]:
    """All ways to let every stream wait for nothing (-1) or for one other, without circles; ``first`` must not wait."""
    options = [
        [-1] if pinned else [-1, *(u for u in streams if u != v)] for v, pinned in zip(streams, first, strict=True)
    ]
    for combination in product(*options):
        before = dict(zip(streams, combination, strict=True))
        if not _circular(before):
            yield before


def _circular(before: dict[int, int]) -> bool:
    for first in before.values():
        at, steps = first, 0
        while at >= 0:
            at, steps = before[at], steps + 1
            if steps > len(before):
                return True
    return False


def exhaust(tables: Tables, dual: Dual, incumbent: float, deadline: float) -> Exhausted:
    """Search until done or ``deadline`` (monotonic). ``dual`` must price every retraining of ``tables``."""
    return _Exhaustive(tables, dual, incumbent, deadline).run()
