"""Local search over layouts: simulated annealing with moves drawn where the prices say that it matters."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable

from optimizer.policies.timeline_layout import FOREVER, Layout, Queued, Snapshot

GUIDED = 0.7  # part of the retraining moves that go where a quick estimate says
NOISE = 1e-3  # of that estimate, per stream
MANY_GPUS = 12

Undoing = Callable[[], None]


class Search:
    """Improves one layout in place and remembers the best it has seen.

    ``trainings``: per stream the indices of the retrainings worth trying, best first.
    """

    def __init__(self, layout: Layout, trainings: list[list[int]], seed: int) -> None:
        self.layout, self.t = layout, layout.t
        self.trainings = trainings
        self.rng = random.Random(seed)
        self.best: Snapshot = layout.snapshot()
        self._moves: list[tuple[float, Callable[[int], tuple[set[int], Undoing] | None]]] = [
            (0.42, self._requeue),
            (0.56, self._exchange),
            (0.72, self._rebase),
            (0.80, self._rehost),
            (0.92, self._exchange_hosts),
            (1.00, self._move_later),
        ]
        self.total = layout.total
        self.noise = 0.0

    def run(self, deadline: float, steps: int, hot: float, goal: float) -> int:
        """Anneal for ``steps`` steps from temperature ``hot``, until ``deadline`` (monotonic) or ``goal``."""
        rng, layout, count = self.rng, self.layout, self.t.num_streams
        random_, exp = rng.random, math.exp
        moves = self._moves
        for step in range(steps):
            if not step % 64 and time.monotonic() > deadline:
                self._remember()
                return step
            cooling = 1.0 - step / steps
            temperature = hot * cooling * cooling
            self.noise = 2.0 * temperature + NOISE / count
            draw = random_()
            move = next(m for limit, m in moves if draw < limit)
            made = move(int(random_() * count))
            if made is None:
                continue
            gpus, undo_move = made
            undo = layout.settle(gpus)
            if undo is None:
                undo_move()
                continue
            if undo.gain < 0.0:
                if temperature <= 0.0 or random_() >= exp(max(-700.0, undo.gain / temperature)):
                    layout.restore(undo)
                    undo_move()
                    continue
                if self.total > self.best.total + 1e-12:
                    layout.restore(undo)
                    undo_move()
                    self._remember()
                    continue
            self.total += undo.gain
            if self.total >= goal:
                self._remember()
                return step
        self._remember()
        return steps

    def _remember(self) -> None:
        """Keep the layout as it is now; done only when it is about to get worse, for copying costs time."""
        self.total = self.layout.total
        if self.total > self.best.total:
            self.best = self.layout.snapshot()

    # ------------------------------------------------------------ moves: (GPUs concerned, how to take it back)

    def _requeue(self, v: int) -> tuple[set[int], Undoing] | None:
        """Put the retraining of ``v`` elsewhere, with another configuration or share, or drop it."""
        layout, rng, t = self.layout, self.rng, self.t
        candidates = self.trainings[v]
        if not candidates:
            return None
        old_g, old_training = layout.where[v], layout.training[v]
        old_swap, old_accuracy = layout.swap_s[v], layout.accuracy[v]
        saved: dict[int, list[Queued]] = {}
        gpus: set[int] = set()
        old: Queued | None = None
        if old_g >= 0:
            queue = layout.queue[old_g]
            saved[old_g] = list(queue)
            at = next(i for i, entry in enumerate(queue) if entry.stream == v)
            old = queue.pop(at)
            gpus.add(old_g)
        if old is not None and rng.random() < 0.06:
            layout.where[v], layout.training[v] = -1, -1
            layout.swap_s[v], layout.accuracy[v] = FOREVER, t.accuracy_now[v]
            gpus.add(layout.host[v])
            if layout.second[v] >= 0:
                gpus.add(layout.second[v])
        else:
            if old is not None and rng.random() < 0.5:
                training = old.training
            else:
                training = candidates[int(len(candidates) * rng.random() ** 2)]
            pinned = t.trainings[v][training].pinned
            link = t.queue_of(t.trainings[v][training])
            g = old_g if 0 <= old_g < t.num_gpus and rng.random() < 0.4 else int(rng.random() * t.num_gpus)
            if pinned >= 0:
                g = pinned
            quanta = 0 if rng.random() < 0.75 else 1 + int(rng.random() * t.capacity[g])
            if link >= 0:
                g, quanta = link, 0
            at = 0 if pinned >= 0 else int(rng.random() * (len(layout.queue[g]) + 1))
            if pinned < 0 and link < 0 and rng.random() < GUIDED:
                place = self._good_place(v, training)
                if place is not None:
                    g, at, quanta = *place, 0
            if g not in saved:
                saved[g] = list(layout.queue[g])
            layout.queue[g].insert(at, Queued(v, training, quanta))
            layout.where[v], layout.training[v] = g, training
            gpus.add(g)
            if t.with_memory:
                gpus.add(layout.host[v])
                if layout.second[v] >= 0:
                    gpus.add(layout.second[v])

        def undo() -> None:
            for g, queue in saved.items():
                layout.queue[g] = queue
            layout.where[v], layout.training[v] = old_g, old_training
            layout.swap_s[v], layout.accuracy[v] = old_swap, old_accuracy

        return gpus, undo

    def _good_place(self, v: int, training: int) -> tuple[int, int] | None:
        """(GPU, position) for a retraining of ``v``, drawn towards those that gain most if queues run one by one.

        Gain of a place: what its end before the window's end is worth, less the delay of all behind it.
        """
        layout, t, noise = self.layout, self.t, self.noise
        random_, log = self.rng.random, math.log
        wanted = t.trainings[v][training]
        worth = t.weight[v] * (wanted.accuracy - t.accuracy_now[v])
        best, place = -math.inf, None
        for g in self._some_gpus():
            limit = t.capacity[g]
            c = t.class_of[g]
            for u in layout.residents[g]:
                limit -= t.choices[u][c][layout.base[u]].quanta
            if limit <= 0:
                continue
            rate = t.rates[c][limit]
            length_s = wanted.gpu_seconds / rate
            queue = layout.queue[g]
            behind = 0.0
            ends = 0.0
            delays: list[tuple[float, float]] = []
            for entry in queue:
                u = entry.stream
                other = t.trainings[u][entry.training]
                gain = t.weight[u] * (other.accuracy - t.accuracy_now[u])
                delays.append((ends, gain))
                behind += gain
                ends += other.gpu_seconds / rate
            delays.append((ends, 0.0))
            for at, (start_s, gain) in enumerate(delays):
                if start_s + length_s < t.own_s[v]:
                    score = worth * (t.own_s[v] - start_s - length_s) - behind * length_s
                    score -= noise * log(-log(random_() + 1e-300) + 1e-300)
                    if score > best:
                        best, place = score, (g, at)
                behind -= gain
        return place

    def _some_gpus(self) -> list[int] | range:
        """All GPUs, or a sample of them where there are many."""
        count = self.t.num_gpus
        return range(count) if count <= MANY_GPUS else self.rng.sample(range(count), MANY_GPUS)

    def _exchange(self, v: int) -> tuple[set[int], Undoing] | None:
        """Let two retrainings change places in their queues."""
        layout, rng = self.layout, self.rng
        u = int(rng.random() * self.t.num_streams)
        g, h = layout.where[v], layout.where[u]
        if u == v or g < 0 or h < 0 or (g != h and max(g, h) >= self.t.num_gpus):
            return None
        saved = {g: list(layout.queue[g]), h: list(layout.queue[h])}
        i = next(i for i, entry in enumerate(layout.queue[g]) if entry.stream == v)
        j = next(i for i, entry in enumerate(layout.queue[h]) if entry.stream == u)
        one, other = layout.queue[g][i], layout.queue[h][j]
        layout.queue[g][i] = Queued(u, other.training, one.quanta)
        layout.queue[h][j] = Queued(v, one.training, other.quanta)
        layout.where[v], layout.where[u] = h, g

        def undo() -> None:
            for k, queue in saved.items():
                layout.queue[k] = queue
            layout.where[v], layout.where[u] = g, h

        return {g, h}, undo

    def _rebase(self, v: int) -> tuple[set[int], Undoing] | None:
        """Hold another option for ``v`` from the start."""
        layout = self.layout
        g, old = layout.host[v], layout.base[v]
        new = self._draw_choice(v, g)
        if new < 0 or new == old:
            return None
        layout.base[v] = new

        def undo() -> None:
            layout.base[v] = old

        return {g}, undo

    def _draw_choice(self, v: int, g: int) -> int:
        choices = self.t.choices[v][self.t.class_of[g]]
        if not choices:
            return -1
        index = int(self.rng.random() * len(choices))
        return index if choices[index].allowed else -1

    def _spare(self, g: int) -> int:
        """Quanta of ``g`` that its residents do not hold."""
        layout, t = self.layout, self.t
        choices, c = t.choices, t.class_of[g]
        spare = t.capacity[g]
        for u in layout.residents[g]:
            spare -= choices[u][c][layout.base[u]].quanta
        return spare

    def _fitting_choice(self, v: int, g: int, spare: int) -> int:
        """An option of ``v`` on ``g`` within ``spare`` quanta, -1 = none: often the largest, else any."""
        choices = self.t.choices[v][self.t.class_of[g]]
        fitting = [i for i, choice in enumerate(choices) if choice.allowed and choice.quanta <= spare]
        if not fitting:
            return -1
        return fitting[-1] if self.rng.random() < 0.6 else fitting[int(self.rng.random() * len(fitting))]

    def _rehost(self, v: int) -> tuple[set[int], Undoing] | None:
        """Serve ``v`` on another GPU."""
        layout, rng, t = self.layout, self.rng, self.t
        g = layout.host[v]
        h = int(rng.random() * t.num_gpus)
        if g == h or layout.second[v] == h:
            return None
        old = layout.base[v]
        new = old if t.class_of[g] == t.class_of[h] and rng.random() < 0.3 else -1
        if new < 0:
            new = self._fitting_choice(v, h, self._spare(h))
        if new < 0:
            return None
        self._place(v, g, h, new)
        return {g, h}, lambda: self._place(v, h, g, old)

    def _place(self, v: int, g: int, h: int, base: int) -> None:
        layout = self.layout
        layout.residents[g].remove(v)
        layout.residents[h].append(v)
        layout.host[v], layout.base[v] = h, base

    def _exchange_hosts(self, v: int) -> tuple[set[int], Undoing] | None:
        """Let two streams change GPUs."""
        layout, t = self.layout, self.t
        u = int(self.rng.random() * t.num_streams)
        g, h = layout.host[v], layout.host[u]
        if g == h or layout.second[v] == h or layout.second[u] == g:
            return None
        old_v, old_u = layout.base[v], layout.base[u]
        same = t.class_of[g] == t.class_of[h]
        new_v = old_v if same else self._draw_choice(v, h)
        new_u = old_u if same else self._draw_choice(u, g)
        if new_v < 0 or new_u < 0:
            return None
        self._place(v, g, h, new_v)
        self._place(u, h, g, new_u)

        def undo() -> None:
            self._place(v, h, g, old_v)
            self._place(u, g, h, old_u)

        return {g, h}, undo

    def _move_later(self, v: int) -> tuple[set[int], Undoing] | None:
        """Let ``v`` move, or move no longer, to a GPU whose queue has ended."""
        layout, rng, t = self.layout, self.rng, self.t
        old, old_base, old_leave = layout.second[v], layout.second_base[v], layout.leave_s[v]
        new, base = -1, 0
        if old < 0 or rng.random() < 0.5:
            new = int(rng.random() * t.num_gpus)
            if new == layout.host[v] or not layout.queue[new]:
                return None
            spare = self._spare(new)
            for u in layout.arrivals[new]:
                if u != v:
                    spare -= t.choices[u][t.class_of[new]][layout.second_base[u]].quanta
            base = self._fitting_choice(v, new, spare)
            if base < 0:
                return None
        gpus = {g for g in (old, new) if g >= 0}
        gpus.add(layout.host[v])
        self._second(v, new, base, FOREVER)
        return gpus, lambda: self._second(v, old, old_base, old_leave)

    def _second(self, v: int, g: int, base: int, leave_s: float) -> None:
        layout = self.layout
        if layout.second[v] >= 0:
            layout.arrivals[layout.second[v]].remove(v)
        if g >= 0:
            layout.arrivals[g].append(v)
        layout.second[v], layout.second_base[v], layout.leave_s[v] = g, base, leave_s
