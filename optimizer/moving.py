"""What moving a stream or changing its configuration costs, as measured; the planner's prices come from here. Pure.

A move to another GPU costs the time in which the old place was given up and the new one not ready yet. A hand-over to
another worker of the same GPU costs what its gap between two results is longer than that between two frames. Prices
are the mean of what was measured and of the site's own figure, which counts like ``_PRIOR`` measurements, and never
less than ``_LEAST`` of the site's figure: where a change costs nothing it still has to gain something.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from optimizer.config import SiteConfig
from optimizer.following import serving_job_id
from optimizer.state import ExecutorState, Moving, SiteState, StreamState
from protocol.events import WorkerChanged
from protocol.messages import WorkerStatus
from protocol.schema import StreamSpec

_PRIOR = 2.0
_LEAST = 0.5
_REMEMBERED = 20
# A move that took longer than this says more of a lost executor than of moving.
_LONGEST_S = 60.0


def serving_worker(stream: StreamState, executors: Mapping[str, ExecutorState]) -> WorkerStatus | None:
    """The worker that serves a stream where it is to be served; None while it is not ready, or not heard of."""
    home = executors.get(stream.serving_executor)
    job_id = serving_job_id(stream.stream_id)
    workers = () if home is None else home.workers
    return next((w for w in workers if w.job_id == job_id and w.state == "ready"), None)


def is_ready(stream: StreamState, executors: Mapping[str, ExecutorState]) -> bool:
    """Whether the place where a stream is to be served says that its worker serves."""
    return serving_worker(stream, executors) is not None


def note_moves(state: SiteState, executors: Mapping[str, ExecutorState], now: float) -> None:
    """Follow the moves that are under way; those that are over are remembered with what they cost."""
    for stream in state.streams.values():
        moving = stream.moving
        if moving is None:
            continue
        if is_ready(stream, executors):
            cost_s = 0.0 if moving.let_go_s is None else now - moving.let_go_s
            _remember(state.move_costs_s, cost_s)
            stream.moving = None
        elif stream.leaving is None and moving.let_go_s is None:
            stream.moving = Moving(since_s=moving.since_s, let_go_s=now)
        elif now - moving.since_s > _LONGEST_S:
            stream.moving = None


def note_hand_over(state: SiteState, event: WorkerChanged, spec: StreamSpec) -> None:
    """A stream was handed over to another worker of its GPU."""
    if event.change == "handed_over" and event.gap_ms is not None:
        _remember(state.change_costs_s, max(0.0, event.gap_ms / 1e3 - 1.0 / spec.fps))


def prices(state: SiteState, site: SiteConfig) -> tuple[float, float]:
    """(of a change of configuration, of a move to another GPU): seconds of a stream's accuracy."""
    return _price(site.config_change_s, state.change_costs_s), _price(site.migration_s, state.move_costs_s)


def _price(usual_s: float, measured_s: Sequence[float]) -> float:
    mean_s = (_PRIOR * usual_s + sum(measured_s)) / (_PRIOR + len(measured_s))
    return max(mean_s, _LEAST * usual_s)


def _remember(costs_s: list[float], cost_s: float) -> None:
    costs_s.append(cost_s)
    del costs_s[:-_REMEMBERED]


def begin(stream: StreamState, now: float) -> None:
    """A plan moves a stream that was served elsewhere."""
    stream.moving = Moving(since_s=now)
