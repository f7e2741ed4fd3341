"""A placed plan in the making: who is served where, which retrainings queue on which GPU, and what that is worth.

A *layout* gives every stream a host GPU and a base option there (held from the start), every retraining
a place in the queue of one GPU, and may let a stream move at the end of a queue into the GPU that has
then become free. Times follow from the queues, with exact durations. Whatever share is left over in any
interval lifts the streams on that GPU to better options, best accuracy per share first.

A link to a cloud is a queue like that of a GPU on which nobody is served: queue number ``num_gpus`` + position of the
link. Its times are those of the transfers (rule 8 of ``protocol.plan``).

The worth of a layout is a sum over GPUs, so that a change is evaluated on the few GPUs that it touches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from optimizer.execution import label_budget, labels_are_short
from optimizer.policies.timeline_model import Model

FOREVER = 1e18
OVER = 63  # in the code of a stream, instead of a retraining: its own window has ended
MOST_REMEMBERED = 200_000  # earnings of intervals kept, per GPU class


@dataclass(frozen=True, slots=True)
class Choice:
    """One inference option on one class. ``allowed``: keeps the stream's floor before the swap."""

    quanta: int
    q: float
    num_bytes: int
    allowed: bool
    lam: int


@dataclass(frozen=True, slots=True)
class Training:
    """One retraining configuration; ``pinned`` is a GPU position or -1.

    ``link``: position of the link over which it goes to the cloud, -1 = on a GPU; ``transfer_s`` is then (up, wait,
    down), and ``gamma`` counts on into the stream's cloud tuple. ``labels_s``: label seconds, 0 where none are short.
    """

    gamma: int
    accuracy: float
    gpu_seconds: float
    num_bytes: int
    swap_bytes: int
    pinned: int
    case: int
    labels_s: float = 0.0
    link: int = -1
    transfer_s: tuple[float, float, float] = (0.0, 0.0, 0.0)
    running: bool = False


class Queued(NamedTuple):
    """Retraining ``training`` (index) of ``stream`` with ``quanta`` of the GPU; 0 = all that inference leaves."""

    stream: int
    training: int
    quanta: int


class Run(NamedTuple):
    """A queued retraining with its times, seconds."""

    stream: int
    training: int
    quanta: int
    start_s: float
    end_s: float


@dataclass(slots=True)
class Stay:
    """One stream on one GPU from ``start_s`` to ``end_s``: steps (start, choice index) in order of time."""

    stream: int
    start_s: float
    end_s: float
    steps: list[tuple[float, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Placed:
    """A placed schedule: what runs and who stays on each GPU, and when; ``runs`` goes on with what links carry."""

    tables: Tables
    runs: list[list[Run]]
    stays: list[list[Stay]]


def counted(own_s: float, a: float, b: float) -> float:
    """The part of the time from ``a`` to ``b`` that lies before the end of an own window."""
    return 1.0 if own_s >= b else 0.0 if own_s <= a else (own_s - a) / (b - a)


class Tables:
    """What a layout looks up, as plain Python lists (the search runs in scalar code)."""

    def __init__(self, model: Model) -> None:
        problem = model.problem
        self.model = model
        self.window_s = problem.window_s
        self.num_streams, self.num_gpus = model.num_streams, len(problem.gpus)
        self.class_of = [0] * self.num_gpus
        for c, one in enumerate(model.classes):
            for g in one.members:
                self.class_of[g] = c
        self.capacity = [model.classes[c].capacity for c in self.class_of]
        self.memory = [float(gpu.memory_bytes) if gpu.memory_bytes else FOREVER for gpu in problem.gpus]
        self.with_memory = any(one.memory_row >= 0 for one in model.classes)
        self.with_changes = problem.config_change_s > 0.0 or problem.migration_s > 0.0
        self.change_s, self.migration_s = problem.config_change_s, problem.migration_s
        self.earnings: list[dict[tuple[int, ...], float]] = [{} for _ in model.classes]
        self.rates = [[0.0, *one.rates.tolist()] for one in model.classes]
        self.own_s: list[float] = model.own_s.tolist()
        self.weight = [w / own_s for w, own_s in zip(model.weight.tolist(), self.own_s, strict=True)]
        self.num_links = len(problem.links)
        self.label_budget_s = label_budget(problem) if labels_are_short(problem) else math.inf
        self.with_labels = math.isfinite(self.label_budget_s)
        self.accuracy_now: list[float] = model.accuracy_now.tolist()
        position = {gpu.gpu_id: g for g, gpu in enumerate(problem.gpus)}
        # Where each stream is served now: a position, -1 for a GPU that has left, None for nowhere.
        self.serving = [None if s.serving_gpu is None else position.get(s.serving_gpu, -1) for s in problem.streams]
        self.choices: list[list[list[Choice]]] = []
        self.serving_lam: list[int | None] = []
        for v, stream in enumerate(problem.streams):
            per_class: list[list[Choice]] = [[] for _ in model.classes]
            for l in range(model.option_class.shape[1]):
                c = int(model.option_class[v, l])
                if c >= 0:
                    per_class[c].append(
                        Choice(
                            int(model.option_quanta[v, l]),
                            float(model.option_q[v, l]),
                            int(model.option_bytes[v, l]),
                            bool(model.serves[v, l]),
                            int(model.option_lambda[v, l]),
                        )
                    )
            self.choices.append(per_class)
            named = [i for i, p in enumerate(stream.inference) if p.inference_id == stream.serving_inference]
            self.serving_lam.append(named[0] if named else None)
        self.trainings: list[list[Training]] = [[] for _ in range(self.num_streams)]
        for j, v in enumerate(model.case_stream.tolist()):
            gamma = int(model.case_gamma[j])
            if gamma >= len(problem.streams[v].retrain):
                self.trainings[v].append(self._sent(v, gamma, j))
            elif gamma >= 0:
                profile = problem.streams[v].retrain[gamma]
                pinned = -1 if profile.pinned_gpu is None else position[profile.pinned_gpu]
                self.trainings[v].append(
                    Training(
                        gamma,
                        profile.accuracy_after,
                        profile.gpu_seconds,
                        profile.memory_bytes,
                        profile.swap_bytes,
                        pinned,
                        j,
                        profile.label_seconds if self.with_labels else 0.0,
                    )
                )

    def _sent(self, v: int, gamma: int, case: int) -> Training:
        """A retraining in the cloud."""
        problem = self.model.problem
        profile = problem.streams[v].cloud[gamma - len(problem.streams[v].retrain)]
        position = next(i for i, link in enumerate(problem.links) if link.link_id == profile.link_id)
        link = problem.links[position]
        up_s, down_s = profile.up_bytes / link.up_bytes_per_s, profile.down_bytes / link.down_bytes_per_s
        return Training(
            gamma,
            profile.accuracy_after,
            0.0,
            0,
            profile.swap_bytes,
            -1,
            case,
            profile.label_seconds if self.with_labels else 0.0,
            position,
            (up_s, profile.cloud_seconds, down_s),
            profile.running,
        )

    def queue_of(self, training: Training) -> int:
        """The queue of a retraining in the cloud; -1 for one on any GPU."""
        return self.num_gpus + training.link if training.link >= 0 else -1


class Layout:
    """A layout with its times and worth. Mutate the lists, then ``settle`` the GPUs concerned."""

    def __init__(self, tables: Tables) -> None:
        self.t = tables
        count, gpus = tables.num_streams, tables.num_gpus
        self.host = [-1] * count
        self.base = [0] * count
        self.second = [-1] * count  # GPU that the stream moves to at the end of its queue, -1 = none
        self.second_base = [0] * count
        gpus += tables.num_links  # queues of links are behind those of GPUs
        self.residents: list[list[int]] = [[] for _ in range(gpus)]
        self.arrivals: list[list[int]] = [[] for _ in range(gpus)]
        self.queue: list[list[Queued]] = [[] for _ in range(gpus)]
        self.where = [-1] * count  # GPU on whose queue the stream's retraining is
        self.training = [-1] * count
        self.swap_s = [FOREVER] * count
        self.accuracy = list(tables.accuracy_now)
        self.leave_s = [FOREVER] * count
        self.runs: list[list[Run]] = [[] for _ in range(gpus)]
        self.worth = [0.0] * gpus
        self.evaluations = 0

    @property
    def total(self) -> float:
        return sum(self.worth)

    def swap_room(self, v: int) -> int:
        """Bytes that a hot swap of ``v`` keeps free beside its inference."""
        return self.t.trainings[v][self.training[v]].swap_bytes if self.training[v] >= 0 else 0

    # ------------------------------------------------------------ times

    def schedule(self, g: int) -> list[Run] | None:
        """Times of the queue of ``g``; None where something never fits or never ends in the window."""
        t = self.t
        if g >= t.num_gpus:
            return self._transfers(g)
        c = t.class_of[g]
        free = t.capacity[g]
        room = t.memory[g]
        for v in self.residents[g]:
            choice = t.choices[v][c][self.base[v]]
            free -= choice.quanta
            if t.with_memory:
                room -= choice.num_bytes + self.swap_room(v)
        if free < 0 or room < 0:
            return None
        runs: list[Run] = []
        active: list[tuple[float, int, int]] = []
        now, limit, limit_bytes = 0.0, free, room
        rates = t.rates[c]
        for entry in self.queue[g]:
            training = t.trainings[entry.stream][entry.training]
            quanta = min(entry.quanta, limit) if entry.quanta else limit
            held = training.num_bytes if t.with_memory else 0
            pinned = training.pinned if training.link < 0 else t.num_gpus
            if quanta <= 0 or held > limit_bytes or (pinned >= 0 and pinned != g):
                return None
            while free < quanta or room < held:
                active.sort()
                now, released, released_bytes = active.pop(0)
                free += released
                room += released_bytes
            if training.pinned >= 0 and now > 0.0:
                return None
            end_s = now + training.gpu_seconds / rates[quanta]
            if end_s >= t.own_s[entry.stream]:
                return None
            runs.append(Run(entry.stream, entry.training, quanta, now, end_s))
            active.append((end_s, quanta, held))
            free -= quanta
            room -= held
        return runs

    def _transfers(self, g: int) -> list[Run] | None:
        """Times of the queue of a link; None where a model comes too late or a running retraining does not go first."""
        t = self.t
        runs: list[Run] = []
        up_end_s = down_end_s = 0.0
        fresh = False
        for entry in self.queue[g]:
            training = t.trainings[entry.stream][entry.training]
            if t.queue_of(training) != g or (training.running and fresh):
                return None
            fresh = not training.running
            up_s, wait_s, down_s = training.transfer_s
            start_s = up_end_s
            up_end_s += up_s
            down_end_s = max(down_end_s, up_end_s + wait_s) + down_s
            if down_end_s >= t.own_s[entry.stream]:
                return None
            runs.append(Run(entry.stream, entry.training, 0, start_s, down_end_s))
        return runs

    def labels_fit(self) -> bool:
        """Whether the chosen retrainings keep to the label budget."""
        t = self.t
        used_s = sum(t.trainings[v][i].labels_s for v, i in enumerate(self.training) if i >= 0)
        return used_s <= t.label_budget_s

    # ------------------------------------------------------------ worth

    def value(self, g: int, runs: list[Run], stays: list[Stay] | None = None) -> float | None:
        """Worth of everything served on ``g``; None where memory overflows. ``stays`` receives the steps."""
        self.evaluations += 1
        t = self.t
        if g >= t.num_gpus:
            return 0.0
        c = t.class_of[g]
        if stays is None and not t.with_memory and not t.with_changes:
            return self._plain_value(g, c, runs)
        window_s = t.window_s
        swap_s, leave_s = self.swap_s, self.leave_s
        marks = {0.0, window_s}
        jobs: list[tuple[float, float, int, list[Choice], int]] = []
        for v in self.residents[g]:
            until = leave_s[v]
            jobs.append((0.0, until, v, t.choices[v][c], self.base[v]))
            if swap_s[v] < window_s:
                marks.add(swap_s[v])
            if until < window_s:
                marks.add(until)
        closing = 0.0
        for run in runs:
            marks.add(run.start_s)
            marks.add(run.end_s)
            closing = max(closing, run.end_s)
        if self.arrivals[g] and not runs:
            return None
        for v in self.arrivals[g]:
            jobs.append((closing, window_s, v, t.choices[v][c], self.second_base[v]))
            if closing < swap_s[v] < window_s:
                marks.add(swap_s[v])
        if not jobs:
            return 0.0
        times = sorted(marks)
        total = 0.0
        accuracy, accuracy_now, weight = self.accuracy, t.accuracy_now, t.weight
        history: list[list[tuple[float, float, float, int]]] = [[] for _ in jobs]
        keep = t.with_changes or stays is not None
        for a, b in pairwise(times):
            free = t.capacity[g]
            room = t.memory[g]
            for run in runs:
                if run.start_s <= a < run.end_s:
                    free -= run.quanta
                    if t.with_memory:
                        room -= t.trainings[run.stream][run.training].num_bytes
            here: list[list[float]] = []
            options: list[list[Choice]] = []
            for index, (start_s, end_s, v, choices, base) in enumerate(jobs):
                if start_s <= a < end_s:
                    free -= choices[base].quanta
                    swapped = swap_s[v] <= a
                    if t.with_memory:
                        room -= choices[base].num_bytes + (0 if swapped else self.swap_room(v))
                    reached = accuracy[v] if swapped else accuracy_now[v]
                    here.append([weight[v] * reached * counted(t.own_s[v], a, b), base, index])
                    options.append(choices)
            if free < 0 or room < 0:
                return None
            if free > 0:
                self._lift(here, options, free, room)
            if keep:
                for rate, level, job_index in here:
                    history[int(job_index)].append((a, b, rate, int(level)))
            if not t.with_changes:
                earned = 0.0
                for (rate, level, _), choices in zip(here, options, strict=True):
                    earned += rate * choices[int(level)].q
                total += earned * (b - a)
        if t.with_changes:
            for index, job in enumerate(jobs):
                earned, levels = self._with_changes(g, job, history[index], index < len(self.residents[g]))
                total += earned
                history[index] = [(*h[:3], level) for h, level in zip(history[index], levels, strict=True)]
        if stays is not None:
            for (start_s, end_s, v, _, _), seen in zip(jobs, history, strict=True):
                stay = Stay(v, start_s, min(end_s, window_s))
                for a, _, _, level in seen:
                    if not stay.steps or stay.steps[-1][1] != level:
                        stay.steps.append((a, level))
                if stay.steps:
                    stays.append(stay)
        return total

    def _plain_value(self, g: int, c: int, runs: list[Run]) -> float | None:
        """The same where neither memory nor changes matter: what an interval earns per second is remembered."""
        t = self.t
        window_s = t.window_s
        swap_s, leave_s, training = self.swap_s, self.leave_s, self.training
        marks = {0.0, window_s}
        jobs = []
        choices, own_s = t.choices, t.own_s
        capacity = t.capacity[g]
        for v in self.residents[g]:
            swap, until, base = swap_s[v], leave_s[v], self.base[v]
            if swap < window_s:
                marks.add(swap)
            if until < window_s:
                marks.add(until)
            own = own_s[v]
            code = (v << 12) + (base << 6)
            jobs.append((0.0, until, swap, own, code, code + 1 + training[v], choices[v][c][base].quanta))
        closing = 0.0
        for _, _, _, start_s, end_s in runs:
            marks.add(start_s)
            marks.add(end_s)
            closing = max(closing, end_s)
        if self.arrivals[g]:
            if not runs:
                return None
            for v in self.arrivals[g]:
                swap, base = swap_s[v], self.second_base[v]
                if closing < swap < window_s:
                    marks.add(swap)
                own = own_s[v]
                code = (v << 12) + (base << 6)
                jobs.append((closing, window_s, swap, own, code, code + 1 + training[v], choices[v][c][base].quanta))
        if not jobs:
            return 0.0
        times = sorted(marks)
        total, a = 0.0, 0.0
        known = t.earnings[c]
        for b in times[1:]:
            free = capacity
            for _, _, quanta, start_s, end_s in runs:
                if start_s <= a < end_s:
                    free -= quanta
            key = []
            parts: list[float] | None = None
            for start_s, until, swap, own, before, after, quanta in jobs:
                if start_s <= a < until:
                    free -= quanta
                    key.append((before | OVER) if own <= a else after if swap <= a else before)
                    if parts is None and own < b:
                        parts = [1.0] * (len(key) - 1)
                    if parts is not None:
                        parts.append(counted(own, a, b))
            if free < 0:
                return None
            key.append(free)
            name = tuple(key)
            rate = known.get(name) if parts is None else self._earning(c, name, parts)
            if rate is None:
                rate = self._earning(c, name)
                if len(known) < MOST_REMEMBERED:
                    known[name] = rate
            total += rate * (b - a)
            a = b
        return total

    def _earning(self, c: int, name: tuple[int, ...], parts: list[float] | None = None) -> float:
        """What the streams coded in ``name`` earn per second; its last number is the free quanta.

        ``parts``: the part of the time that counts for each of them, None = all of it.
        """
        t = self.t
        here: list[list[float]] = []
        options: list[list[Choice]] = []
        for code in name[:-1]:
            v, base, swapped = code >> 12, (code >> 6) & 63, code & 63
            accuracy = t.trainings[v][swapped - 1].accuracy if 0 < swapped < OVER else t.accuracy_now[v]
            if swapped == OVER:
                accuracy = 0.0  # its own window is over
            elif parts is not None:
                accuracy *= parts[len(here)]
            here.append([t.weight[v] * accuracy, base, 0])
            options.append(t.choices[v][c])
        self._lift(here, options, name[-1], FOREVER)
        return sum(row[0] * choices[int(row[1])].q for row, choices in zip(here, options, strict=True))

    def _lift(self, here: list[list[float]], options: list[list[Choice]], free: int, room: float) -> None:
        """Hand ``free`` quanta to the streams that are ``here``, most accuracy per quantum first."""
        with_memory = self.t.with_memory
        while free > 0:
            best, who, what, cost = 0.0, -1, 0, 0
            for index, row in enumerate(here):
                choices = options[index]
                level = int(row[1])
                current = choices[level]
                for k in range(level + 1, len(choices)):
                    choice = choices[k]
                    more = choice.quanta - current.quanta
                    if more > free:
                        break
                    if with_memory and choice.num_bytes - current.num_bytes > room:
                        continue
                    ratio = row[0] * (choice.q - current.q) / (more or 0.5)
                    if ratio > best:
                        best, who, what, cost = ratio, index, k, more
            if who < 0:
                return
            if with_memory:
                room -= options[who][what].num_bytes - options[who][int(here[who][1])].num_bytes
            here[who][1] = what
            free -= cost

    def _with_changes(
        self,
        g: int,
        job: tuple[float, float, int, list[Choice], int],
        seen: list[tuple[float, float, float, int]],
        from_start: bool,
    ) -> tuple[float, list[int]]:
        """Best path through the levels that are open to a stream when every change has its price."""
        t = self.t
        _, _, v, choices, base = job
        if not seen:
            return 0.0, []
        allowed = sorted({base, *(level for _, _, _, level in seen)})
        state: dict[int, float] = {}
        back: list[dict[int, int]] = []
        for index, (a, b, rate, top) in enumerate(seen):
            follow: dict[int, float] = {}
            origin: dict[int, int] = {}
            ceiling = choices[top]
            best_from = max(state, key=lambda k: state[k]) if state else -1
            for level in allowed:
                choice = choices[level]
                if choice.quanta > ceiling.quanta or (t.with_memory and choice.num_bytes > ceiling.num_bytes):
                    continue
                if choice.q < choices[base].q:
                    continue
                earned = rate * choice.q
                if index == 0:
                    source, before = level, -earned * self._start_cost_s(g, v, choice, from_start)
                else:
                    source, before = best_from, state[best_from] - earned * t.change_s
                    if level in state and state[level] >= before:
                        source, before = level, state[level]
                follow[level] = before + earned * (b - a)
                origin[level] = source
            state = follow
            back.append(origin)
        level = max(state, key=lambda k: state[k])
        earned = state[level]
        path = [level]
        for origin in reversed(back[1:]):
            level = origin[level]
            path.append(level)
        path.reverse()
        return earned, path

    def _start_cost_s(self, g: int, v: int, choice: Choice, from_start: bool) -> float:
        t = self.t
        if not from_start:
            return t.migration_s
        if t.serving[v] is None:
            return 0.0
        if t.serving[v] != g:
            return t.migration_s
        return 0.0 if t.serving_lam[v] in (None, choice.lam) else t.change_s

    # ------------------------------------------------------------ changes

    def settle(self, gpus: set[int]) -> Undo | None:
        """Recompute ``gpus`` and whatever depends on them. None (nothing changed) where it is infeasible."""
        t = self.t
        schedules: dict[int, list[Run]] = {}
        if t.with_labels and not self.labels_fit():
            return None
        for g in gpus:
            runs = self.schedule(g)
            if runs is None:
                return None
            schedules[g] = runs
        undo = Undo()
        touched = set(gpus)
        for g, runs in schedules.items():
            closing = 0.0
            for run in runs:
                v = run.stream
                closing = max(closing, run.end_s)
                accuracy = t.trainings[v][run.training].accuracy
                if self.swap_s[v] != run.end_s or self.accuracy[v] != accuracy:
                    undo.swaps.append((v, self.swap_s[v], self.accuracy[v]))
                    self.swap_s[v], self.accuracy[v] = run.end_s, accuracy
                    touched.add(self.host[v])
                    if self.second[v] >= 0:
                        touched.add(self.second[v])
            for v in self.arrivals[g]:
                if self.leave_s[v] != closing:
                    undo.leaves.append((v, self.leave_s[v]))
                    self.leave_s[v] = closing
                    touched.add(self.host[v])
        for g in touched:
            worth = self.value(g, schedules.get(g, self.runs[g])) if g >= 0 else 0.0
            if worth is None:
                self.restore(undo)
                return None
            if g >= 0:
                undo.worths.append((g, self.worth[g], self.runs[g]))
                undo.gain += worth - self.worth[g]
                self.worth[g] = worth
        self_runs = self.runs
        for g, runs in schedules.items():
            self_runs[g] = runs
        return undo

    def restore(self, undo: Undo) -> None:
        for v, swap_s, accuracy in reversed(undo.swaps):
            self.swap_s[v], self.accuracy[v] = swap_s, accuracy
        for v, leave_s in reversed(undo.leaves):
            self.leave_s[v] = leave_s
        for g, worth, runs in reversed(undo.worths):
            self.worth[g], self.runs[g] = worth, runs

    def placed(self) -> Placed:
        """What the layout comes to: runs and stays, with times."""
        stays: list[list[Stay]] = []
        for g, runs in enumerate(self.runs):
            here: list[Stay] = []
            self.value(g, runs, here)
            stays.append(here)
        return Placed(self.t, [list(runs) for runs in self.runs], stays)

    def snapshot(self) -> Snapshot:
        return Snapshot(
            list(self.host),
            list(self.base),
            list(self.second),
            list(self.second_base),
            [list(x) for x in self.queue],
            self.total,
        )

    def load(self, snapshot: Snapshot) -> None:
        """Become ``snapshot``; it was feasible when it was taken."""
        t = self.t
        self.host, self.base = list(snapshot.host), list(snapshot.base)
        self.second, self.second_base = list(snapshot.second), list(snapshot.second_base)
        self.queue = [list(x) for x in snapshot.queue]
        gpus = range(t.num_gpus + t.num_links)
        self.residents = [[] for _ in gpus]
        self.arrivals = [[] for _ in gpus]
        self.where, self.training = [-1] * t.num_streams, [-1] * t.num_streams
        self.swap_s, self.leave_s = [FOREVER] * t.num_streams, [FOREVER] * t.num_streams
        self.accuracy = list(t.accuracy_now)
        for v, g in enumerate(self.host):
            self.residents[g].append(v)
            if self.second[v] >= 0:
                self.arrivals[self.second[v]].append(v)
        for g in gpus:
            for entry in self.queue[g]:
                self.where[entry.stream], self.training[entry.stream] = g, entry.training
        if self.settle(set(gpus)) is None:
            raise RuntimeError("a layout that was feasible is no longer")


@dataclass(slots=True)
class Undo:
    """What ``settle`` changed, for taking it back, and what it gained."""

    swaps: list[tuple[int, float, float]] = field(default_factory=list)
    leaves: list[tuple[int, float]] = field(default_factory=list)
    worths: list[tuple[int, float, list[Run]]] = field(default_factory=list)
    gain: float = 0.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    host: list[int]
    base: list[int]
    second: list[int]
    second_base: list[int]
    queue: list[list[Queued]]
    total: float
