"""Queues of retrainings where moving inference is free: in every interval all streams are packed anew on what is left.

For GPUs of one kind, without prices for changes and with memory to spare. A layout (``timeline_layout``) lets a stream
move once; with free moves nothing is lost by letting all of them move at every event, and the search has only the
queues to decide about: which retraining, on which GPU, in which turn, with how many quanta.

The search is compiled (numba, one function on flat arrays, its machine code kept on disk). Letters: v stream, g GPU,
k inference choice (ascending in quanta), i retraining, e interval between two events.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

from optimizer.policies.timeline_layout import Layout, Placed, Run, Stay, Tables

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

TOLERANCE = 1e-9
SLICE_STEPS = 400  # between two looks at the clock
F = TypeVar("F", bound=Callable[..., object])

if TYPE_CHECKING:

    def compiled(function: F) -> F:
        """``function`` as machine code, kept on disk between processes."""
        return function

else:
    compiled = numba.njit(cache=True, error_model="numpy")


@compiled
def _packs(number: Ints, free: Ints, left: Ints) -> bool:
    """Whether ``number[size]`` jobs of every size fit on GPUs with ``free`` quanta: first fit, largest first."""
    left[:] = free
    for back in range(1, len(number)):
        size = len(number) - back
        many = number[size]
        for x in range(len(left)):
            if many == 0:
                break
            taken = min(many, left[x] // size)
            many -= taken
            left[x] -= taken * size
        if many > 0:
            return False
    return True


@compiled
def _upgrade(sizes: Ints, q: Floats, num_choices: Ints, v: int, level: int, limit: int) -> tuple[float, int]:
    """(gain per quantum, choice) of the best larger choice of ``v`` that takes fewer than ``limit`` quanta."""
    best, choice = 0.0, -1
    for k in range(level + 1, num_choices[v]):
        if sizes[v, k] >= limit:
            break
        ratio = (q[v, k] - q[v, level]) / max(1, sizes[v, k] - sizes[v, level])
        if ratio > best:
            best, choice = ratio, k
    return best, choice


@compiled
def _search(
    queue: Ints,  # G x V: streams in their turn
    queued: Ints,  # G
    which: Ints,  # V: retraining, -1 = none
    granted: Ints,  # V: quanta of it
    where: Ints,  # V: GPU, -1 = none
    caps: Ints,  # G: quanta that all retrainings there have together
    sizes: Ints,  # V x K
    q: Floats,  # V x K
    num_choices: Ints,  # V
    weight: Floats,  # V
    now: Floats,  # V
    floor: Floats,  # V
    after: Floats,  # V x I
    seconds: Floats,  # V x I, on a whole GPU of speed 1
    pinned: Ints,  # V x I
    wanted: Ints,  # V x I: retrainings worth trying
    num_wanted: Ints,  # V
    rates: Floats,  # quanta + 1
    window_s: float,
    seed: int,
    first: int,
    last: int,
    steps: int,
    hot: float,
    goal: float,
    worth_now: float,
    levels: Ints,  # 2 V + 2 x V: choice in every interval, written when steps = 0
    marks: Floats,  # 2 V + 3: moments, the same
) -> tuple[float, int]:
    """Steps ``first`` to ``last`` of ``steps`` of annealing, in place; (worth, steps made). 0 steps: only evaluate."""
    num_gpus, count = len(queued), len(which)
    capacity = len(rates) - 1
    starts, ends = np.full(count, 1e18), np.full(count, 1e18)
    kept_starts, kept_ends = starts.copy(), ends.copy()
    free, left = np.zeros(num_gpus, dtype=np.int64), np.zeros(num_gpus, dtype=np.int64)
    level, rate = np.zeros(count, dtype=np.int64), np.zeros(count)
    number = np.zeros(capacity + 1, dtype=np.int64)
    times, whose = np.zeros(2 * count + 2), np.zeros(2 * count + 2, dtype=np.int64)
    ladder, ladder_v = np.zeros(count), np.zeros(count, dtype=np.int64)
    limits = np.zeros(count, dtype=np.int64)
    top_size = np.zeros(count, dtype=np.int64)
    for w in range(count):
        top_size[w] = sizes[w, num_choices[w] - 1]
    earned_before, reached = np.zeros(2 * count + 3), np.zeros(2 * count + 3)  # of the queues as accepted
    fresh_before, fresh_reached = np.zeros(2 * count + 3), np.zeros(2 * count + 3)
    known = 0
    kept_queue, kept_queued = queue.copy(), queued.copy()
    kept_which, kept_granted, kept_where = which.copy(), granted.copy(), where.copy()
    kept_caps, held, kept_held = caps.copy(), granted.copy(), granted.copy()
    step = first
    while step < last or steps == 0:
        # ---------------------------------------------------------------- a change
        cooling = 1.0 - step / max(1, steps)
        temperature = hot * cooling * cooling
        step += 1
        v, g, h = -1, -1, -1
        if steps > 0:
            if step == first + 1:
                np.random.seed(seed + first)
            v = int(np.random.random() * count)
            draw = np.random.random()
            g = where[v]
            kept_g, kept_i, kept_r = g, which[v], granted[v]
            u = -1
            if draw < 0.3 and g >= 0:  # exchange with another one
                u = int(np.random.random() * count)
                h = where[u]
                if u == v or h < 0:
                    continue
                x, y = 0, 0
                while queue[g, x] != v:
                    x += 1
                while queue[h, y] != u:
                    y += 1
                queue[g, x], queue[h, y] = u, v
                where[v], where[u] = h, g
            else:
                if num_wanted[v] == 0:
                    continue
                place = 0
                if g >= 0:
                    while queue[g, place] != v:
                        place += 1
                    for x in range(place, queued[g] - 1):
                        queue[g, x] = queue[g, x + 1]
                    queued[g] -= 1
                if g >= 0 and draw < 0.33:
                    which[v], where[v] = -1, -1
                else:
                    if g < 0 or np.random.random() < 0.4:
                        which[v] = wanted[v, int(num_wanted[v] * np.random.random() ** 2)]
                    if g < 0:
                        granted[v] = capacity
                    if np.random.random() < 0.25:
                        part = np.random.random()
                        granted[v] = capacity if part < 0.5 else 1 + int(np.random.random() * capacity)
                    h, at = g, place
                    if g < 0 or draw < 0.85:
                        h = int(np.random.random() * num_gpus)
                        at = int(np.random.random() * (queued[h] + 1))
                    if pinned[v, which[v]] >= 0:
                        h, at = pinned[v, which[v]], 0
                    for back in range(queued[h] - at):
                        x = queued[h] - back
                        queue[h, x] = queue[h, x - 1]
                    queue[h, at] = v
                    queued[h] += 1
                    where[v] = h
                    if np.random.random() < 0.05:
                        part = np.random.random()
                        caps[h] = capacity if part < 0.4 else 1 + int(np.random.random() * capacity)
        # ---------------------------------------------------------------- times
        feasible = True
        events = 0
        changed_s = 1e18  # before this moment nothing is different from the accepted queues
        for x in range(num_gpus):
            moment, share = 0.0, caps[x]
            begun = 0
            for y in range(queued[x]):
                w = queue[x, y]
                i, quanta = which[w], min(granted[w], caps[x])
                while share < quanta:
                    soonest = 1e18
                    for z in range(begun, y):
                        end = ends[queue[x, z]]
                        if end > moment and end < soonest:
                            soonest = end
                    moment = soonest
                    for z in range(begun, y):
                        if ends[queue[x, z]] == moment:
                            share += held[queue[x, z]]
                share -= quanta
                held[w] = quanta
                begins, finish = moment, moment + seconds[w, i] / rates[quanta]
                if x in (g, h):
                    if (
                        begins != kept_starts[w]
                        or finish != kept_ends[w]
                        or kept_where[w] != x
                        or kept_held[w] != quanta
                    ):
                        changed_s = min(changed_s, begins, kept_starts[w])
                    elif kept_which[w] != i:
                        changed_s = min(changed_s, finish)
                starts[w], ends[w] = begins, finish
                if ends[w] >= window_s or (pinned[w, i] >= 0 and (moment > 0.0 or pinned[w, i] != x)):
                    feasible = False
                    break
                times[events], whose[events] = starts[w], w
                times[events + 1], whose[events + 1] = ends[w], -1 - w
                events += 2
            if not feasible:
                break
        # ---------------------------------------------------------------- worth
        total = 0.0
        if v >= 0 and where[v] < 0:
            changed_s = min(changed_s, kept_starts[v])
        if feasible:
            for x in range(1, events):
                t, w = times[x], whose[x]
                y = x - 1
                while y >= 0 and times[y] > t:
                    times[y + 1], whose[y + 1] = times[y], whose[y]
                    y -= 1
                times[y + 1], whose[y + 1] = t, w
            for x in range(num_gpus):
                free[x] = capacity
            for w in range(count):
                rate[w] = now[w]
            moment, e, interval = 0.0, 0, 0
            while moment < window_s and feasible:
                while e < events and times[e] <= moment:
                    w = whose[e]
                    if w >= 0:
                        free[where[w]] -= held[w]
                    else:
                        w = -1 - w
                        free[where[w]] += held[w]
                        rate[w] = after[w, which[w]]
                    e += 1
                until = times[e] if e < events else window_s
                if interval + 1 < known and reached[interval + 1] <= changed_s and reached[interval + 1] == until:
                    total = earned_before[interval + 1]
                    interval += 1
                    fresh_before[interval], fresh_reached[interval] = total, until
                    moment = until
                    continue
                # The smallest choices first, then upgrades, worth most per quantum first, while all can be packed.
                spare = 0
                for x in range(num_gpus):
                    spare += free[x]
                number[:] = 0
                for w in range(count):
                    k = 0
                    while k < num_choices[w] and rate[w] * q[w, k] < floor[w] - TOLERANCE:
                        k += 1
                    if k == num_choices[w]:
                        feasible = False
                        break
                    level[w] = k
                    number[sizes[w, k]] += 1
                    spare -= sizes[w, k]
                if not feasible or spare < 0:
                    feasible = False
                    break
                if not _packs(number, free, left):
                    feasible = False
                    break
                tops = spare
                for w in range(count):
                    tops -= top_size[w] - sizes[w, level[w]]
                if tops >= 0:  # there may be room for the largest choice of everyone
                    number[:] = 0
                    for w in range(count):
                        number[top_size[w]] += 1
                    if _packs(number, free, left):
                        spare = 0
                        for w in range(count):
                            level[w] = num_choices[w] - 1
                    else:
                        number[:] = 0
                        for w in range(count):
                            number[sizes[w, level[w]]] += 1
                for w in range(count):
                    if spare == 0:
                        break
                    limits[w] = 1 << 30
                    ladder[w], ladder_v[w] = _upgrade(sizes, q, num_choices, w, level[w], limits[w])
                    ladder[w] *= weight[w] * rate[w]
                while spare > 0:
                    best, w = 0.0, -1
                    for x in range(count):
                        if ladder[x] > best:
                            best, w = ladder[x], x
                    if w < 0:
                        break
                    k, old = ladder_v[w], level[w]
                    more = sizes[w, k] - sizes[w, old]
                    fits = more <= spare
                    if fits:
                        number[sizes[w, old]] -= 1
                        number[sizes[w, k]] += 1
                        fits = _packs(number, free, left)
                        if not fits:
                            number[sizes[w, old]] += 1
                            number[sizes[w, k]] -= 1
                    if fits:
                        spare -= more
                        level[w] = k
                    else:
                        limits[w] = sizes[w, k]  # from now on only smaller ones
                    ladder[w], ladder_v[w] = _upgrade(sizes, q, num_choices, w, level[w], limits[w])
                    ladder[w] *= weight[w] * rate[w]
                if not feasible:
                    break
                earned = 0.0
                for w in range(count):
                    earned += weight[w] * rate[w] * q[w, level[w]]
                total += earned * (until - moment)
                if steps == 0:
                    for w in range(count):
                        levels[interval, w] = level[w]
                    marks[interval], marks[interval + 1] = moment, until
                interval += 1
                fresh_before[interval], fresh_reached[interval] = total, until
                moment = until
        if steps == 0:
            return (total if feasible else -1.0), interval
        # ---------------------------------------------------------------- accept or take back
        gain = total - worth_now
        accept = feasible and (
            gain >= 0.0 or (temperature > 0.0 and np.random.random() < np.exp(max(-700.0, gain / temperature)))
        )
        if accept:
            worth_now = total
            known = interval + 1
            earned_before, fresh_before = fresh_before, earned_before
            reached, fresh_reached = fresh_reached, reached
            for w in range(count):
                if where[w] < 0:
                    starts[w], ends[w] = 1e18, 1e18
                kept_starts[w], kept_ends[w], kept_held[w] = starts[w], ends[w], held[w]
            for x in (g, h):
                if x >= 0:
                    kept_queued[x], kept_caps[x] = queued[x], caps[x]
                    for y in range(queued[x]):
                        kept_queue[x, y] = queue[x, y]
            kept_which[v], kept_granted[v], kept_where[v] = which[v], granted[v], where[v]
            if u >= 0:
                kept_where[u] = where[u]
            if worth_now >= goal:
                return worth_now, step
        else:
            for x in (g, h):
                if x >= 0:
                    queued[x], caps[x] = kept_queued[x], kept_caps[x]
                    for y in range(kept_queued[x]):
                        queue[x, y] = kept_queue[x, y]
            which[v], granted[v], where[v] = kept_i, kept_r, kept_g
            if u >= 0:
                where[u] = kept_where[u]
    return worth_now, step


class PoolSearch:
    """Annealing over queues, from the queues of a layout; the best ones are kept.

    ``trainings``: per stream the indices of the retrainings worth trying, best first.
    """

    def __init__(self, layout: Layout, trainings: list[list[int]], seed: int) -> None:
        self.t = t = layout.t
        count, gpus = t.num_streams, t.num_gpus
        self.seed, self.done = seed, 0
        depth = max(1, *(len(per) for per in t.trainings))
        width = max(len(per[0]) for per in t.choices)
        sizes, q = np.zeros((count, width), dtype=np.int64), np.zeros((count, width))
        after, seconds = np.zeros((count, depth)), np.zeros((count, depth))
        pinned, wanted = (np.zeros((count, depth), dtype=np.int64) for _ in range(2))
        for v in range(count):
            for k, choice in enumerate(t.choices[v][0]):
                sizes[v, k], q[v, k] = choice.quanta, choice.q
            for i, one in enumerate(t.trainings[v]):
                after[v, i], seconds[v, i], pinned[v, i] = one.accuracy, one.gpu_seconds, one.pinned
        ints = np.int64
        self._fixed = (
            sizes,
            q,
            np.array([len(per[0]) for per in t.choices], dtype=ints),
            np.array(t.weight),
            np.array(t.accuracy_now),
            np.asarray(t.model.floor, dtype=np.float64),
            after,
            seconds,
            pinned,
            wanted,
            np.zeros(count, dtype=ints),
            np.array(t.rates[0]),
            float(t.window_s),
        )
        self.want(trainings)
        queue, queued = np.zeros((gpus, count), dtype=ints), np.zeros(gpus, dtype=ints)
        which, granted = np.full(count, -1, dtype=ints), np.full(count, t.capacity[0], dtype=ints)
        where, caps = np.full(count, -1, dtype=ints), np.array(t.capacity, dtype=ints)
        for g, runs in enumerate(layout.runs):
            bases = sum(t.choices[v][0][layout.base[v]].quanta for v in layout.residents[g])
            caps[g] = max(1, t.capacity[g] - bases)
            for run in runs:
                queue[g, queued[g]] = run.stream
                queued[g] += 1
                which[run.stream], granted[run.stream], where[run.stream] = run.training, run.quanta, g
        self._state = (queue, queued, which, granted, where, caps)
        self._levels, self._marks = np.zeros((2 * count + 2, count), dtype=ints), np.zeros(2 * count + 3)
        self.worth = self._run(0, 0, 0, 0.0, 0.0)[0]
        self.best, self._best_state = self.worth, tuple(part.copy() for part in self._state)

    def _run(self, first: int, last: int, steps: int, hot: float, goal: float) -> tuple[float, int]:
        worth = self.worth if steps else 0.0
        rest = (self.seed, first, last, steps, hot, goal, worth, self._levels, self._marks)
        search: Any = _search
        found, made = search(*self._state, *self._fixed, *rest)
        return float(found), int(made)

    def want(self, trainings: list[list[int]]) -> None:
        """Try only ``trainings`` (per stream, best first) from now on."""
        wanted, num_wanted = self._fixed[9], self._fixed[10]
        for v, per in enumerate(trainings):
            wanted[v, : len(per)], num_wanted[v] = per, len(per)

    def run(self, deadline: float, steps: int, hot: float, goal: float) -> None:
        """Anneal from the best queues for ``steps`` steps, until ``deadline`` (monotonic) or ``goal``."""
        for part, kept in zip(self._state, self._best_state, strict=True):
            part[:] = kept
        self.worth = self.best
        self.seed += steps
        for first in range(0, steps, SLICE_STEPS):
            if time.monotonic() > deadline or self.best >= goal:
                break
            last = min(steps, first + SLICE_STEPS)
            self.worth, _ = self._run(first, last, steps, hot, goal)
            if self.worth > self.best:
                self.best, self._best_state = self.worth, tuple(part.copy() for part in self._state)

    # ------------------------------------------------------------ out

    def placed(self) -> Placed:
        """The best queues with their times, and every stream on a GPU in every interval, moving as little as can be."""
        for part, kept in zip(self._state, self._best_state, strict=True):
            part[:] = kept
        _, intervals = self._run(0, 0, 0, 0.0, 0.0)
        t = self.t
        queue, queued, which, granted, _, caps = self._state
        runs: list[list[Run]] = []
        for g in range(t.num_gpus):
            here: list[Run] = []
            for v in queue[g, : queued[g]].tolist():
                here.append(_next_run(t, here, v, int(which[v]), int(min(granted[v], caps[g])), int(caps[g])))
            runs.append(here)
        stays: list[list[Stay]] = [[] for _ in range(t.num_gpus)]
        current: list[tuple[int, Stay] | None] = [None] * t.num_streams
        for e in range(intervals):
            a, b = float(self._marks[e]), float(self._marks[e + 1])
            free = list(t.capacity)
            for g, per in enumerate(runs):
                free[g] -= sum(run.quanta for run in per if run.start_s <= a < run.end_s)
            levels = self._levels[e].tolist()
            sizes = [t.choices[v][0][k].quanta for v, k in enumerate(levels)]
            homes = _packed(sizes, free, [-1 if known is None else known[0] for known in current])
            for v, (g, k) in enumerate(zip(homes, levels, strict=True)):
                known = current[v]
                if known is None or known[0] != g:
                    stay = Stay(v, a, b)
                    stays[g].append(stay)
                    current[v] = (g, stay)
                else:
                    stay = known[1]
                stay.end_s = b
                if not stay.steps or stay.steps[-1][1] != k:
                    stay.steps.append((a, k))
        return Placed(t, runs, stays)


def _next_run(t: Tables, before: list[Run], v: int, training: int, quanta: int, cap: int) -> Run:
    """The run that queues behind ``before`` and starts as soon as its share is free."""
    start_s = before[-1].start_s if before else 0.0
    while cap - sum(run.quanta for run in before if run.end_s > start_s) < quanta:
        start_s = min(run.end_s for run in before if run.end_s > start_s)
    end_s = start_s + t.trainings[v][training].gpu_seconds / t.rates[0][quanta]
    return Run(v, training, quanta, start_s, end_s)


def _packed(sizes: list[int], free: list[int], old: list[int]) -> list[int]:
    """A GPU for every job: first fit, largest first, by numbers; among equal sizes each keeps its old GPU if it may."""
    home = [-1] * len(sizes)
    left = list(free)
    for size in sorted(set(sizes), reverse=True):
        waiting = [v for v, one in enumerate(sizes) if one == size]
        slots: list[int] = []
        for g in range(len(left)):
            taken = min(len(waiting) - len(slots), left[g] // size)
            left[g] -= taken * size
            slots += [g] * taken
        for v in list(waiting):
            if old[v] in slots:
                home[v] = old[v]
                slots.remove(old[v])
                waiting.remove(v)
        for v, g in zip(waiting, slots, strict=True):
            home[v] = g
    return home


def prepare() -> None:
    """Compile the search, or load its machine code; otherwise the first search takes some seconds longer."""
    table, ints = np.ones((1, 1)), np.zeros((1, 1), dtype=np.int64)
    flat = np.zeros(1, dtype=np.int64)
    fixed = (ints + 1, table, flat + 1, table[0], table[0], table[0], table, table, ints - 1, ints, flat)
    rest = (0, 0, 0, 0, 0.0, 0.0, 0.0, np.zeros((4, 1), dtype=np.int64), np.zeros(5))
    search: Any = _search
    search(ints.copy(), flat.copy(), flat - 1, flat + 1, flat - 1, flat + 1, *fixed, np.array([0.0, 1.0]), 1.0, *rest)


def moves_are_free(tables: Tables) -> bool:
    """Whether ``PoolSearch`` knows all that matters in this problem."""
    return len(tables.rates) == 1 and not tables.with_memory and not tables.with_changes
