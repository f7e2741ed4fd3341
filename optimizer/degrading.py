"""Live streams that give no pictures: noticed in what executors say of their workers, and planned for. Pure.

A degraded stream keeps its worker, which goes on trying, at the smallest share that is handed out; the rest of its
share is for others until it is back. Its labels and trials wait; a retraining of it that runs is finished.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from optimizer.following import serving_job_id
from optimizer.state import ExecutorState, SiteState, StreamState
from protocol.plan import InferenceProfile
from protocol.schema import StreamCondition

# A condition has to last this long before a plan is made for it: a camera that starts anew does not upset others.
_LASTING_S = 1.0
# A problem without a share for a configuration is refused; this one is rounded up to a quantum.
_NEXT_TO_NOTHING = 1e-6


def notice_conditions(state: SiteState, executors: Mapping[str, ExecutorState], now: float) -> list[str]:
    """Bring ``degraded`` of all streams up to date; the reasons to plan anew."""
    reasons = []
    for stream in state.streams.values():
        condition = _reported(stream, executors)
        if condition is None:
            continue
        degraded = condition not in ("ok", "changed")
        if degraded == stream.degraded:
            stream.turned_s = None
        elif stream.turned_s is None:
            stream.turned_s = now
        elif now - stream.turned_s >= _LASTING_S:
            stream.degraded, stream.turned_s = degraded, None
            reasons.append(f"stream {stream.stream_id} is {condition if degraded else 'back'}")
    return reasons


def least(choices: tuple[InferenceProfile, ...]) -> tuple[InferenceProfile, ...]:
    """What keeps the worker of a degraded stream: its cheapest configuration, needing next to nothing."""
    cheapest = min(choices, key=lambda profile: profile.gpu_share_needed)
    return (msgspec.structs.replace(cheapest, gpu_share_needed=_NEXT_TO_NOTHING),)


def _reported(stream: StreamState, executors: Mapping[str, ExecutorState]) -> StreamCondition | None:
    home = executors.get(stream.serving_executor)
    job_id = serving_job_id(stream.stream_id)
    workers = [w for w in home.workers if w.job_id == job_id and w.state == "ready"] if home else []
    return workers[-1].condition if workers else None
