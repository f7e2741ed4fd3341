"""From a layout to a plan of events: every start names the retraining ends that free what it takes.

Share and memory flow from holder to holder like parcels. A parcel carries the set of retraining ends
after which it is free; whoever takes it inherits that set as ``after``. Hence nothing is ever handed out
twice, whatever the real durations are and in whatever order the retrainings end (docs/timeline.md, section 6).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from optimizer.execution import share_of
from optimizer.policies.timeline_layout import Placed, Run
from protocol.plan import Assignment, CloudStep, InferenceStep, RetrainStep

Ends = frozenset[int]  # streams whose retrainings have ended
NOTHING: Ends = frozenset()


@dataclass(slots=True)
class _Pool:
    """One resource of one GPU: parcels of (amount, when free)."""

    parcels: list[tuple[int, Ends]]

    def take(self, amount: int, known: Ends) -> Ends:
        """Take ``amount``; returns ``known`` and whatever else has to have ended. The caller has checked ``free``."""
        while amount > 0:
            index = min(range(len(self.parcels)), key=lambda i: (len(self.parcels[i][1] - known), i))
            size, ends = self.parcels.pop(index)
            if size > amount:
                self.parcels.append((size - amount, ends))
            amount -= size
            known |= ends
        return known

    def give(self, amount: int, ends: Ends) -> None:
        if amount > 0:
            self.parcels.append((amount, ends))

    @property
    def free(self) -> int:
        return sum(size for size, _ in self.parcels)


@dataclass(slots=True)
class _Change:
    """One stream's inference goes from one holding to another: (GPU, quanta, bytes), None = not yet served."""

    stream: int
    choice: int
    old: tuple[int, int, int] | None
    new: tuple[int, int, int]
    known: Ends
    is_step: bool = True

    def wants(self) -> list[tuple[int, int, int]]:
        """(GPU, quanta, bytes) to be taken."""
        g, quanta, num_bytes = self.new
        if self.old is None or self.old[0] != g:
            return [self.new]
        return [(g, max(0, quanta - self.old[1]), max(0, num_bytes - self.old[2]))]

    def returns(self) -> list[tuple[int, int, int]]:
        if self.old is None:
            return []
        if self.old[0] != self.new[0]:
            return [self.old]
        return [(self.old[0], max(0, self.old[1] - self.new[1]), max(0, self.old[2] - self.new[2]))]


@dataclass(slots=True)
class _Served:
    """What one stream holds at the moment of planning, and its steps so far: (GPU, choice, new ends)."""

    holding: tuple[int, int, int] | None = None
    choice: int = -1
    known: Ends = NOTHING
    steps: list[tuple[int, int, Ends]] = field(default_factory=list)


class _Emitter:
    def __init__(self, placed: Placed) -> None:
        self.placed, self.t = placed, placed.tables
        memory = [int(m) if self.t.with_memory and m < 1e17 else 1 << 60 for m in self.t.memory]
        self.shares = [_Pool([(c, NOTHING)]) for c in self.t.capacity]
        self.memory = [_Pool([(m, NOTHING)]) for m in memory]
        self.streams = [_Served() for _ in range(self.t.num_streams)]
        self.starts: dict[int, Ends] = {}
        self.ended: set[int] = set()
        self.names = [stream.stream_id for stream in placed.tables.model.problem.streams]
        self.runs: dict[int, tuple[int, Run]] = {r.stream: (g, r) for g, runs in enumerate(placed.runs) for r in runs}

    # ------------------------------------------------------------ in order of planned time

    def walk(self) -> None:
        events: dict[float, list[tuple[int, int, int]]] = {}
        for g, stays in enumerate(self.placed.stays):
            for stay in stays:
                for start_s, choice in stay.steps:
                    events.setdefault(start_s, []).append((stay.stream, g, choice))
        times = set(events)
        ending: dict[float, list[int]] = {}
        starting: dict[float, list[int]] = {}
        for v, (g, run) in self.runs.items():
            ending.setdefault(run.end_s, []).append(v)
            if g < self.t.num_gpus:
                starting.setdefault(run.start_s, []).append(v)
        for now in sorted(times | set(ending) | set(starting)):
            ended = ending.get(now, [])
            self.ended.update(ended)
            for v in ended:
                g, run = self.runs[v]
                if g >= self.t.num_gpus:
                    continue  # the cloud holds nothing here
                ends = frozenset((v,))
                self.shares[g].give(run.quanta, ends)
                self.memory[g].give(self._run_bytes(run), ends)
            trigger = frozenset(ended)
            changes = [self._change(v, g, choice, trigger) for v, g, choice in events.get(now, [])]
            moved = {change.stream for change in changes}
            if self.t.with_memory:
                changes += [self._swap_release(v) for v in ended if v not in moved]
            self._carry_out(changes, sorted(starting.get(now, []), key=lambda v: self.runs[v][0]))

    def _run_bytes(self, run: Run) -> int:
        return self.t.trainings[run.stream][run.training].num_bytes if self.t.with_memory else 0

    def _swap_room(self, v: int) -> int:
        if v not in self.runs:
            return 0
        return self.t.trainings[v][self.runs[v][1].training].swap_bytes

    def _bytes(self, v: int, g: int, choice: int, swapped: bool) -> int:
        if not self.t.with_memory:
            return 0
        held = self.t.choices[v][self.t.class_of[g]][choice].num_bytes
        return held if swapped or v not in self.runs else held + self._swap_room(v)

    def _change(self, v: int, g: int, choice: int, trigger: Ends) -> _Change:
        served = self.streams[v]
        swapped = v in self.ended
        known = served.known | trigger
        if swapped and self.t.with_memory and self._swap_room(v):
            known |= {v}  # else it might come before the swap and need room for it
        quanta = self.t.choices[v][self.t.class_of[g]][choice].quanta
        return _Change(v, choice, served.holding, (g, quanta, self._bytes(v, g, choice, swapped)), known)

    def _swap_release(self, v: int) -> _Change:
        served = self.streams[v]
        assert served.holding is not None
        g, quanta, _ = served.holding
        new = (g, quanta, self._bytes(v, g, served.choice, True))
        return _Change(v, served.choice, served.holding, new, served.known | {v}, is_step=False)

    def _carry_out(self, changes: list[_Change], starting: list[int]) -> None:
        """All that happens at one instant: who only gives goes first, the rest as soon as it fits."""
        pending = sorted(changes, key=lambda change: sum(q + b for _, q, b in change.wants()))
        progress = True
        while progress and (pending or starting):
            progress = False
            for change in list(pending):
                if all(self._fits(*want) for want in change.wants()):
                    self._settle([change])
                    pending.remove(change)
                    progress = True
            for v in list(starting):
                g, run = self.runs[v]
                if self._fits(g, run.quanta, self._run_bytes(run)):
                    ends = self.shares[g].take(run.quanta, NOTHING)
                    ends = self.memory[g].take(self._run_bytes(run), ends)
                    self.starts[v] = self._closed(ends)
                    starting.remove(v)
                    progress = True
            if not progress and pending:
                self._settle(pending)  # they change places among themselves
                pending = []
                progress = True

    def _fits(self, g: int, quanta: int, num_bytes: int) -> bool:
        return self.shares[g].free >= quanta and self.memory[g].free >= num_bytes

    def _settle(self, group: list[_Change]) -> None:
        """Carry out changes that belong together: all of them wait for the same ends."""
        known: Ends = NOTHING
        for change in group:
            known |= change.known
        marker = frozenset((-1,))
        if len(group) > 1:
            for change in group:
                for g, quanta, num_bytes in change.returns():
                    self.shares[g].give(quanta, marker)
                    self.memory[g].give(num_bytes, marker)
        for change in group:
            for g, quanta, num_bytes in change.wants():
                known = self.memory[g].take(num_bytes, self.shares[g].take(quanta, known))
        known = self._closed(known - marker)
        if len(group) > 1:
            for pool in (*self.shares, *self.memory):
                pool.parcels = [(size, known if ends == marker else ends) for size, ends in pool.parcels]
        else:
            for g, quanta, num_bytes in group[0].returns():
                self.shares[g].give(quanta, known)
                self.memory[g].give(num_bytes, known)
        for change in group:
            served = self.streams[change.stream]
            if change.is_step:
                served.steps.append((change.new[0], change.choice, known - served.known))
                served.known, served.choice = known, change.choice
            served.holding = change.new

    def _closed(self, ends: Ends) -> Ends:
        """``ends`` with all ends that must have come before them."""
        closed = set(ends)
        for v in ends:
            closed |= self.starts.get(v, NOTHING)
        return frozenset(closed)

    # ------------------------------------------------------------ out

    def needed(self, ends: Ends) -> list[int]:
        """``ends`` without those that another of them implies, in the problem's order."""
        implied: set[int] = set()
        for v in ends:
            implied |= self.starts.get(v, NOTHING)
        return sorted(ends - implied)

    def assignment(self, v: int) -> Assignment:
        problem, t = self.t.model.problem, self.t
        names = self.names
        stream = problem.streams[v]
        steps: list[InferenceStep] = []
        for g, index, ends in self.streams[v].steps:
            choice = t.choices[v][t.class_of[g]][index]
            steps.append(
                InferenceStep(
                    inference_id=stream.inference[choice.lam].inference_id,
                    gpu_id=problem.gpus[g].gpu_id,
                    share=share_of(choice.quanta, problem.share_quantum),
                    after=tuple(names[u] for u in self.needed(ends)),
                )
            )
        retrain = None
        cloud = None
        if v in self.runs and self.runs[v][0] >= t.num_gpus:
            g, run = self.runs[v]
            cloud = CloudStep(
                retrain_id=stream.cloud[t.trainings[v][run.training].gamma - len(stream.retrain)].retrain_id,
                turn=self.placed.runs[g].index(run),
            )
        elif v in self.runs:
            g, run = self.runs[v]
            retrain = RetrainStep(
                retrain_id=stream.retrain[t.trainings[v][run.training].gamma].retrain_id,
                gpu_id=problem.gpus[g].gpu_id,
                share=share_of(run.quanta, problem.share_quantum),
                after=tuple(names[u] for u in self.needed(self.starts[v])),
            )
        return Assignment(stream_id=stream.stream_id, inference=tuple(steps), retrain=retrain, cloud=cloud)


def assignments_of(placed: Placed) -> tuple[Assignment, ...]:
    """The assignments that carry ``placed`` out, one per stream in the problem's order."""
    emitter = _Emitter(placed)
    emitter.walk()
    return tuple(emitter.assignment(v) for v in range(placed.tables.num_streams))
