"""The judge: feasibility and value of a plan, by the execution model of ``protocol.plan`` and by nothing else.

It knows no solver and shares no code with one beyond the arithmetic of ``optimizer.execution``. Every
plan passes through it, whoever made it, in production as well as in tests.

Value (window-averaged inference accuracy): sum_v w_v * (1/T_v) * integral_0^T_v a_v(t) q_v(t) dt / sum_v w_v, with
T_v the stream's own window (rule 7). While a configuration change or a migration is paid for (rule 6), the stream's
accuracy counts as 0; the floor is on a * q and does not look at these moments.

Floor: the least that is asked of stream v is min(aMIN_v, a(v,0) * best usable q): where no option of a
stream meets its floor, its least violation is asked for, and nothing more. The same holds for the latency
limit; an inference configuration that breaks what is asked of the latency is not usable.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

from optimizer.execution import (
    asked_latency_s,
    capacity_quanta,
    fastest_retrain_seconds,
    fits,
    gpu_classes,
    label_budget,
    needed_quanta,
    own_window_s,
    quanta_of,
    retrain_seconds,
    transfer_times,
)
from optimizer.verdicts import GpuVerdict, StreamVerdict, Verdict, Violation, ViolationKind
from protocol.plan import Assignment, CloudProfile, Plan, Problem, RetrainProfile, StreamProfile
from protocol.schema import GpuSpec

__all__ = [
    "ACCURACY_TOLERANCE",
    "SECONDS_TOLERANCE",
    "GpuVerdict",
    "StreamVerdict",
    "Verdict",
    "Violation",
    "ViolationKind",
    "attainable_floor",
    "judge",
    "stamped",
    "upper_bound_trivial",
]

ACCURACY_TOLERANCE = 1e-9
SECONDS_TOLERANCE = 1e-9


class _Use(msgspec.Struct):
    """What one GPU is used for: (time, quanta, bytes) changes."""

    gpu: GpuSpec
    changes: list[tuple[float, int, int]]


class _Judging:
    """One judgement in progress: the problem by name, and the violations found so far."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.window_s = problem.window_s
        self.quantum = problem.share_quantum
        self.uses = {gpu.gpu_id: _Use(gpu, []) for gpu in problem.gpus}
        self.streams = {stream.stream_id: stream for stream in problem.streams}
        self.violations: list[Violation] = []
        self._classes = [gpu for gpu, _ in gpu_classes(problem)]

    def report(self, kind: ViolationKind, subject: str, text: str) -> None:
        self.violations.append(Violation(kind=kind, subject=subject, text=text))

    def occupy(self, gpu_id: str, start_s: float, end_s: float, quanta: int, num_bytes: int) -> None:
        if start_s >= min(end_s, self.window_s):
            return
        changes = self.uses[gpu_id].changes
        changes.append((start_s, quanta, num_bytes))
        changes.append((end_s, -quanta, -num_bytes))

    # ------------------------------------------------------------ steps of a judgement

    def by_stream(self, plan: Plan) -> dict[str, Assignment]:
        """The plan's assignments by stream id; structural violations are reported."""
        if abs(plan.window_s - self.window_s) > 1e-6 * self.window_s:
            self.report("window", "plan", f"the plan is for {plan.window_s:g} s, the problem has {self.window_s:g} s")
        found: dict[str, Assignment] = {}
        for assignment in plan.assignments:
            stream_id = assignment.stream_id
            if stream_id not in self.streams:
                self.report("unknown_stream", stream_id, f"the problem has no stream {stream_id!r}")
            elif stream_id in found:
                self.report("duplicate_stream", stream_id, f"stream {stream_id!r} is assigned more than once")
            else:
                found[stream_id] = assignment
        for stream_id in self.streams:
            if stream_id not in found:
                self.report("missing_stream", stream_id, f"stream {stream_id!r} is not served")
        if not self.violations and list(found) != list(self.streams):
            self.report("order", "plan", "the assignments are not in the problem's order of streams")
        return found

    def cloud_times(self, assignments: dict[str, Assignment]) -> dict[str, tuple[float, float]]:
        """(start, arrival of the model) of the retrainings in the cloud (rule 8)."""
        queues: dict[str, list[tuple[int, int, CloudProfile, str]]] = {link.link_id: [] for link in self.problem.links}
        for position, (stream_id, assignment) in enumerate(assignments.items()):
            if assignment.cloud is None:
                continue
            if assignment.retrain is not None:
                text = f"stream {stream_id!r} is retrained on a GPU and in the cloud at once"
                self.report("two_retrainings", stream_id, text)
            profile = self._cloud_profile(assignment)
            if profile is None or profile.link_id not in queues:
                text = f"stream {stream_id!r} has no retraining {assignment.cloud.retrain_id!r} in the cloud"
                self.report("unknown_retrain", stream_id, text)
            else:
                queues[profile.link_id].append((assignment.cloud.turn, position, profile, stream_id))
        times: dict[str, tuple[float, float]] = {}
        for link in self.problem.links:
            queue = sorted(queues[link.link_id], key=lambda entry: entry[:2])
            for behind, (_, _, profile, stream_id) in zip([None, *queue], queue, strict=False):
                if profile.running and behind is not None and not behind[2].running:
                    text = f"the retraining of {stream_id!r} runs over {link.link_id!r} and must keep its turn in front"
                    self.report("link_order", stream_id, text)
            for entry, time in zip(queue, transfer_times(link, [entry[2] for entry in queue]), strict=True):
                times[entry[3]] = time
        return times

    def _cloud_profile(self, assignment: Assignment) -> CloudProfile | None:
        step = assignment.cloud
        if step is None:
            return None
        profiles = self.streams[assignment.stream_id].cloud
        return next((p for p in profiles if p.retrain_id == step.retrain_id), None)

    def _retrain_profile(self, assignment: Assignment) -> RetrainProfile | None:
        step = assignment.retrain
        if step is None:
            return None
        profiles = self.streams[assignment.stream_id].retrain
        return next((p for p in profiles if p.retrain_id == step.retrain_id), None)

    def labels(self, assignments: dict[str, Assignment]) -> None:
        """The golden model is not asked for more than its budget (rule 9)."""
        budget_s = self.problem.label_budget_s
        if budget_s is None:
            return
        chosen = [
            profile
            for assignment in assignments.values()
            for profile in (self._retrain_profile(assignment), self._cloud_profile(assignment))
            if profile is not None
        ]
        total_s = math.fsum(profile.label_seconds for profile in chosen)
        if total_s > label_budget(self.problem):
            text = f"the retrainings need {total_s:g} s of labelling, the budget is {budget_s:g} s"
            self.report("labels", "plan", text)

    def retrain_times(
        self, assignments: dict[str, Assignment], cloud: dict[str, tuple[float, float]]
    ) -> dict[str, tuple[float, float]]:
        """(start, end) of the retrainings, ``cloud`` included, inf for those that never start (rules 2 and 4)."""
        lengths = {sid: self._retrain_length(sid, a) for sid, a in assignments.items() if a.retrain is not None}
        waits: dict[str, set[str]] = {}
        for stream_id in lengths:
            step = assignments[stream_id].retrain
            waits[stream_id] = set(step.after) if step is not None else set()
        starts = dict.fromkeys(lengths, 0.0)
        for stream_id, names in waits.items():
            for name in names & cloud.keys():
                starts[stream_id] = max(starts[stream_id], cloud[name][1])
            names.difference_update(cloud)
        blocks: dict[str, list[str]] = {}
        for stream_id, names in waits.items():
            for name in names:
                blocks.setdefault(name, []).append(stream_id)
        times = dict(cloud)
        ready = [stream_id for stream_id, names in waits.items() if not names]
        while ready:
            stream_id = ready.pop()
            end_s = starts[stream_id] + lengths[stream_id]
            times[stream_id] = (starts[stream_id], end_s)
            for blocked in blocks.get(stream_id, ()):
                waits[blocked].discard(stream_id)
                starts[blocked] = max(starts[blocked], end_s)
                if not waits[blocked]:
                    ready.append(blocked)
        for stream_id, names in waits.items():
            if names:
                times[stream_id] = (math.inf, math.inf)
                text = f"the retraining of {stream_id!r} waits for {sorted(names)}, which never ends before it"
                self.report("never_starts", stream_id, text)
        return times

    def _retrain_length(self, stream_id: str, assignment: Assignment) -> float:
        """Length of a stream's retraining; checks everything about the step that time does not enter."""
        step = assignment.retrain
        if step is None:
            return math.inf
        profile = self._retrain_profile(assignment)
        if profile is None:
            text = f"stream {stream_id!r} has no retraining configuration {step.retrain_id!r}"
            self.report("unknown_retrain", stream_id, text)
        quanta = self._checked_quanta(stream_id, step.gpu_id, step.share)
        if profile is None or quanta is None:
            return math.inf
        if profile.pinned_gpu is not None and (profile.pinned_gpu != step.gpu_id or step.after):
            text = (
                f"retraining {step.retrain_id!r} of {stream_id!r} runs on {profile.pinned_gpu!r} and must go on there"
            )
            self.report("pinned_gpu", stream_id, text)
        return retrain_seconds(profile, self.uses[step.gpu_id].gpu, step.share)

    def _checked_quanta(self, stream_id: str, gpu_id: str, share: float) -> int | None:
        """Quanta of a granted share; None, with a violation reported, where the grant makes no sense."""
        if gpu_id not in self.uses:
            self.report("unknown_gpu", stream_id, f"the problem has no GPU {gpu_id!r}")
            return None
        if not 0.0 < share <= 1.0 + 1e-9:
            self.report("share_too_large", stream_id, f"share {share:g} of {stream_id!r} is not within (0, 1]")
            return None
        quanta = quanta_of(share, self.quantum)
        if quanta is None:
            text = f"share {share:g} of {stream_id!r} is not a multiple of the quantum {self.quantum:g}"
            self.report("share_quantum", stream_id, text)
            return math.ceil(share / self.quantum)
        return quanta

    def stream(self, assignment: Assignment, times: dict[str, tuple[float, float]]) -> StreamVerdict:
        """Simulate one stream: when its steps start, what it occupies, and its accuracy over the window."""
        stream = self.streams[assignment.stream_id]
        window_s, own_s = self.window_s, own_window_s(stream, self.window_s)
        retrain_start_s, retrain_end_s = times.get(stream.stream_id, (math.inf, math.inf))
        after_accuracy, swap_bytes = stream.accuracy_now, 0
        step, in_cloud = assignment.retrain, self._cloud_profile(assignment)
        if in_cloud is not None:
            after_accuracy, swap_bytes = in_cloud.accuracy_after, in_cloud.swap_bytes
        profile = self._retrain_profile(assignment)
        if step is not None and profile is not None:
            after_accuracy, swap_bytes = profile.accuracy_after, profile.swap_bytes
            quanta = quanta_of(step.share, self.quantum)
            if step.gpu_id in self.uses:
                granted = math.ceil(step.share / self.quantum) if quanta is None else quanta
                self.occupy(step.gpu_id, retrain_start_s, retrain_end_s, granted, profile.memory_bytes)
        if retrain_end_s >= own_s:
            after_accuracy = stream.accuracy_now

        starts = self._step_starts(assignment, times)
        integral, least, unserved_until_s, latency_s = 0.0, math.inf, 0.0, 0.0
        held_gpu, held_inference = stream.serving_gpu, stream.serving_inference
        inference = {p.inference_id: p for p in stream.inference}
        for index, serving in enumerate(assignment.inference):
            start_s = starts[index]
            end_s = min(starts[index + 1] if index + 1 < len(starts) else window_s, window_s)
            chosen = inference.get(serving.inference_id)
            if chosen is None:
                text = f"stream {stream.stream_id!r} has no inference configuration {serving.inference_id!r}"
                self.report("unknown_inference", stream.stream_id, text)
            granted_quanta = self._checked_quanta(stream.stream_id, serving.gpu_id, serving.share)
            if chosen is None or granted_quanta is None:
                least = 0.0
                continue
            needed = needed_quanta(chosen, self.uses[serving.gpu_id].gpu, self.quantum)
            if granted_quanta < needed:
                text = (
                    f"{serving.inference_id!r} of {stream.stream_id!r} needs share {needed * self.quantum:g} of "
                    f"{serving.gpu_id!r} and gets {serving.share:g}"
                )
                self.report("share_too_small", stream.stream_id, text)
            if start_s >= end_s:
                continue
            latency_s = max(latency_s, chosen.latency_s)
            self.occupy(serving.gpu_id, start_s, end_s, granted_quanta, chosen.memory_bytes)
            if swap_bytes:
                self.occupy(serving.gpu_id, start_s, min(end_s, retrain_end_s), 0, swap_bytes)
            if held_gpu is not None:
                if held_gpu != serving.gpu_id:
                    unserved_until_s = max(unserved_until_s, start_s + self.problem.migration_s)
                elif held_inference is not None and held_inference != serving.inference_id:
                    unserved_until_s = max(unserved_until_s, start_s + self.problem.config_change_s)
            held_gpu, held_inference = serving.gpu_id, serving.inference_id
            for accuracy, from_s, to_s in (
                (stream.accuracy_now, start_s, min(end_s, retrain_end_s)),
                (after_accuracy, max(start_s, retrain_end_s), end_s),
            ):
                if from_s < to_s:
                    least = min(least, accuracy * chosen.relative_accuracy)
                    served_s = max(0.0, min(to_s, own_s) - max(from_s, unserved_until_s))
                    integral += accuracy * chosen.relative_accuracy * served_s
        least = 0.0 if math.isinf(least) else least
        self._check_floor(stream, least)
        self._check_latency(stream, latency_s)
        retrains = step is not None or assignment.cloud is not None
        return StreamVerdict(
            stream_id=stream.stream_id,
            value=integral / own_s,
            min_accuracy=least,
            retrain_start_s=retrain_start_s if retrains else None,
            retrain_end_s=retrain_end_s if retrains else None,
            step_starts_s=tuple(starts),
            max_latency_s=latency_s,
        )

    def _step_starts(self, assignment: Assignment, times: dict[str, tuple[float, float]]) -> list[float]:
        """When each inference step starts (rule 4); one that waits for nothing that ends is reported."""
        starts: list[float] = []
        now_s = 0.0
        for index, step in enumerate(assignment.inference):
            for name in step.after:
                now_s = max(now_s, times.get(name, (math.inf, math.inf))[1])
                if name not in times or math.isinf(times[name][1]):
                    text = f"step {index} of {assignment.stream_id!r} waits for {name!r}, whose retraining never ends"
                    self.report("never_starts", assignment.stream_id, text)
            starts.append(now_s)
        if assignment.inference and assignment.inference[0].after:
            text = f"the first inference step of {assignment.stream_id!r} waits: the stream is not served at the start"
            self.report("never_starts", assignment.stream_id, text)
        return starts

    def _check_floor(self, stream: StreamProfile, least: float) -> None:
        if least >= stream.min_accuracy - ACCURACY_TOLERANCE:
            return
        floor = min(stream.min_accuracy, attainable_floor(stream, self._classes, self.quantum))
        if least < floor - ACCURACY_TOLERANCE:
            text = f"accuracy of {stream.stream_id!r} falls to {least:.4f}, {floor:.4f} is attainable and asked for"
            self.report("floor", stream.stream_id, text)

    def _check_latency(self, stream: StreamProfile, latency_s: float) -> None:
        if stream.max_latency_s is None or latency_s <= stream.max_latency_s + SECONDS_TOLERANCE:
            return
        asked_s = asked_latency_s(stream, self._classes, self.quantum)
        if latency_s > asked_s + SECONDS_TOLERANCE:
            text = f"results of {stream.stream_id!r} take {latency_s:g} s, {asked_s:g} s is attainable and asked for"
            self.report("latency", stream.stream_id, text)

    def gpu(self, use: _Use) -> GpuVerdict:
        """Sweep one GPU over time; at equal times what ends goes before what starts."""
        quanta = peak_quanta = num_bytes = peak_bytes = 0
        use.changes.sort()
        for _, change, change_bytes in _releases_first(use.changes):
            quanta += change
            num_bytes += change_bytes
            peak_quanta = max(peak_quanta, quanta)
            peak_bytes = max(peak_bytes, num_bytes)
        gpu = use.gpu
        capacity = capacity_quanta(gpu, self.quantum)
        if peak_quanta > capacity:
            text = f"shares on {gpu.gpu_id!r} add up to {peak_quanta * self.quantum:g} of {capacity * self.quantum:g}"
            self.report("capacity", gpu.gpu_id, text)
        if gpu.memory_bytes and peak_bytes > gpu.memory_bytes:
            text = f"{peak_bytes} bytes are resident on {gpu.gpu_id!r}, which has {gpu.memory_bytes}"
            self.report("memory", gpu.gpu_id, text)
        return GpuVerdict(
            gpu_id=gpu.gpu_id, peak_share=round(peak_quanta * self.quantum, 9), peak_memory_bytes=peak_bytes
        )


def _releases_first(changes: list[tuple[float, int, int]]) -> Iterable[tuple[float, int, int]]:
    """Merge all changes of one instant, so that a hand-over between two jobs is no peak."""
    index = 0
    while index < len(changes):
        time_s, quanta, num_bytes = changes[index]
        index += 1
        while index < len(changes) and changes[index][0] == time_s:
            quanta += changes[index][1]
            num_bytes += changes[index][2]
            index += 1
        yield time_s, quanta, num_bytes


def attainable_floor(stream: StreamProfile, gpus: Iterable[GpuSpec], quantum: float) -> float:
    """The highest instantaneous accuracy that ``stream`` could have all window long: a(v,0) * best usable q."""
    return stream.accuracy_now * _best_usable_q(stream, tuple(gpus), quantum)


def _best_usable_q(stream: StreamProfile, gpus: tuple[GpuSpec, ...], quantum: float) -> float:
    """Relative accuracy of the best configuration that fits on some GPU and keeps what is asked of the latency."""
    latency_s = asked_latency_s(stream, gpus, quantum) + SECONDS_TOLERANCE
    return max(
        (
            p.relative_accuracy
            for p in stream.inference
            if p.latency_s <= latency_s and any(fits(p, gpu, quantum) for gpu in gpus)
        ),
        default=0.0,
    )


def judge(problem: Problem, plan: Plan) -> Verdict:
    """Simulate ``plan`` on ``problem`` and say whether it keeps every rule and what it is worth.

    Never raises on a bad plan: everything that is wrong with it becomes a violation.
    """
    judging = _Judging(problem)
    assignments = judging.by_stream(plan)
    judging.labels(assignments)
    times = judging.retrain_times(assignments, judging.cloud_times(assignments))
    streams: list[StreamVerdict] = []
    total = weights = 0.0
    for stream in problem.streams:
        assignment = assignments.get(stream.stream_id)
        if assignment is None:
            verdict = StreamVerdict(stream_id=stream.stream_id, value=0.0, min_accuracy=0.0)
        else:
            verdict = judging.stream(assignment, times)
        streams.append(verdict)
        total += stream.weight * verdict.value
        weights += stream.weight
    gpus = tuple(judging.gpu(use) for use in judging.uses.values())
    return Verdict(
        feasible=not judging.violations,
        violations=tuple(judging.violations),
        value=total / weights,
        streams=tuple(streams),
        gpus=gpus,
    )


def stamped(problem: Problem, plan: Plan) -> Plan:
    """``plan`` with its planned times as the judge sees them (steps that never start keep the window's end)."""
    verdicts = {verdict.stream_id: verdict for verdict in judge(problem, plan).streams}
    assignments: list[Assignment] = []
    for assignment in plan.assignments:
        verdict = verdicts.get(assignment.stream_id)
        if verdict is None or len(verdict.step_starts_s) != len(assignment.inference):
            assignments.append(assignment)
            continue
        steps = tuple(
            msgspec.structs.replace(step, planned_start_s=_finite(start_s, problem.window_s))
            for step, start_s in zip(assignment.inference, verdict.step_starts_s, strict=True)
        )
        retrain = assignment.retrain
        if retrain is not None and verdict.retrain_start_s is not None and verdict.retrain_end_s is not None:
            retrain = msgspec.structs.replace(
                retrain,
                planned_start_s=_finite(verdict.retrain_start_s, problem.window_s),
                planned_end_s=_finite(verdict.retrain_end_s, problem.window_s),
            )
        cloud = assignment.cloud
        if cloud is not None and verdict.retrain_start_s is not None and verdict.retrain_end_s is not None:
            cloud = msgspec.structs.replace(
                cloud,
                planned_start_s=_finite(verdict.retrain_start_s, problem.window_s),
                planned_end_s=_finite(verdict.retrain_end_s, problem.window_s),
            )
        assignments.append(msgspec.structs.replace(assignment, inference=steps, retrain=retrain, cloud=cloud))
    return msgspec.structs.replace(plan, assignments=tuple(assignments))


def _finite(time_s: float, window_s: float) -> float:
    return min(time_s, 1e9) if math.isfinite(time_s) else window_s


def upper_bound_trivial(problem: Problem) -> float:
    """A bound on the value of every plan: each stream alone, retrained as fast as can be, served at its best."""
    quantum = problem.share_quantum
    gpus = [gpu for gpu, _ in gpu_classes(problem)]
    links = {link.link_id: link for link in problem.links}
    total = weights = 0.0
    for stream in problem.streams:
        # Where the limits cannot all be kept at once a plan may break them, so that they bound nothing here.
        best_q = _best_usable_q(msgspec.structs.replace(stream, max_latency_s=None), tuple(gpus), quantum)
        best, window_s = stream.accuracy_now, own_window_s(stream, problem.window_s)
        ends = [(p.accuracy_after, _fastest_end(problem, gpus, p)) for p in stream.retrain]
        ends += [
            (p.accuracy_after, transfer_times(links[p.link_id], [p])[0][1]) for p in stream.cloud if p.link_id in links
        ]
        for accuracy_after, end_s in ends:
            left = max(0.0, 1.0 - end_s / window_s)
            best = max(best, stream.accuracy_now * (1.0 - left) + accuracy_after * left)
        total += stream.weight * best * best_q
        weights += stream.weight
    return total / weights


def _fastest_end(problem: Problem, gpus: list[GpuSpec], profile: RetrainProfile) -> float:
    """Seconds until a retraining is over at the earliest, with a GPU for itself."""
    places = gpus if profile.pinned_gpu is None else [g for g in problem.gpus if g.gpu_id == profile.pinned_gpu]
    quantum = problem.share_quantum
    return min((fastest_retrain_seconds(profile, gpu, quantum) for gpu in places), default=problem.window_s)
