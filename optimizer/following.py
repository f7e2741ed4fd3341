"""From a plan and the events so far to the jobs that should run now. Pure functions.

A step starts when every retraining named in its ``after`` has ended (formulation rule 4): events start
things, predicted times only order them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import msgspec

from optimizer.state import Retraining, Served, SiteState, StreamState
from protocol.messages import InferenceJob, Job
from protocol.plan import Assignment, InferenceStep, Plan, StreamProfile
from protocol.schema import InferenceConfig, Name, StreamSpec


def ended_in(plan: Plan, ended: Collection[str]) -> frozenset[str]:
    """Those of ``ended`` whose retrainings have ended in the plan's order.

    A retraining that is given up before its turn has ended as well, but what waits for it counts on what it would
    have waited for: plans name the last events only.
    """
    after = {a.stream_id: a.retrain.after for a in plan.assignments if a.retrain is not None}
    done: set[str] = set()
    while True:
        more = {s for s in ended if s not in done and done.issuperset(after.get(s, ()))}
        if not more:
            return frozenset(done)
        done |= more


def current_step(assignment: Assignment, ended: Collection[str]) -> InferenceStep:
    """The last inference step whose events, and those of all steps before it, have happened."""
    step = assignment.inference[0]
    for candidate in assignment.inference[1:]:
        if not all(stream in ended for stream in candidate.after):
            break
        step = candidate
    return step


def served(assignment: Assignment, profile: StreamProfile, ended: Collection[str]) -> Served | None:
    """How the plan wants the stream to be served now; None when the profile carries no configuration."""
    step = current_step(assignment, ended)
    config = next((p.config for p in profile.inference if p.inference_id == step.inference_id), None)
    if config is None:
        return None
    return Served(executor_id=step.gpu_id, config=config, share=step.share)


def retraining(assignment: Assignment, profile: StreamProfile, ended: Collection[str]) -> Retraining | None:
    """The retraining that the plan wants to run now, None when there is none or its events are still to come."""
    step = assignment.retrain
    if step is None or not all(stream in ended for stream in step.after):
        return None
    choice = next((p for p in profile.retrain if p.retrain_id == step.retrain_id), None)
    if choice is None or choice.config is None:
        return None
    return Retraining(
        executor_id=step.gpu_id,
        config=choice.config,
        share=step.share,
        profile=choice,
    )


def serving_job_id(stream_id: Name) -> str:
    """One serving job per stream, for ever: its worker lives through windows, plans and swaps."""
    return f"serve/{stream_id}"


def desired_jobs(state: SiteState, specs: dict[str, StreamSpec], executors: Iterable[str]) -> dict[str, list[Job]]:
    """Every executor's complete desired state. ``position_s`` is left at 0: it is stamped when sent."""
    jobs: dict[str, list[Job]] = {executor_id: [] for executor_id in executors}

    def serve(stream: StreamState, executor_id: str, config: InferenceConfig, share: float) -> None:
        if stream.checkpoint and executor_id in jobs:
            jobs[executor_id].append(
                InferenceJob(
                    job_id=serving_job_id(stream.stream_id),
                    stream=specs[stream.stream_id],
                    share=share,
                    config=config,
                    checkpoint=stream.checkpoint,
                    position_s=0.0,
                )
            )

    for stream in state.streams.values():
        if stream.serving_config:
            serve(stream, stream.serving_executor, stream.serving_config, stream.serving_share)
        if stream.leaving:
            serve(stream, stream.leaving.executor_id, stream.leaving.config, stream.leaving.share)
        if stream.running and stream.running.stopped_s is None and stream.running.executor_id in jobs:
            jobs[stream.running.executor_id].append(
                msgspec.structs.replace(stream.running.job, share=stream.running.share)
            )
        if stream.canary and stream.canary.job and stream.canary.executor_id in jobs:
            jobs[stream.canary.executor_id].append(stream.canary.job)
    for executor_id, job in state.pipeline.items():
        if executor_id in jobs:
            jobs[executor_id].append(job)
    return jobs


def planned_shares(state: SiteState, executors: Iterable[str]) -> dict[str, float]:
    """Share promised on every executor: serving, retraining and profiling; old places and comparisons not counted."""
    used = dict.fromkeys(executors, 0.0)
    for stream in state.streams.values():
        if stream.serving_config and stream.serving_executor in used:
            used[stream.serving_executor] += stream.serving_share
        if stream.running and stream.running.executor_id in used:
            used[stream.running.executor_id] += stream.running.share
    for executor_id, job in state.pipeline.items():
        if executor_id in used:
            used[executor_id] += job.share
    return used


def used_shares(state: SiteState, executors: Iterable[str]) -> dict[str, float]:
    """``planned_shares`` and old places; comparisons not counted."""
    used = planned_shares(state, executors)
    for stream in state.streams.values():
        if stream.leaving and stream.leaving.executor_id in used:
            used[stream.leaving.executor_id] += stream.leaving.share
    return used


def stamp_positions(jobs: Iterable[Job], site_s: float) -> tuple[Job, ...]:
    """The jobs as they are sent: each stream's own time at this moment."""
    return tuple(
        msgspec.structs.replace(job, position_s=site_s + job.stream.start_s) if isinstance(job, InferenceJob) else job
        for job in jobs
    )
