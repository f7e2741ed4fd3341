"""Why a plan does with one stream what it does: the reasons, in sentences.

Values are the judge's. What a share is worth comes from the Lagrangian prices of the time-indexed model
(docs/formulation.md), which hold for the best plan of the problem, not only for the plan explained.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from optimizer.execution import retrain_seconds
from optimizer.explain_choices import Choice, choices, quantum_values, retrained_with
from optimizer.objective import attainable_floor, judge
from optimizer.policies.timeline_bound import Dual, dual_of_few, dual_of_many
from optimizer.policies.timeline_model import build_model
from optimizer.verdicts import StreamVerdict, Verdict
from protocol.plan import Assignment, Plan, Problem, StreamProfile
from protocol.schema import Record

PRICE_BUDGET_S = 5.0
MANY_STREAMS = 150  # from here on prices are found on a sample first
SHOWN_CHOICES = 5
POINTS = 100.0  # accuracy is spoken of in points


class SlotPrice(Record, frozen=True, kw_only=True):
    """What a whole GPU of one kind is worth in a slot: points of mean accuracy per GPU for the whole slot."""

    gpus: tuple[str, ...]
    start_s: float
    end_s: float
    points: float


class Prices(Record, frozen=True, kw_only=True):
    """Prices per kind of GPU and slot, and the bound on every plan's value that they prove."""

    slots: tuple[SlotPrice, ...]
    bound: float

    def points(self, gpu_id: str, share: float, start_s: float, end_s: float) -> float:
        """What ``share`` of a GPU costs from ``start_s`` to ``end_s``, in points of mean accuracy."""
        total = 0.0
        for slot in self.slots:
            if gpu_id in slot.gpus:
                overlap_s = max(0.0, min(end_s, slot.end_s) - max(start_s, slot.start_s))
                total += slot.points * share * overlap_s / (slot.end_s - slot.start_s)
        return total


def slot_prices(problem: Problem, budget_s: float = PRICE_BUDGET_S) -> Prices:
    """Shadow prices of GPU share in each of the problem's slots."""
    grid_s = np.linspace(0.0, problem.window_s, problem.num_slots + 1)
    deadline = time.monotonic() + budget_s
    find = dual_of_many if len(problem.streams) > MANY_STREAMS else dual_of_few
    dual: Dual = find(build_model(problem), grid_s, deadline)
    model = dual.pricer.model
    found: list[SlotPrice] = []
    for one in model.classes:
        # The price of the largest job: with rows for what does not pack, small jobs may be priced below their part.
        density = model.item_use[:, one.first_item + one.capacity] @ dual.prices
        names = tuple(problem.gpus[g].gpu_id for g in one.members)
        for k, per_second in enumerate(density):
            start_s, end_s = float(grid_s[k]), float(grid_s[k + 1])
            points = POINTS * float(per_second) * (end_s - start_s)
            found.append(SlotPrice(gpus=names, start_s=start_s, end_s=end_s, points=points))
    return Prices(slots=tuple(found), bound=dual.bound)


# ---------------------------------------------------------------- one stream


class Explained:
    """A plan with its problem and verdict, by stream."""

    def __init__(self, problem: Problem, plan: Plan, prices: Prices | None = None) -> None:
        self.problem, self.plan = problem, plan
        self.verdict: Verdict = judge(problem, plan)
        self.profiles = {one.stream_id: one for one in problem.streams}
        self.assignments = {one.stream_id: one for one in plan.assignments}
        self.verdicts = {one.stream_id: one for one in self.verdict.streams}
        self._prices = prices
        self._choices: dict[str, list[Choice]] = {}

    @property
    def prices(self) -> Prices:
        """Shadow prices, computed when first wanted."""
        if self._prices is None:
            self._prices = slot_prices(self.problem)
        return self._prices

    def choices(self, stream_id: str) -> list[Choice]:
        """What the stream could do instead, best for the site first."""
        if stream_id not in self._choices:
            self._choices[stream_id] = choices(self.problem, self.plan, self.verdict, stream_id)
        return self._choices[stream_id]

    def others(self, stream_id: str) -> list[Choice]:
        """Choices with another retraining configuration than the plan's."""
        planned = retrained_with(self.assignments[stream_id])
        return [choice for choice in self.choices(stream_id) if choice.retrain_id != planned]


def explain_stream(explained: Explained, stream_id: str) -> list[str]:
    """Why this stream is, or is not, retrained; what else it could do; what limits it. One sentence or two a line."""
    profile, assignment = explained.profiles[stream_id], explained.assignments[stream_id]
    verdict = explained.verdicts[stream_id]
    return [
        *_what(profile, assignment, verdict),
        *_why(explained, profile, assignment, verdict),
        *_instead(explained, stream_id),
        *_limits(explained, profile, assignment, verdict),
    ]


def _what(profile: StreamProfile, assignment: Assignment, verdict: StreamVerdict) -> list[str]:
    name, step = profile.stream_id, assignment.retrain
    lines = []
    cloud = assignment.cloud
    if cloud is not None and verdict.retrain_start_s is not None and verdict.retrain_end_s is not None:
        sent = next(p for p in profile.cloud if p.retrain_id == cloud.retrain_id)
        lines.append(
            f"{name} is retrained in the cloud with {cloud.retrain_id} over {sent.link_id}, turn {cloud.turn + 1}, "
            f"from {verdict.retrain_start_s:.1f} s; its model is there at {verdict.retrain_end_s:.1f} s: "
            f"{profile.accuracy_now:.4f} -> {sent.accuracy_after:.4f} for {sent.up_bytes / 1e6:.1f} MB up and "
            f"{sent.down_bytes / 1e6:.1f} MB down."
        )
    elif step is None or verdict.retrain_start_s is None or verdict.retrain_end_s is None:
        lines.append(f"{name} is not retrained: its model stays at {profile.accuracy_now:.4f}.")
    else:
        chosen = next(p for p in profile.retrain if p.retrain_id == step.retrain_id)
        waits = f", once the retraining of {_and(step.after)} has ended," if step.after else ""
        lines.append(
            f"{name} is retrained with {step.retrain_id} on {step.gpu_id} at share {step.share:g}{waits} from "
            f"{verdict.retrain_start_s:.1f} s to {verdict.retrain_end_s:.1f} s: {profile.accuracy_now:.4f} -> "
            f"{chosen.accuracy_after:.4f} for {chosen.gpu_seconds:.1f} GPU-seconds."
        )
    quality = {p.inference_id: p.relative_accuracy for p in profile.inference}
    parts = [
        f"{serving.inference_id} ({quality[serving.inference_id]:.0%} of full accuracy) on {serving.gpu_id} at share "
        f"{serving.share:g}" + (f" from {start_s:.1f} s" if start_s > 0.0 else "")
        for serving, start_s in zip(assignment.inference, verdict.step_starts_s, strict=True)
    ]
    lines.append(f"It is served with {'; then '.join(parts)}.")
    lines.append(
        f"By the judge its window-averaged accuracy is {verdict.value:.4f}, never below {verdict.min_accuracy:.4f}."
    )
    return lines


def _why(explained: Explained, profile: StreamProfile, assignment: Assignment, verdict: StreamVerdict) -> list[str]:
    step = assignment.retrain
    others = explained.others(profile.stream_id)
    now = explained.verdict.value
    retrains = step is not None or assignment.cloud is not None
    if retrains and verdict.retrain_start_s is not None and verdict.retrain_end_s is not None:
        lines = []
        worth = "It takes no share of any GPU."
        if step is not None:
            rent = explained.prices.points(step.gpu_id, step.share, verdict.retrain_start_s, verdict.retrain_end_s)
            worth = f"The share that the retraining takes is worth {rent:.3f} points at the site's prices."
        without = next((choice for choice in others if choice.retrain_id is None), None)
        if verdict.retrain_end_s >= explained.problem.window_s:
            lines.append("Its retraining does not end within the window and so changes nothing in it.")
        elif without is not None:
            lines.append(
                f"Without retraining, everything else as planned, it would have {without.value:.4f}; the site would "
                f"{_lose_or_gain(without.site_value - now)}. {worth}"
            )
        else:
            lines.append(f"Others rely on its retraining, so that the plan cannot go without it. {worth}")
        return lines
    useful = [p for p in profile.retrain if p.accuracy_after > profile.accuracy_now]
    if not useful:
        return ["None of its retraining configurations is expected to make its model better."]
    best = next((choice for choice in others if choice.retrain_id is not None), None)
    if best is None:
        return [_no_room(explained, profile)]
    step = best.assignment.retrain
    gain = best.site_value - now
    if gain > 1e-9:
        verb = f"would raise the site's accuracy by {points(gain)}: the plan is not the best possible"
    else:
        verb = f"would cost the site {points(-gain)}"
    lines = [f"The best retraining that fits, everything else as planned, {verb}: {_say(best)}."]
    if step is not None:
        rent = explained.prices.points(step.gpu_id, step.share, best.start_s, best.end_s)
        lines.append(f"The share that it would take is worth {rent:.3f} points at the site's prices.")
    return lines


def _no_room(explained: Explained, profile: StreamProfile) -> str:
    problem = explained.problem
    useful = [p for p in profile.retrain if p.accuracy_after > profile.accuracy_now]
    cheapest = min(useful, key=lambda p: p.gpu_seconds)
    whole_s = min(retrain_seconds(cheapest, gpu, 1.0) for gpu in problem.gpus)
    if whole_s >= problem.window_s:
        return (
            f"Even its cheapest useful retraining, {cheapest.retrain_id}, takes {whole_s:.1f} s on a whole GPU; the "
            f"window has {problem.window_s:g} s."
        )
    return (
        f"What the other streams leave free is not enough for any useful retraining: the cheapest, "
        f"{cheapest.retrain_id}, takes {cheapest.gpu_seconds:.1f} GPU-seconds."
    )


def _instead(explained: Explained, stream_id: str) -> list[str]:
    found = explained.others(stream_id)[:SHOWN_CHOICES]
    if not found:
        return ["Nothing else fits, everything else as planned."]
    lines = ["Its next best choices, everything else as planned:"]
    for choice in found:
        change = choice.site_value - explained.verdict.value
        says = f"the site loses {points(-change)}" if change <= 0.0 else f"the site gains {points(change)}"
        lines.append(f"  {_say(choice)}; {says}")
    gains = quantum_values(explained.problem, explained.plan, explained.verdict, stream_id)
    best = {gpu: gain for gpu, gain in gains.items() if gain > 1e-6}
    quantum = explained.problem.share_quantum
    if best:
        says = ", ".join(f"{points(gain)} on {gpu}" for gpu, gain in sorted(best.items(), key=lambda i: -i[1])[:4])
        lines.append(f"One more share quantum ({quantum:g}) all window long would bring the stream {says}.")
    else:
        lines.append(f"One more share quantum ({quantum:g}) on any GPU would bring the stream nothing.")
    return lines


def _limits(explained: Explained, profile: StreamProfile, assignment: Assignment, verdict: StreamVerdict) -> list[str]:
    problem, lines = explained.problem, []
    if profile.min_accuracy > 0.0:
        attainable = attainable_floor(profile, problem.gpus, problem.share_quantum)
        floor = min(profile.min_accuracy, attainable)
        if attainable < profile.min_accuracy:
            lines.append(
                f"Its floor {profile.min_accuracy:.4f} cannot be met by any configuration; {attainable:.4f} is asked "
                "for instead."
            )
        served = {step.inference_id for step in assignment.inference[:1]}
        barred = [
            p.inference_id for p in profile.inference if profile.accuracy_now * p.relative_accuracy < floor - 1e-9
        ]
        spare = verdict.min_accuracy - floor
        if barred:
            lines.append(
                f"Its floor rules out {len(barred)} of {len(profile.inference)} inference configurations before a "
                f"swap; {_and(sorted(served))} keeps {spare:.4f} above it."
            )
    used = {step.gpu_id for step in assignment.inference} | (
        {assignment.retrain.gpu_id} if assignment.retrain is not None else set()
    )
    gpus = {gpu.gpu_id: gpu for gpu in problem.gpus}
    for use in explained.verdict.gpus:
        if use.gpu_id not in used:
            continue
        gpu = gpus[use.gpu_id]
        full = 1.0 - gpu.reserved_share
        if use.peak_share >= full - problem.share_quantum + 1e-9:
            lines.append(f"The share of {use.gpu_id} is used up at some time: {use.peak_share:g} of {full:g}.")
        if gpu.memory_bytes:
            part = use.peak_memory_bytes / gpu.memory_bytes
            limits = ": it limits the plan" if part > 0.9 else ""
            lines.append(f"The memory of {use.gpu_id} is {part:.0%} full at its peak{limits}.")
    broken = [v.text for v in explained.verdict.violations if v.subject == profile.stream_id]
    return lines + [f"Rule broken: {text}." for text in broken]


def _say(choice: Choice) -> str:
    serving = choice.assignment.inference
    served = " then ".join(dict.fromkeys(step.inference_id for step in serving))
    step = choice.assignment.retrain
    if choice.assignment.cloud is not None:
        cloud = choice.assignment.cloud
        return (
            f"{cloud.retrain_id} in the cloud, there at {choice.end_s:.0f} s, served with {served}: {choice.value:.4f}"
        )
    if step is None:
        return f"no retraining, served with {served}: {choice.value:.4f}"
    return (
        f"{step.retrain_id} on {step.gpu_id} at {step.share:g}, {choice.start_s:.0f} to {choice.end_s:.0f} s, served "
        f"with {served}: {choice.value:.4f}"
    )


def _lose_or_gain(change: float) -> str:
    return f"lose {points(-change)}" if change <= 0.0 else f"gain {points(change)}"


def points(value: float) -> str:
    return f"{POINTS * value:.3f} points"


def _and(names: Sequence[str]) -> str:
    return " and ".join(names)
