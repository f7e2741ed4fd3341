"""From the state of the site to the problem that the planner is asked. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import msgspec

from optimizer import latencies, moving
from optimizer.clouds import what_is_left
from optimizer.config import SiteConfig
from optimizer.degrading import least
from optimizer.execution import capacity_quanta, needed_quanta, share_efficiency, share_of
from optimizer.state import ExecutorState, Retraining, RunningRetrain, SiteState, StreamState
from optimizer.windows import own_left_s
from protocol.plan import START_RATE, CloudProfile, InferenceProfile, Problem, RetrainProfile, StreamProfile
from protocol.schema import GpuSpec, LinkSpec, RetrainRun, StreamSpec

_NUMBER = re.compile(r":\d+")
# What is left of a retraining that has used up its estimate: it cannot be known, but it is not nothing.
_LEAST_LEFT = 0.05
# A retraining is late beyond this part of its estimate and these GPU-seconds; then it is reckoned to take so many times
# what it has taken. It can be late again, but not often: the estimate grows by a fixed factor.
_LATE_PART, _LATE_S = 0.15, 1.0
_LATE_FACTOR = 1.25


def work_done(running: RunningRetrain, gpu: GpuSpec, now: float) -> float:
    """GPU-seconds (speed 1, share 1) of a running retraining that are behind it, by the execution model."""
    rate = gpu.speed * share_efficiency(gpu, running.share)
    return running.done_s + max(0.0, now - running.since_s) * rate


def expected_work(wish: Retraining, gpu: GpuSpec) -> float:
    """GPU-seconds of a retraining by the execution model at the share that the plan gives it: starting takes as long at
    any share, and so counts for more of a large one."""
    rate = gpu.speed * share_efficiency(gpu, wish.share)
    start_s = wish.profile.start_s
    return max(wish.profile.gpu_seconds + start_s * (rate - START_RATE), start_s * rate)


def work_left(running: RunningRetrain, gpu: GpuSpec, now: float) -> float:
    """GPU-seconds that are still ahead of a running retraining, never less than a twentieth of all."""
    expected_s = running.late_work_s or running.work_s
    return max(expected_s - work_done(running, gpu, now), expected_s * _LEAST_LEFT)


def notice_late(state: SiteState, executors: Mapping[str, ExecutorState], now: float) -> list[str]:
    """Expect more of retrainings that take longer than their estimate; the reasons to plan anew."""
    reasons = []
    for stream in state.streams.values():
        running = stream.running
        if running is None or running.executor_id not in executors:
            continue
        done_s = work_done(running, executors[running.executor_id].gpu, now)
        expected_s = running.late_work_s or running.work_s
        if done_s > expected_s * (1.0 + _LATE_PART) + _LATE_S:
            running.late_work_s = done_s * _LATE_FACTOR
            reasons.append(f"retraining of {stream.stream_id} is late")
    return reasons


def device_kind(executor: ExecutorState) -> str:
    """What devices like this executor's are called where measurements of one hold for the others."""
    return f"{_NUMBER.sub('', executor.device)}/{executor.backend}"


def how_it_ran(running: RunningRetrain, executor: ExecutorState | None, now: float) -> RetrainRun | None:
    """How a retraining that has just ended ran; None when its executor is gone or its start was not seen."""
    if executor is None or running.started_s is None:
        return None
    never_resized = running.since_s == running.started_s
    return RetrainRun(
        executor_id=running.executor_id,
        device=device_kind(executor),
        share=running.share if never_resized else None,
        elapsed_s=max(0.0, now - running.started_s),
        work_s=work_done(running, executor.gpu, now),
    )


class Ends(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds from a retraining's command to its report: as they were, as expected at its start and half way."""

    elapsed_s: float
    predicted_s: float
    half_s: float | None


def predicted_ends(running: RunningRetrain, executor: ExecutorState | None, now: float) -> Ends | None:
    """When a retraining that has just ended was expected to end, at the shares that it turned out to have."""
    ran = how_it_ran(running, executor, now)
    if ran is None or ran.work_s <= 0.0:
        return None
    per_work = ran.elapsed_s / ran.work_s
    half_s = running.half_work_s * per_work if running.half_work_s else None
    return Ends(elapsed_s=ran.elapsed_s, predicted_s=running.work_s * per_work, half_s=half_s)


def make_problem(
    state: SiteState,
    site: SiteConfig,
    executors: Mapping[str, ExecutorState],
    *,
    now: float,
    left_s: float,
    with_retraining: bool,
    links: tuple[LinkSpec, ...] = (),
) -> Problem | None:
    """What is to be planned now, None when no executor or no profiled stream is there.

    Kept free on a GPU are ``room_for_trials``, and the site's ``watch_share`` where a new model is compared with the
    old one; ``links``: to a cloud that somebody talks to; ``left_s`` is what is left of the site's window, seconds.
    The plan looks ahead to the end of the longest own window of a stream (``windows.py``).
    Serving is reckoned to need what ``demand_planned`` says besides its profile (``demands.py``).
    """
    specs = {spec.stream_id: spec for spec in site.streams}
    lefts = {sid: own_left_s(spec, state.window, left_s, site.window_s) for sid, spec in specs.items()}
    streams = tuple(
        _stream(
            stream,
            specs[stream.stream_id],
            executors,
            now,
            with_retraining,
            state.window,
            lefts[stream.stream_id],
            links,
            site.share_quantum,
        )
        for stream in state.streams.values()
        if stream.checkpoint and stream.profile and stream.stream_id not in state.shed
    )
    if not streams or not executors:
        return None
    horizon_s = max(lefts[stream.stream_id] for stream in streams)
    streams = tuple(msgspec.structs.replace(s, window_s=None) if s.window_s == horizon_s else s for s in streams)
    watching = {s.serving_executor for s in state.streams.values() if s.canary}
    room = room_for_trials(state, executors)
    gpus = tuple(
        msgspec.structs.replace(
            executor.gpu,
            gpu_id=executor_id,
            reserved_share=min(
                1.0,
                room.get(executor_id, 0.0) + (state.watch_share if executor_id in watching else 0.0),
            ),
        )
        for executor_id, executor in sorted(executors.items())
    )
    change_s, move_s = moving.prices(state, site)
    return Problem(
        window_s=horizon_s,
        gpus=gpus,
        streams=streams,
        share_quantum=site.share_quantum,
        config_change_s=change_s,
        migration_s=move_s,
        planning_quantile=site.planning_quantile,
        links=links,
    )


def too_many(problem: Problem) -> tuple[str, ...]:
    """The streams to do without when no plan serves them all: least weight first, at least one.

    Counts the cheapest configuration of every stream against all GPUs together; where that would fit, what is in
    the way is packing, and leaving out one stream is the next thing to try.
    """
    room = sum(capacity_quanta(gpu, problem.share_quantum) for gpu in problem.gpus)
    least = {
        stream.stream_id: min(
            needed_quanta(profile, gpu, problem.share_quantum) for profile in stream.inference for gpu in problem.gpus
        )
        for stream in problem.streams
    }
    order = sorted(problem.streams, key=lambda stream: (-stream.weight, least[stream.stream_id]))
    kept: list[str] = []
    for stream in order[: len(order) - 1]:
        room -= least[stream.stream_id]
        if room < 0:
            break
        kept.append(stream.stream_id)
    return tuple(stream.stream_id for stream in problem.streams if stream.stream_id not in kept)


def _stream(
    stream: StreamState,
    spec: StreamSpec,
    executors: Mapping[str, ExecutorState],
    now: float,
    with_retraining: bool,
    window: int,
    left_s: float,
    links: tuple[LinkSpec, ...],
    share_quantum: float,
) -> StreamProfile:
    assert stream.profile is not None
    choices: tuple[RetrainProfile, ...] = ()
    if not stream.settled:
        running = stream.running
        if running is None and _may_begin(stream, with_retraining) and not (stream.sent and stream.sent.begun):
            choices = tuple(p for p in stream.profile.retrain if stream.penalties.get(p.retrain_id, -1) < window)
        elif running is not None and running.executor_id in executors:
            known = next((p for p in stream.profile.retrain if p.retrain_id == running.retrain_id), None)
            if known is not None:
                left = work_left(running, executors[running.executor_id].gpu, now)
                choices = (msgspec.structs.replace(known, gpu_seconds=left, pinned_gpu=running.executor_id),)
    gpus = [executor.gpu for executor in executors.values()]
    needed = (
        _with_demand(profile, stream.demand_planned.get(profile.inference_id, 0.0))
        for profile in stream.profile.inference
    )
    inference = tuple(_with_latency(stream, profile, gpus, share_quantum) for profile in needed)
    return msgspec.structs.replace(
        stream.profile,
        inference=least(inference) if stream.degraded else inference,
        retrain=choices,
        cloud=_cloud(stream, with_retraining, window) if links else (),
        min_accuracy=spec.min_accuracy,
        weight=spec.weight,
        max_latency_s=spec.max_latency_s,
        window_s=left_s,
        serving_gpu=stream.serving_executor if stream.serving_executor in executors else None,
        serving_inference=stream.serving_config.config_id if stream.serving_config else None,
    )


def _may_begin(stream: StreamState, with_retraining: bool) -> bool:
    """Whether a retraining may be planned: not before its labels, and the trials that its choice waits for, are there.

    ``alarm``: a stream that has drifted waits for what is learned after it, whose end sets it free.
    """
    return with_retraining and not stream.degraded and not stream.awaits_trial


def room_for_trials(state: SiteState, executors: Mapping[str, ExecutorState]) -> dict[str, float]:
    """Share that plans keep free on executors for labelling and trials.

    Measuring and the labels of the next window take what plans leave over.

    Everywhere as long as the window is not planned; beside a plan where such jobs run, or streams are served that wait
    for them. What follows a sudden drift has a share like that at the window's start.
    """
    if state.phase == "profiling":
        return dict.fromkeys(executors, state.profiling_share)
    if state.phase not in ("planning", "executing"):
        return {}
    waiting = {s.stream_id: s for s in state.streams.values() if s.awaits_trial and s.ahead <= state.window}
    homes = {s.serving_executor for s in waiting.values() if s.alarm is None}
    if any(s.serving_executor not in executors for s in waiting.values()):
        homes |= set(sorted(executors)[:1])  # a stream that nobody serves yet waits for its first model
    homes |= {executor_id for executor_id, job in state.pipeline.items() if job.stream.stream_id in waiting}
    urgent = {s.serving_executor for s in state.streams.values() if s.alarm is not None and state.phase == "executing"}
    # As long as nothing can be retrained yet, trials are what everything waits for.
    idle = all(s.awaits_trial or s.settled or s.degraded for s in state.streams.values())
    share = max(state.beside_share, state.profiling_share) if idle else state.beside_share
    return {e: state.profiling_share if e in urgent else share for e in executors if e in homes | urgent}


def _cloud(stream: StreamState, with_retraining: bool, window: int) -> tuple[CloudProfile, ...]:
    """What the cloud could do for a stream; once its turn on a link has come, only to go on."""
    if stream.settled or stream.running is not None or stream.profile is None:
        return ()
    if stream.sent is not None and stream.sent.begun:
        sent = stream.sent
        return tuple(what_is_left(p, sent) for p in stream.profile.cloud if p.retrain_id == sent.retrain_id)
    if not _may_begin(stream, with_retraining):
        return ()
    return tuple(p for p in stream.profile.cloud if stream.penalties.get(p.retrain_id, -1) < window)


def _with_demand(profile: InferenceProfile, besides: float) -> InferenceProfile:
    """With the share that serving was seen to need; never more than a whole GPU because of it."""
    share = max(profile.gpu_share_needed, min(1.0, profile.gpu_share_needed + besides))
    return msgspec.structs.replace(profile, gpu_share_needed=share)


def _with_latency(
    stream: StreamState, profile: InferenceProfile, gpus: Sequence[GpuSpec], quantum: float
) -> InferenceProfile:
    """With the latency measured while serving; before that with the estimate at the share that would be granted.

    The estimate is for just the share needed at speed 1; a share that is rounded up to the quantum, and a faster
    GPU, shorten it. The slowest of the GPUs counts.
    """
    latency_s = latencies.measured_s(stream, profile.inference_id)
    if latency_s is None:
        rates = [gpu.speed * share_of(needed_quanta(profile, gpu, quantum), quantum) for gpu in gpus]
        latency_s = profile.latency_s * profile.gpu_share_needed / min(rates, default=profile.gpu_share_needed)
        latency_s = min(latency_s, profile.latency_s)
    return msgspec.structs.replace(profile, latency_s=latency_s)
