"""Time series of a report's pictures from the events. Pure functions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from optimizer.report_data import ConditionRow
from protocol.events import JobShare, StreamAccuracy, TelemetryEvent, WorkerChanged
from protocol.schema import Record

SMOOTH_S = 5.0
MAX_POINTS = 600
# A drift takes seconds and changes the words several times on its way: one mark for all of it.
MARK_GAP_S = 8.0
# A job that has not reported for this many report intervals is taken to have ended.
MISSED_REPORTS = 3.0


class AccuracyPoint(Record, frozen=True, kw_only=True):
    """Accuracy since the point before, and its mean over the last ``SMOOTH_S`` seconds, weighted by frames."""

    site_s: float
    accuracy: float
    smooth: float


def with_gaps(points: Sequence[AccuracyPoint]) -> tuple[AccuracyPoint, ...]:
    """The points with a point of no accuracy (NaN) in every hole, so that no line is drawn across it."""
    if len(points) < 3:
        return tuple(points)
    steps = sorted(b.site_s - a.site_s for a, b in itertools.pairwise(points))
    longest = max(MISSED_REPORTS * steps[len(steps) // 2], 3.0)
    nothing = float("nan")
    shown = [points[0]]
    for before, point in itertools.pairwise(points):
        if point.site_s - before.site_s > longest:
            shown.append(AccuracyPoint(site_s=before.site_s, accuracy=nothing, smooth=nothing))
        shown.append(point)
    return tuple(shown)


class Mark(Record, frozen=True, kw_only=True):
    site_s: float
    text: str


class Block(Record, frozen=True, kw_only=True):
    """A job's share on a GPU during a time, stacked on the jobs below it."""

    gpu_id: str
    job_id: str
    stream_id: str
    kind: str
    from_s: float
    to_s: float
    bottom: float
    share: float


def accuracy_series(events: Sequence[TelemetryEvent]) -> dict[str, tuple[AccuracyPoint, ...]]:
    """Points per stream in time order, thinned to about ``MAX_POINTS``; events without objects are left out."""
    rows: dict[str, list[StreamAccuracy]] = {}
    for e in events:
        if isinstance(e, StreamAccuracy) and e.accuracy is not None:
            rows.setdefault(e.stream_id, []).append(e)
    return {stream: _smooth(sorted(found, key=lambda e: e.site_s)) for stream, found in rows.items()}


def _smooth(rows: Sequence[StreamAccuracy]) -> tuple[AccuracyPoint, ...]:
    points: list[AccuracyPoint] = []
    span = max(SMOOTH_S, (rows[-1].site_s - rows[0].site_s) / 60.0)
    weights = [max(row.num_scored, 1) for row in rows]
    first, total, weight = 0, 0.0, 0
    for last, row in enumerate(rows):
        total += weights[last] * (row.accuracy or 0.0)
        weight += weights[last]
        while rows[first].site_s < row.site_s - span:
            total -= weights[first] * (rows[first].accuracy or 0.0)
            weight -= weights[first]
            first += 1
        smooth = min(max(total / weight, 0.0), 1.0)
        points.append(AccuracyPoint(site_s=row.site_s, accuracy=row.accuracy or 0.0, smooth=smooth))
    step = -(-len(points) // MAX_POINTS)
    return tuple(points[::step])


def condition_marks(conditions: Sequence[ConditionRow], stream_id: str) -> tuple[Mark, ...]:
    """Where a stream's scene changed and to what: only the words that are new."""
    marks: list[tuple[float, float, set[str], str]] = []
    for row in conditions:
        if row.stream_id != stream_id:
            continue
        if marks and row.site_s - marks[-1][1] < MARK_GAP_S:
            start, _, before, _ = marks.pop()
        else:
            start, before = row.site_s, set(_words(row.before))
        marks.append((start, row.site_s, before, row.after))
    return tuple(
        Mark(site_s=start, text=", ".join(word for word in _words(after) if word not in before) or after)
        for start, _, before, after in marks
    )


def _words(conditions: str) -> list[str]:
    return [word.strip() for word in conditions.split(",") if word.strip()]


def share_blocks(events: Sequence[TelemetryEvent]) -> tuple[Block, ...]:
    """Granted shares as stacked blocks: per GPU inference at the bottom, in order of stream, other jobs above."""
    spans: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    about: dict[tuple[str, str], JobShare] = {}
    ended = [
        (e.site_s, e.job_id)
        for e in events
        if isinstance(e, WorkerChanged) and e.change in ("finished", "stopped", "failed")
    ]
    # Before the site's clock runs, all reports carry time 0: first models are trained then, outside of any window.
    shares = sorted((e for e in events if isinstance(e, JobShare) and e.site_s > 0.0), key=lambda e: e.site_s)
    started = {e.job_id: e.site_s for e in events if isinstance(e, WorkerChanged) and e.change == "started"}
    resized = {(e.job_id, e.share, e.site_s) for e in events if isinstance(e, WorkerChanged) and e.change == "resized"}
    interval = _interval(shares)
    for e in shares:
        key = (e.gpu_id, e.job_id)
        about[key] = e
        found = spans.setdefault(key, [])
        # A report tells of the interval before it.
        start = max(e.site_s - interval, 0.0)
        if not found and start < started.get(e.job_id, 0.0) < e.site_s:
            start = started[e.job_id]
        if found and start - found[-1][1] < MISSED_REPORTS * interval:
            start = found[-1][1]
            # One share gives way to the next when the worker was resized, not when it next reports.
            changed = [at for job, share, at in resized if (job, share) == (e.job_id, e.share_granted)]
            at = min((at for at in changed if start < at < e.site_s), default=start)
            if found[-1][2] != e.share_granted and at > start:
                found[-1], start = (found[-1][0], at, found[-1][2]), at
        if found and found[-1][1] == start and found[-1][2] == e.share_granted:
            found[-1] = (found[-1][0], e.site_s, e.share_granted)
        else:
            found.append((start, e.site_s, e.share_granted))
    for site_s, job_id in ended:
        for (_, owner), found in spans.items():
            if owner == job_id and 0.0 < site_s - found[-1][1] < interval:
                found[-1] = (found[-1][0], site_s, found[-1][2])
    blocks: list[Block] = []
    for gpu_id in sorted({gpu for gpu, _ in spans}):
        blocks += _stack({key[1]: spans[key] for key in spans if key[0] == gpu_id}, about, gpu_id)
    return tuple(blocks)


def _stack(
    spans: dict[str, list[tuple[float, float, float]]], about: dict[tuple[str, str], JobShare], gpu_id: str
) -> list[Block]:
    order = sorted(
        spans,
        key=lambda job: (about[gpu_id, job].kind != "inference", about[gpu_id, job].stream_id, job),
    )
    times = sorted({t for found in spans.values() for start, end, _ in found for t in (start, end)})
    open_blocks: dict[str, Block] = {}
    done: list[Block] = []
    places = dict.fromkeys(order, 0)
    for start, end in itertools.pairwise(times):
        bottom = 0.0
        for job in order:
            found = spans[job]
            while places[job] < len(found) and found[places[job]][1] <= start:
                places[job] += 1
            place = places[job]
            if place >= len(found) or found[place][0] > start:
                if job in open_blocks:
                    done.append(open_blocks.pop(job))
                continue
            share = found[place][2]
            last = open_blocks.get(job)
            if last is not None and last.share == share and abs(last.bottom - bottom) < 1e-9 and last.to_s == start:
                from_s = last.from_s
            else:
                if last is not None:
                    done.append(last)
                from_s = start
            open_blocks[job] = Block(
                gpu_id=gpu_id,
                job_id=job,
                stream_id=about[gpu_id, job].stream_id,
                kind=about[gpu_id, job].kind,
                from_s=from_s,
                to_s=end,
                bottom=bottom,
                share=share,
            )
            bottom += share
    return done + list(open_blocks.values())


def _interval(shares: Sequence[JobShare]) -> float:
    """Median time between a job's reports, 1 s when it cannot be told."""
    last: dict[tuple[str, str], float] = {}
    gaps = []
    for e in shares:
        before = last.get((e.gpu_id, e.job_id))
        if before is not None and e.site_s > before:
            gaps.append(e.site_s - before)
        last[e.gpu_id, e.job_id] = e.site_s
    return sorted(gaps)[len(gaps) // 2] if gaps else 1.0
