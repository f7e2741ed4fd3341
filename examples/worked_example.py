"""The two windows of the paper's Table 1, planned by every policy: docs/formulation.md has the same by hand.

    python examples/worked_example.py

Three GPUs, windows of 120 s, two streams, inference accuracy proportional to the share, floor 40 %. The second window
begins with the models that the first one left.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from optimizer.objective import judge
from optimizer.policies.registry import get_policy
from optimizer.problems import load_problem
from optimizer.verdicts import Verdict
from protocol.plan import Plan, Problem, RetrainProfile

POLICIES = ("timeline", "milp", "thief", "fair", "uniform", "uniform:high:0.5", "none")
BUDGET_S = 20.0
# Window 2: (accuracy after, GPU-seconds) per stream; window 1 stands in worked_example.json.
SECOND = {"A": ((0.95, 90.0), (0.90, 40.0)), "B": ((0.98, 80.0), (0.90, 70.0))}


def first_window() -> Problem:
    """Window 1 of the table."""
    return load_problem(Path(__file__).with_name("worked_example.json"))


def second_window(first: Problem, plan: Plan, verdict: Verdict) -> Problem:
    """Window 2 after window 1 was carried out as planned: its models serve on."""
    streams = []
    for stream, assignment, judged in zip(first.streams, plan.assignments, verdict.streams, strict=True):
        accuracy, step = stream.accuracy_now, assignment.retrain
        if step is not None and judged.retrain_end_s is not None and judged.retrain_end_s < first.window_s:
            accuracy = next(p.accuracy_after for p in stream.retrain if p.retrain_id == step.retrain_id)
        retrain = tuple(
            RetrainProfile(retrain_id=f"to{100 * after:.0f}", accuracy_after=after, gpu_seconds=gpu_seconds)
            for after, gpu_seconds in SECOND[stream.stream_id]
        )
        streams.append(msgspec.structs.replace(stream, accuracy_now=accuracy, retrain=retrain))
    return msgspec.structs.replace(first, streams=tuple(streams))


def said(plan: Plan, verdict: Verdict) -> str:
    """The plan in one line."""
    parts = []
    for assignment, judged in zip(plan.assignments, verdict.streams, strict=True):
        shares = " then ".join(
            f"{step.share:g}" + (f" from {start_s:.1f} s" if start_s else "")
            for step, start_s in zip(assignment.inference, judged.step_starts_s, strict=True)
        )
        step = assignment.retrain
        retraining = "not retrained"
        if step is not None:
            retraining = (
                f"{step.retrain_id} at {step.share:g} from {judged.retrain_start_s:.1f} to {judged.retrain_end_s:.1f} s"
            )
        parts.append(f"{assignment.stream_id} {judged.value:.4f}: served at {shares}, {retraining}")
    return "; ".join(parts)


def both_windows(policy: str) -> tuple[tuple[Plan, Verdict], tuple[Plan, Verdict]]:
    """Plans and verdicts of both windows."""
    problem = first_window()
    plan = get_policy(policy)(problem, BUDGET_S)
    verdict = judge(problem, plan)
    second = second_window(problem, plan, verdict)
    then = get_policy(policy)(second, BUDGET_S)
    return (plan, verdict), (then, judge(second, then))


def main() -> None:
    """Print the table, and every plan below."""
    print("| policy | window 1 | window 2 | both |\n|---|---|---|---|")
    lines = []
    for policy in POLICIES:
        windows = both_windows(policy)
        first, second = (verdict.value for _, verdict in windows)
        broken = sorted({v.subject for _, verdict in windows for v in verdict.violations})
        below = f" (below its floor: {', '.join(broken)})" if broken else ""
        print(f"| {policy} | {first:.4f} | {second:.4f} | {(first + second) / 2:.4f}{below} |", flush=True)
        lines += [f"{policy}, window {w}: {said(*one)}" for w, one in enumerate(windows, start=1)]
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
