"""Queues of retrainings where moving inference is free: in every interval all streams are packed anew on what is left.

For GPUs of one kind, without prices for changes and with memory to spare. Links to a cloud are queues like those of
GPUs, behind them. A layout (``timeline_layout``) lets a stream
move once; with free moves nothing is lost by letting all of them move at every event, and the search has only the
queues to decide about: which retraining, on which GPU, in which turn, with how many quanta.

The worth of queues has two measures. *Pooled*: inference shares out what all GPUs leave as if they were one, most
accuracy per quantum first; about a microsecond. *Packed*: the same on single GPUs, by first fit. Few streams are
searched by packed worth, and only what is good enough pooled is packed at all. With many streams pooling loses next to
nothing, and only the best queues are packed in the end. The loops are in ``timeline_kernels``.
"""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimizer.policies.timeline_cache import kernel
from optimizer.policies.timeline_layout import Choice, Layout, Placed, Run, Stay, Tables

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

NUM_BUCKETS = 512
PACKED_STREAMS = 60  # up to here queues are searched by their packed worth
MARGIN = 1e-3  # of the worth: pooled worth may be so much too low, per stream of ten
SLICE_STEPS = 50_000  # between two looks at the clock, over the number of streams
SPLITTING = (0.1, 0.25)  # how often a retraining gets another share: where shares train as fast as they are large, else


class PoolSearch:
    """Annealing over queues, from the queues of a layout; the best ones are kept.

    ``trainings``: per stream the indices of the retrainings worth trying, best first.
    """

    def __init__(self, layout: Layout, trainings: list[list[int]], seed: int) -> None:
        self.t = t = layout.t
        count, gpus, ints = t.num_streams, t.num_gpus + t.num_links, np.int64
        self.seed = seed
        self.packing = count <= PACKED_STREAMS
        self._anneal: Any = kernel()
        if self._anneal is None:
            raise RuntimeError("the compiled search has not been loaded (timeline_cache.prepare)")
        self._fixed = (*_constants(t), *_limits(t))
        self._wanted, self._num_wanted = self._fixed[9], self._fixed[10]
        self.want(trainings)
        queue, queued = np.zeros((gpus, count), dtype=ints), np.zeros(gpus, dtype=ints)
        which, granted = np.full(count, -1, dtype=ints), np.full(count, t.capacity[0], dtype=ints)
        where, caps = np.full(count, -1, dtype=ints), np.full(gpus, t.capacity[0], dtype=ints)
        for g, runs in enumerate(layout.runs):
            bases = sum(t.choices[v][0][layout.base[v]].quanta for v in layout.residents[g])
            caps[g] = max(1, (t.capacity[g] if g < t.num_gpus else t.capacity[0]) - bases)
            for run in runs:
                queue[g, queued[g]] = run.stream
                queued[g] += 1
                which[run.stream], granted[run.stream], where[run.stream] = run.training, run.quanta or t.capacity[0], g
        self._state = (queue, queued, which, granted, where, caps)
        self._best_state = tuple(part.copy() for part in self._state)
        self._levels, self._moments = np.zeros((2 * count + 2, count), dtype=ints), np.zeros(2 * count + 3)
        self.best = self.packed() if self.packing else -1.0

    def packed(self) -> float:
        """The packed worth of the best queues; -1 where something does not fit."""
        return self._run(self._best_state, 0, 0, 0, 0.0, 0.0)[0]

    def _run(
        self, state: tuple[Any, ...], first: int, last: int, steps: int, hot: float, goal: float
    ) -> tuple[float, int]:
        margin = MARGIN * max(0.0, self.best) * 10.0 / self.t.num_streams if steps else 0.0
        rest = (
            self.seed,
            first,
            last,
            steps,
            hot,
            goal,
            self.packing or not steps,
            margin,
            self.best if steps else 0.0,
        )
        found, made = self._anneal(*state, *self._fixed, *rest, *self._best_state, self._levels, self._moments)
        return float(found), int(made)

    def want(self, trainings: list[list[int]]) -> None:
        """Try only ``trainings`` (per stream, best first) from now on."""
        for v, per in enumerate(trainings):
            self._wanted[v, : len(per)], self._num_wanted[v] = per, len(per)

    def run(self, deadline: float, steps: int, hot: float, goal: float) -> int:
        """Anneal from the best queues for ``steps`` steps, until ``deadline`` (monotonic) or ``goal``; steps made."""
        for part, kept in zip(self._state, self._best_state, strict=True):
            part[:] = kept
        self.seed += steps
        size = max(100, SLICE_STEPS // self.t.num_streams)
        for first in range(0, steps, size):
            if time.monotonic() > deadline or self.best >= goal:
                return first
            self.best, _ = self._run(self._state, first, min(steps, first + size), steps, hot, goal)
        return steps

    def adopt(self, other: PoolSearch) -> None:
        """Go on from the best queues of ``other``, a search of the same problem."""
        self.best = other.best
        for part, found in zip(self._best_state, other._best_state, strict=True):
            part[:] = found

    # ------------------------------------------------------------ out

    def placed(self) -> Placed:
        """The best queues with their times, and every stream on a GPU in every interval, moving as little as can be."""
        _, intervals = self._run(self._best_state, 0, 0, 0, 0.0, 0.0)
        t = self.t
        queue, queued, which, granted, _, caps = self._best_state
        runs: list[list[Run]] = []
        for g in range(t.num_gpus + t.num_links):
            here: list[Run] = []
            if g >= t.num_gpus:
                turns = queue[g, : queued[g]].tolist()
                runs.append(
                    [Run(v, int(which[v]), 0, start_s, end_s) for v, start_s, end_s in _transfers(t, turns, which)]
                )
                continue
            for v in queue[g, : queued[g]].tolist():
                here.append(_next_run(t, here, v, int(which[v]), int(min(granted[v], caps[g])), int(caps[g])))
            runs.append(here)
        stays: list[list[Stay]] = [[] for _ in range(t.num_gpus)]
        current: list[tuple[int, Stay] | None] = [None] * t.num_streams
        for e in range(intervals):
            a, b = float(self._moments[e]), float(self._moments[e + 1])
            free = list(t.capacity)
            for g, per in enumerate(runs[: t.num_gpus]):
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


def _transfers(t: Tables, turns: list[int], which: Ints) -> list[tuple[int, float, float]]:
    """(stream, start, arrival) of what one link carries, in its order."""
    found: list[tuple[int, float, float]] = []
    up_end_s = down_end_s = 0.0
    for v in turns:
        up_s, wait_s, down_s = t.trainings[v][int(which[v])].transfer_s
        start_s, up_end_s = up_end_s, up_end_s + up_s
        down_end_s = max(down_end_s, up_end_s + wait_s) + down_s
        found.append((v, start_s, down_end_s))
    return found


def _limits(t: Tables) -> tuple[Any, ...]:
    """Own windows, links and labels, in the order of the parameters of the compiled loop."""
    count, ints = t.num_streams, np.int64
    depth = max([1, *(len(per) for per in t.trainings)])
    link, labels = np.full((count, depth), -1, dtype=ints), np.zeros((count, depth))
    transfers = np.zeros((3, count, depth))
    running = 0
    for v, per in enumerate(t.trainings):
        for i, one in enumerate(per):
            link[v, i], labels[v, i] = t.queue_of(one), one.labels_s
            transfers[:, v, i] = one.transfer_s
            running += one.running
    own_s = np.array(t.own_s)
    own_windows = bool((own_s < t.window_s).any())
    return own_s, link, *transfers.copy(), own_windows, labels, t.label_budget_s, t.num_gpus, running


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


def _constants(t: Tables) -> tuple[Any, ...]:
    """What the compiled loop looks up; the order is that of its parameters."""
    count, ints = t.num_streams, np.int64
    depth = max(1, *(len(per) for per in t.trainings)) if count > 1 else max(1, len(t.trainings[0]))
    width = max(len(per[0]) for per in t.choices)
    hulls = [_hull(t.choices[v][0]) for v in range(count)]
    steps = max(2, *(len(hull) for hull in hulls)) - 1 if count > 1 else max(1, len(hulls[0]) - 1)
    sizes, q = np.zeros((count, width), dtype=ints), np.zeros((count, width))
    quanta, dq = np.zeros((count, steps), dtype=ints), np.zeros((count, steps))
    leads_to = np.full((count, steps), -1, dtype=ints)
    after, seconds = np.zeros((count, depth)), np.ones((count, depth))
    pinned, wanted = np.full((count, depth), -1, dtype=ints), np.zeros((count, depth), dtype=ints)
    for v in range(count):
        choices = t.choices[v][0]
        for k, choice in enumerate(choices):
            sizes[v, k], q[v, k] = choice.quanta, choice.q
        for j, (old, new) in enumerate(pairwise(hulls[v])):
            quanta[v, j], dq[v, j] = choices[new].quanta - choices[old].quanta, choices[new].q - choices[old].q
            leads_to[v, j] = new
        for i, one in enumerate(t.trainings[v]):
            after[v, i], seconds[v, i] = one.accuracy, one.gpu_seconds
            pinned[v, i] = -2 if one.running else one.pinned
    weight, now, rates = np.array(t.weight), np.array(t.accuracy_now), np.array(t.rates[0])
    least_q = np.array([t.choices[v][0][hull[0]].q for v, hull in enumerate(hulls)])
    gain_now = weight[:, None] * now[:, None] * dq
    gain_after = weight[:, None, None] * after[:, :, None] * dq[:, None, :]
    # Steps of equal gain per quantum share a bucket; buckets are even in the logarithm.
    each = np.maximum(1, quanta)
    per_now, per_after = (
        np.log(np.maximum(1e-12, gain_now / each)),
        np.log(np.maximum(1e-12, gain_after / each[:, None])),
    )
    real = quanta > 0
    known = np.concatenate((per_now[real], per_after[real[:, None, :] & (after > 0.0)[:, :, None]]))
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
    scale = (NUM_BUCKETS - 1) / max(1e-9, high - low)
    linear = bool(np.allclose(rates, np.arange(len(rates)) / (len(rates) - 1)))
    return (
        sizes,
        q,
        np.array([len(per[0]) for per in t.choices], dtype=ints),
        weight,
        now,
        np.asarray(t.model.floor, dtype=np.float64),
        after,
        seconds,
        pinned,
        wanted,
        np.zeros(count, dtype=ints),
        rates,
        float(t.window_s),
        sum(t.choices[v][0][hull[0]].quanta for v, hull in enumerate(hulls)),
        SPLITTING[0] if linear else SPLITTING[1],
        weight * now * least_q,
        weight[:, None] * after * least_q[:, None],
        quanta,
        leads_to,
        gain_now,
        np.ascontiguousarray(gain_after),
        np.clip((per_now - low) * scale, 0, NUM_BUCKETS - 1).astype(ints),
        np.clip((per_after - low) * scale, 0, NUM_BUCKETS - 1).astype(ints, order="C"),
    )


def _hull(choices: list[Choice]) -> list[int]:
    """Choices on the upper concave envelope of (quanta, accuracy), from the smallest that keeps the floor."""
    found: list[int] = []
    for k, choice in enumerate(choices):
        if not choice.allowed or (found and choice.q <= choices[found[-1]].q):
            continue
        while len(found) > 1:
            a, b = choices[found[-2]], choices[found[-1]]
            if (b.q - a.q) * (choice.quanta - b.quanta) > (choice.q - b.q) * (b.quanta - a.quanta):
                break
            found.pop()
        found.append(k)
    return found


def moves_are_free(tables: Tables) -> bool:
    """Whether ``PoolSearch`` knows all that matters in this problem."""
    return len(tables.rates) == 1 and not tables.with_memory and not tables.with_changes
