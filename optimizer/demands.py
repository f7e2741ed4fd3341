"""The GPU share that serving a stream was seen to need beyond what profiling measured. It corrects plans.

Profiling measures a configuration's analysed frames for a second or two; serving also takes in the frames that are
skipped, meets more objects, and neighbours that take memory bandwidth. Reports of a stream (about one a second) say how
much was needed:

    needed = achieved share * frames that came / frames that were not dropped

A stream that keeps up needs what it uses; one that drops frames needs more by the part that it drops. The median of a
configuration's last reports less the figure of the profile in force is what it needs besides, never below 0: profiled
shares have head-room for bursts, which a quiet minute does not disprove. A configuration that the stream was not
served with is reckoned to need as much more, in proportion, as it does for other streams; where nobody is, as much
besides as the one that is.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

from optimizer.state import StreamState
from protocol.events import StreamAccuracy
from protocol.messages import WorkerStatus

_REPORTS, _LEAST_REPORTS = 15, 6
# A report is not taken at its word beyond this share, or the profile's again: a stream that has just been moved may
# lose nearly all its frames.
_MOST = 0.1
# Planned anew when this part of the frames is dropped and so much more is needed than the plan reckons with.
_DROPPED, _GROWTH = 0.03, 0.02
# So many reports after a change of configuration or place still tell of what queued up before it.
_SETTLING = 2
_NOBODY: Mapping[str, float] = MappingProxyType({})


def remember(stream: StreamState, event: StreamAccuracy, worker: WorkerStatus | None, speed: float = 1.0) -> None:
    """Take in a report. ``worker``: of the stream where it is served now, on a GPU of that ``speed``; None when it was
    not heard of."""
    if event.inference_id != stream.demand_of or worker is None or event.num_analysed == 0:
        stream.demand_of, stream.demand_reports = event.inference_id, 0
        return
    stream.demand_reports += 1
    profiled = _profiled(stream, event.inference_id)
    if stream.demand_reports <= _SETTLING or profiled is None or event.num_frames <= event.num_dropped:
        return
    share = worker.share_granted if worker.share_achieved is None else worker.share_achieved
    if worker.share_achieved is None and event.num_dropped == 0:
        return  # it keeps up, with who knows how much to spare
    needed = speed * share * event.num_frames / (event.num_frames - event.num_dropped)
    kept = [*stream.demands.get(event.inference_id, ()), (needed, event.num_dropped / event.num_frames)]
    stream.demands[event.inference_id] = kept[-_REPORTS:]


def of_site(streams: Iterable[StreamState]) -> dict[str, float]:
    """By configuration, what it needs besides over its profile: the median of the streams that were served with it."""
    found: dict[str, list[float]] = {}
    for stream in streams:
        for inference_id in stream.demands:
            more, profiled = _besides(stream, inference_id), _profiled(stream, inference_id)
            if more is not None and profiled is not None:
                found.setdefault(inference_id, []).append(more / profiled)
    return {inference_id: statistics.median(ratios) for inference_id, ratios in found.items()}


def besides(stream: StreamState, inference_id: str, others: Mapping[str, float] = _NOBODY) -> float:
    """Share of a GPU of speed 1 that a configuration needs beyond its profile; ``others``: see :func:`of_site`."""
    known, profiled = _besides(stream, inference_id), _profiled(stream, inference_id)
    if known is None and profiled is not None and inference_id in others:
        known = _believed(others[inference_id] * profiled, profiled)
    if known is None:
        known = _besides(stream, stream.demand_of)
    return 0.0 if known is None else max(0.0, known)


def newly_short(stream: StreamState) -> bool:
    """Whether the stream drops frames because it needs more than the plan reckons with; told once per size."""
    reports = stream.demands.get(stream.demand_of, ())
    if len(reports) < _LEAST_REPORTS or stream.demand_reports < _SETTLING + _LEAST_REPORTS:
        return False
    dropped = statistics.fmean(part for _, part in reports[-_LEAST_REPORTS:])
    more = besides(stream, stream.demand_of)
    if dropped <= _DROPPED or more < stream.demand_planned.get(stream.demand_of, 0.0) + _GROWTH:
        return False
    stream.demand_planned = {**stream.demand_planned, stream.demand_of: more}
    return True


def plan_with(streams: Collection[StreamState]) -> None:
    """What is known now goes into the plan that is about to be made: it reckons with ``demand_planned``."""
    others = of_site(streams)
    for stream in streams:
        known = stream.profile.inference if stream.profile is not None else ()
        stream.demand_planned = {p.inference_id: besides(stream, p.inference_id, others) for p in known}


def forget_old(stream: StreamState) -> None:
    """What a configuration that is not in use needed in another scene says less: it gives way to new reports sooner."""
    stream.demands = {
        name: kept if name == stream.demand_of else kept[-_LEAST_REPORTS:] for name, kept in stream.demands.items()
    }


def _besides(stream: StreamState, inference_id: str) -> float | None:
    """None while too little is known."""
    reports, profiled = stream.demands.get(inference_id, ()), _profiled(stream, inference_id)
    if len(reports) < _LEAST_REPORTS or profiled is None:
        return None
    return _believed(statistics.median(share for share, _ in reports) - profiled, profiled)


def _believed(more: float, profiled: float) -> float:
    return min(more, max(_MOST, profiled))


def _profiled(stream: StreamState, inference_id: str) -> float | None:
    """Share of a GPU of speed 1 that profiling found for a configuration."""
    if stream.profile is None:
        return None
    found = (p.gpu_share_needed for p in stream.profile.inference if p.inference_id == inference_id)
    return next(found, None) or None
