"""Telemetry events that sum up a plan or a window. Pure functions."""

from __future__ import annotations

from typing import Literal

from optimizer.account import Tally
from optimizer.objective import Verdict
from optimizer.state import SiteState, StreamState
from protocol.events import PlannedStream, PlanSolved, StreamWindow
from protocol.plan import Assignment, Plan, Problem


def plan_solved(
    state: SiteState,
    phase: Literal["profiling", "plan", "replan"],
    reason: str,
    plan: Plan,
    verdict: Verdict,
    problem: Problem,
) -> PlanSolved:
    """What a chosen plan says, stream by stream, with the judge's value."""
    predicted = {stream.stream_id: stream.value for stream in verdict.streams}
    report = plan.report
    return PlanSolved(
        window=state.window,
        revision=state.revision,
        phase=phase,
        reason=reason,
        policy=report.policy,
        status=report.status,
        predicted=min(1.0, max(0.0, verdict.value)),
        bound=report.bound,
        gap=report.gap,
        seconds=report.seconds,
        detail=report.detail,
        streams=tuple(_planned(a, predicted.get(a.stream_id, 0.0)) for a in plan.assignments),
        config_change_s=problem.config_change_s,
        migration_s=problem.migration_s,
    )


def _planned(assignment: Assignment, predicted: float) -> PlannedStream:
    first, last, retrain = assignment.inference[0], assignment.inference[-1], assignment.retrain
    timed = retrain or assignment.cloud
    return PlannedStream(
        stream_id=assignment.stream_id,
        predicted=predicted,
        inference_id=first.inference_id,
        inference_share=first.share,
        inference_gpu=first.gpu_id,
        retrain_id=timed.retrain_id if timed else "",
        retrain_share=retrain.share if retrain else 0.0,
        retrain_gpu=retrain.gpu_id if retrain else "",
        retrain_start_s=timed.planned_start_s if timed else 0.0,
        retrain_end_s=timed.planned_end_s if timed else 0.0,
        inference_id_after=last.inference_id if last is not first else "",
    )


def stream_window(stream: StreamState, tally: Tally) -> StreamWindow:
    """One stream's window: what was predicted and what was measured."""
    return StreamWindow(
        stream_id=stream.stream_id,
        realised=tally.accuracy,
        predicted=stream.predicted,
        num_frames=tally.num_frames,
        num_analysed=tally.num_analysed,
        num_dropped=tally.num_dropped,
        num_objects=tally.num_objects,
        retrain_id=stream.retrain_id,
        swapped=stream.swapped,
    )
