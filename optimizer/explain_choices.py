"""What one stream could do instead while everything else stays as planned. Pure functions.

The share and memory that the other streams leave free change only when retrainings end, so a window has
few intervals. Within them every retraining configuration is tried on every GPU with every share and
every start that some retraining's end allows, with the best inference configuration that fits into each
interval. What comes out is written as a plan and valued by the judge.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from optimizer.execution import capacity_quanta, needed_quanta, quanta_of, retrain_seconds, share_of
from optimizer.objective import ACCURACY_TOLERANCE, attainable_floor, judge
from optimizer.verdicts import StreamVerdict, Verdict
from protocol.plan import Assignment, CloudStep, InferenceStep, Plan, Problem, RetrainStep, StreamProfile
from protocol.schema import GpuSpec, Record

_SAME_S = 1e-6


class Choice(Record, frozen=True, kw_only=True):
    """Something that one stream could do, everything else as planned.

    ``value``: window average of the stream; ``site_value``: of the whole plan. ``assignment`` says it in full.
    """

    retrain_id: str | None
    value: float
    site_value: float
    start_s: float
    end_s: float
    assignment: Assignment


@dataclass(frozen=True, slots=True)
class Interval:
    """A part of the window in which the other streams change nothing. ``events``: retrainings that end at its start."""

    start_s: float
    end_s: float
    events: tuple[str, ...]


class Room:
    """What the other streams leave free. ``quanta[g][i]`` and ``num_bytes[g][i]`` in interval i of GPU g."""

    def __init__(self, problem: Problem, plan: Plan, verdict: Verdict, stream_id: str) -> None:
        self.problem = problem
        verdicts = {one.stream_id: one for one in verdict.streams}
        others = [a for a in plan.assignments if a.stream_id != stream_id]
        ends = {
            a.stream_id: end
            for a in others
            if (end := verdicts[a.stream_id].retrain_end_s) is not None and end < problem.window_s
        }
        times = [0.0]
        for end in sorted(ends.values()):
            if end > times[-1] + _SAME_S:
                times.append(end)
        self.intervals = tuple(
            Interval(start_s, end_s, tuple(name for name, end in ends.items() if abs(end - start_s) <= _SAME_S))
            for start_s, end_s in zip(times, [*times[1:], problem.window_s], strict=True)
        )
        count = len(self.intervals)
        self.quanta = {g.gpu_id: [capacity_quanta(g, problem.share_quantum)] * count for g in problem.gpus}
        self.num_bytes = {g.gpu_id: [g.memory_bytes or 1 << 62] * count for g in problem.gpus}
        profiles = {one.stream_id: one for one in problem.streams}
        for assignment in others:
            self._occupy(assignment, profiles[assignment.stream_id], verdicts[assignment.stream_id])

    def _occupy(self, assignment: Assignment, profile: StreamProfile, verdict: StreamVerdict) -> None:
        window_s = self.problem.window_s
        step = assignment.retrain
        retrain_end_s, swap_bytes = math.inf, 0
        if step is not None:
            chosen = next(p for p in profile.retrain if p.retrain_id == step.retrain_id)
            assert verdict.retrain_start_s is not None
            assert verdict.retrain_end_s is not None
            retrain_end_s, swap_bytes = verdict.retrain_end_s, chosen.swap_bytes
            self._take(step.gpu_id, verdict.retrain_start_s, retrain_end_s, step.share, chosen.memory_bytes)
        elif assignment.cloud is not None and verdict.retrain_end_s is not None:
            retrain_end_s = verdict.retrain_end_s
            swap_bytes = next(p for p in profile.cloud if p.retrain_id == assignment.cloud.retrain_id).swap_bytes
        starts = [*verdict.step_starts_s, window_s]
        num_bytes = {p.inference_id: p.memory_bytes for p in profile.inference}
        for serving, start_s, end_s in zip(assignment.inference, starts, starts[1:], strict=False):
            self._take(serving.gpu_id, start_s, end_s, serving.share, num_bytes[serving.inference_id])
            if swap_bytes:
                self._take(serving.gpu_id, start_s, min(end_s, retrain_end_s), 0.0, swap_bytes)

    def _take(self, gpu_id: str, start_s: float, end_s: float, share: float, num_bytes: int) -> None:
        quanta = quanta_of(share, self.problem.share_quantum) or math.ceil(share / self.problem.share_quantum)
        for index, one in enumerate(self.intervals):
            if start_s < one.end_s - _SAME_S and end_s > one.start_s + _SAME_S:
                self.quanta[gpu_id][index] -= quanta
                self.num_bytes[gpu_id][index] -= num_bytes

    def add(self, gpu_id: str, quanta: int) -> None:
        """Room that is not really there: what would more of it be worth?"""
        self.quanta[gpu_id] = [free + quanta for free in self.quanta[gpu_id]]


@dataclass(frozen=True, slots=True)
class _Training:
    """A retraining that would fit: index of the configuration, GPU, quanta, first interval, seconds."""

    gamma: int
    gpu: GpuSpec
    quanta: int
    first: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Draft:
    """A choice before the judge has seen it. ``value`` is the window average without prices of changes."""

    value: float
    training: _Training | None
    home: str
    steps: tuple[tuple[float, int], ...]  # (start, inference configuration)


class Chooser:
    """Finds the best choice of one stream for every retraining configuration, and for none."""

    def __init__(self, problem: Problem, stream: StreamProfile, room: Room) -> None:
        self.problem, self.stream, self.room = problem, stream, room
        self.gpus = {gpu.gpu_id: gpu for gpu in problem.gpus}
        self.best_q = max(p.relative_accuracy for p in stream.inference)
        floor = min(stream.min_accuracy, attainable_floor(stream, problem.gpus, problem.share_quantum))
        self.floor = floor - ACCURACY_TOLERANCE

    def drafts(self) -> dict[int, Draft]:
        """The best draft per retraining configuration (index; -1 = none) that keeps the floor."""
        found: dict[int, Draft] = {}
        for home in self._homes(None):
            self._keep(found, -1, self._serve(home, None))
        for training in self._trainings():
            promise = self._promise(training)
            held = found.get(training.gamma)
            if held is not None and promise <= held.value + 1e-12:
                continue
            for home in self._homes(training):
                self._keep(found, training.gamma, self._serve(home, training))
        return found

    def _keep(self, found: dict[int, Draft], gamma: int, draft: Draft | None) -> None:
        if draft is not None and (gamma not in found or draft.value > found[gamma].value + 1e-12):
            found[gamma] = draft

    def _homes(self, training: _Training | None) -> list[str]:
        """GPUs to serve from: all of a small site, else where the stream is and where the retraining runs."""
        if len(self.gpus) <= 8 or training is None:
            return list(self.gpus)
        return list(dict.fromkeys(g for g in (self.stream.serving_gpu, training.gpu.gpu_id) if g in self.gpus))

    def _promise(self, training: _Training) -> float:
        """No draft with this retraining is worth more."""
        profile = self.stream.retrain[training.gamma]
        part = training.end_s / self.problem.window_s
        return self.best_q * (self.stream.accuracy_now * part + profile.accuracy_after * (1.0 - part))

    def _trainings(self) -> Iterator[_Training]:
        """All that fit and end within the window, the most promising first for every configuration."""
        fitting: list[_Training] = []
        for gamma, profile in enumerate(self.stream.retrain):
            places = [g for g in self.problem.gpus if profile.pinned_gpu in (None, g.gpu_id)]
            for gpu in places:
                most = capacity_quanta(gpu, self.problem.share_quantum)
                for first, one in enumerate(self.room.intervals):
                    if profile.pinned_gpu is not None and first > 0:
                        break  # it runs already and cannot wait
                    for quanta in range(most, 0, -1):
                        seconds = retrain_seconds(profile, gpu, share_of(quanta, self.problem.share_quantum))
                        training = _Training(gamma, gpu, quanta, first, one.start_s, one.start_s + seconds)
                        if training.end_s >= self.problem.window_s:
                            break
                        if self._fits(training, profile.memory_bytes):
                            fitting.append(training)
        return iter(sorted(fitting, key=lambda t: -self._promise(t)))

    def _fits(self, training: _Training, num_bytes: int) -> bool:
        gpu_id = training.gpu.gpu_id
        for index in range(training.first, len(self.room.intervals)):
            if self.room.intervals[index].start_s >= training.end_s - _SAME_S:
                break
            if self.room.quanta[gpu_id][index] < training.quanta or self.room.num_bytes[gpu_id][index] < num_bytes:
                return False
        return True

    def _serve(self, home: str, training: _Training | None) -> Draft | None:
        """The best inference configuration for each interval on ``home``; None where one cannot be served at all."""
        stream, window_s = self.stream, self.problem.window_s
        end_s = math.inf if training is None else training.end_s
        total = 0.0
        steps: list[tuple[float, int]] = []
        for index, one in enumerate(self.room.intervals):
            pieces = [(one.start_s, one.end_s)]
            if one.start_s + _SAME_S < end_s < one.end_s - _SAME_S:
                pieces = [(one.start_s, end_s), (end_s, one.end_s)]
            for from_s, to_s in pieces:
                swapped = from_s >= end_s - _SAME_S
                accuracy = stream.accuracy_now
                if training is not None and swapped:
                    accuracy = stream.retrain[training.gamma].accuracy_after
                lam = self._best(home, index, training, from_s, swapped, accuracy)
                if lam is None:
                    return None
                total += accuracy * stream.inference[lam].relative_accuracy * (to_s - from_s)
                if not steps or steps[-1][1] != lam:
                    steps.append((from_s, lam))
        return Draft(total / window_s, training, home, tuple(steps))

    def _best(
        self, home: str, index: int, training: _Training | None, from_s: float, swapped: bool, accuracy: float
    ) -> int | None:
        free, free_bytes = self.room.quanta[home][index], self.room.num_bytes[home][index]
        if training is not None and not swapped:
            profile = self.stream.retrain[training.gamma]
            free_bytes -= profile.swap_bytes
            if training.gpu.gpu_id == home and from_s >= training.start_s - _SAME_S:
                free -= training.quanta
                free_bytes -= profile.memory_bytes
        best: int | None = None
        for lam, profile_q in enumerate(self.stream.inference):
            fits = needed_quanta(profile_q, self.gpus[home], self.problem.share_quantum) <= free
            if not fits or profile_q.memory_bytes > free_bytes or accuracy * profile_q.relative_accuracy < self.floor:
                continue
            if best is None or profile_q.relative_accuracy > self.stream.inference[best].relative_accuracy:
                best = lam
        return best

    # ------------------------------------------------------------ as a plan

    def assignment(self, draft: Draft) -> Assignment:
        """The draft as the plan would say it."""
        quantum, stream = self.problem.share_quantum, self.stream
        gpu = self.gpus[draft.home]
        events = {one.start_s: one.events for one in self.room.intervals}
        steps: list[InferenceStep] = []
        for start_s, lam in draft.steps:
            profile = stream.inference[lam]
            after = events.get(start_s)
            steps.append(
                InferenceStep(
                    inference_id=profile.inference_id,
                    gpu_id=draft.home,
                    share=share_of(needed_quanta(profile, gpu, quantum), quantum),
                    after=(stream.stream_id,) if after is None else after,
                    planned_start_s=start_s,
                )
            )
        retrain = None
        if draft.training is not None:
            training = draft.training
            retrain = RetrainStep(
                retrain_id=stream.retrain[training.gamma].retrain_id,
                gpu_id=training.gpu.gpu_id,
                share=share_of(training.quanta, quantum),
                after=self.room.intervals[training.first].events,
                planned_start_s=training.start_s,
                planned_end_s=training.end_s,
            )
        return Assignment(stream_id=stream.stream_id, inference=tuple(steps), retrain=retrain)


def retrained_with(assignment: Assignment) -> str | None:
    """The retraining configuration of an assignment, on a GPU or in the cloud; None = no retraining."""
    if assignment.retrain is not None:
        return assignment.retrain.retrain_id
    return None if assignment.cloud is None else assignment.cloud.retrain_id


def with_assignment(plan: Plan, assignment: Assignment) -> Plan:
    """``plan`` with one stream's part replaced.

    Where its retraining is taken out, others that waited for it wait for what it waited for itself.
    """
    stream_id = assignment.stream_id
    old = next(a for a in plan.assignments if a.stream_id == stream_id)
    parts = tuple(assignment if a.stream_id == stream_id else a for a in plan.assignments)
    if retrained_with(assignment) is None and retrained_with(old) is not None:
        before = old.retrain.after if old.retrain is not None else ()
        parts = tuple(_no_longer_waiting(part, stream_id, before) for part in parts)
    return msgspec.structs.replace(plan, assignments=parts)


def _no_longer_waiting(part: Assignment, stream_id: str, instead: tuple[str, ...]) -> Assignment:
    def waits(after: tuple[str, ...]) -> tuple[str, ...]:
        if stream_id not in after:
            return after
        names = dict.fromkeys((*after, *instead))
        return tuple(name for name in names if name != stream_id)

    retrain = part.retrain
    return msgspec.structs.replace(
        part,
        inference=tuple(msgspec.structs.replace(step, after=waits(step.after)) for step in part.inference),
        retrain=None if retrain is None else msgspec.structs.replace(retrain, after=waits(retrain.after)),
    )


def choices(problem: Problem, plan: Plan, verdict: Verdict, stream_id: str) -> list[Choice]:
    """The best choice of a stream for every retraining configuration and for none, best first, by the judge.

    Everything else stays as planned: either at its planned times, or, where only the configuration of
    the planned retraining is exchanged or it is taken out, after the same events.
    """
    stream = next(one for one in problem.streams if one.stream_id == stream_id)
    chooser = Chooser(problem, stream, Room(problem, plan, verdict, stream_id))
    candidates = [chooser.assignment(draft) for draft in chooser.drafts().values()]
    planned = next(one for one in plan.assignments if one.stream_id == stream_id)
    if planned.retrain is not None:
        for profile in stream.retrain:
            step = msgspec.structs.replace(planned.retrain, retrain_id=profile.retrain_id)
            candidates.append(msgspec.structs.replace(planned, retrain=step))
    candidates += _in_the_cloud(stream, plan, planned, candidates)
    found: dict[str | None, Choice] = {}
    for assignment in candidates:
        judged = judge(problem, with_assignment(plan, assignment))
        own = next(one for one in judged.streams if one.stream_id == stream_id)
        if not judged.only_floors_broken or (own.retrain_end_s or 0.0) > problem.window_s:
            continue
        retrain_id = retrained_with(assignment)
        if retrain_id not in found or judged.value > found[retrain_id].site_value:
            found[retrain_id] = Choice(
                retrain_id=retrain_id,
                value=own.value,
                site_value=judged.value,
                start_s=own.retrain_start_s or 0.0,
                end_s=own.retrain_end_s or 0.0,
                assignment=assignment,
            )
    return sorted(found.values(), key=lambda choice: -choice.site_value)


def _in_the_cloud(
    stream: StreamProfile, plan: Plan, planned: Assignment, candidates: list[Assignment]
) -> list[Assignment]:
    """The stream's retrainings in the cloud, in the planned turn or as the last of their link."""
    last = max((a.cloud.turn for a in plan.assignments if a.cloud is not None), default=-1)
    found: list[Assignment] = []
    for profile in stream.cloud:
        turn = planned.cloud.turn if planned.cloud is not None else last + 1
        step = CloudStep(retrain_id=profile.retrain_id, turn=turn)
        bases = [planned] if planned.retrain is None else [c for c in candidates if c.retrain is None]
        found += [msgspec.structs.replace(base, retrain=None, cloud=step) for base in bases]
    return found


def quantum_values(problem: Problem, plan: Plan, verdict: Verdict, stream_id: str) -> dict[str, float]:
    """Window accuracy that this stream alone could gain from one more quantum of each GPU, all window long."""
    stream = next(one for one in problem.streams if one.stream_id == stream_id)

    def best(gpu_id: str | None) -> float:
        room = Room(problem, plan, verdict, stream_id)
        if gpu_id is not None:
            room.add(gpu_id, 1)
        return max((draft.value for draft in Chooser(problem, stream, room).drafts().values()), default=0.0)

    now = best(None)
    return {gpu.gpu_id: max(0.0, best(gpu.gpu_id) - now) for gpu in problem.gpus}
